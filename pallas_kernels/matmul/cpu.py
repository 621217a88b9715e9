"""Native products for CPUs, in bfloat16 and int8.

XLA's own products for the CPU pack the weights anew at every call. Here they are packed once, when
they are loaded: bfloat16 as [L, N / 16, K / 2, 16, 2], in which 64 bytes are 16 columns by a pair
of rows, as AMX and AVX512-BF16 take them, and int8, by four rows, as [L, N / 16, K / 4, 16, 4]. A
stack stays whole, and the call is told which layer: a slice would be a copy. Sums go in one order
whatever the number of rows, so that a row's result does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.matmul.int8 import Quantised
from pallas_kernels.matmul.norm import Norm

COLUMNS = 16  # of a block
BLOCKS_OF_SCORES = 16  # that a thread computes at a time, as in scores.cc
WORD = 4  # bytes: entries of a row that are multiplied at once
DEPTH = 16 * WORD  # bytes: K is a multiple of what a tile of AMX takes


def unsupported(dtype: str, in_int8: bool, shapes: Sequence[tuple[int, int]]) -> str | None:
    """Why matrices of these (K, N) can't be multiplied by native code here, or None."""
    if reason := native.unavailable():
        return reason
    if dtype != "bfloat16":
        return f"native products are for models in bfloat16, not in {dtype}"
    multiple = DEPTH // (1 if in_int8 else 2)
    for depth, width in shapes:
        if depth % multiple or width % COLUMNS:
            return f"a matrix is {depth} by {width}, not multiples of {multiple} and {COLUMNS}"
    return None


def pack(matrices: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.pack`."""
    *stacked, depth, width = matrices.shape
    entries = WORD // matrices.dtype.itemsize
    blocks = matrices.reshape(*stacked, depth // entries, entries, width // COLUMNS, COLUMNS)
    return jnp.moveaxis(blocks, (-2, -4, -1, -3), (-4, -3, -2, -1))


def pack_table(table: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.pack_table`."""
    return pack(table.T)


def embed(table: jax.Array | Quantised, token_ids: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul.embed`."""
    if isinstance(table, Quantised):
        rows = embed(table.values, token_ids).astype(jnp.float32)
        return rows * table.scales[token_ids][:, None]
    words = table[token_ids // COLUMNS, :, token_ids % COLUMNS]
    return words.reshape(len(token_ids), -1)


def scores(
    x: jax.Array,
    weights: jax.Array | Quantised,
    is_table: bool,
    instructions: str = native.INSTRUCTIONS[-1],
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.matmul.scores`; `instructions` are the most that it may use."""
    del is_table  # both are packed alike
    stack = jax.tree.map(lambda part: part[None], weights)
    rows, blocks = x.shape[0], _width(stack) // COLUMNS
    chunks = -(-blocks // BLOCKS_OF_SCORES)
    results = [
        jax.ShapeDtypeStruct((rows, blocks * COLUMNS), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((chunks, rows), jnp.float32),  # the best of each chunk
        jax.ShapeDtypeStruct((chunks, rows), jnp.int32),
    ]
    call = _call("octavo_scores", results)
    logits, best, *_ = call(x, *_arrays(stack), most=_most(instructions))
    return logits, best


def matmul(
    x: jax.Array,
    stacks: Sequence[jax.Array | Quantised],
    layer: jax.Array,
    dtype: jnp.dtype,
    norm: Norm | None = None,
    add: jax.Array | None = None,
    *,
    instructions: str = native.INSTRUCTIONS[-1],
) -> list[jax.Array]:
    """See `pallas_kernels.matmul.matmul`; `instructions` are the most that it may use."""
    rows = x.shape[0]
    normed = jax.ShapeDtypeStruct((0,) if norm is None else x.shape, jnp.bfloat16)
    results = [jax.ShapeDtypeStruct((rows, _width(stack)), dtype) for stack in stacks]
    call = _call("octavo_matmul", [normed, *results])
    scales = jnp.zeros(0, jnp.bfloat16) if norm is None else norm.scales_LD
    _, *products = call(
        x,
        layer,
        scales,
        jnp.zeros(0, jnp.float32) if add is None else add,
        *_arrays(*stacks),
        epsilon=np.float32(0.0 if norm is None else norm.epsilon),
        most=_most(instructions),
    )
    return products


def feed_forward(
    x: jax.Array,
    norm: Norm,
    gate: jax.Array | Quantised,
    up: jax.Array | Quantised,
    down: jax.Array | Quantised,
    layer: jax.Array,
    *,
    instructions: str = native.INSTRUCTIONS[-1],
) -> jax.Array:
    """See `pallas_kernels.matmul.feed_forward`; `instructions` are the most that it may use."""
    rows, width = x.shape
    results = [
        jax.ShapeDtypeStruct(x.shape, jnp.float32),
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),  # its norm
        jax.ShapeDtypeStruct((rows, _width(gate)), jnp.bfloat16),
    ]
    call = _call("octavo_feed_forward", results)
    epsilon, most = np.float32(norm.epsilon), _most(instructions)
    stacks = _arrays(gate, up, down)
    return call(x, layer, norm.scales_LD, *stacks, epsilon=epsilon, most=most)[0]


def _width(stack: jax.Array | Quantised) -> int:
    """Columns of a packed stack's matrices."""
    return jax.tree.leaves(stack)[0].shape[1] * COLUMNS


def _arrays(*stacks: jax.Array | Quantised) -> list[jax.Array]:
    """Each stack and its scales, which are empty if it has none."""
    none = jnp.zeros(0, jnp.float32)
    pairs = [stack if isinstance(stack, Quantised) else (stack, none) for stack in stacks]
    return [array for pair in pairs for array in pair]


def _call(target: str, results: Sequence[jax.ShapeDtypeStruct]) -> Any:
    native.load()
    return jax.ffi.ffi_call(target, results)


def _most(instructions: str) -> np.int32:
    return np.int32(native.INSTRUCTIONS.index(instructions))
