"""What the gpu kernels work through: a ragged batch cut into items of similar cost.

`prepare` does not know the heads, so it lays out the items for every way of cutting that
`attend` may choose by them; those that it does not choose are dead code to XLA.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.layout import Ragged

# Persistent, one a multiprocessor of an H100 SXM, H200 or GH200. It doesn't follow the device: with
# fewer (H100 PCIe 114, H20 78) some blocks start when others end: right, but uneven.
THREAD_BLOCKS = 132
WAVES = 4  # work items a thread block, where there is enough to do
UNIT = 128  # context tokens: work is cut in multiples of them, and no buffer holds more
SHORTEST_ITEM = 4  # units, where enough items remain: joining parts costs more than it saves

_KV_HEADS = (1, 2, 4, 8)  # decodes: thread blocks that share a sequence without cutting it
_TILE_TOKENS = (1, 2, 4, 8, 16, 32, 64)  # prompts: tokens of a warpgroup


class Items(NamedTuple):
    """Work for one KV head. M: the static number of items, as many as there can be."""

    # int32[M, 6]: row, first token in the batch, its position, tokens, context start and stop
    table: jax.Array
    count: jax.Array  # int32[1]
    starts: jax.Array  # int32[S + 1]: decodes: the first item of each row
    length: jax.Array  # int32[1]: decodes: context tokens of an item


class Work(NamedTuple):
    """A batch cut into items, in every way `attend` may ask for."""

    write_blocks: jax.Array  # int32[T]: block of one layer, negative at padded tokens
    write_offsets: jax.Array  # int32[T]
    decodes: tuple[Items, ...]  # by _KV_HEADS
    prompts: tuple[Items, ...]  # by _TILE_TOKENS; empty in a batch of decodes only
    ragged: Ragged

    def decode_items(self, num_kv_heads: int) -> Items:
        """Items of the rows with one token, for a device with that many KV heads."""
        return self.decodes[sum(heads <= num_kv_heads for heads in _KV_HEADS) - 1]

    def prompt_items(self, tile_tokens: int) -> Items:
        """Items of the rows with several tokens, for warpgroups that hold that many."""
        return self.prompts[_TILE_TOKENS.index(tile_tokens)]


def prepare(ragged: Ragged, *, block_size: int, max_query_len: int) -> Work:
    """Cut a batch into work items: rows of one token by context, longer rows by queries."""
    num_seqs = ragged.kv_lens.shape[0]
    is_real = ragged.token_rows < num_seqs
    row = jnp.minimum(ragged.token_rows, num_seqs - 1)
    write_blocks = ragged.block_tables[row, ragged.positions // block_size]
    return Work(
        write_blocks=jnp.where(is_real, write_blocks, -1),
        write_offsets=ragged.positions % block_size,
        decodes=tuple(_decode_items(ragged, heads, block_size) for heads in _KV_HEADS),
        prompts=tuple(_prompt_items(ragged, tokens) for tokens in _TILE_TOKENS)
        if max_query_len > 1
        else (),
        ragged=ragged,
    )


def _decode_items(ragged: Ragged, num_kv_heads: int, block_size: int) -> Items:
    """Cut the context of rows with one token so that every thread block finds WAVES items."""
    num_seqs, num_blocks = ragged.block_tables.shape
    query_lens = ragged.query_starts[1:] - ragged.query_starts[:-1]
    lens = jnp.where(query_lens == 1, ragged.kv_lens, 0)
    target = -(-WAVES * THREAD_BLOCKS // num_kv_heads)
    units = -(-lens // UNIT)
    total = jnp.sum(units)
    longest = jnp.minimum(SHORTEST_ITEM, total // THREAD_BLOCKS)
    item_units = jnp.maximum(jnp.maximum(-(-total // target), longest), 1)
    most = num_seqs + max(target, THREAD_BLOCKS * 2)
    most = min(most, num_seqs * -(-num_blocks * block_size // UNIT))

    stops = jnp.cumsum(-(-units // item_units))
    starts = jnp.concatenate((jnp.zeros_like(stops[:1]), stops))
    row = _rows_of_items(stops, most)
    start = (jnp.arange(most, dtype=jnp.int32) - starts[row]) * item_units * UNIT
    stop = jnp.minimum(start + item_units * UNIT, lens[row])
    columns = (row, ragged.query_starts[row], lens[row] - 1, jnp.ones_like(row), start, stop)
    length = (item_units * UNIT).reshape(1)
    return Items(_table(columns), stops[-1:], starts.astype(jnp.int32), length)


def _prompt_items(ragged: Ragged, tile_tokens: int) -> Items:
    """Cut the queries of rows with several tokens, the most expensive items first."""
    num_seqs, num_tokens = ragged.kv_lens.shape[0], ragged.positions.shape[0]
    tile = 2 * tile_tokens  # two warpgroups
    query_lens = ragged.query_starts[1:] - ragged.query_starts[:-1]
    tiles = jnp.where(query_lens > 1, -(-query_lens // tile), 0)
    most = max(1, num_tokens // tile + min(num_seqs, num_tokens // 2))

    stops = jnp.cumsum(tiles)
    row = _rows_of_items(stops, most)
    index = jnp.arange(most, dtype=jnp.int32)
    offset = (index - (stops - tiles)[row]) * tile
    tokens = jnp.minimum(tile, query_lens[row] - offset)
    position = ragged.kv_lens[row] - query_lens[row] + offset
    stop = jnp.where(index < stops[-1], position + tokens, 0)
    columns = (row, ragged.query_starts[row] + offset, position, tokens, 0 * row, stop)
    order = jnp.argsort(-stop, stable=True)
    none = jnp.zeros(1, jnp.int32)
    return Items(_table(columns)[order], stops[-1:], none, none)


def _rows_of_items(stops: jax.Array, most: int) -> jax.Array:
    index = jnp.arange(most, dtype=jnp.int32)
    row = jnp.searchsorted(stops, index, side="right", method="compare_all")
    return jnp.minimum(row, stops.shape[0] - 1).astype(jnp.int32)


def _table(columns: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)
