"""The compiler's own products, on any device. A stack stays [L, K, N]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.int8 import Quantised, quantise_rows


def pack(matrices: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.pack`."""
    return matrices


def pack_table(table: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.pack_table`."""
    return table


def embed(table: jax.Array | Quantised, token_ids: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.embed`."""
    if isinstance(table, Quantised):
        rows = table.values[token_ids].astype(jnp.float32)
        return rows * table.scales[token_ids][:, None]
    return table[token_ids]


def scores(x: jax.Array, table: jax.Array | Quantised) -> jax.Array:
    """See `pallas_kernels.matmul.scores`."""
    return _dot(x, table, 1, jnp.float32)


def matmul(
    x: jax.Array, stacks: Sequence[jax.Array | Quantised], layer: jax.Array, dtype: jnp.dtype
) -> list[jax.Array]:
    """See `pallas_kernels.matmul.matmul`."""

    def of_layer(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    return [_dot(x, jax.tree.map(of_layer, stack), 0, dtype) for stack in stacks]


def _dot(x: jax.Array, matrix: jax.Array | Quantised, axis: int, dtype: Any) -> jax.Array:
    """The product of x's last axis with an axis of a matrix."""
    axes = (((x.ndim - 1,), (axis,)), ((), ()))
    if isinstance(matrix, Quantised):
        values, scales = quantise_rows(x)
        sums = jax.lax.dot_general(
            values, matrix.values, axes, preferred_element_type=jnp.int32
        ).astype(jnp.float32)
        return (sums * scales * matrix.scales[None]).astype(dtype)
    # TPUs multiply float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, matrix, axes, precision=precision, preferred_element_type=dtype)
