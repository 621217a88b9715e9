"""Weights in int8, and rows quantised as they come: W8A8 with one scale a column and one a row.

Symmetric: a number is an integer from -127 to 127 times a scale, the largest of its column or row
over 127 (LLM.int8(), Dettmers et al., 2022, without its outliers; vLLM: dynamic per-token). A
product's sums are integers, so they are exact, and the same in any order and on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_DEPTH = (2**31 - 1) // 127**2  # beyond it, a sum may not fit int32
_LEAST = 1e-30  # where nothing is larger, all is zero: 127 over less might overflow


class Quantised(NamedTuple):
    """Matrices in int8.

    Attributes:
      values: int8, [..., K, N] or as a backend packs it; of a table, [V, D].
      scales: float32 [..., N], what one stands for in each column; of a table, [V].
    """

    values: jax.Array
    scales: jax.Array


def quantise(matrices: jax.Array, axis: int = -2) -> Quantised:
    """Matrices in int8, scaled along an axis: that of K, so -1 for a table.

    A column that has anything in it that isn't finite gets a scale that isn't a number.
    """
    wide = matrices.astype(jnp.float32)
    values, scales = _quantise(wide, axis)
    return Quantised(values, jnp.squeeze(scales, axis))


def quantise_rows(x_MK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [M, K] and float32 scales [M, 1]; the scale of a row that isn't finite is no number."""
    return _quantise(x_MK.astype(jnp.float32), -1)


def _quantise(wide: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    most = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    is_used = jnp.isfinite(most) & (most >= _LEAST)
    ratio = 127 / jnp.where(is_used, most, 1)
    values = jnp.where(is_used, jnp.round(wide * ratio), 0).astype(jnp.int8)
    scales = jnp.where(is_used, most * jnp.float32(1 / 127), jnp.where(most < _LEAST, 0, jnp.nan))
    return values, scales
