"""Paged attention in float64 NumPy with plain loops, and ragged batches to feed it.

It shares nothing with the kernels, not even their `positions`: a token's place follows from
the row's context and its place in the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import paged_attention as pa

Program = Callable[..., tuple[jax.Array, jax.Array]]

# Unit roundoff: half the distance of two neighbours, relative to the number.
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
NUMPY_DTYPE = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's call: arguments as NumPy arrays.

    Padded tokens are NaN, and so is everything of the pool that no row's context holds.
    """

    q: np.ndarray  # [T, N, H]
    k: np.ndarray  # [T, K, H]
    v: np.ndarray
    pool: np.ndarray  # [layers * blocks, K, B, 2H]
    query_starts: np.ndarray
    kv_lens: np.ndarray
    block_tables: np.ndarray
    first_block: int
    scale: float

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.query_starts[-1])

    def ragged(self) -> pa.Ragged:
        """The batch as kernels take it, padded as core/batching does."""
        num_seqs = len(self.kv_lens)
        rows = np.full(len(self.q), num_seqs, np.int32)
        positions = np.zeros(len(self.q), np.int32)
        for row, (start, stop) in enumerate(
            zip(self.query_starts[:-1], self.query_starts[1:], strict=True)
        ):
            rows[start:stop] = row
            positions[start:stop] = np.arange(self.kv_lens[row] - (stop - start), self.kv_lens[row])
        return pa.Ragged(
            jnp.asarray(rows),
            jnp.asarray(positions),
            jnp.asarray(self.query_starts),
            jnp.asarray(self.kv_lens),
            jnp.asarray(self.block_tables),
        )


@dataclasses.dataclass(frozen=True)
class Expected:
    """What must come out, and how far rounding may take it from there."""

    out: np.ndarray  # float64[T, N, H]
    tolerance: np.ndarray  # float64[T, N, H]
    pool: np.ndarray


