"""The GGUF container: a bounds-checked index over a memory-mapped file, and dequantisation.

The format is specified in ggml's docs/gguf.md. Every count and length in the file is checked
against the bytes that are left before anything is allocated for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.weights.checkpoint import WeightsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS

# Far above any real file; they keep a hostile one from filling memory with small values.
_MAX_METADATA = 2**16
_MAX_TENSORS = 2**20
_MAX_ARRAY = 2**24

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
# Metadata value types -> NumPy's name of the little-endian scalar.
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}

# gguf.quants works on sixteen rows at a time. Rows of about this many values keep a group in
# the second-level cache and make Python's share small: twice as fast as a model's own rows.
_ROW_VALUES = 8192


class TensorEntry(NamedTuple):
    """Where a tensor is.

    Attributes:
      shape: outermost axis first, as NumPy has it (the file lists the innermost first).
      type_id: GGMLQuantizationType.
      offset: in bytes from the start of the file.
      num_bytes: of the quantised data.
    """

    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF file: metadata, where the tensors are, and the mapped bytes.

    Attributes:
      path: of the file.
      metadata: key -> int, float, bool, str, or a list of one of them.
      tensors: name -> entry, in the file's order.
      header_bytes: length of everything before the tensors' data.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    header_bytes: int
    _data: mmap.mmap = dataclasses.field(repr=False)

    def dequantise(self, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """The values of a tensor, float32, in the file's orientation ([out, in]).

        Args:
          name: a key of `tensors`.
          rows: which rows of the outermost axis, in which order; only those are read.
        """
        from gguf import GGMLQuantizationType, quants
        from gguf.constants import GGML_QUANT_SIZES

        entry = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, entry.num_bytes, entry.offset)
        shape = entry.shape
        if rows is not None and len(shape) > 1:
            raw = raw.reshape(shape[0], -1)[rows]
            shape = (raw.shape[0], *shape[1:])
        quant = GGMLQuantizationType(entry.type_id)
        values_a_block, block_bytes = GGML_QUANT_SIZES[quant]
        num_blocks = raw.size // block_bytes
        # Blocks don't know of rows, so they may be grouped anew.
        group = math.gcd(num_blocks, max(_ROW_VALUES // values_a_block, 1))
        with np.errstate(all="ignore"):  # scales in a corrupt file may overflow
            values = quants.dequantize(raw.reshape(-1, group * block_bytes), quant)
        values = values.reshape(shape)
        # A vector has no rows of whole blocks to choose from before it is dequantised.
        return values[rows] if rows is not None and len(shape) == 1 else values


def read_index(path: Path) -> GGUFFile:
    """Map a GGUF file and read its header: metadata and the index of tensors.

    Raises:
      WeightsError: the file is not GGUF 2 or 3 in little-endian order, is truncated or
        corrupt, or a tensor has a type that can't be dequantised.
    """
    try:
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # mmap's word for an empty file
        raise WeightsError(path, "is empty; download it again") from None
    except OSError as error:
        raise WeightsError(path, f"can't be read: {error.strerror}") from None
    cursor = _Cursor(data, path)
    num_tensors, num_metadata = _read_preamble(cursor)
    metadata = _read_metadata(cursor, num_metadata)
    relative = _read_tensor_entries(cursor, num_tensors)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise WeightsError(
            path, f"general.alignment is {alignment!r:.40}; it must be a multiple of 8"
        )
    start = -(-cursor.offset // alignment) * alignment
    tensors = {
        name: entry._replace(offset=start + entry.offset) for name, entry in relative.items()
    }
    _check_extents(path, tensors, start, alignment, len(data))
    return GGUFFile(path, metadata, tensors, cursor.offset, data)


class _Cursor:
    """Reads forward through the header and never past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data = data
        self.path = path
        self.offset = 0

    def skip(self, num_bytes: int, what: str) -> int:
        """Where the next `num_bytes` start; raises if the file ends before they do."""
        start, left = self.offset, len(self.data) - self.offset
        if num_bytes > left:
            raise WeightsError(
                self.path,
                f"{what:.120} needs {num_bytes} bytes at byte {start}, but the file ends "
                f"{left} bytes later; it is truncated or corrupt, download it again",
            )
        self.offset = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.skip(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.skip(8, what))[0]

    def string(self, what: str) -> str:
        length = self.u64(what)
        start = self.skip(length, what)
        return self.decode(self.data[start : start + length], what)

    def decode(self, text: bytes, what: str) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise WeightsError(self.path, f"{what:.120} is not UTF-8: {error.reason}") from None

    def count(self, what: str, limit: int, least_bytes: int) -> int:
        """A count of things of `least_bytes` each, no more than could be in the file."""
        count = self.u64(what)
        if count > limit:
            raise WeightsError(
                self.path, f"{what:.120} is {count}, above the limit of {limit}; it is corrupt"
            )
        left = len(self.data) - self.offset
        if count * least_bytes > left:
            raise WeightsError(
                self.path,
                f"{what:.120} is {count}, more than fit in the {left} bytes that are left; the "
                "file is truncated or corrupt, download it again",
            )
        return count


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Magic and version checked; the numbers of tensors and of metadata entries."""
    if cursor.data[:4] != MAGIC:
        raise WeightsError(cursor.path, "is not a GGUF file: it doesn't start with 'GGUF'")
    cursor.skip(4, "the magic")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        # Big-endian files have the version's bytes the other way round.
        hint = " (a big-endian file)" if version and version % 2**16 == 0 else ""
        raise WeightsError(
            cursor.path, f"is GGUF version {version}{hint}; little-endian 2 and 3 are read"
        )
    # The least sizes: an entry is a string and a type and a byte; a tensor has five fields.
    num_tensors = cursor.count("the number of tensors", _MAX_TENSORS, 8 + 4 + 8 + 4 + 8)
    return num_tensors, cursor.count("the number of metadata entries", _MAX_METADATA, 8 + 4 + 1)


def _read_metadata(cursor: _Cursor, num_metadata: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for position in range(num_metadata):
        key = cursor.string(f"the key of metadata entry {position}")
        if key in metadata:
            raise WeightsError(cursor.path, f"metadata key {key:.80} is there twice")
        what = f"metadata {key:.80}"
        kind = cursor.u32(what)
        if kind == _STRING:
            metadata[key] = cursor.string(what)
        elif kind == _ARRAY:
            metadata[key] = _read_array(cursor, what)
        else:
            metadata[key] = _read_scalars(cursor, kind, 1, what)[0]
    return metadata


def _read_array(cursor: _Cursor, what: str) -> list[Any]:
    kind = cursor.u32(what)
    if kind == _ARRAY:
        raise WeightsError(cursor.path, f"{what} is an array of arrays, which no model needs")
    if kind != _STRING:
        return _read_scalars(
            cursor, kind, cursor.count(f"the length of {what}", _MAX_ARRAY, 1), what
        )
    count = cursor.count(f"the length of {what}", _MAX_ARRAY, 8)
    # A vocabulary and its merges are most of opening a file: one tight loop, same checks.
    data, offset, end = cursor.data, cursor.offset, len(cursor.data)
    unpack, texts = _U64.unpack_from, []
    for _ in range(count):
        stop = offset + 8
        if stop <= end:
            stop += unpack(data, offset)[0]
        if stop > end:
            cursor.offset = offset
            cursor.string(what)  # raises, with the numbers
        texts.append(data[offset + 8 : stop])
        offset = stop
    cursor.offset = offset
    return [cursor.decode(text, what) for text in texts]


def _read_scalars(cursor: _Cursor, kind: int, count: int, what: str) -> list[Any]:
    if kind not in _SCALARS:
        raise WeightsError(cursor.path, f"{what} has the unknown value type {kind}; it is corrupt")
    dtype = np.dtype(_SCALARS[kind])
    start = cursor.skip(count * dtype.itemsize, what)
    return np.frombuffer(cursor.data, dtype, count, start).tolist()


def _read_tensor_entries(cursor: _Cursor, num_tensors: int) -> dict[str, TensorEntry]:
    """The index, with offsets as the file has them: from the start of the data."""
    entries: dict[str, TensorEntry] = {}
    for position in range(num_tensors):
        name = cursor.string(f"the name of tensor {position}")
        what = f"the index entry of tensor {name:.80}"
        if name in entries:
            raise WeightsError(cursor.path, "is in the index twice", tensor=name)
        num_dims = cursor.u32(what)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise WeightsError(
                cursor.path,
                f"has {num_dims} dimensions; from 1 to {_MAX_DIMS} are possible",
                tensor=name,
            )
        shape = tuple(cursor.u64(what) for _ in range(num_dims))[::-1]
        type_id, offset = cursor.u32(what), cursor.u64(what)
        quant = _quantisation(type_id)
        if quant is None:
            raise WeightsError(
                cursor.path,
                f"has the type {_type_name(type_id)}, which can't be dequantised here; convert "
                "the model to another type, such as Q8_0 or BF16",
                tensor=name,
            )
        values_a_block, block_bytes = quant
        if 0 in shape or shape[-1] % values_a_block:
            raise WeightsError(
                cursor.path,
                f"has shape {list(shape)}; rows of {_type_name(type_id)} come in blocks of "
                f"{values_a_block} values",
                tensor=name,
            )
        num_bytes = math.prod(shape) // values_a_block * block_bytes
        entries[name] = TensorEntry(shape, type_id, offset, num_bytes)
    return entries


def _check_extents(
    path: Path, tensors: dict[str, TensorEntry], start: int, alignment: int, size: int
) -> None:
    """Every tensor lies in the file, aligned, and no two share bytes.

    Without the last, a small file could name the same bytes a million times and ask for
    terabytes of parameters.
    """
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        if entry.offset + entry.num_bytes > size:
            raise WeightsError(
                path,
                f"needs bytes {entry.offset} to {entry.offset + entry.num_bytes}, but the file "
                f"has {size}; it is truncated or corrupt, download it again",
                tensor=name,
            )
        if (entry.offset - start) % alignment:
            raise WeightsError(
                path,
                f"starts at byte {entry.offset - start} of the data, which is not a multiple "
                f"of the file's alignment, {alignment}",
                tensor=name,
            )
        if entry.offset < end:
            raise WeightsError(path, "overlaps the tensor before it; it is corrupt", tensor=name)
        end = entry.offset + entry.num_bytes


@functools.cache
def _quantisation(type_id: int) -> tuple[int, int] | None:
    """Values and bytes in a block of this type; None if `gguf.quants` can't dequantise it."""
    from gguf import GGMLQuantizationType, quants
    from gguf.constants import GGML_QUANT_SIZES

    try:
        quant = GGMLQuantizationType(type_id)
        values, num_bytes = GGML_QUANT_SIZES[quant]
        quants.dequantize(np.zeros((1, num_bytes), np.uint8), quant)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return values, num_bytes


def _type_name(type_id: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(type_id).name
    except ValueError:
        return f"number {type_id}"
