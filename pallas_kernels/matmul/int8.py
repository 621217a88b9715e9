"""Weights in int8, and rows put into it twice: their nearest integers, and what that leaves.

Symmetric: an integer from -127 to 127 times a scale, which is the largest of a column, or row, over
127. A product's sums are integers, so they are exact, and the same in any order on any device.

With one int8 an entry, as in LLM.int8() (Dettmers et al., 2022) or vLLM's W8A8, rows cost far more
than weights do: a row's outliers set its scale. The rest of each entry, in int8 too and of steps a
254th as long, brings rows to the precision of bfloat16. No more weights are read for it, which is
what a decoding step waits for, and int8 products take half as long as bfloat16's where they count.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_DEPTH = (2**31 - 1) // 127**2  # beyond it, a sum may not fit int32
STEPS = 254  # of the rest, in one of the integers
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
    ratios, scales = _scaled(matrices, axis)
    return Quantised(jnp.round(ratios).astype(jnp.int8), jnp.squeeze(scales, axis))


def quantise_rows(x_MK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows in int8, [M, 2, K], and their scales, float32 [M, 1].

    Entry i of a row is its scale times (first[i] + second[i] / STEPS); the scale of a row that has
    anything in it that isn't finite is not a number.
    """
    ratios, scales = _scaled(x_MK, -1)
    first = jnp.round(ratios)
    rest = jnp.round((ratios - first) * STEPS)
    return jnp.stack([first, rest], axis=1).astype(jnp.int8), scales


def _scaled(array: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """What is to be rounded, from -127 to 127, and what one of it stands for; in float32."""
    wide = array.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    is_used = jnp.isfinite(most) & (most >= _LEAST)
    ratios = jnp.where(is_used, wide * (127 / jnp.where(is_used, most, 1)), 0)
    scales = jnp.where(is_used, most * jnp.float32(1 / 127), jnp.where(most < _LEAST, 0, jnp.nan))
    return ratios, scales
