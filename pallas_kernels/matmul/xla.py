"""The compiler's own products, on any device. A stack stays [L, K, N]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    return _dot(x, table, 1, jnp.float32)


def matmul(
    x: jax.Array, stacks: Sequence[jax.Array], layer: jax.Array, dtype: jnp.dtype
) -> list[jax.Array]:
    """See `pallas_kernels.matmul.matmul`."""
    return [
        _dot(x, jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), 0, dtype)
        for stack in stacks
    ]


def _dot(x: jax.Array, matrix: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """The product of x's last axis with an axis of a matrix."""
    # TPUs multiply float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        matrix,
        (((x.ndim - 1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )
