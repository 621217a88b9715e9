"""Paged attention for TPUs (Pallas, Mosaic): one kernel for prompts, decodes and their mixes.

It reads the pool through the block table into a ring of fetches that run ahead of the products,
across sequences, and puts the step's keys and values into the pool's pages on their way through.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import tpu_plan
from pallas_kernels.paged_attention.layout import Options, product_dtype
from pallas_kernels.paged_attention.tpu_plan import Items, Plan, Work, prepare, unsupported

__all__ = ["attend", "prepare", "unsupported"]

_LANES = tpu_plan.LANES
_MASKED = -1e30  # finite, so that a row that sees nothing yet makes no NaN
_LOG2E = math.log2(math.e)


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
    words = _as_words(kv_new)
    plan = Plan(
        num_heads=num_heads,
        num_kv_heads=kv_pool.shape[1],
        width=width,
        block=kv_pool.shape[2],
        dtype=kv_pool.dtype,
        out_dtype=q.dtype,
        tile=0,
        windowed=options.window is not None,
        softcap=options.softcap,
        table_width=work.block_tables.shape[1],
    )
    call = functools.partial(_call, work=work, first_block=first_block, options=options)
    # Where a head's keys and values share a tile, zeros beside the query leave the values out.
    queries = q.astype(product_dtype(kv_pool.dtype))
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, plan.part - width)))

    stacked = _stack_heads(_of_decodes(queries, work), plan)
    result, kv_pool = call(plan, work.decodes, stacked, _of_decodes(words, work), kv_pool)
    result = _unstack_heads(result, plan)
    if work.prompts is None:
        is_real = jnp.arange(num_tokens) < work.decodes.offsets[-1]
        out = jnp.where(is_real[:, None, None], _resize(result, num_tokens), 0.0)
    else:
        out = jnp.zeros((num_tokens, num_heads, plan.part), q.dtype)
        out = out.at[work.decode_tokens].set(result, mode="drop")
        plan = dataclasses.replace(plan, tile=tpu_plan.query_tile(num_tokens))
        padding = -num_tokens % plan.tile
        flat = jnp.pad(queries, ((0, padding), (0, 0), (0, 0))).reshape(-1, num_heads * plan.part)
        by_head = jnp.pad(words, ((0, padding), (0, 0), (0, 0))).transpose(1, 0, 2)
        result, kv_pool = call(plan, work.prompts, flat, by_head, kv_pool)
        result = result[:num_tokens].reshape(out.shape)
        out = jnp.where(work.in_prompt[:, None, None], result, out)
    return out[..., plan.part - width :], kv_pool


def _of_decodes(x: jax.Array, work: Work) -> jax.Array:
    """What the decodes have of x, [T, ...]: where there are no prompts, decode i is token i."""
    if work.prompts is None:
        return _resize(x, work.decode_tokens.shape[0])
    return x[jnp.minimum(work.decode_tokens, x.shape[0] - 1)]


def _resize(x: jax.Array, length: int) -> jax.Array:
    """The first axis cut or padded with zeros, neither of which moves what stays."""
    x = x[:length]
    return jnp.pad(x, ((0, length - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def _stack_heads(q: jax.Array, plan: Plan) -> jax.Array:
    """[D, N, part] as [D, groups, rows, lanes]: each head's queries beside zeros.

    A row then meets the keys of its own head only, in products that a whole stack shares.
    """
    q = q.reshape(q.shape[0], plan.num_groups, plan.stack, plan.group, 1, plan.part)
    own = jnp.eye(plan.stack, dtype=bool)[:, None, :, None]
    q = jnp.where(own, q, jnp.zeros_like(q)).reshape(*q.shape[:2], -1, plan.lanes)
    return jnp.pad(q, ((0, 0), (0, 0), (0, plan.rows - q.shape[2]), (0, 0)))


def _unstack_heads(out: jax.Array, plan: Plan) -> jax.Array:
    """The inverse: [D, N, part], of each row what the values of its own head made."""
    out = out[:, :, : plan.stack * plan.group]
    out = out.reshape(*out.shape[:2], plan.stack, plan.group, plan.stack, plan.part)
    own = [out[:, :, head, :, head] for head in range(plan.stack)]
    return jnp.stack(own, axis=2).reshape(out.shape[0], plan.num_heads, plan.part)


def _as_words(kv_new: jax.Array) -> jax.Array:
    """Each element as an int32 that repeats its bits: merging it into a packed tile is then one
    masked copy of words, exact for every dtype."""
    bits = 8 * kv_new.dtype.itemsize
    raw = jax.lax.bitcast_convert_type(kv_new, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    repeat = sum(1 << shift for shift in range(0, 32, bits))
    return jax.lax.bitcast_convert_type(raw * jnp.uint32(repeat), jnp.int32)


def _call(
    plan: Plan, items: Items, q, words, kv_pool, *, work: Work, first_block, options: Options
):
    """The kernel over one work list.

    Args:
      q: [D, groups, rows, lanes] of decodes, or [T, N * lanes] of tiles.
      words: int32[D, K, 2W] or int32[K, T, 2W], see `_as_words`.
    """
    ones = jnp.ones((plan.num_kv_heads,), jnp.float32)
    k_scales = ones if options.k_scales is None else options.k_scales
    v_scales = ones if options.v_scales is None else options.v_scales
    # Powers of two are what the chip computes; a cap is applied to scores in units of itself.
    per_score = options.scale * (_LOG2E if plan.softcap is None else 1 / plan.softcap)

    def by_row(of_heads):  # as each group's rows have it, in all lanes
        of_heads = of_heads.reshape(plan.num_groups, -1, 1)
        of_heads = jnp.pad(of_heads, ((0, 0), (0, -of_heads.shape[1] % 8), (0, 0)))
        return jnp.broadcast_to(of_heads, (*of_heads.shape[:2], _LANES))

    repeats = plan.group if plan.tile == 0 else 1
    factors = [by_row(jnp.repeat(x, repeats)) for x in (k_scales * per_score, v_scales)]
    inputs = [q, words, *factors]
    whole = [pl.BlockSpec(x.shape, lambda i, *_: (0, 0, 0)) for x in factors]
    if options.sinks is not None:
        inputs.append(by_row(options.sinks * _LOG2E))
        whole.append(pl.BlockSpec(inputs[-1].shape, lambda i, *_: (0, 0, 0)))
    # Tables stay in the device's memory, however large: each fetch takes its part of a row.
    # Only the addition differs from layer to layer: the rest leaves the layer loop.
    tables = jnp.pad(work.block_tables, ((0, 0), (0, plan.table_padding)))
    inputs += [first_block + tables.reshape(-1, 1, plan.table_lanes), kv_pool]
    if plan.tile:
        q_spec = pl.BlockSpec((plan.tile, q.shape[1]), lambda i, *_: (i, 0))
        new_spec = pl.BlockSpec(
            (words.shape[0], plan.tile, words.shape[2]), lambda i, *_: (0, i, 0)
        )
    else:
        q_spec = pl.BlockSpec((tpu_plan.DECODE_ROWS, *q.shape[1:]), lambda i, *_: (i, 0, 0, 0))
        new_spec = pl.BlockSpec((tpu_plan.DECODE_ROWS, *words.shape[1:]), lambda i, *_: (i, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scratch = [
        pltpu.VMEM(plan.kv_shape, plan.dtype),
        pltpu.VMEM((plan.num_groups, plan.rows, _LANES), jnp.float32),
        pltpu.VMEM((plan.num_groups, plan.rows, _LANES), jnp.float32),
        pltpu.VMEM((plan.num_groups, plan.rows, plan.lanes), jnp.float32),
        pltpu.SemaphoreType.DMA((plan.slots,)),
        pltpu.SemaphoreType.DMA(()),
        pltpu.SMEM(((plan.slots + 1) * plan.table_lanes,), jnp.int32),
        pltpu.SemaphoreType.DMA((plan.slots + 1,)),
        pltpu.SMEM((7,), jnp.int32),
    ]
    if plan.tile:
        scratch.append(pltpu.VMEM((plan.num_groups, plan.rows, plan.lanes), q.dtype))
        scratch.append(pltpu.VMEM(plan.new_shape, jnp.int32))
    window = jnp.int32(0 if options.window is None else options.window)
    scalars = (*items, window[None])
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, has_sinks=options.sinks is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(items.offsets.shape[0] - 1,),
            in_specs=[q_spec, new_spec, *whole, anywhere, anywhere],
            out_specs=[q_spec, anywhere],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, plan.out_dtype),
            jax.ShapeDtypeStruct(kv_pool.shape, kv_pool.dtype),
        ],
        input_output_aliases={len(scalars) + len(inputs) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),  # one core: the ring crosses grid steps
            vmem_limit_bytes=tpu_plan.vmem_bytes() * 15 // 16,
            disable_bounds_checks=True,  # a third of a transfer's start; the interpreter checks
        ),
        interpret=options.interpret,
        name=f"paged_attention_{'prompts' if plan.tile else 'decodes'}",
    )(*scalars, *inputs)


# The cursors' places in scalar memory: what is fetched next and where to, where what is computed
# lies, open writes.
_ITEM, _INDEX, _FETCH_SLOT, _FETCH_ENTRY, _SLOT, _ENTRY, _WRITES = range(7)


def _kernel(
    rows, starts, counts, positions, offsets, window,  # int32, see Items
    q,  # [DECODE_ROWS, groups, rows, lanes] or [tile, N * lanes]
    new,  # int32[DECODE_ROWS, K, 2W] or int32[K, tile, 2W]
    score_factors, out_factors,  # float32[groups, 8 or rows, 128]
    *refs,
    plan: Plan,
    has_sinks: bool,
):  # fmt: skip
    sinks = refs[0] if has_sinks else None  # float32[groups, heads, 128]
    # `pool` is the output; the input that it is aliased with is not touched.
    tables, _, out, pool, kv, top, total, acc, fetched, written, *refs = refs[has_sinks:]
    entries, named, cursor, *of_tile = refs
    q_rows, new_rows = of_tile or (q, new)  # of tiles only
    step, num_steps = pl.program_id(0), pl.num_programs(0)
    num_items = offsets[num_steps]
    shape = (plan.rows, plan.chunk)

    def first_seen(item):
        return jnp.maximum(positions[item] - window[0] + 1, 0) if plan.windowed else 0

    def stop_of(item):
        return positions[item] + counts[item]

    def first_fetch(item):
        return _div(first_seen(item), plan.fetch)

    def pages_of(item, index):
        """The pages of an item's fetch that hold something it sees or writes."""
        first = jnp.maximum(index * plan.pages, _div(first_seen(item), plan.block))
        return first, jnp.minimum((index + 1) * plan.pages, _cdiv(stop_of(item), plan.block))

    # Fetching: a cursor that runs ahead of the products over the same items.

    def copy_entries(item, index, slot):
        """What names a fetch's pages: the part of the row's table that they are in."""
        part = _div(index * plan.pages, plan.table_lanes)
        source = tables.at[rows[item] * plan.table_parts + part, 0]
        target = entries.at[pl.ds(slot * plan.table_lanes, plan.table_lanes)]
        return pltpu.make_async_copy(source, target, named.at[slot])

    def start_fetch():
        item, index = cursor[_ITEM], cursor[_INDEX]
        slot, entry_slot = cursor[_FETCH_SLOT], cursor[_FETCH_ENTRY]

        @pl.when(item < num_items)
        def _():
            first, stop = pages_of(item, index)
            local = first - index * plan.pages
            entry = entry_slot * plan.table_lanes + (first & (plan.table_lanes - 1))

            def start(page, count):
                pages = kv.at[slot, pl.ds(local + page, count)]
                for i in range(count):
                    block = entries[entry + page + i]
                    pltpu.make_async_copy(pool.at[block], pages.at[i], fetched.at[slot]).start()

            copy_entries(item, index, entry_slot).wait()
            many = _div(stop - first, plan.unroll)
            pl.loop(0, many)(lambda turn: start(turn * plan.unroll, plan.unroll))
            pl.loop(many * plan.unroll, stop - first)(lambda page: start(page, 1))
            is_last = (index + 1) * plan.fetch >= stop_of(item)
            following = jnp.minimum(item + 1, num_items - 1)
            cursor[_ITEM] = jnp.where(is_last, item + 1, item)
            cursor[_INDEX] = jnp.where(is_last, first_fetch(following), index + 1)
            cursor[_FETCH_SLOT] = _next(slot, plan.slots)
            cursor[_FETCH_ENTRY] = _next(entry_slot, plan.slots + 1)
            start_entries()

    def start_entries():
        """Of the next fetch, so that they are there when it starts."""

        @pl.when(cursor[_ITEM] < num_items)
        def _():
            copy_entries(cursor[_ITEM], cursor[_INDEX], cursor[_FETCH_ENTRY]).start()

    def wait_fetch(item, index, slot):
        first, stop = pages_of(item, index)

        def wait(count):  # for as many bytes as so many pages have
            pages = kv.at[slot, pl.ds(0, count)]
            pltpu.make_async_copy(pages, pages, fetched.at[slot]).wait()

        many = _div(stop - first, plan.unroll)
        pl.loop(0, many)(lambda _: wait(plan.unroll))
        pl.loop(many * plan.unroll, stop - first)(lambda _: wait(1))

    # Writing: new tokens go into the fetched pages, and the tiles they touch back to the pool.

    def tile_of(page, row):
        return page.at[:, pl.ds(pl.multiple_of(row, plan.merge_rows), plan.merge_rows), :]

    def merge(item, index, slot):
        """Put the new tokens of a fetch in their places and start writing them."""
        position, base = positions[item], index * plan.fetch
        first = jnp.maximum(_div(position, plan.merge_rows) * plan.merge_rows, base)

        @pl.loop(first, jnp.minimum(stop_of(item), base + plan.fetch), step=plan.merge_rows)
        def _(place):
            page, row = _div(place, plan.block), place & (plan.block - 1)
            here = tile_of(kv.at[slot, page - index * plan.pages], row)

            @pl.loop(0, plan.num_kv_heads)
            def _(head):
                words = pltpu.bitcast(here[head], jnp.int32)
                pack = plan.merge_rows // words.shape[0]
                for i in range(pack):  # word by word: token `pack * sublane + i`
                    token = jax.lax.broadcasted_iota(jnp.int32, words.shape, 0) * pack + i
                    is_new = (place + token >= position) & (place + token < stop_of(item))
                    fresh = new_words(item, head, place - position + i, pack, words.shape)
                    mine = _bits(i, pack)
                    words = jnp.where(is_new, (words & ~mine) | (fresh & mine), words)
                here[head] = pltpu.bitcast(words, plan.dtype)

            here_in_row = page & (plan.table_lanes - 1)
            block = entries[cursor[_ENTRY] * plan.table_lanes + here_in_row]
            pltpu.make_async_copy(here, tile_of(pool.at[block], row), written).start()
            cursor[_WRITES] += 1

    def new_words(item, head, first, stride, shape):
        """Every so many of the item's tokens, from `first`, which may lie before the item."""
        if not plan.tile:
            return jnp.broadcast_to(new[starts[item], pl.ds(head, 1), :], shape)
        first = first + starts[item] + 32  # new_rows begins with so many rows of room
        pieces = []
        for i in range(new_rows.shape[1]):
            words = new_rows.at[head, i]
            if stride > 1:
                pieces.append(words[pl.ds(first, shape[0], stride), :])
            else:  # an unaligned load, which the chip lacks: two tiles, rolled
                aligned = pl.multiple_of(_div(first, 8) * 8, 8)
                both = words[pl.ds(aligned, 16), :]
                pieces.append(pltpu.roll(both, 16 - (first - aligned), 0)[:8])
        return jnp.concatenate(pieces, axis=1)

    def wait_writes():
        @pl.loop(0, cursor[_WRITES])
        def _(_):
            some = tile_of(kv.at[0, 0], 0)
            pltpu.make_async_copy(some, some, written).wait()

        cursor[_WRITES] = 0

    # Products: an online softmax (Milakov & Gimelshein, 2018), chunk by chunk.

    def attend_fetch(item, index, slot):
        """All chunks of a fetch; only those at an end of what is visible need a mask."""
        base = index * plan.fetch
        stop = _cdiv(jnp.minimum(stop_of(item) - base, plan.fetch), plan.chunk)
        start = _div(jnp.maximum(first_seen(item) - base, 0), plan.chunk)
        whole_stop = jnp.clip(_div(positions[item] + 1 - base, plan.chunk), start, stop)
        whole = start
        if plan.windowed:  # the last query's window begins last
            whole = _cdiv(jnp.maximum(stop_of(item) - window[0] - base, 0), plan.chunk)
            whole = jnp.clip(whole, start, whole_stop)
            pl.loop(start, whole)(lambda i: attend_chunk(item, base, slot, i, True))
        pl.loop(whole, whole_stop)(lambda i: attend_chunk(item, base, slot, i, False))
        pl.loop(whole_stop, stop)(lambda i: attend_chunk(item, base, slot, i, True))

    def attend_chunk(item, base, slot, chunk, masked):
        base = base + chunk * plan.chunk

        def context(head):
            """Keys and values of one KV head: [chunk, 2W]."""
            pages = plan.chunk // plan.block
            tile = kv[slot, pl.ds(chunk * pages, pages), head]
            return tile.reshape(plan.chunk, 2 * plan.width).astype(q.dtype)

        def score(group):
            # Head by head: a row's queries are zero but for its own, so the sum has one term.
            query = q_rows[group] if plan.tile else q[starts[item], group]
            scores = functools.reduce(
                jnp.add,
                (
                    _dot(
                        query[:, i * plan.part : (i + 1) * plan.part],
                        context(group * plan.stack + i)[:, : plan.part],
                        1,
                    )
                    for i in range(plan.stack)
                ),
            )
            scores = scores * factor(score_factors, group)
            if plan.softcap is not None:
                scores = jnp.tanh(scores) * (plan.softcap * _LOG2E)
            return jnp.where(visible(), scores, _MASKED) if masked else scores

        def visible():
            column = base + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            last = positions[item]  # the row's own position
            if plan.tile:
                row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) & (plan.tile - 1)
                last = last - starts[item] + row
            seen = column <= last
            return seen & (column > last - window[0]) if plan.windowed else seen

        def add(group, scores):
            """Fold the scores and the values they weigh into the sums."""
            old_top = top[group]  # the same in all lanes
            new_top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp2(scores - _tile_lanes(new_top, plan.chunk))
            shrink = jnp.exp2(old_top - new_top)
            top[group] = new_top
            # Each lane sums its own columns: what crosses lanes is left to the end.
            parts = [weights[:, i : i + _LANES] for i in range(0, plan.chunk, _LANES)]
            total[group] = total[group] * shrink + functools.reduce(jnp.add, parts)
            heads = range(plan.stack)
            values = [context(group * plan.stack + i)[:, -plan.part :] for i in heads]
            values = jnp.concatenate(values, axis=1)
            if masked:  # rows that nobody wrote may hold NaN, and 0 * NaN is NaN
                row = base + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
                is_context = (row >= first_seen(item)) & (row < stop_of(item))
                values = jnp.where(is_context, values, jnp.zeros_like(values))
            new = _dot(weights.astype(q.dtype), values, 0)
            acc[group] = acc[group] * _tile_lanes(shrink, plan.lanes) + new

        # All products of scores come first: they hide the latency of each other's softmax. A
        # chunk with a mask comes once a sequence, and its masks would spill if they were many.
        together = 1 if masked or plan.tile else math.gcd(plan.num_groups, 4)

        @pl.loop(0, plan.num_groups, step=together)
        def _(first):
            groups = [first + i for i in range(together)]
            for group, scores in zip(groups, [score(g) for g in groups], strict=True):
                add(group, scores)

    def factor(factors, group):
        return factors[group, :1, :1] if plan.tile else factors[group, :, :1]

    def start_item():
        top[...] = jnp.full(top.shape, _MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        if sinks is None:
            return
        total[...] = jnp.full(total.shape, 1 / _LANES, jnp.float32)  # together exp(0)
        if not plan.tile:
            top[...] = sinks[...]
            return
        for head in range(plan.num_heads):
            group, i = divmod(head, plan.group)
            here = (plan.tile, _LANES)
            top[group, pl.ds(i * plan.tile, plan.tile), :] = jnp.broadcast_to(
                sinks[group, i : i + 1, :], here
            )

    def finish_item(item):
        for group in range(plan.num_groups):
            divisor = jnp.maximum(jnp.sum(total[group], axis=1, keepdims=True), 1e-30)
            result = acc[group] * (factor(out_factors, group) / divisor)
            if not plan.tile:
                out[starts[item], group] = result.astype(out.dtype)
                continue
            row = jax.lax.broadcasted_iota(jnp.int32, (plan.tile, plan.lanes), 0)
            is_mine = (row >= starts[item]) & (row < starts[item] + counts[item])
            for i in range(plan.group):
                lanes = pl.ds((group * plan.group + i) * plan.lanes, plan.lanes)
                mine = result[i * plan.tile : (i + 1) * plan.tile].astype(out.dtype)
                out[:, lanes] = jnp.where(is_mine, mine, out[:, lanes])

    def load_tile():
        """Sort a tile's queries by head, and its new words so that any row can be a first one."""
        for head in range(plan.num_heads):
            group, i = divmod(head, plan.group)
            lanes = pl.ds(head * plan.lanes, plan.lanes)
            q_rows[group, pl.ds(i * plan.tile, plan.tile), :] = q[:, lanes]
        for head in range(plan.num_kv_heads):
            for i in range(new_rows.shape[1]):
                words = new[head, :, pl.ds(i * _LANES, _LANES)]
                new_rows[head, i, pl.ds(32, plan.tile), :] = words

    @pl.when(step == 0)
    def _():
        for place in (_ITEM, _FETCH_SLOT, _FETCH_ENTRY, _SLOT, _ENTRY, _WRITES):
            cursor[place] = 0
        cursor[_INDEX] = first_fetch(0)
        start_entries()
        pl.loop(0, plan.slots - 1)(lambda _: start_fetch())

    if plan.tile:
        pl.when(offsets[step] < offsets[step + 1])(load_tile)

    @pl.loop(offsets[step], offsets[step + 1])
    def _(item):
        start_item()

        @pl.loop(first_fetch(item), _cdiv(stop_of(item), plan.fetch))
        def _(index):
            slot = cursor[_SLOT]
            wait_writes()  # out of the slot that the next fetch overwrites
            if not plan.tile:
                start_fetch()
            wait_fetch(item, index, slot)

            @pl.when((index + 1) * plan.fetch > positions[item])
            def _():
                merge(item, index, slot)

            if plan.tile:  # the row's next item may fetch what this one writes
                ahead = jnp.minimum(cursor[_ITEM], num_items - 1)
                pl.when((ahead != item) & (rows[ahead] == rows[item]))(wait_writes)
                start_fetch()
            attend_fetch(item, index, slot)
            cursor[_SLOT] = _next(slot, plan.slots)
            cursor[_ENTRY] = _next(cursor[_ENTRY], plan.slots + 1)

        finish_item(item)

    pl.when(step == num_steps - 1)(wait_writes)


def _bits(index: int, pack: int) -> jax.Array:
    """The bits of one of the `pack` elements of a word."""
    width = 32 // pack
    mask = ((1 << width) - 1) << (index * width)
    return jnp.int32(mask - (1 << 32) if mask >> 31 else mask)


def _next(slot, slots: int):
    return jnp.where(slot + 1 == slots, 0, slot + 1)


def _div(x, y: int):
    """x // y for a power of two: one shift, where floor division of a signed number is many."""
    return jnp.right_shift(x, y.bit_length() - 1)


def _cdiv(x, y: int):
    return _div(x + (y - 1), y)


def _tile_lanes(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128], the same in all lanes, as [rows, width]: registers are reused, not copied."""
    return jnp.concatenate([x] * (width // _LANES), axis=1)


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """The last axis of x with one of y, in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
