"""Paged attention in float64 NumPy with plain loops, and ragged batches to feed it.

It shares nothing with the kernels, not even their `positions`: a token's place follows from
the row's context and its place in the row. `run` feeds the same cases to any backend, with the
pool as wide as the backend wants it, on a device or in an interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import native
from pallas_kernels import paged_attention as pa

Program = Callable[..., tuple[jax.Array, jax.Array]]

# Unit roundoff: half the distance of two neighbours, relative to the number.
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
NUMPY_DTYPE = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
}
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
# What nobody wrote: NaN, or where there is none, the value that weighs most.
GARBAGE = {"int8": -128}

# What a layer may ask for beside plain causal attention: options of `make_case`, by name.
FEATURES: dict[str, dict[str, Any]] = {
    "a window of one token": {"window": 1},
    "a window inside a block": {"window": 5},
    "a window of several blocks": {"window": 27},
    "a window wider than any context": {"window": 10_000},
    "a soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "window, cap and sinks": {"window": 11, "softcap": 2.0, "sinks": True},
    "float8 without scales": {"pool_dtype": "float8_e4m3fn"},
    "float8 with scales": {"pool_dtype": "float8_e4m3fn", "kv_scales": True},
    "int8": {"pool_dtype": "int8"},
    "float8 with everything": {
        "pool_dtype": "float8_e4m3fn",
        "kv_scales": True,
        "window": 13,
        "softcap": 2.0,
        "sinks": True,
    },
    "int8 with everything": {"pool_dtype": "int8", "window": 9, "softcap": 3.0, "sinks": True},
}


# Native code with each set of instructions that the processor has: "cpu avx2" is native code with
# no more than AVX2. AMX has code for bfloat16 only; the rest is as with AVX512.
NATIVE: tuple[str, ...] = ()
if native.unavailable() is None:
    most = native.INSTRUCTIONS.index(native.instructions())
    NATIVE = tuple(f"cpu {name}" for name in native.INSTRUCTIONS[: most + 1])


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer's call: arguments as NumPy arrays.

    Padded tokens are NaN; everything of the pool that no row's context holds is GARBAGE.
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
    window: int | None = None
    softcap: float | None = None
    sinks: np.ndarray | None = None  # float32[N]
    kv_scales: np.ndarray | None = None  # float32[2, K]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.query_starts[-1])

    @property
    def is_decode_only(self) -> bool:
        """No row has more than one token."""
        return bool((np.diff(self.query_starts) <= 1).all())

    def place(self, row: int, position: int) -> tuple[int, int]:
        """Entry of the pool and offset in it where a row's position lies."""
        block_size = self.pool.shape[2]
        block = self.block_tables[row, position // block_size]
        return self.first_block + int(block), position % block_size

    def held(self, *, after: bool) -> np.ndarray:
        """bool[layers * blocks, B]: what some row's context holds, before the step or after."""
        held = np.zeros((len(self.pool), self.pool.shape[2]), np.bool_)
        for row, length in enumerate(self.kv_lens - (0 if after else np.diff(self.query_starts))):
            for position in range(length):
                held[self.place(row, position)] = True
        return held

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


def rows_for(block_size: int) -> list[tuple[int, int]]:
    """(new tokens, context before): ends before, on and after a block's edge; one empty row."""
    return [
        (1, 0),
        (1, block_size - 1),
        (1, block_size),
        (0, 0),
        (7, block_size - 7),
        (3, block_size - 1),
        (1, 2 * block_size + 1),
        (block_size + 1, 0),
    ]


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
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    kv_scales: bool | None = None,
) -> Case:
    """Random values for rows of (new tokens, context before them).

    Physical blocks are shuffled. `num_blocks` is by default one more than the rows use, and
    entries of the tables beyond a row's context name any block. `kv_scales` are by default
    given where the pool needs them (int8); some are so small that keys or values are clipped.
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

    pool_dtype = pool_dtype or dtype
    shape = (num_layers * num_blocks, num_kv_heads, block_size, 2 * head_dim)
    pool = np.full(shape, GARBAGE.get(pool_dtype, np.nan), NUMPY_DTYPE[pool_dtype])
    scales = None
    if pool_dtype == "int8" if kv_scales is None else kv_scales:
        reach = np.random.default_rng(seed + 1).uniform(1.0, 5.0, (2, num_kv_heads))
        scales = (reach / LARGEST[pool_dtype]).astype(np.float32)
    free = rng.permutation(num_blocks)
    tables = rng.integers(0, num_blocks, (num_seqs, table_width)).astype(np.int32)
    taken = 0
    for row, (count, (_, before)) in enumerate(zip(used, rows, strict=True)):
        tables[row, :count] = free[taken : taken + count]
        taken += count
        for position in range(before):
            block = layer * num_blocks + tables[row, position // block_size]
            kv = rng.standard_normal((num_kv_heads, 2 * head_dim)).astype(np.float32)
            for part, lanes in enumerate((slice(0, head_dim), slice(head_dim, None))):
                scale = None if scales is None else scales[part]
                pool[block, :, position % block_size, lanes] = store(
                    kv[:, lanes], pool_dtype, scale
                )
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
        window=window,
        softcap=softcap,
        sinks=1 + 2 * rng.standard_normal(num_kv_heads * ratio).astype(np.float32)
        if sinks
        else None,
        kv_scales=scales,
    )


def store(values: np.ndarray, dtype: str, scales: np.ndarray | None) -> np.ndarray:
    """One token's keys or values [K, H] as a pool of this dtype holds them.

    8-bit pools take x * (1 / scale), in float32, clipped to what is finite.
    """
    if dtype not in LARGEST:
        return values.astype(NUMPY_DTYPE[dtype])
    scaled = values.astype(np.float32)
    if scales is not None:
        scaled = scaled * (np.float32(1) / scales)[:, None]
    least = -128.0 if dtype == "int8" else -LARGEST[dtype]
    scaled = np.clip(scaled, least, LARGEST[dtype])
    return (np.rint(scaled) if dtype == "int8" else scaled).astype(NUMPY_DTYPE[dtype])


def expect(case: Case) -> Expected:
    """Attention by the definition, in float64.

    The tolerance is an error bound, with u the unit roundoff of the dtype that products take:
    the pool's, or bfloat16's where the pool has 8 bits (which bfloat16 holds exactly).

    - A score is a sum of H products. In float32 it is off by about sqrt(H) * 2**-24 times the
      sum of their magnitudes, as roundings are independent (Higham & Mary, 2019), and queries
      rounded to the products' dtype by at most u times it. Scales of keys add two roundings.
    - A soft cap takes nothing away from the next point and adds none (its slope is at most 1),
      but its tanh may be off by 16 roundings of the capped score: XLA's is a rational function.
    - A score that is off by d scales its weight by a factor of exp(d), and the divisor, a
      sink's part of it aside, by as much: 2d of the weighted mean of |v|.
    - A weight rounded to the products' dtype is off by u of itself: u of the mean of |v|.
    - Sums over C positions in float32 add sqrt(C) * 2**-24 of it, twice (products, divisor).
    - Scales of values add one rounding in float32, and rounding the result to q's dtype its u.

    Second-order terms are covered by the margin of 1.1.
    """
    _, num_heads, head_dim = case.q.shape
    num_kv_heads = case.pool.shape[1]
    pool = case.pool.copy()
    out = np.zeros(case.q.shape)
    tolerance = np.zeros(case.q.shape)
    f32 = ROUNDOFF["float32"]
    u_product = ROUNDOFF.get(case.pool.dtype.name, ROUNDOFF["bfloat16"])
    u_out = ROUNDOFF[case.q.dtype.name]
    u_query = u_product if u_product > u_out else 0.0
    u_weight = u_product if u_product > f32 else 0.0
    is_scaled = case.kv_scales is not None
    k_scales, v_scales = (None, None) if case.kv_scales is None else case.kv_scales

    for row, kv_len in enumerate(case.kv_lens):
        start, stop = case.query_starts[row : row + 2]
        for token in range(start, stop):
            block, offset = case.place(row, kv_len - (stop - token))
            kv = pool[block, :, offset]
            kv[:, :head_dim] = store(case.k[token], pool.dtype.name, k_scales)
            kv[:, head_dim:] = store(case.v[token], pool.dtype.name, v_scales)
    for row, kv_len in enumerate(case.kv_lens):
        start, stop = case.query_starts[row : row + 2]
        if start == stop:
            continue
        context = np.empty((kv_len, num_kv_heads, 2 * head_dim))
        for position in range(kv_len):
            block, offset = case.place(row, position)
            context[position] = pool[block, :, offset].astype(np.float64)
        if k_scales is not None and v_scales is not None:
            context[..., :head_dim] *= k_scales[:, None]
            context[..., head_dim:] *= v_scales[:, None]
        for token in range(start, stop):
            last = kv_len - (stop - token)
            first = 0 if case.window is None else max(0, last - case.window + 1)
            count = last - first + 1
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                keys = context[first : last + 1, kv_head, :head_dim]
                values = context[first : last + 1, kv_head, head_dim:]
                query = case.q[token, head].astype(np.float64)
                scores = keys @ query * case.scale
                size = (np.abs(keys) @ np.abs(query)).max() * abs(case.scale)
                off = size * (head_dim**0.5 * f32 + u_query + 2 * f32 * is_scaled)
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                    off += 16 * f32 * np.abs(scores).max()
                top, rest = scores.max(), 0.0
                if case.sinks is not None:
                    top = max(top, case.sinks[head])
                    rest = np.exp(np.float64(case.sinks[head]) - top)
                weights = np.exp(scores - top)
                weights /= weights.sum() + rest
                out[token, head] = weights @ values
                mean = weights @ np.abs(values)
                relative = 2 * off + u_weight + 2 * count**0.5 * f32 + f32 * is_scaled
                tolerance[token, head] = 1.1 * (relative * mean + u_out * np.abs(out[token, head]))
    return Expected(out, tolerance, pool)


def split(backend: str) -> tuple[pa.Backend, str | None]:
    """A backend and the most instructions it may use, of a name such as those of NATIVE."""
    name, _, instructions = backend.partition(" ")
    found: Any = name
    return found, instructions or None


def compiled(backend: str, *, interpret: Any = False, decode_only: bool = False) -> Program:
    """The public entry point as a program, compiled anew for each call of this function.

    Args:
      backend: any, or one of NATIVE.
      interpret: run a tpu or gpu kernel on the CPU; see `paged_attention`.
      decode_only: promise that no row has more than one token.
    """

    name, instructions = split(backend)

    def call(q, k, v, pool, ragged, first_block, window, sinks, kv_scales, scale, softcap):
        work = pa.prepare(
            ragged,
            block_size=pool.shape[2],
            max_query_len=1 if decode_only else len(q),
            backend=name,
        )
        return pa.paged_attention(
            q,
            k,
            v,
            pool,
            work,
            first_block=first_block,
            scale=scale,
            backend=name,
            window=window,
            softcap=softcap,
            sinks_N=sinks,
            kv_scales_2K=kv_scales,
            interpret=interpret,
            instructions=instructions,
        )

    # The generic interpreter unrolls a kernel into operations that take longer to optimise than
    # to run.
    options = {"xla_backend_optimization_level": "0"} if interpret is True else None
    return jax.jit(call, static_argnums=(9, 10), compiler_options=options)


def run(
    case: Case,
    backend: str,
    program: Program | None = None,
    *,
    interpret: Any = False,
    width: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and pool of a case, by a program that is kept or by a new one.

    The pool is handed over as wide as the backend wants it (or `width` elements a head), and
    comes back as narrow as it was, once its padding is seen to be right: zero where a context
    lies, untouched elsewhere.
    """
    program = program or compiled(backend, interpret=interpret, decode_only=case.is_decode_only)
    head_dim = case.q.shape[-1]
    width = width or pa.head_width(head_dim, split(backend)[0])
    out, wide = program(
        case.q,
        case.k,
        case.v,
        widen(case.pool, width, case.held(after=False)).view(
            pa.kv_pool_dtype(case.pool.dtype, split(backend)[0])
        ),
        case.ragged(),
        jnp.int32(case.first_block),
        None if case.window is None else jnp.int32(case.window),
        case.sinks,
        case.kv_scales,
        case.scale,
        case.softcap,
    )
    wide = np.asarray(wide).view(case.pool.dtype)
    pool = np.concatenate((wide[..., :head_dim], wide[..., width : width + head_dim]), axis=-1)
    padded = widen(pool, width, case.held(after=True))
    assert bits(wide) == bits(padded), "the pool's padding holds what it should not"
    return np.asarray(out), pool


def widen(pool: np.ndarray, width: int, held: np.ndarray) -> np.ndarray:
    """The pool with heads padded to a width: by zeros where a context lies, else by GARBAGE."""
    head_dim = pool.shape[-1] // 2
    garbage = GARBAGE.get(pool.dtype.name, np.nan)
    wide = np.full((*pool.shape[:-1], 2 * width), garbage, pool.dtype)
    wide = np.where(held[:, None, :, None], np.zeros((), pool.dtype), wide)
    wide[..., :head_dim] = pool[..., :head_dim]
    wide[..., width : width + head_dim] = pool[..., head_dim:]
    return wide


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
