"""The oracle: every token gathers its whole padded context. Plain, slow, float32.

It shares no helper and no default with the other backends.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.layout import Options, Ragged, Shape


def unsupported(shape: Shape, device_kind: str) -> str | None:
    """Every combination that `check_supported` lets through runs on any device."""
    del shape, device_kind


def prepare(ragged: Ragged, *, block_size: int, max_query_len: int) -> Ragged:
    """Nothing to derive: the oracle reads the batch as it is."""
    del block_size, max_query_len
    return ragged


def attend(
    q: jax.Array,
    kv_new: jax.Array,
    kv_pool: jax.Array,
    ragged: Ragged,
    first_block: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention.paged_attention`."""
    num_seqs, num_blocks = ragged.block_tables.shape
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = kv_pool.shape
    is_real = ragged.token_rows < num_seqs
    row = jnp.where(is_real, ragged.token_rows, 0)

    block = first_block + ragged.block_tables[row, ragged.positions // block_size]
    block = jnp.where(is_real, block, kv_pool.shape[0])  # out of range: dropped
    kv_pool = kv_pool.at[block, :, ragged.positions % block_size].set(kv_new, mode="drop")

    context = kv_pool[first_block + ragged.block_tables[row]]  # [T, P, K, B, 2H]
    if context.dtype == jnp.uint8:  # the bits of float8
        context = jax.lax.bitcast_convert_type(context, jnp.float8_e4m3fn)
    context = context.transpose(0, 2, 1, 3, 4).astype(jnp.float32)
    context = context.reshape(num_tokens, num_kv_heads, num_blocks * block_size, 2 * head_dim)
    # Blocks that nobody wrote may hold NaN, and 0 * NaN is NaN.
    age = ragged.positions[:, None] - jnp.arange(num_blocks * block_size)[None]  # [T, C]
    visible = age >= 0
    if options.window is not None:
        visible &= age < options.window
    context = jnp.where(visible[:, None, :, None], context, 0.0)
    keys, values = context[..., :head_dim], context[..., head_dim:]

    group = num_heads // num_kv_heads
    queries = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, group, head_dim)
    highest = jax.lax.Precision.HIGHEST
    if options.k_scales is not None:
        keys = keys * options.k_scales[None, :, None, None]
    if options.v_scales is not None:
        values = values * options.v_scales[None, :, None, None]

    scores = jnp.einsum("tkgh,tkch->tkgc", queries, keys, precision=highest) * options.scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    if options.sinks is not None:  # one more column, which has no value
        sinks = options.sinks.reshape(1, num_kv_heads, group, 1)
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        scores = jnp.concatenate((scores, sinks), axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : num_blocks * block_size]
    out = jnp.einsum("tkgc,tkch->tkgh", weights, values, precision=highest)
    out = out.reshape(num_tokens, num_heads, head_dim)
    return jnp.where(is_real[:, None, None], out, 0.0).astype(q.dtype), kv_pool