def make_case(
    rows: list[tuple[int, int]],
    *,
    block_size: int = 8,
    num_kv_heads: int = 2,
    ratio: int = 2,
    head_dim: int = 8,
    dtype: str = "float32",
    pool_dtype: str | None = None,
    num_tokens: int | None = None,
    num_seqs: int | None = None,
    num_blocks: int | None = None,
    table_width: int | None = None,
    num_layers: int = 3,
    layer: int = 1,
    seed: int = 0,
) -> Case:
    """Random values for rows of (new tokens, context before them).

    Physical blocks are shuffled. `num_blocks` is by default one more than the rows use, and
    entries of the tables beyond a row's context name any block.
    """
    rng = np.random.default_rng(seed)
    real = NUMPY_DTYPE[dtype]
    lens = np.array([new for new, _ in rows], np.int64)
    totals = np.array([sum(row) for row in rows], np.int64)
    used = -(-totals // block_size)
    num_seqs = len(rows) if num_seqs is None else num_seqs
    num_tokens = max(1, int(lens.sum())) if num_tokens is None else num_tokens
    num_blocks = int(used.sum()) + 1 if num_blocks is None else num_blocks
    table_width = max(1, int(used.max(initial=1))) if table_width is None else table_width

    def values(heads: int) -> np.ndarray:
        array = rng.standard_normal((num_tokens, heads, head_dim)).astype(real)
        array[lens.sum() :] = np.nan
        return array

    shape = (num_layers * num_blocks, num_kv_heads, block_size, 2 * head_dim)
    pool = np.full(shape, np.nan, NUMPY_DTYPE[pool_dtype or dtype])
    free = rng.permutation(num_blocks)
    tables = rng.integers(0, num_blocks, (num_seqs, table_width)).astype(np.int32)
    taken = 0
    for row, (count, (_, before)) in enumerate(zip(used, rows, strict=True)):
        tables[row, :count] = free[taken : taken + count]
        taken += count
        for position in range(before):
            block = layer * num_blocks + tables[row, position // block_size]
            pool[block, :, position % block_size] = rng.standard_normal(
                (num_kv_heads, 2 * head_dim)
            ).astype(pool.dtype)
    starts = np.zeros(num_seqs + 1, np.int32)
    starts[1 : len(rows) + 1] = np.cumsum(lens)
    starts[len(rows) + 1 :] = lens.sum()
    kv_lens = np.zeros(num_seqs, np.int32)
    kv_lens[: len(rows)] = totals
    return Case(
        q=values(num_kv_heads * ratio),
        k=values(num_kv_heads),
        v=values(num_kv_heads),
        pool=pool,
        query_starts=starts,
        kv_lens=kv_lens,
        block_tables=tables,
        first_block=layer * num_blocks,
        scale=head_dim**-0.5,
    )


def expect(case: Case) -> Expected:
    """Attention by the definition, in float64.

    The tolerance is an error bound, with u the unit roundoff of the pool's dtype:

    - A score is a sum of H products. In float32 it is off by about sqrt(H) * 2**-24 times the
      sum of their magnitudes, as roundings are independent (Higham & Mary, 2019), and queries
      rounded to the pool's dtype by at most u times it. A score that is off by d scales its
      weight by a factor of exp(d), and the divisor by as much: 2d of the weighted mean of |v|.
    - A weight rounded to the pool's dtype is off by u of itself: u of the weighted mean of |v|.
    - Sums over C positions in float32 add sqrt(C) * 2**-24 of it, twice (products, divisor).
    - The result is rounded to q's dtype: its u times the result.

    Second-order terms are covered by the margin of 1.1.
    """
    _, num_heads, head_dim = case.q.shape
    num_kv_heads, block_size = case.pool.shape[1:3]
    pool = case.pool.copy()
    out = np.zeros(case.q.shape)
    tolerance = np.zeros(case.q.shape)
    f32 = ROUNDOFF["float32"]
    u_pool, u_out = ROUNDOFF[case.pool.dtype.name], ROUNDOFF[case.q.dtype.name]
    u_query = u_pool if u_pool > u_out else 0.0

    def place(row: int, position: int) -> tuple[int, int]:
        block = case.block_tables[row, position // block_size]
        return case.first_block + block, position % block_size

    for row, kv_len in enumerate(case.kv_lens):
        start, stop = case.query_starts[row : row + 2]
        for token in range(start, stop):
            block, offset = place(row, kv_len - (stop - token))
            pool[block, :, offset, :head_dim] = case.k[token].astype(pool.dtype)
            pool[block, :, offset, head_dim:] = case.v[token].astype(pool.dtype)
    for row, kv_len in enumerate(case.kv_lens):
        start, stop = case.query_starts[row : row + 2]
        if start == stop:
            continue
        context = np.empty((kv_len, num_kv_heads, 2 * head_dim))
        for position in range(kv_len):
            block, offset = place(row, position)
            context[position] = pool[block, :, offset].astype(np.float64)
        for token in range(start, stop):
            visible = kv_len - (stop - token) + 1
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                keys = context[:visible, kv_head, :head_dim]
                values = context[:visible, kv_head, head_dim:]
                query = case.q[token, head].astype(np.float64)
                scores = keys @ query * case.scale
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[token, head] = weights @ values
                size = (np.abs(keys) @ np.abs(query)).max() * abs(case.scale)
                off = size * (head_dim**0.5 * f32 + u_query)
                mean = weights @ np.abs(values)
                relative = 2 * off + (u_pool if u_pool > f32 else 0.0) + 2 * visible**0.5 * f32
                tolerance[token, head] = 1.1 * (relative * mean + u_out * np.abs(out[token, head]))
    return Expected(out, tolerance, pool)


def compiled(backend: pa.Backend) -> Program:
    """The public entry point as a program, compiled anew for each call of this function."""

    def call(q, k, v, pool, ragged, first_block, scale):
        work = pa.prepare(ragged, block_size=pool.shape[2], backend=backend)
        return pa.paged_attention(
            q, k, v, pool, work, first_block=first_block, scale=scale, backend=backend
        )

    return jax.jit(call, static_argnums=6)


def run(
    case: Case, backend: pa.Backend, program: Program | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Output and pool of a case, by a program that is kept or by a new one."""
    program = program or compiled(backend)
    first_block = jnp.int32(case.first_block)
    out, pool = program(case.q, case.k, case.v, case.pool, case.ragged(), first_block, case.scale)
    return np.asarray(out), np.asarray(pool)


def check(case: Case, out: np.ndarray, pool: np.ndarray, expected: Expected | None = None) -> None:
    """Assert that output and pool are right, and nothing else was written."""
    expected = expected or expect(case)
    assert out.dtype == case.q.dtype
    assert pool.dtype == case.pool.dtype
    assert bits(pool) == bits(expected.pool), "the pool holds what it should not"
    assert (out[case.num_tokens :] == 0).all(), "output at padded tokens"
    error = np.abs(out.astype(np.float64) - expected.out)
    assert np.isfinite(error).all(), "NaN reached the output"
    worst = float((error - expected.tolerance).max(initial=0.0))
    assert worst <= 0, f"off by {float(error.max()):.3g}, {worst:.3g} more than rounding explains"


def bits(array: np.ndarray) -> bytes:
    """Every bit, NaN included."""
    return np.ascontiguousarray(array).tobytes()
