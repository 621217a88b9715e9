"""A cheap identity for weights too large to hash in full.

Block keys start from it, so that cached blocks of one model never serve another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 256


def fingerprint(files: Iterable[tuple[Path, int]]) -> str:
    """Hash some of each file: its size, its first bytes, and samples of the rest.

    It changes if a file's name, size, header or metadata change, and almost surely if the
    weights were trained, merged or quantised differently, because then nearly every byte
    differs. It is no checksum: an edit of a few bytes between the samples goes unseen.

    Args:
      files: paths with the number of leading bytes (index, metadata) to hash in full. 256
        samples of 4 KiB, evenly spaced, follow for each, the file's last bytes among them.

    Returns:
      Hex SHA-256.
    """
    digest = hashlib.sha256(b"octavo weights 1")
    for path, head in files:
        size = path.stat().st_size
        digest.update(f"\n{path.name}\n{size}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(min(head, size)))
            span = max(size - head - _SAMPLE_BYTES, 0)
            for sample in range(_NUM_SAMPLES if size > head else 0):
                stream.seek(head + span * sample // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
