"""Paged attention in plain XLA, for any device: block by block with an online softmax.

Work is proportional to live context, not to padding: rows with one token are sorted by
length and go through in groups, longer rows in tiles of queries, and every loop starts where
its window does and ends where its longest context does. Only one chunk of blocks is ever
gathered at a time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.layout import Options, Ragged, Shape, from_bits, product_dtype

DECODE_GROUP = 16  # rows of one token that go through together
DECODE_CHUNK = 256  # context tokens gathered at a time for each of them
QUERY_TILE = 64  # tokens of one longer row that go through together
PREFILL_CHUNK = 256  # context tokens gathered at a time for them
_MASKED = -1e30  # finite, so that a row that sees nothing yet makes no NaN


class Work(NamedTuple):
    """A batch sorted into groups and tiles. G, M: static numbers of groups and tiles.

    A batch of which one token a row is promised has no tiles: M is 0.
    """

    write_blocks: jax.Array  # int32[T]: block of one layer, negative at padded tokens
    write_offsets: jax.Array  # int32[T]: position in it
    decode_rows: jax.Array  # int32[G * group]: rows of one token, the longest first
    decode_lens: jax.Array  # int32[G * group]: their context; 0 for all others
    num_groups: jax.Array  # int32[]
    tile_rows: jax.Array  # int32[M]: the row of each tile
    tile_offsets: jax.Array  # int32[M]: its first token within the row
    num_tiles: jax.Array  # int32[]
    ragged: Ragged


def unsupported(shape: Shape, device_kind: str) -> str | None:
    """Every combination that `check_supported` lets through runs on any device."""
    del shape, device_kind


def prepare(ragged: Ragged, *, block_size: int, max_query_len: int) -> Work:
    """Sort a batch into groups of decodes and tiles of prompts."""
    num_seqs, num_blocks = ragged.block_tables.shape
    num_tokens = ragged.positions.shape[0]
    is_real = ragged.token_rows < num_seqs
    row = jnp.minimum(ragged.token_rows, num_seqs - 1)
    write_blocks = ragged.block_tables[row, ragged.positions // block_size]

    query_lens = ragged.query_starts[1:] - ragged.query_starts[:-1]
    group = min(DECODE_GROUP, num_seqs)
    decode_lens = jnp.where(query_lens == 1, ragged.kv_lens, 0)
    order = jnp.argsort(-decode_lens)
    padding = -num_seqs % group
    num_decodes = jnp.sum(query_lens == 1)

    tile = min(QUERY_TILE, num_tokens)
    max_tiles = num_tokens // tile + min(num_seqs, num_tokens // 2) if max_query_len > 1 else 0
    tiles = jnp.where(query_lens > 1, -(-query_lens // tile), 0)
    tile_stops = jnp.cumsum(tiles)
    index = jnp.arange(max_tiles)
    tile_rows = jnp.minimum(jnp.searchsorted(tile_stops, index, side="right"), num_seqs - 1)
    tile_offsets = (index - (tile_stops - tiles)[tile_rows]) * tile

    # Chunks are read whole: make the table as wide as the last chunk of either kind reaches.
    chunks = [_blocks_a_chunk(c, block_size, num_blocks) for c in (DECODE_CHUNK, PREFILL_CHUNK)]
    padding_blocks = max(-num_blocks % chunk for chunk in chunks)
    tables = jnp.pad(ragged.block_tables, ((0, 0), (0, padding_blocks)))
    return Work(
        write_blocks=jnp.where(is_real, write_blocks, -1),
        write_offsets=ragged.positions % block_size,
        decode_rows=jnp.pad(order, (0, padding)),
        decode_lens=jnp.pad(decode_lens[order], (0, padding)),
        num_groups=-(-num_decodes // group),
        tile_rows=tile_rows,
        tile_offsets=tile_offsets,
        num_tiles=tile_stops[-1],
        ragged=ragged._replace(block_tables=tables),
    )


def attend(
    q: jax.Array,
    kv_new: jax.Array,
    kv_pool: jax.Array,
    work: Work,
    first_block: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention.paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pool.shape[1]
    block = jnp.where(work.write_blocks < 0, kv_pool.shape[0], first_block + work.write_blocks)
    kv_pool = kv_pool.at[block, :, work.write_offsets].set(kv_new, mode="drop")

    # Zeros where the values lie: scores then read keys and values as one contiguous piece.
    queries = q.astype(product_dtype(kv_pool.dtype))
    queries = queries.reshape(num_tokens, num_kv_heads, -1, head_dim)
    queries = jnp.concatenate((queries, jnp.zeros_like(queries)), axis=-1)  # [T, K, Q, 2H]
    out = jnp.zeros((num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim), q.dtype)
    out = _attend_decodes(queries, kv_pool, work, first_block, options, out)
    if work.tile_rows.shape[0]:
        out = _attend_tiles(queries, kv_pool, work, first_block, options, out)
    return out.reshape(q.shape), kv_pool


def _attend_decodes(queries, kv_pool, work: Work, first_block, options: Options, out):
    """All rows of one token, `DECODE_GROUP` at a time, the longest contexts first."""
    block_size = kv_pool.shape[2]
    num_blocks = work.ragged.block_tables.shape[1]
    group = min(DECODE_GROUP, work.ragged.kv_lens.shape[0])
    chunk_blocks = _blocks_a_chunk(DECODE_CHUNK, block_size, num_blocks)
    chunk = chunk_blocks * block_size
    cut = jax.vmap(lambda table, start: jax.lax.dynamic_slice_in_dim(table, start, chunk_blocks))

    def attend_group(index, out):
        rows = jax.lax.dynamic_slice_in_dim(work.decode_rows, index * group, group)
        lens = jax.lax.dynamic_slice_in_dim(work.decode_lens, index * group, group)
        tokens = work.ragged.query_starts[rows]
        tables = work.ragged.block_tables[rows]  # [group, P]
        start = _window_start(lens, options)
        first_chunk = start // chunk  # each row's own: windows of a group begin far apart

        def context(step):
            chunks = first_chunk + step
            blocks = cut(tables, chunks * chunk_blocks)
            positions = chunks[:, None] * chunk + jnp.arange(chunk)[None]
            visible = positions < lens[:, None]
            if options.window is not None:
                visible &= positions >= start[:, None]
            return _gather(kv_pool, first_block + blocks), visible[:, None, None]

        num_chunks = jnp.max(-(-lens // chunk) - first_chunk)
        result = _online_softmax(queries[tokens], context, options, num_chunks)
        tokens = jnp.where(lens > 0, tokens, out.shape[0])
        return out.at[tokens].set(result.astype(out.dtype), mode="drop")

    return jax.lax.fori_loop(0, work.num_groups, attend_group, out)


def _attend_tiles(queries, kv_pool, work: Work, first_block, options: Options, out):
    """All rows of several tokens, `QUERY_TILE` tokens at a time."""
    num_tokens, num_kv_heads, group, width = queries.shape
    block_size = kv_pool.shape[2]
    ragged = work.ragged
    tile = min(QUERY_TILE, num_tokens)
    chunk_blocks = _blocks_a_chunk(PREFILL_CHUNK, block_size, ragged.block_tables.shape[1])
    chunk = chunk_blocks * block_size

    def attend_tile(index, out):
        row, offset = work.tile_rows[index], work.tile_offsets[index]
        tokens = ragged.query_starts[row] + offset + jnp.arange(tile)
        is_real = tokens < ragged.query_starts[row + 1]
        tokens = jnp.minimum(tokens, num_tokens - 1)
        seen = jnp.where(is_real, ragged.positions[tokens], -1)  # the last position each sees
        start = _window_start(seen + 1, options)  # and the first
        table = jax.lax.dynamic_index_in_dim(ragged.block_tables, row, keepdims=False)
        first_chunk = start[0] // chunk  # the first token of a tile is real, and sees furthest

        def context(step):
            index = first_chunk + step
            blocks = jax.lax.dynamic_slice_in_dim(table, index * chunk_blocks, chunk_blocks)
            positions = index * chunk + jnp.arange(chunk)[None]
            visible = positions <= seen[:, None]  # [tile, C]
            if options.window is not None:
                visible &= positions >= start[:, None]
            visible = jnp.broadcast_to(visible[:, None], (tile, group, chunk))
            return (
                _gather(kv_pool, first_block + blocks),
                visible.reshape(1, tile * group, chunk),
            )

        tile_queries = queries[tokens].transpose(1, 0, 2, 3)
        tile_queries = tile_queries.reshape(num_kv_heads, tile * group, width)
        num_chunks = jnp.max(seen) // chunk + 1 - first_chunk
        result = _online_softmax(tile_queries, context, options, num_chunks)
        result = result.reshape(num_kv_heads, tile, group, -1).transpose(1, 0, 2, 3)
        tokens = jnp.where(is_real, tokens, num_tokens)
        return out.at[tokens].set(result.astype(out.dtype), mode="drop")

    return jax.lax.fori_loop(0, work.num_tiles, attend_tile, out)


def _window_start(lens: jax.Array, options: Options) -> jax.Array:
    """The first position that the last of `lens` positions sees."""
    if options.window is None:
        return jnp.zeros_like(lens)
    return jnp.maximum(lens - options.window, 0)


def _online_softmax(queries, context, options: Options, num_steps):
    """Attention over a context that comes chunk by chunk (Milakov & Gimelshein, 2018).

    Products take the queries' dtype; scores, softmax and sums are float32.

    Args:
      queries: [..., K, Q, 2H], zero in the values' half. Where Q is several tokens' heads, a
        token's heads lie together.
      context: step -> ([..., K, C, 2H], bool[..., 1, Q or 1, C] which of it each query sees).
      options: what happens to the scores.
      num_steps: int32[], how many chunks there are.

    Returns:
      float32[..., K, Q, H].
    """
    *lead, width = queries.shape
    num_kv_heads, num_queries = lead[-2:]
    rank = len(lead)
    batch = tuple(range(rank - 1))
    dot = functools.partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    def by_kv_head(scales):
        return scales.reshape((1,) * (rank - 2) + (num_kv_heads, 1, 1))

    scale = options.scale
    if options.k_scales is not None:
        scale = by_kv_head(options.k_scales) * scale

    def step(index, carry):
        top, total, acc = carry
        kv, visible = context(index)
        kv = from_bits(kv).astype(queries.dtype)
        # Blocks that nobody wrote may hold NaN, and 0 * NaN is NaN.
        kv = jnp.where(jnp.any(visible, axis=-2)[..., None], kv, jnp.zeros((), kv.dtype))
        scores = dot(queries, kv, (((rank,), (rank,)), (batch, batch))) * scale
        if options.softcap is not None:
            scores = options.softcap * jnp.tanh(scores / options.softcap)
        scores = jnp.where(visible, scores, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        new = dot(weights.astype(kv.dtype), kv, (((rank,), (rank - 1,)), (batch, batch)))
        return new_top, total, acc * shrink + new

    if options.sinks is None:
        top = jnp.full((*lead, 1), _MASKED, jnp.float32)
        total = jnp.zeros((*lead, 1), jnp.float32)
    else:  # as if the sink had been seen already: a weight of one, and no value
        sinks = options.sinks.reshape((1,) * (rank - 2) + (num_kv_heads, 1, -1))
        repeats = num_queries // sinks.shape[-1]
        top = jnp.broadcast_to(sinks, (*lead[:-1], repeats, sinks.shape[-1])).reshape(*lead, 1)
        total = jnp.ones((*lead, 1), jnp.float32)
    acc = jnp.zeros((*lead, width), jnp.float32)
    _, total, acc = jax.lax.fori_loop(0, num_steps, step, (top, total, acc))
    out = acc[..., width // 2 :] / jnp.maximum(total, 1e-30)
    return out if options.v_scales is None else out * by_kv_head(options.v_scales)


def _gather(kv_pool: jax.Array, blocks: jax.Array) -> jax.Array:
    """Blocks [..., C] of the pool as [..., K, C * B, 2H], without a transpose."""
    _, num_kv_heads, block_size, width = kv_pool.shape
    pages = kv_pool.reshape(-1, block_size, width)
    shape = (*blocks.shape[:-1], num_kv_heads, blocks.shape[-1])
    heads = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    index = blocks[..., None, :] * num_kv_heads + heads
    return pages[index].reshape(*index.shape[:-1], index.shape[-1] * block_size, width)


def _blocks_a_chunk(tokens: int, block_size: int, num_blocks: int) -> int:
    return max(1, min(tokens // block_size, num_blocks))
