"""What the TPU kernel is told before it runs: its work list, made once a step on the device, and
its static plan, whose sizes follow from the target's vector memory instead of from tables.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.layout import Ragged, Shape, head_width, product_dtype

LANES = 128
DECODE_ROWS = 8  # decodes a grid step
DECODE_SLOTS = 3  # fetches in the ring
PROMPT_SLOTS = 2  # exactly: a tile may read what the one before it writes, and the kernel holds
# back the next fetch for that, no later ones; prompts are bound by products anyway
FETCH_BYTES, FETCH_TOKENS = 4 * 2**20, 4096  # of one fetch, at most
CHUNK = 512  # context tokens in a product; one KV head alone needs more to hide its latency
MAX_SCORES = 2**19  # of one product, where a chunk can be that short
BLOCK_SIZES = (16, 32, 64, 128, 256)


class Items(NamedTuple):
    """The kernel's work list. An item is a run of tokens of one row within one grid step."""

    rows: jax.Array  # int32[I]
    starts: jax.Array  # int32[I]: its first token, counted within the grid step
    counts: jax.Array  # int32[I]: its tokens
    positions: jax.Array  # int32[I]: the first token's position in the sequence
    offsets: jax.Array  # int32[steps + 1]: grid step i does items offsets[i] to offsets[i + 1]


class Work(NamedTuple):
    """A batch split into decodes, rows of one token, and tiles of prompts."""

    decodes: Items
    decode_tokens: jax.Array  # int32[D]: the batch's token of each decode; T at padding
    prompts: Items | None  # None in a program of decodes only
    in_prompt: jax.Array  # bool[T]
    block_tables: jax.Array  # int32[S, P]


