"""The compiler's own products, on any device. A stack stays [L, K, N]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.int8 import STEPS, Quantised, quantise_rows
from pallas_kernels.matmul.norm import Norm


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


def scores(
    x: jax.Array, weights: jax.Array | Quantised, is_table: bool
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.matmul.scores`.

    Of `jnp.argmax`, XLA's CPU compares pairs of value and index one by one: four times as long.
    """
    logits = _dot(x, weights, 1 if is_table else 0, jnp.float32)
    is_best = logits == jnp.max(logits, axis=1, keepdims=True)
    indices = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return logits, jnp.min(jnp.where(is_best, indices, logits.shape[1] - 1), axis=1)


def matmul(
    x: jax.Array,
    stacks: Sequence[jax.Array | Quantised],
    layer: jax.Array,
    dtype: jnp.dtype,
    norm: Norm | None = None,
    add: jax.Array | None = None,
) -> list[jax.Array]:
    """See `pallas_kernels.matmul.matmul`."""

    def of_layer(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    if norm is not None:
        x = norm(x, layer)
    if add is not None:
        dtype = x.dtype  # what chips send each other to sum a split product is no wider than that
    results = [_dot(x, jax.tree.map(of_layer, stack), 0, dtype) for stack in stacks]
    return results if add is None else [add + y.astype(add.dtype) for y in results]


def feed_forward(
    x: jax.Array,
    norm: Norm,
    gate: jax.Array | Quantised,
    up: jax.Array | Quantised,
    down: jax.Array | Quantised,
    layer: jax.Array,
) -> jax.Array:
    """See `pallas_kernels.matmul.feed_forward`."""
    scales = norm.scales_LD
    gated, upped = matmul(x, [gate, up], layer, scales.dtype, norm)
    # In bfloat16, the sigmoid would round once more than need be, and no faster.
    hidden = jax.nn.silu(gated.astype(jnp.float32)) * upped.astype(jnp.float32)
    return matmul(hidden.astype(scales.dtype), [down], layer, scales.dtype, add=x)[0]


def _dot(x: jax.Array, matrix: jax.Array | Quantised, axis: int, dtype: Any) -> jax.Array:
    """The product of x's last axis with an axis of a matrix."""
    if isinstance(matrix, Quantised):
        values, scales = quantise_rows(x)
        axes = (((2,), (axis,)), ((), ()))
        sums = jax.lax.dot_general(
            values, matrix.values, axes, preferred_element_type=jnp.int32
        ).astype(jnp.float32)
        sums = sums[:, 0] + sums[:, 1] * (1 / STEPS)
        return (sums * scales * matrix.scales[None]).astype(dtype)
    # TPUs multiply float32 in bfloat16 unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        matrix,
        (((x.ndim - 1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )
