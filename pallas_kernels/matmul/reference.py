"""Plain products in float32, rounded once: what other backends are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def pack(matrices: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.pack`."""
    return matrices


def pack_table(table: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.pack_table`."""
    return table


def embed(table: jax.Array, token_ids: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.embed`."""
    return table[token_ids]


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
