"""Native products for CPUs, in bfloat16 and int8.

XLA's own products for the CPU pack the weights anew at every call. Here they are packed once, when
they are loaded: bfloat16 as [L, N / 16, K / 2, 16, 2], in which 64 bytes are 16 columns by a pair
of rows, as AMX and AVX512-BF16 take them, and int8, by four rows, as [L, N / 16, K / 4, 16, 4]. A
stack stays whole, and the call is told which layer: a slice would be a copy. Sums go in one order
whatever the number of rows, so that a row's result does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.matmul.int8 import Quantised

COLUMNS = 16  # of a block
WORD = 4  # bytes: entries of a row that are multiplied at once
DEPTH = {"bfloat16": 32, "int8": 64}  # K is a multiple of what a tile of AMX takes


def unsupported(dtype: str, shapes: Sequence[tuple[int, int]]) -> str | None:
    """Why matrices of these (K, N) can't be multiplied by native code here, or None."""
    if reason := native.unavailable():
        return reason
    if dtype not in DEPTH:
        return f"native products are for bfloat16 weights and int8 ones, not for {dtype}"
    for depth, width in shapes:
        if depth % DEPTH[dtype] or width % COLUMNS:
            multiples = f"{DEPTH[dtype]} and {COLUMNS}"
            return f"a matrix is {depth} by {width}, not multiples of {multiples}"
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


def scores(x: jax.Array, table: jax.Array | Quantised) -> jax.Array:
    """See `pallas_kernels.matmul.scores`."""
    stack = jax.tree.map(lambda part: part[None], table)
    return matmul(x, [stack], jnp.int32(0), jnp.dtype(jnp.float32))[0]


def matmul(
    x: jax.Array,
    stacks: Sequence[jax.Array | Quantised],
    layer: jax.Array,
    dtype: jnp.dtype,
    instructions: str = native.INSTRUCTIONS[-1],
) -> list[jax.Array]:
    """See `pallas_kernels.matmul.matmul`; `instructions` are the most that it may use."""
    native.load()
    widths = [jax.tree.leaves(stack)[0].shape[1] * COLUMNS for stack in stacks]
    results = [jax.ShapeDtypeStruct((x.shape[0], width), dtype) for width in widths]
    most = np.int32(native.INSTRUCTIONS.index(instructions))
    arrays = jax.tree.leaves(stacks)  # of one in int8, the values and then the scales
    return list(jax.ffi.ffi_call("octavo_matmul", results)(x, layer, *arrays, most=most))
