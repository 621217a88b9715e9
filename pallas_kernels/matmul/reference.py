"""Plain products in float32, rounded once: what other backends are compared with.

Weights stay as xla has them, which is as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.xla import embed, pack, pack_table

__all__ = ["embed", "matmul", "pack", "pack_table", "scores"]


def scores(x: jax.Array, table: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.scores`."""
    return _product(x, table.T)


def matmul(
    x: jax.Array, stacks: Sequence[jax.Array], layer: jax.Array, dtype: jnp.dtype
) -> list[jax.Array]:
    """See `pallas_kernels.matmul.matmul`."""
    return [_product(x, stack[layer]).astype(dtype) for stack in stacks]


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    wide = (x.astype(jnp.float32), matrix.astype(jnp.float32))
    return jnp.einsum("mk,kn->mn", *wide, precision=jax.lax.Precision.HIGHEST)
