"""Whether a native library was compiled from the sources that lie here: by content, not by dates.

Builds import this where there is no jax.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "native/_octavo.so"
SUFFIXES = (".cc", ".h", ".inc")
BUILD = PACKAGE.parent / "scripts/build_native.py"  # the flags, and what is compiled


class Mark(NamedTuple):
    """What a library says about itself, in bytes that are found without loading it."""

    digest: str  # of all sources, SHA-256 in hexadecimal
    jaxlib: str  # the version whose headers it was compiled with

    def __str__(self) -> str:
        return f"octavo-native {self.digest} jaxlib {self.jaxlib};"


def elsewhere() -> str | None:
    """Why native code is not for this machine, or None."""
    machine = platform.machine()
    if sys.platform == "linux" and machine in ("x86_64", "AMD64"):
        return None
    return f"native code is for Linux on x86-64, and this is {sys.platform} on {machine}"


def sources() -> list[Path]:
    """What is compiled, and what that includes; nothing in a wheel."""
    return sorted(path for path in PACKAGE.rglob("*") if path.suffix in SUFFIXES)


def digest() -> str | None:
    """Of the sources and the way that they are compiled; None where they aren't, as in a wheel."""
    found = sources()
    if not found or not BUILD.exists():
        return None
    whole = hashlib.sha256()
    for path in (BUILD, *found):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        whole.update(f"{path.relative_to(PACKAGE.parent).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def mark_of(library: Path) -> Mark | None:
    """A library's mark, or None: it is missing, or has none."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return None
    found = re.search(rb"octavo-native ([0-9a-f]{64}) jaxlib ([^\s;]+);", content)
    return Mark(*(part.decode() for part in found.groups())) if found else None
