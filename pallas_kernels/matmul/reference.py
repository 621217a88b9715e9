"""Plain products in float32, rounded once: what other backends are compared with.

Weights stay as xla has them, which is as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.int8 import Quantised, quantise_rows
from pallas_kernels.matmul.xla import embed, pack, pack_table

__all__ = ["embed", "matmul", "pack", "pack_table", "scores"]


def scores(x: jax.Array, table: jax.Array | Quantised) -> jax.Array:
    """See `pallas_kernels.matmul.scores`."""
    if isinstance(table, Quantised):
        table = Quantised(table.values.T, table.scales)
        return _product(x, table)
    return _product(x, table.T)


def matmul(
    x: jax.Array, stacks: Sequence[jax.Array | Quantised], layer: jax.Array, dtype: jnp.dtype
) -> list[jax.Array]:
    """See `pallas_kernels.matmul.matmul`."""
    return [
        _product(x, jax.tree.map(lambda part: part[layer], stack)).astype(dtype) for stack in stacks
    ]


def _product(x: jax.Array, matrix: jax.Array | Quantised) -> jax.Array:
    if isinstance(matrix, Quantised):  # the numbers that the integers stand for
        values, scales = quantise_rows(x)
        x = values.astype(jnp.float32) * scales
        matrix = matrix.values.astype(jnp.float32) * matrix.scales[None]
    wide = (x.astype(jnp.float32), matrix.astype(jnp.float32))
    return jnp.einsum("mk,kn->mn", *wide, precision=jax.lax.Precision.HIGHEST)