def prepare(ragged: Ragged, *, block_size: int, max_query_len: int) -> Work:
    """Sort a batch into decodes and tiles of prompts."""
    del block_size
    num_seqs, num_tokens = ragged.kv_lens.shape[0], ragged.token_rows.shape[0]
    query_lens = ragged.query_starts[1:] - ragged.query_starts[:-1]
    num_decodes = jnp.sum(query_lens == 1, dtype=jnp.int32)
    order = jnp.argsort(query_lens != 1, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, -num_seqs % DECODE_ROWS))
    index = jnp.arange(order.shape[0], dtype=jnp.int32)
    steps = jnp.arange(order.shape[0] // DECODE_ROWS + 1, dtype=jnp.int32)
    row = jnp.minimum(ragged.token_rows, num_seqs - 1)
    return Work(
        decodes=Items(
            rows=order,
            starts=index % DECODE_ROWS,
            counts=jnp.ones_like(order),
            positions=ragged.kv_lens[order] - 1,
            offsets=jnp.minimum(steps * DECODE_ROWS, num_decodes),
        ),
        decode_tokens=jnp.where(index < num_decodes, ragged.query_starts[order], num_tokens),
        prompts=None if max_query_len == 1 else _prompt_items(ragged, query_lens),
        in_prompt=(ragged.token_rows < num_seqs) & (query_lens[row] > 1),
        block_tables=ragged.block_tables,
    )


def _prompt_items(ragged: Ragged, query_lens: jax.Array) -> Items:
    """One item for each pair of a row of several tokens and a tile that has some of them."""
    num_tokens, num_seqs = ragged.token_rows.shape[0], ragged.kv_lens.shape[0]
    tile = query_tile(num_tokens)
    num_tiles = -(-num_tokens // tile)
    first = ragged.query_starts[:-1] // tile
    last = jnp.maximum(ragged.query_starts[1:] - 1, 0) // tile
    pieces = jnp.where(query_lens > 1, last - first + 1, 0)
    stops = jnp.cumsum(pieces, dtype=jnp.int32)
    index = jnp.arange(num_tiles + min(num_seqs, num_tokens // 2), dtype=jnp.int32)
    row = jnp.searchsorted(stops, index, side="right").astype(jnp.int32)
    is_real = row < num_seqs
    row = jnp.minimum(row, num_seqs - 1)
    tiles = first[row] + index - (stops - pieces)[row]
    start = jnp.maximum(ragged.query_starts[row], tiles * tile)
    before = ragged.kv_lens[row] - query_lens[row]
    of_step = jnp.where(is_real, tiles, num_tiles)
    return Items(
        rows=row,
        starts=start - tiles * tile,
        counts=jnp.minimum(ragged.query_starts[row + 1], (tiles + 1) * tile) - start,
        positions=before + start - ragged.query_starts[row],
        offsets=jnp.searchsorted(of_step, jnp.arange(num_tiles + 1)).astype(jnp.int32),
    )


def vmem_bytes() -> int:
    """Vector memory of the target; where the kernel is interpreted, the least of any TPU."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 16 * 2**20


def vmem_budget() -> int:
    """What `Plan.vmem` may come to. The compiler spills, pads and keeps arrays of its own there:
    it took up to a fifth more than the plan in the shapes that were compiled."""
    return vmem_bytes() * 3 // 4


def query_tile(num_tokens: int) -> int:
    """Tokens of a tile of prompts, a power of two: as many as vector memory has room for.

    Every tile fetches the context anew. Chips do some 500 operations in the time of a byte, so
    it takes the rows of 128 tokens or more to be bound by products and not by fetches.
    """
    return min(2 * vmem_bytes() // 2**20, max(16, pl.next_power_of_2(num_tokens)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is static about one call of the kernel. Sizes follow from the target's memory."""

    num_heads: int
    num_kv_heads: int
    width: int  # of a head's keys in the pool
    block: int  # tokens of a page
    dtype: jnp.dtype  # of the pool
    out_dtype: jnp.dtype
    tile: int  # tokens of a grid step that lie side by side; 0: `DECODE_ROWS` decodes
    windowed: bool = False
    softcap: float | None = None
    table_width: int = 0  # entries of a row of the block table

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def stack(self) -> int:
        """KV heads whose decode queries fill the 8 rows of a register together."""
        return 1 if self.tile else math.gcd(max(1, 8 // self.group), self.num_kv_heads)

    @property
    def num_groups(self) -> int:
        """Stacks of KV heads."""
        return self.num_kv_heads // self.stack

    @property
    def rows(self) -> int:
        """Query rows that one product takes: tokens x heads of a group, or heads of a stack."""
        return self.group * self.tile if self.tile else -(-self.stack * self.group // 8) * 8

    @property
    def part(self) -> int:
        """Lanes of one head's queries: a tile of keys *and* values, or the keys' own tiles."""
        return 2 * self.width if self.width < LANES else self.width

    @property
    def lanes(self) -> int:
        return self.stack * self.part

    @property
    def token_bytes(self) -> int:
        return self.num_kv_heads * 2 * self.width * self.dtype.itemsize

    @property
    def slots(self) -> int:
        return PROMPT_SLOTS if self.tile else DECODE_SLOTS

    @property
    def chunk(self) -> int:
        """Context tokens of one product: at least a page, and the lanes of one register."""
        chunk = CHUNK if self.tile or self.num_kv_heads > 1 else 2 * CHUNK
        while chunk > LANES and (
            chunk * self.token_bytes > self._fetch_bytes or chunk * self.rows > MAX_SCORES
        ):
            chunk //= 2
        return max(chunk, self.block)

    @property
    def pages(self) -> int:
        """Pages of one fetch, a power of two. Long fetches cost less per token to start and to
        wait for, but more is in flight, and a short sequence fills only a part of one."""
        fetch = self.chunk
        while 2 * fetch * self.token_bytes <= self._fetch_bytes and fetch < FETCH_TOKENS:
            fetch *= 2
        return fetch // self.block

    @property
    def _fetch_bytes(self) -> int:
        return min(vmem_bytes() // (3 * self.slots), FETCH_BYTES)  # a third holds the ring

    @property
    def fetch(self) -> int:
        return self.pages * self.block

    @property
    def unroll(self) -> int:
        """Pages whose transfers start, or are waited for, in one piece of code."""
        return min(self.pages, 16)

    @property
    def table_lanes(self) -> int:
        """Entries of a block table that are read at a time: those of a fetch, whole lanes."""
        return max(LANES, self.pages)

    @property
    def table_parts(self) -> int:
        """Of so many entries in a row of the table."""
        return -(-self.table_width // self.table_lanes)

    @property
    def table_padding(self) -> int:
        return self.table_parts * self.table_lanes - self.table_width

    @property
    def merge_rows(self) -> int:
        """Tokens of one tile of the pool, the least that can be written."""
        return min(32 // self.dtype.itemsize, self.block)

    @property
    def kv_shape(self) -> tuple[int, ...]:
        return (self.slots, self.pages, self.num_kv_heads, self.block, 2 * self.width)

    @property
    def new_shape(self) -> tuple[int, ...]:
        """Of a tile's new keys and values, with room before and after for a tile of the pool."""
        return (self.num_kv_heads, 2 * self.width // LANES, self.tile + 64, LANES)

    @property
    def vmem(self) -> int:
        """Bytes of vector memory it takes, with scores and double-buffered blocks."""
        rows = self.num_groups * self.rows
        itemsize = product_dtype(self.dtype).itemsize
        sums = rows * (self.lanes + 2 * LANES) * 4
        queries = rows * self.lanes * itemsize
        out = rows * self.lanes * self.out_dtype.itemsize
        blocks = 2 * (queries + out) * (1 if self.tile else DECODE_ROWS)
        new = 2 * self.tile * self.num_kv_heads * 2 * self.width + math.prod(self.new_shape)
        new = 4 * new if self.tile else 0
        own = queries if self.tile else 0
        scores = 3 * self.rows * self.chunk * 4
        return math.prod(self.kv_shape) * self.dtype.itemsize + sums + blocks + new + own + scores


def unsupported(shape: Shape, device_kind: str) -> str | None:
    """Why the kernel can't serve `shape`, or None."""
    if shape.block_size not in BLOCK_SIZES:
        return f"blocks of {shape.block_size} tokens; it takes {', '.join(map(str, BLOCK_SIZES))}"
    if shape.head_dim > 256:
        return f"head dim {shape.head_dim}; it takes up to 256"
    needed = _needed(shape, shape.block_size)
    if needed <= vmem_budget():
        return None
    fitting = [block for block in BLOCK_SIZES if _needed(shape, block) <= vmem_budget()]
    smaller = f"take blocks of {fitting[-1]} or " if fitting else ""
    return (
        f"{shape.num_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim} with "
        f"blocks of {shape.block_size} tokens take {needed / 2**20:.1f} MiB of vector memory, but "
        f"{device_kind or 'the target'} has {vmem_budget() / 2**20:.1f} for it; {smaller}split "
        "the heads over more chips (mesh.tensor)"
    )


def _needed(shape: Shape, block: int) -> int:
    """Vector memory for decodes or for the largest tile of prompts, whichever takes more."""
    return max(
        Plan(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            width=head_width(shape.head_dim, "tpu"),
            block=block,
            dtype=jnp.dtype(shape.cache_dtype),
            out_dtype=jnp.dtype(shape.dtype),
            tile=tile,
        ).vmem
        for tile in (0, query_tile(2**20))
    )
