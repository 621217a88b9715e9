"""Paged attention in native code for CPUs: it reads each context where it lies.

XLA's way gathers a context's blocks before it computes with them, and makes a dozen small
operations of each step of the softmax. Here a step's keys and values are written and its tokens
attend in one call, on XLA's own threads. Scores, softmax and sums are float32. So are products, as
values are widened when they are read; AMX's are of bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.paged_attention.layout import Options, Ragged, Shape
from pallas_kernels.paged_attention.rotary import Rope

MAX_HEAD_DIM = 256
_NO_WINDOW = np.int32(np.iinfo(np.int32).max)


class Work(NamedTuple):
    """A batch as it is: native code sorts it out."""

    ragged: Ragged


def unsupported(shape: Shape, device_kind: str) -> str | None:
    """See `check_supported`."""
    del device_kind
    if shape.head_dim > MAX_HEAD_DIM:
        return f"head dim {shape.head_dim} is above {MAX_HEAD_DIM}; set attention.backend to xla"
    return None


def prepare(ragged: Ragged, *, block_size: int, max_query_len: int) -> Work:
    """Nothing is derived."""
    del block_size, max_query_len
    return Work(ragged)


def attend(
    q: jax.Array,
    kv_new: jax.Array,
    kv_pool: jax.Array,
    work: Work,
    first_block: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention.paged_attention`.

    A block, a position or a row that is out of range fails the program, before anything is written.
    """
    native.load()
    ragged = work.ragged
    window = _NO_WINDOW if options.window is None else options.window
    nothing = jnp.zeros(0, jnp.float32)
    floats = (options.sinks, options.k_scales, options.v_scales)
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, kv_pool)]
    call = jax.ffi.ffi_call("octavo_attention", results, input_output_aliases={2: 1})
    out, kv_pool = call(
        q,
        kv_new,
        kv_pool,
        ragged.token_rows,
        ragged.positions,
        ragged.query_starts,
        ragged.block_tables,
        jnp.asarray(first_block, jnp.int32),
        jnp.asarray(window, jnp.int32),
        *(nothing if value is None else value for value in floats),
        scale=np.float32(options.scale),
        softcap=np.float32(options.softcap or 0.0),
        most=_most(options.instructions),
    )
    return out, kv_pool


def rotate(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: Rope, instructions: str | None
) -> tuple[jax.Array, jax.Array]:
    """Queries turned, and turned keys beside values as the pool holds them, [T, K, 2H]; see
    `pallas_kernels.paged_attention.rotate`."""
    native.load()
    tokens, kv_heads, head_dim = k.shape
    results = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((tokens, kv_heads, 2 * head_dim), k.dtype),
    ]
    call = jax.ffi.ffi_call("octavo_rotate", results)
    turned, entries = call(q, k, v, *rope, most=_most(instructions))
    return turned, entries


def _most(instructions: str | None) -> np.int32:
    return np.int32(native.INSTRUCTIONS.index(instructions or native.INSTRUCTIONS[-1]))
