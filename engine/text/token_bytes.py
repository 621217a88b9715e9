"""What a token stands for, in bytes.

Both families of tokenizers we read (byte-level BPE and SentencePiece BPE with byte fallback)
give a token the same bytes wherever it stands, so text is the UTF-8 of concatenated tokens.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import tokenizers

SPACE_MARK = "\u2581"  # "▁": how SentencePiece writes a space

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """A tokenizer that can't be used: says where, what was found, and what is possible."""


class TokenBytes:
    """Maps a token id to its bytes, by the rules of the tokenizer's decoder.

    Attributes:
      strips_leading_space: the decoder drops one space at the very start of a text, because
        the encoder put one there.

    Raises:
      TokenizerError: the decoder is not one whose tokens have bytes of their own.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._cache: dict[int, bytes] = {}
        self._replace: list[tuple[str, str]] = []
        self._byte_level = False
        self._byte_fallback = False
        self.strips_leading_space = False
        for step in _decoder_steps(tokenizer):
            self._add_step(step)

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes; empty for an id that has no token, as `tokenizers` has it."""
        found = self._cache.get(token_id)
        if found is None:
            token = id_to_token(self._tokenizer, token_id)
            if token is None:
                return b""  # not cached: the cache stays within the vocabulary
            found = self._cache[token_id] = self._bytes_of(token)
        return found

    def _bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            table = _byte_of_character()
            try:
                return bytes(table[character] for character in token)
            except KeyError:  # an added token, written as plain text
                return token.encode()
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return token.encode()

    def _add_step(self, step: dict[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replace.append((old, new))
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self.strips_leading_space = True
            case _:
                raise TokenizerError(
                    f"this tokenizer's decoder has a step {json.dumps(step):.120} that is not "
                    "supported; byte-level BPE and SentencePiece BPE with byte fallback are"
                )


def id_to_token(tokenizer: tokenizers.Tokenizer, token_id: int) -> str | None:
    """The token as the vocabulary writes it, or None for an id without one."""
    return tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None


def _decoder_steps(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        raise TokenizerError("this tokenizer has no decoder, so its tokens can't become text")
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if "Strip" in kinds and "Fuse" not in kinds[: kinds.index("Strip")]:
        # Without Fuse before it, Strip works on every token, not on the text.
        raise TokenizerError(f"this tokenizer's decoder strips every token ({kinds})")
    return steps


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's reversible map: printable bytes stand for themselves, the others follow at 256.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py, `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
