"""One KV block as a file: what it holds, and a reader that takes nothing in it on trust.

A file is a header of fixed size and the block's bytes. Reading gives the very array that was
written under that key and layout, or the reason why not; nothing in a file sizes memory, as every
size follows from the layout.

    offset  bytes  field
         0      8  magic, ``octavoKV``
         8      4  format version
        12      8  size of the payload
        20     32  digest of the layout: shape, dtype, weights, byte order
        52     40  key of the block
        92      8  when it expires: seconds since 1970 as a float64, infinite for never
       100     32  SHA-256 over all of the above and the payload
       132         the payload, C order

A block's key is the one that names its contents (`core/block_keys.py`), followed by a tag that says
whose they are, so that all of one domain can be found by their names.

Numbers are little-endian. The checksum tells a torn or rotten file from a whole one. It is no
signature: whoever may write to the folder may put any keys and values there, with a checksum that
fits. What keeps them out is the folder's mode.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
import os
import stat
import struct
import sys
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 - teaches NumPy the names bfloat16 and float8_*
import numpy as np

MAGIC = b"octavoKV"
VERSION = 2
TAG_BYTES = 8
KEY_BYTES = 32 + TAG_BYTES
PUBLIC_TAG = bytes(TAG_BYTES)  # of what every domain may find
_PREFIX = struct.Struct("<8sIQ32s40s")  # what a layout and a key decide: it is compared whole
_EXPIRES = struct.Struct("<d")
_START = MAGIC + struct.pack("<I", VERSION)
_CHECKSUM_BYTES = 32
HEADER_BYTES = _PREFIX.size + _EXPIRES.size + _CHECKSUM_BYTES
NEVER = math.inf


class Miss(enum.StrEnum):
    """Why a block is not to be had."""

    ABSENT = "absent"  # there is no such file
    TRUNCATED = "truncated"  # shorter than a block of this layout
    TOO_LONG = "too_long"  # longer than a block of this layout
    FOREIGN = "foreign"  # whole by its looks, but of another layout, key or format
    CORRUPTED = "corrupted"  # no magic, or the checksum doesn't fit
    EXPIRED = "expired"  # its time to live is over
    NOT_A_FILE = "not_a_file"  # a symbolic link, a folder, a pipe
    UNREADABLE = "unreadable"  # the file system said no


class Block(Protocol):
    """A block's contents, in NumPy or in what NumPy can read, such as a jax array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def nbytes(self) -> int: ...
    def __array__(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, slots=True)
class BlockLayout:
    """What makes a block's bytes meaningful.

    Attributes:
      shape: of one block over all layers, such as ``[L, K, B, 2W]``.
      dtype: NumPy's or ml_dtypes' name, such as ``float32`` or ``bfloat16``.
      fingerprint: names the weights and how the cache is held.

    Raises:
      ValueError: a dimension below one, or a dtype that NumPy doesn't know.
    """

    shape: tuple[int, ...]
    dtype: str
    fingerprint: str

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"a block of shape {self.shape} is empty; dimensions start at 1")
        try:
            dtype = np.dtype(self.dtype)
        except TypeError as error:
            raise ValueError(f"dtype {self.dtype!r} is unknown to NumPy and ml_dtypes") from error
        if dtype.hasobject or dtype.name != self.dtype:
            raise ValueError(f"dtype {self.dtype!r} must be a plain number, by its own name")

    @property
    def num_bytes(self) -> int:
        """Bytes of one block."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of one block's file."""
        return HEADER_BYTES + self.num_bytes

    def digest(self) -> bytes:
        """SHA-256 over everything that two layouts may differ in."""
        digest = hashlib.sha256(b"octavo.block_layout.v2")
        for part in (
            repr(tuple(map(int, self.shape))),
            self.dtype,
            self.fingerprint,
            sys.byteorder,
        ):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(struct.pack("<Q", len(encoded)))
            digest.update(encoded)
        return digest.digest()


class BlockFormat:
    """Writes and reads files of one layout."""

    def __init__(self, layout: BlockLayout):
        self.layout = layout
        self.layout_digest = layout.digest()

    def header(self, key: bytes, array: np.ndarray, expires: float) -> bytes:
        """The header that goes before `array`, which has the layout's shape and is contiguous."""
        start = self._prefix(key) + _EXPIRES.pack(expires)
        return start + _checksum(start, array)

    def read(self, descriptor: int, key: bytes, now: float) -> np.ndarray | Miss:
        """The block of that key from an open file, read-only, or why it is none.

        Args:
          descriptor: where the file is open, at its start.
          key: what the file must hold.
          now: seconds since 1970, to compare the expiry with.

        Raises:
          OSError: reading failed.
        """
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return Miss.NOT_A_FILE
        if status.st_size != self.layout.file_bytes:
            small = status.st_size < self.layout.file_bytes
            return Miss.TRUNCATED if small else Miss.TOO_LONG
        array = np.empty(self.layout.shape, self.layout.dtype)
        with open(descriptor, "rb", closefd=False) as stream:
            header = stream.read(HEADER_BYTES)
            num_read = stream.readinto(as_bytes(array))
        if len(header) + num_read < self.layout.file_bytes:  # it was cut while it was read
            return Miss.TRUNCATED
        prefix = self._prefix(key)
        if not header.startswith(prefix):
            return Miss.FOREIGN if header.startswith(MAGIC) else Miss.CORRUPTED
        start = header[:-_CHECKSUM_BYTES]
        if header[-_CHECKSUM_BYTES:] != _checksum(start, array):
            return Miss.CORRUPTED
        if not now < _EXPIRES.unpack_from(start, len(prefix))[0]:
            return Miss.EXPIRED
        array.setflags(write=False)
        return array

    def _prefix(self, key: bytes) -> bytes:
        return _PREFIX.pack(MAGIC, VERSION, self.layout.num_bytes, self.layout_digest, key)


def expiry(header: bytes) -> float:
    """When the file of any layout that starts so expires, in seconds since 1970. NEVER if it is no
    block of this format."""
    if len(header) < HEADER_BYTES or not header.startswith(_START):
        return NEVER
    return _EXPIRES.unpack_from(header, _PREFIX.size)[0]


def as_array(block: Block) -> np.ndarray | Miss:
    """A block's contents, read-only and in C order; a miss if its memory was erased meanwhile."""
    try:
        array = np.ascontiguousarray(block).view()
    except RuntimeError:  # jax: "Array has been deleted"
        return Miss.ABSENT
    array.setflags(write=False)
    return array


def as_bytes(array: np.ndarray) -> memoryview:
    """A contiguous array's memory. NumPy itself exports no buffer of bfloat16."""
    return memoryview(array.reshape(-1).view(np.uint8))


def _checksum(start: bytes, array: np.ndarray) -> bytes:
    digest = hashlib.sha256(start)
    digest.update(as_bytes(array))
    return digest.digest()
