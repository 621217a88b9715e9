"""Paged attention for Hopper GPUs (Pallas, Mosaic GPU): pages by TMA, products by wgmma.

One persistent kernel serves decodes and prompts. A thread block is three warpgroups: one
fetches, two compute. The fetching one follows the block table and keeps a ring of buffers full,
across work items, so that memory never waits; the other two hold 64 query rows each (tokens x
the query heads of one KV head) and run an online softmax over the pages (Dao, 2022; Shah et
al., 2024). In a decode both hold the same rows and take every other buffer, long contexts are
cut into items of similar length (flash-decoding), and a small kernel joins the parts. With a
prompt they hold different rows and share the buffers.

Only pages that some query of an item sees are moved, so that a sliding window saves time. What
lies before the first position that is seen or after the last, in their pages or in a buffer that
no page filled, may be NaN: scores are replaced there, values set to zero before the product.

New keys and values are written by an XLA scatter before the kernel runs: it updates the donated
pool in place (`make gpu-aot` checks that no copy of it is made).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.paged_attention.gpu_items import Items, Work, prepare
from pallas_kernels.paged_attention.gpu_plan import (
    COLUMNS,
    ROWS,
    Buffers,
    Plan,
    scratch,
    unsupported,
)
from pallas_kernels.paged_attention.layout import Options, Ragged

__all__ = ["attend", "prepare", "unsupported"]

JOINED_AT_ONCE = 4  # parts whose loads are in flight together
_LOG2_E = math.log2(math.e)
# A score that does not count, and the maximum before there is any: finite, so that there is no
# NaN, and so far apart that a row that sees nothing yet has no weight.
_MASKED, _LEAST = -1e30, -1e15


class _Item(NamedTuple):
    """One work item as the warpgroups see it. All are int32 scalars."""

    index: jax.Array
    head: jax.Array  # the KV head
    row: jax.Array
    token: jax.Array
    position: jax.Array
    tokens: jax.Array
    start: jax.Array  # the first position that some query sees
    stop: jax.Array  # after the last
    first: jax.Array  # tile of the context that some query sees
    end: jax.Array  # after the last; first == end: nothing to do


def attend(
    q: jax.Array,
    kv_new: jax.Array,
    kv_pool: jax.Array,
    work: Work,
    first_block: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention.paged_attention`."""
    num_tokens, num_heads, width = q.shape
    num_blocks, num_kv_heads, block_size, _ = kv_pool.shape
    block = jnp.where(work.write_blocks < 0, num_blocks, first_block + work.write_blocks)
    kv_pool = kv_pool.at[block, :, work.write_offsets].set(kv_new, mode="drop")

    plan = Plan(
        is_decode=True,
        width=width,
        group=num_heads // num_kv_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        pool_dtype=kv_pool.dtype,
        out_dtype=jnp.float32,
        has_window=options.window is not None,
        softcap=options.softcap,
        has_sinks=options.sinks is not None,
        interpret=options.interpret,
    )
    # What is not given is a NumPy constant, which costs no launch in any layer.
    window = np.int32(2**24) if options.window is None else jnp.minimum(options.window, 2**24)
    ones = np.ones(num_kv_heads, np.float32)
    score_factors = np.float32(options.scale * (1.0 if options.softcap else _LOG2_E))
    score_factors = score_factors * (ones if options.k_scales is None else options.k_scales)
    value_factors = ones if options.v_scales is None else options.v_scales
    sinks = np.zeros(num_heads, np.float32) if options.sinks is None else options.sinks
    sinks = sinks.astype(np.float32).reshape(num_kv_heads, plan.group) * np.float32(_LOG2_E)
    place, window = jnp.reshape(first_block, 1), jnp.reshape(window, 1)
    scalars = (place, window, score_factors, value_factors)
    pages = kv_pool.reshape(-1, 2 * width)  # rows of tokens: page p, head k is rows (p K + k) B …

    # Both kernels write the rows of real tokens; a token of no row stays zero.
    # A row of the output is a vector in `_join`, spread over a warpgroup's 128 threads. At head
    # dim 64 half of it is padding, cut off again in every layer: little beside a layer's KV.
    padded_width = -(-width // 128) * 128
    shape = (num_tokens, num_kv_heads, plan.group, padded_width)
    out = jax.new_ref(jnp.zeros(shape, q.dtype))
    if work.prompts:
        prompt_plan = dataclasses.replace(plan, is_decode=False, out_dtype=q.dtype)
        items = work.prompt_items(prompt_plan.tile_tokens)
        tokens = items.table[:, 1, None] + jnp.arange(2 * prompt_plan.tile_tokens)[None]
        queries = _query_tiles(prompt_plan, q, tokens)
        array = jnp if plan.has_sinks else np
        rows = array.pad(sinks, ((0, 0), (0, prompt_plan.rows_a_token - plan.group)))
        rows = array.tile(rows, (1, ROWS))[:, :ROWS]  # the sink of each row of a tile
        _launch(prompt_plan, items, work.ragged, (*scalars, rows), queries, pages, out)
    items = work.decode_items(num_kv_heads)
    queries = _query_tiles(plan, q, work.ragged.query_starts[:-1, None])
    parts = _launch(plan, items, work.ragged, (*scalars, sinks), queries, pages, None)
    _join(plan, items, work.ragged, (*scalars, sinks), parts, out)
    return jax.freeze(out)[..., :width].reshape(q.shape), kv_pool


def _query_tiles(plan: Plan, q: jax.Array, tokens: jax.Array) -> jax.Array:
    """The queries of `tokens`, int32[tiles, …], head by head and tile by tile: bfloat16[…, W].

    Copies to swizzled shared memory start at multiples of 8 rows, hence the tiles and padding.
    """
    tiles, group = tokens.shape[0], plan.group
    q = q.astype(jnp.bfloat16).reshape(q.shape[0], plan.num_kv_heads, group, plan.width)
    q = jnp.take(q, tokens.reshape(-1), axis=0, mode="clip")
    q = jnp.pad(q, ((0, 0), (0, 0), (0, plan.rows_a_token - group), (0, 0)))
    q = q.reshape(tiles, -1, plan.num_kv_heads, plan.rows_a_token, plan.width)
    return q.transpose(2, 0, 1, 3, 4).reshape(-1, plan.width)


def _launch(
    plan: Plan,
    items: Items,
    ragged: Ragged,
    scalars: tuple[Any, ...],
    queries: jax.Array,
    pages: jax.Array,
    out: Any,
) -> tuple[jax.Array, jax.Array] | None:
    """Run the kernel over `items`. Prompts write to `out`; decodes return their parts.

    Parts are normalised, one for each warpgroup and item: float32[M, K, 2, G, W] and the
    base-2 logarithm of each row's softmax sum, float32[M, K, 2, ROWS].
    """
    most, width = items.table.shape[0], plan.width
    part = (most, plan.num_kv_heads, 2)
    out_type = (
        (
            jax.ShapeDtypeStruct((*part, plan.group, -(-width // 128) * 128), jnp.float32),
            jax.ShapeDtypeStruct((*part, ROWS), jnp.float32),
        )
        if plan.is_decode
        else ()
    )

    def body(table, count, block_tables, first_block, window, *refs, **scratch_refs):
        *factors, queries, pages = refs[:5]
        buffers = Buffers(**scratch_refs)
        first_block, window = first_block[0], window[0]
        walk = functools.partial(_walk_items, plan, table, count, window)
        group = lax.axis_index("group")

        @pl.when(group == 2)
        def _():
            plgpu.set_max_registers(56, action="decrease")
            _fetch(plan, walk, block_tables, first_block, queries, pages, buffers)

        @pl.when(group < 2)
        def _():
            plgpu.set_max_registers(224, action="increase")
            _compute(plan, walk, window, factors, refs[5:], buffers, group)

    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch(plan),
        grid=(plan.thread_blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_attention_decode" if plan.is_decode else "paged_attention_prompt",
        interpret=plan.interpret or None,
    )
    arrays = (items.table, items.count, ragged.block_tables, *scalars, queries, pages)
    return kernel(*arrays) if plan.is_decode else kernel(*arrays, out)


def _walk_items(plan: Plan, table, count, window, visit, carry):
    """Call `visit(item, carry)` for each of this thread block's items; all warpgroups do alike.

    Blocks take turns in alternating direction, so that items sorted by cost spread evenly.
    """
    blocks, heads = plan.thread_blocks, plan.num_kv_heads
    block = lax.axis_index("block")
    total = count[0] * heads

    def step(turn, carry):
        index = turn * blocks + jnp.where(turn % 2 == 0, block, blocks - 1 - block)
        flat = jnp.minimum(index, total - 1)
        item, head = lax.div(flat, heads), lax.rem(flat, heads)
        row, token, position, tokens, start, stop = (table[item, field] for field in range(6))
        if plan.has_window:
            start = jnp.maximum(start, position + 1 - window)
        first = lax.div(start, plan.tile)
        end = jnp.maximum(lax.div(stop + plan.tile - 1, plan.tile), first)
        end = jnp.where(index < total, end, first)
        seen = _Item(item, head, row, token, position, tokens, start, stop, first, end)
        return visit(seen, carry)

    return lax.fori_loop(0, lax.div(total + blocks - 1, blocks), step, carry)


def _fetch(plan: Plan, walk, block_tables, first_block, queries, pages, buffers: Buffers):
    """The fetching warpgroup: queries and pages of every item, as far ahead as buffers go."""
    slots, stages = plan.buffers
    block_size, pieces = plan.block_size, plan.tile // plan.piece

    def fetch_queries(item: _Item, num_items):
        slot = lax.rem(num_items, slots)

        @pl.when(num_items >= slots)
        def _():
            plgpu.barrier_wait(buffers.query_free.at[slot])

        # Rows that are not real, in a decode most of them, compute what nobody reads.
        rows = plan.tile_tokens * plan.rows_a_token
        tiles = queries.shape[0] // (plan.num_kv_heads * plan.query_copies * rows)
        tile = item.head * tiles + (item.row if plan.is_decode else item.index)
        for copy in range(plan.query_copies):
            start = (tile * plan.query_copies + copy) * rows
            plgpu.copy_gmem_to_smem(
                queries.at[pl.ds(start, rows)],
                buffers.query_buffer.at[slot, copy, pl.ds(0, rows)],
                buffers.query_ready.at[slot],
            )

    def fetch_tile(item: _Item, tile, num_tiles):
        stage = lax.rem(num_tiles, stages)
        positions = [tile * plan.tile + piece * plan.piece for piece in range(pieces)]
        # Read before anything is waited for: together they take the time of one.
        last = block_tables.shape[1] - 1
        blocks = [
            block_tables[item.row, jnp.minimum(lax.div(position, block_size), last)]
            for position in positions
        ]

        @pl.when(num_tiles >= stages)
        def _():
            plgpu.barrier_wait(buffers.free.at[stage])

        for piece, (position, block) in enumerate(zip(positions, blocks, strict=True)):
            source = ((first_block + block) * plan.num_kv_heads + item.head) * block_size
            if block_size > plan.piece:
                source += lax.div(lax.rem(position, block_size), plan.piece) * plan.piece
            is_seen = (position < item.stop) & (position + plan.piece > item.start)

            @pl.when(is_seen)
            def _(piece=piece, source=source):
                plgpu.copy_gmem_to_smem(
                    pages.at[pl.ds(source, plan.piece)],
                    buffers.ring.at[stage, pl.ds(piece * plan.piece, plan.piece)],
                    buffers.ready.at[stage],
                )

            @pl.when(jnp.logical_not(is_seen))
            def _():
                plgpu.barrier_arrive(buffers.ready.at[stage])

        return num_tiles + 1

    def fetch(item: _Item, carry):
        num_items, num_tiles = carry

        @pl.when(item.first < item.end)
        def _():
            fetch_queries(item, num_items)

        step = functools.partial(fetch_tile, item)
        num_tiles = lax.fori_loop(item.first, item.end, step, num_tiles)
        return num_items + (item.first < item.end).astype(jnp.int32), num_tiles

    num_items, num_tiles = walk(fetch, (jnp.int32(0), jnp.int32(0)))
    # Stay until every buffer is given back: a barrier must not end with an arrival in flight.
    for barriers, used, size in (
        (buffers.query_free, num_items, slots),
        (buffers.free, num_tiles, stages),
    ):
        for buffer in range(size):

            @pl.when(used > buffer)
            def _(barriers=barriers, buffer=buffer):
                plgpu.barrier_wait(barriers.at[buffer])


def _compute(plan: Plan, walk, window, factors, outs, buffers: Buffers, group):
    """A computing warpgroup: the online softmax of every item, and its output."""
    slots, _ = plan.buffers

    def compute(item: _Item, carry):
        num_items, num_tiles = carry

        @pl.when(item.first < item.end)
        def _():
            slot = lax.rem(num_items, slots)
            plgpu.barrier_wait(buffers.query_ready.at[slot])
            copy = 0 if plan.is_decode else group
            queries = buffers.query_buffer.at[slot, copy]
            score_factor = factors[0][item.head]
            state = _attend_item(
                plan, item, num_tiles, queries, window, score_factor, buffers, group
            )
            plgpu.barrier_arrive(buffers.query_free.at[slot])
            if plan.is_decode:
                _store_part(plan, item, state, outs, buffers, group)
            else:
                _store_tokens(plan, item, state, factors, outs[0], buffers, group)

        done = item.end - item.first
        return num_items + (done > 0).astype(jnp.int32), num_tiles + done

    walk(compute, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def _attend_item(plan: Plan, item: _Item, num_tiles, queries, window, factor, buffers, group):
    """Online softmax of one item: (row maxima and sums, float32[ROWS]; float32[ROWS, W])."""
    _, stages = plan.buffers
    width, size = plan.width, plan.tile
    position = item.position if plan.is_decode else item.position + group * plan.tile_tokens

    def attend_tile(tile, state, is_masked):
        top, total, acc = state
        stage = lax.rem(num_tiles + tile - item.first, stages)
        plgpu.barrier_wait(buffers.ready.at[stage])
        seen = (item.start - tile * size, item.stop - tile * size)  # tokens of this tile
        keys, values = (buffers.ring.at[stage, :, pl.ds(half * width, width)] for half in (0, 1))
        if plan.is_narrow:
            keys = _widen(plan, keys, None, buffers, group)
        elif is_masked:

            @pl.when((seen[0] > 0) | (seen[1] < size))
            def _():
                _zero_values(plan, values, seen, buffers, group)

        def multiply(scores):
            plgpu.wgmma(scores, queries, keys.transpose((1, 0)))
            return scores[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, size), jnp.float32))
        if plan.is_narrow:
            values = _widen(plan, values, seen, buffers, group)
            plgpu.barrier_arrive(buffers.free.at[stage])
        if plan.softcap:
            scores = plan.softcap * _LOG2_E * jnp.tanh(scores * (factor / plan.softcap))
        else:
            scores = scores * factor
        # They are base-2 logarithms now. A mask before the factor would be undone by a small one.
        if is_masked:
            visible = _visible(plan, position - tile * size, seen[1], window)
            scores = jnp.where(visible, scores, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        acc = _add_product(plan, acc, weights.astype(jnp.bfloat16), values, buffers, group)
        if not plan.is_narrow:
            plgpu.barrier_arrive(buffers.free.at[stage])
        return new_top, total, acc

    def filled(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    by_row = plgpu.Layout.WGMMA.reduce(1)
    state = (
        filled((ROWS,), _LEAST, by_row),
        filled((ROWS,), 0.0, by_row),
        filled((ROWS, width), 0.0, plgpu.Layout.WGMMA),
    )
    masked = functools.partial(attend_tile, is_masked=True)
    if plan.is_decode:
        # Every other buffer, always the same ones: a decode waits for memory, not for masks.
        first = item.first + lax.rem(num_tiles + group, 2)
        return lax.fori_loop(
            0,
            lax.div(item.end - first + 1, 2),
            lambda step, state: masked(first + 2 * step, state),
            state,
        )
    # Tiles that every query sees whole need no mask.
    unmasked, edge = item.first, lax.div(item.position + 1, size)
    edge = jnp.clip(edge, item.first, item.end)
    if plan.has_window:
        unmasked = lax.div(jnp.maximum(item.stop - window, 0) + size - 1, size)
        unmasked = jnp.clip(unmasked, item.first, edge)
        state = lax.fori_loop(item.first, unmasked, masked, state)
    plain = functools.partial(attend_tile, is_masked=False)
    return lax.fori_loop(edge, item.end, masked, lax.fori_loop(unmasked, edge, plain, state))


def _visible(plan: Plan, position, left, window):
    """bool[ROWS, tile]: which of a tile's tokens each row sees.

    Args:
      position: of the warpgroup's first query, counted from the tile's first token.
      left: tokens of the tile that exist.
      window: see `paged_attention`.
    """
    shape = (ROWS, plan.tile)
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA)
    if plan.is_decode:
        token = iota(1)
        visible = token < left
        return visible & (token > position - window) if plan.has_window else visible
    # Row r is a query of token r // rows: token <= position + r // rows, without a division.
    rows = plan.rows_a_token
    distance = iota(1) * rows - iota(0)
    visible = distance <= position * rows
    if plan.has_window:
        visible &= distance > (position - window) * rows
    return visible


def _add_product(plan: Plan, acc, weights, values, buffers: Buffers, group):
    """acc + weights @ values. The weights go from registers to wgmma.

    The interpreter of JAX 0.12 knows neither that nor an accumulator with a first value, so
    there they take the way over shared memory.
    """
    if not plan.interpret:

        def add(acc_ref):
            plgpu.wgmma(acc_ref, weights, values)

        return pl.run_state(add)(plgpu.ACC.init(acc))

    buffer = buffers.weights.at[group]
    buffer[...] = weights
    plgpu.commit_smem()

    def multiply(product):
        plgpu.wgmma(product, buffer, values)
        return product[...]

    return acc + pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.float32))


def _zero_values(plan: Plan, values, seen, buffers: Buffers, group):
    """Zero the values that no query sees, which may be NaN."""

    def zero():
        for column in range(0, plan.width, COLUMNS):
            part = values.at[:, pl.ds(column, COLUMNS)]
            part[...] = _seen(plan, plgpu.layout_cast(part[...], plgpu.Layout.WGMMA), seen)
        plgpu.commit_smem()

    if plan.is_decode:
        zero()
        return
    # Both warpgroups read this buffer: one zeroes for both.
    pl.when(group == 1)(zero)
    plgpu.barrier_arrive(buffers.together)
    plgpu.barrier_wait(buffers.together)


def _widen(plan: Plan, narrow, seen, buffers: Buffers, group):
    """8-bit keys or values as bfloat16, in this warpgroup's own buffer; zero but for `seen`."""
    wide = buffers.wide.at[group]
    for column in range(0, narrow.shape[1], COLUMNS):
        part = pl.ds(column, COLUMNS)
        values = plgpu.layout_cast(narrow.at[:, part][...], plgpu.Layout.WGMMA_UPCAST_2X)
        if values.dtype == jnp.float8_e4m3fn:  # Hopper turns it into float16 only
            values = values.astype(jnp.float32)
        values = plgpu.layout_cast(values.astype(jnp.bfloat16), plgpu.Layout.WGMMA)
        wide.at[:, part][...] = values if seen is None else _seen(plan, values, seen)
    plgpu.commit_smem()
    return wide


def _seen(plan: Plan, values, seen):
    """Values of a tile, zero in the rows outside the range `seen`."""
    row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
    is_seen = row < seen[1]
    if plan.has_window:
        is_seen &= row >= seen[0]
    return jnp.where(is_seen, values, jnp.zeros_like(values))


def _store_part(plan: Plan, item: _Item, state, outs, buffers: Buffers, group):
    """Write a decode's part: its normalised output, and what it weighs against the others."""
    parts, sums = outs
    top, total, acc = state
    has_any = total > 0.0
    acc = acc * lax.broadcast_in_dim(1.0 / jnp.where(has_any, total, 1.0), acc.shape, [0])
    buffers_free = functools.partial(plgpu.wait_smem_to_gmem, 0, wait_read_only=True)
    buffers_free()
    weight = top + jnp.log2(jnp.where(has_any, total, 1.0))
    buffers.sums.at[group][...] = jnp.where(has_any, weight, _MASKED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers.sums.at[group], sums.at[item.index, item.head, group])
    for column in range(0, plan.width, COLUMNS):
        buffers_free()
        buffers.staging.at[group][...] = acc[:, column : column + COLUMNS]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            buffers.staging.at[group, pl.ds(0, plan.group)],
            parts.at[item.index, item.head, group, :, pl.ds(column, COLUMNS)],
        )


def _store_tokens(plan: Plan, item: _Item, state, factors, out, buffers: Buffers, group):
    """Write the output of a prompt's tokens: of those that exist, one by one."""
    top, total, acc = state
    _, value_factors, sinks = factors
    if plan.has_sinks:
        by_row = plgpu.Layout.WGMMA.reduce(1)
        sink = plgpu.load(sinks.at[item.head], layout=by_row, optimized=False)
        total = total + jnp.exp2(sink - top)
    total = jnp.where(total > 0.0, total, 1.0)
    acc = acc * lax.broadcast_in_dim(value_factors[item.head] / total, acc.shape, [0])
    first = group * plan.tile_tokens
    count = jnp.clip(item.tokens - first, 0, plan.tile_tokens)
    for column in range(0, plan.width, COLUMNS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffers.staging.at[group][...] = acc[:, column : column + COLUMNS].astype(plan.out_dtype)
        plgpu.commit_smem()

        @pl.loop(0, count)
        def _(token, column=column):
            plgpu.copy_smem_to_gmem(
                buffers.staging.at[group, pl.ds(token * plan.rows_a_token, plan.group)],
                out.at[item.token + first + token, item.head, :, pl.ds(column, COLUMNS)],
            )


def _join(plan: Plan, items: Items, ragged: Ragged, scalars, parts, out) -> None:
    """Join the parts of every decode, one thread block a row and query head, into `out`."""
    num_seqs = ragged.kv_lens.shape[0]
    num_heads = plan.num_kv_heads * plan.group

    def body(starts, length, query_starts, kv_lens, *refs):
        _, window, _, value_factors, sinks, parts, sums, out = refs
        row, n = lax.axis_index("row"), lax.axis_index("query_head")
        head, query = lax.div(n, plan.group), lax.rem(n, plan.group)
        first, stop = starts[row], starts[row + 1]
        if plan.has_window:  # items before it were empty, and wrote nothing
            first += lax.div(jnp.maximum(kv_lens[row] - window[0], 0), length[0])

        def join(step, state):
            top, total, acc = state
            begin = first + step * JOINED_AT_ONCE
            found = []
            for item in range(JOINED_AT_ONCE):
                index = jnp.minimum(begin + item, stop - 1)
                for group in (0, 1):
                    weight = sums[index, head, group, query]
                    weight = jnp.where(begin + item < stop, weight, _MASKED)
                    found.append((weight, parts.at[index, head, group, query][...]))
            new_top = functools.reduce(jnp.maximum, [weight for weight, _ in found], top)
            shrink = jnp.exp2(top - new_top)
            total, acc = total * shrink, acc * shrink
            for weight, part in found:
                weight = jnp.exp2(weight - new_top)
                total, acc = total + weight, acc + weight * part
            return new_top, total, acc

        @pl.when(first < stop)
        def _():
            top = sinks[head, query] if plan.has_sinks else jnp.float32(_MASKED)
            total = jnp.float32(1.0 if plan.has_sinks else 0.0)
            acc = jnp.zeros(out.shape[-1:], jnp.float32)
            steps = lax.div(stop - first + JOINED_AT_ONCE - 1, JOINED_AT_ONCE)
            _, total, acc = lax.fori_loop(0, steps, join, (top, total, acc))
            acc = acc * (value_factors[head] / total)
            out.at[query_starts[row], head, query][...] = acc.astype(out.dtype)

    kernel = plgpu.kernel(
        body,
        grid=(num_seqs, num_heads),
        grid_names=("row", "query_head"),
        kernel_name="paged_attention_join",
        interpret=plan.interpret or None,
    )
    arrays = (items.starts, items.length, ragged.query_starts, ragged.kv_lens)
    kernel(*arrays, *scalars, *parts, out)
