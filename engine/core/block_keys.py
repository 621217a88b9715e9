"""Names of KV blocks: a SHA-256 chain over everything that decides a block's contents.

A block's key is a function of its domain, the model, and every token id up to its end, so
equal keys mean equal contents, and blocks of different domains can't match.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from engine.types import Domain

_VERSION = b"octavo.block.v1"


def root_key(domain: Domain, *extras: str) -> bytes:
    """The key that a domain's chains start from, 32 bytes.

    Args:
      domain: who may share the blocks.
      extras: what else decides the contents besides tokens, such as the weights' fingerprint
        and an adapter's name. Each part is length-prefixed, so no two lists of parts collide.
    """
    return _digest(_VERSION, (domain.tenant, domain.salt, *extras))


def public_root_key(*extras: str) -> bytes:
    """The key that chains of public prefixes start from; no domain has it."""
    return _digest(b"octavo.public.v1", extras)


def joined_key(root: bytes, public: bytes) -> bytes:
    """What a domain's chain goes on from where a public prefix ends, given the domain's root."""
    return hashlib.sha256(b"octavo.joined.v1" + root + public).digest()


def child_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of the block that holds `token_ids` and follows the block named `parent`."""
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}i", *token_ids)).digest()


def _digest(version: bytes, parts: Sequence[str]) -> bytes:
    digest = hashlib.sha256(version)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")  # any text must do: it is a client's
        digest.update(struct.pack("<Q", len(encoded)))
        digest.update(encoded)
    return digest.digest()
