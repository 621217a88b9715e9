"""Matrices of a checkpoint in int8 as they are read, by the rule of `pallas_kernels.matmul.int8`.

On the host, layer by layer, from the values that the file holds: neither host nor device ever has a
whole stack of matrices in a wider dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine.weights.checkpoint import Index

SCALE = "_scale"  # after a matrix's name: that of its scales, one a column, or a row of a table
_LEAST = 1e-30  # a column with nothing larger is zeros

# Gives a part of one layer of a parameter; the layer is None if it has none.
Read = Callable[[int | None, Index], np.ndarray]


class _Columns(NamedTuple):
    layer: int | None
    start: int
    stop: int


class QuantisedMatrix:
    """A parameter's matrices in int8, and their scales.

    A scale is of a whole column, also where a shard has only some of its rows: what was found out
    for one shard serves the others, and a matrix that isn't cut there is read once.

    Args:
      read: gives the values as the file holds them.
      depth: entries of a column.
      summed_axis: the one that they lie along, which products sum over: 0, or 1 of a table.
    """

    def __init__(self, read: Read, depth: int, summed_axis: int):
        self._read = read
        self._depth = depth
        self._axis = summed_axis
        self._largest: dict[_Columns, np.ndarray] = {}  # absolute value of each column, float32

    def values(self, layer: int | None, part: Index) -> np.ndarray:
        """int8, of a part of one layer's matrix."""
        rows, columns = part[self._axis], part[1 - self._axis]
        key = _Columns(layer, columns.start, columns.stop)
        if key in self._largest:
            wide = self._read(layer, part).astype(np.float32, copy=False)
        else:
            whole = self._measured(key)
            wide = whole[rows] if self._axis == 0 else whole[:, rows]
        most = np.expand_dims(self._largest[key], self._axis)
        is_used = np.isfinite(most) & (most >= _LEAST)
        ratio = np.float32(127) / np.where(is_used, most, np.float32(1))
        with np.errstate(invalid="ignore"):
            return np.where(is_used, np.rint(wide * ratio), 0).astype(np.int8)

    def scales(self, layer: int | None, part: Index) -> np.ndarray:
        """float32, of some columns: what one stands for in each, NaN if not all in it is finite."""
        (columns,) = part
        key = _Columns(layer, columns.start, columns.stop)
        if key not in self._largest:
            self._measured(key)
        most = self._largest[key]
        scales = np.where(most < _LEAST, np.float32(0), most * np.float32(1 / 127))
        return np.where(np.isfinite(most), scales, np.float32(np.nan))

    def _measured(self, key: _Columns) -> np.ndarray:
        """Whole columns in float32, whose largest entries are known from now on."""
        slices = [slice(key.start, key.stop)] * 2
        slices[self._axis] = slice(0, self._depth)
        whole = self._read(key.layer, tuple(slices)).astype(np.float32, copy=False)
        self._largest[key] = np.abs(whole).max(axis=self._axis)
        return whole
