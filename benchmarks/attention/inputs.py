"""A workload as arrays on the device: random values, blocks in random places.

Everything follows from a seed, so that a pool that was donated can be made again to compare with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention.workloads import Heads, Workload

INT8_SCALE = 4 / 127  # four standard deviations of what is stored


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One workload for one head shape. Legend: T tokens, S rows, P table columns, L layers."""

    workload: Workload
    heads: Heads
    block_size: int
    num_layers: int  # the pool has as many, so that no cache holds it
    seed: int
    cache_dtype: str
    q: jax.Array  # [T, N, H]
    k: jax.Array  # [T, K, H]
    v: jax.Array
    ragged: pa.Ragged
    options: dict[str, Any]  # of `paged_attention`: kv_scales_2K, window, softcap, sinks_N
    is_poisoned: bool  # what no context holds is NaN

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.heads.head_dim**-0.5

    @property
    def num_blocks(self) -> int:
        """Of one layer: as many as the rows use, and one."""
        return count_blocks(self.workload, self.block_size)

    @property
    def max_query_len(self) -> int:
        """What `prepare` is promised."""
        return 1 if self.workload.is_decode else self.workload.num_tokens

    @property
    def bytes_moved(self) -> int:
        """See `Workload.bytes_moved`."""
        return self.workload.bytes_moved(
            self.heads,
            itemsize=self.q.dtype.itemsize,
            cache_itemsize=jnp.dtype(self.cache_dtype).itemsize,
        )

    def pool(self, backend: pa.Backend) -> jax.Array:
        """The pool before the step, always the same values, as wide as `backend` wants it."""
        width = pa.head_width(self.heads.head_dim, backend)
        pool = _random_pool(
            jax.random.key(self.seed),
            (self.num_layers * self.num_blocks, self.heads.num_kv_heads, self.block_size),
            self.heads.head_dim,
            width,
            self.cache_dtype,
        )
        if self.is_poisoned and self.cache_dtype != "int8":
            held = jnp.asarray(self._held())[:, None, :, None]
            pool = jnp.where(held, pool, jnp.asarray(math.nan, pool.dtype))
        return _as_held(pool, backend)

    def _held(self) -> np.ndarray:
        """bool[L * blocks, B]: what the rows' contexts hold before the step, in every layer."""
        held = np.zeros((self.num_blocks, self.block_size), np.bool_)
        tables = np.asarray(self.ragged.block_tables)
        for table, (_, before) in zip(tables, self.workload.rows, strict=True):
            positions = np.arange(before)
            held[table[positions // self.block_size], positions % self.block_size] = True
        return np.tile(held, (self.num_layers, 1))

    def contiguous(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values after the step as [S, C, K, H], C the longest context in whole blocks:
        what kernels without pages read."""
        pool = written_pool(self, "xla")
        return _gather(pool, self.ragged.block_tables, self.heads.head_dim)


def make_inputs(
    workload: Workload,
    heads: Heads,
    *,
    seed: int,
    block_size: int,
    dtype: str = "bfloat16",
    cache_dtype: str = "bfloat16",
    num_layers: int = 1,
    options: dict[str, Any] | None = None,
    is_poisoned: bool = False,
) -> Inputs:
    """Draw a workload's arrays. Blocks of all rows are shuffled over the pool.

    Args:
      workload, heads: what is drawn.
      seed: of everything.
      block_size, num_layers: of the pool.
      dtype, cache_dtype: of queries, keys and values, and of the pool; int8 gets scales.
      options: of `paged_attention`, such as a window.
      is_poisoned: NaN wherever nothing is held; for small pools, as it takes a mask made on the
        host.
    """
    rng = np.random.default_rng(seed)
    news = np.array([new for new, _ in workload.rows], np.int32)
    lens = np.array(workload.kv_lens, np.int32)
    used = -(-lens // block_size)
    order = rng.permutation(count_blocks(workload, block_size)).astype(np.int32)
    tables = np.zeros((len(lens), max(1, int(used.max()))), np.int32)
    stops = np.cumsum(used)
    for row, (count, stop) in enumerate(zip(used, stops, strict=True)):
        tables[row, :count] = order[stop - count : stop]
    starts = np.concatenate(([0], np.cumsum(news))).astype(np.int32)
    rows = np.repeat(np.arange(len(news), dtype=np.int32), news)
    first = np.repeat(lens - news - starts[:-1], news)
    ragged = pa.Ragged(
        token_rows=jnp.asarray(rows),
        positions=jnp.asarray(first + np.arange(len(rows), dtype=np.int32)),
        query_starts=jnp.asarray(starts),
        kv_lens=jnp.asarray(np.where(news > 0, lens, 0).astype(np.int32)),
        block_tables=jnp.asarray(tables),
    )

    def values(name: int, num_heads: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), name)
        shape = (workload.num_tokens, num_heads, heads.head_dim)
        return jax.random.normal(key, shape, jnp.dtype(dtype))

    options = dict(options or {})
    if cache_dtype == "int8":
        options["kv_scales_2K"] = jnp.full((2, heads.num_kv_heads), INT8_SCALE, jnp.float32)
    return Inputs(
        workload=workload,
        heads=heads,
        block_size=block_size,
        num_layers=num_layers,
        seed=seed,
        cache_dtype=cache_dtype,
        q=values(1, heads.num_heads),
        k=values(2, heads.num_kv_heads),
        v=values(3, heads.num_kv_heads),
        ragged=ragged,
        options=options,
        is_poisoned=is_poisoned,
    )


def written_pool(inputs: Inputs, backend: pa.Backend) -> jax.Array:
    """The pool as one step must leave it, with its keys and values in the first layer."""
    width = pa.head_width(inputs.heads.head_dim, backend)
    scales = inputs.options.get("kv_scales_2K")
    scales = (None, None) if scales is None else scales
    padding = ((0, 0), (0, 0), (0, width - inputs.heads.head_dim))
    new = jnp.concatenate(
        [
            jnp.pad(pa.quantise(x, inputs.cache_dtype, scale), padding)
            for x, scale in zip((inputs.k, inputs.v), scales, strict=True)
        ],
        axis=-1,
    )
    return _write(inputs.pool(backend), _as_held(new, backend), inputs.ragged)


def _as_held(values: jax.Array, backend: pa.Backend) -> jax.Array:
    """Values of the cache's dtype as the backend's pool holds them."""
    dtype = pa.kv_pool_dtype(values.dtype, backend)
    return values if dtype == values.dtype else jax.lax.bitcast_convert_type(values, dtype)


def count_blocks(workload: Workload, block_size: int) -> int:
    """Blocks of one layer's pool that holds a workload, and one more that nobody uses."""
    return sum(-(-length // block_size) for length in workload.kv_lens) + 1


@functools.partial(jax.jit, donate_argnums=0)
def _write(pool, new, ragged: pa.Ragged):
    block_size = pool.shape[2]
    block = ragged.block_tables[ragged.token_rows, ragged.positions // block_size]
    return pool.at[block, :, ragged.positions % block_size].set(new)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random_pool(key, shape: tuple[int, int, int], head_dim: int, width: int, dtype: str):
    real = jnp.dtype(dtype)
    drawn = jnp.bfloat16 if real.itemsize == 1 else real
    values = jax.random.normal(key, (*shape, 2, head_dim), drawn)
    if dtype == "int8":
        scaled = jnp.round(values.astype(jnp.float32) / INT8_SCALE)
        values = jnp.clip(scaled, -128, 127)
    values = jnp.pad(values.astype(real), ((0, 0),) * 4 + ((0, width - head_dim),))
    return values.reshape(*shape, 2 * width)


@functools.partial(jax.jit, static_argnums=2)
def _gather(pool, block_tables, head_dim: int):
    pages = pool[block_tables]  # [S, P, K, B, 2H]
    num_seqs, width, heads, block_size, _ = pages.shape
    pages = pages.transpose(0, 1, 3, 2, 4).reshape(num_seqs, width * block_size, heads, -1)
    return pages[..., :head_dim], pages[..., head_dim:]
