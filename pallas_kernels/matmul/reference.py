"""Plain products in float32, rounded once: what other backends are compared with.

Weights stay as xla has them, which is as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.int8 import STEPS, Quantised, quantise_rows
from pallas_kernels.matmul.norm import Norm
from pallas_kernels.matmul.xla import embed, pack, pack_table

__all__ = ["embed", "feed_forward", "matmul", "pack", "pack_table", "scores"]


def scores(
    x: jax.Array, weights: jax.Array | Quantised, is_table: bool
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.matmul.scores`."""
    if isinstance(weights, Quantised):
        values = weights.values.T if is_table else weights.values
        weights = Quantised(values, weights.scales)
    elif is_table:
        weights = weights.T
    logits = _product(x, weights)
    return logits, jnp.argmax(logits, axis=1).astype(jnp.int32)


def matmul(
    x: jax.Array,
    stacks: Sequence[jax.Array | Quantised],
    layer: jax.Array,
    dtype: jnp.dtype,
    norm: Norm | None = None,
    add: jax.Array | None = None,
) -> list[jax.Array]:
    """See `pallas_kernels.matmul.matmul`."""
    if norm is not None:
        x = norm(x, layer)
    matrices = [jax.tree.map(lambda part: part[layer], stack) for stack in stacks]
    products = [_product(x, matrix) for matrix in matrices]
    return [(y if add is None else add + y).astype(dtype) for y in products]


def feed_forward(
    x: jax.Array,
    norm: Norm,
    gate: jax.Array | Quantised,
    up: jax.Array | Quantised,
    down: jax.Array | Quantised,
    layer: jax.Array,
) -> jax.Array:
    """See `pallas_kernels.matmul.feed_forward`."""
    float32 = jnp.dtype(jnp.float32)
    gated, upped = matmul(x, [gate, up], layer, float32, norm)
    hidden = (jax.nn.silu(gated) * upped).astype(norm.scales_LD.dtype)
    return matmul(hidden, [down], layer, float32, add=x)[0]


def _product(x: jax.Array, matrix: jax.Array | Quantised) -> jax.Array:
    if isinstance(matrix, Quantised):  # the numbers that the integers stand for
        values, scales = quantise_rows(x)
        x = (values[:, 0].astype(jnp.float32) + values[:, 1].astype(jnp.float32) / STEPS) * scales
        matrix = matrix.values.astype(jnp.float32) * matrix.scales[None]
    wide = (x.astype(jnp.float32), matrix.astype(jnp.float32))
    return jnp.einsum("mk,kn->mn", *wide, precision=jax.lax.Precision.HIGHEST)
