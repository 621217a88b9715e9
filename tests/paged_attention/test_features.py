"""Windows, soft caps, sinks and 8-bit pools in xla and reference, against the float64 oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import xla
from tests.paged_attention.oracle import (
    FEATURES,
    NATIVE,
    NUMPY_DTYPE,
    Program,
    bits,
    check,
    compiled,
    make_case,
    rows_for,
    run,
    split,
    store,
)
from tests.paged_attention.random_batches import MAX_LENGTH, batches, random_case, shrink_tiles

BACKENDS: tuple[str, ...] = ("xla", "reference", *NATIVE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_matches_the_oracle(feature: str, dtype: str, backend: str) -> None:
    rows = rows_for(16)
    case = make_case(
        rows,
        head_dim=32,
        ratio=3,
        block_size=16,
        dtype=dtype,
        num_tokens=sum(new for new, _ in rows) + 5,
        num_seqs=len(rows) + 2,
        table_width=5,
        **FEATURES[feature],
    )
    check(case, *run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", [{}, FEATURES["float8 with everything"]], ids=["plain", "all"])
def test_a_pool_wider_than_its_heads_gives_the_same(feature: dict[str, Any], backend: str) -> None:
    """Other backends pad heads: the padding weighs nothing and is written as zeros."""
    case = make_case([(1, 20), (9, 8), (1, 0)], head_dim=20, num_tokens=13, num_seqs=4, **feature)
    check(case, *run(case, backend, width=32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", [{}, FEATURES["float8 with everything"]], ids=["plain", "all"])
def test_a_promise_of_decodes_only_changes_no_result(feature: dict[str, Any], backend: str) -> None:
    case = make_case(
        [(1, length) for length in (90, 0, 7, 8, 300)], num_tokens=7, num_seqs=7, **feature
    )
    assert case.is_decode_only
    for decode_only in (True, False):
        check(case, *run(case, backend, compiled(backend, decode_only=decode_only)))


def test_a_promise_of_decodes_only_leaves_the_tiles_out() -> None:
    ragged = make_case([(1, 20), (1, 3)]).ragged()
    for max_query_len, num_tiles in ((1, 0), (2, 2)):
        work = pa.prepare(ragged, block_size=8, max_query_len=max_query_len, backend="xla")
        assert len(work.tile_rows) == num_tiles
    with pytest.raises(ValueError, match="max_query_len=0 must be at least 1"):
        pa.prepare(ragged, block_size=8, max_query_len=0, backend="xla")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_may_be_a_number_or_differ_by_layer_of_a_scan(backend: str) -> None:
    case = make_case([(1, 40), (6, 10)], head_dim=16)
    name, instructions = split(backend)
    work = pa.prepare(case.ragged(), block_size=8, max_query_len=7, backend=name)
    windows = (3, 19, 50)

    def attend(pool, window):
        out, pool = pa.paged_attention(
            jnp.asarray(case.q),
            jnp.asarray(case.k),
            jnp.asarray(case.v),
            pool,
            work,
            first_block=jnp.int32(case.first_block),
            scale=case.scale,
            backend=name,
            window=window,
            instructions=instructions,
        )
        return pool, out

    pool, outs = jax.lax.scan(attend, jnp.asarray(case.pool), jnp.array(windows, jnp.int32))
    for window, out in zip(windows, outs, strict=True):
        windowed = dataclasses.replace(case, window=window)
        check(windowed, np.asarray(out), np.asarray(pool))
    pool, out = jax.jit(attend, static_argnums=1)(case.pool, windows[1])
    check(dataclasses.replace(case, window=windows[1]), np.asarray(out), np.asarray(pool))


@pytest.mark.parametrize(
    ("rows", "with_window", "without"),
    [
        ([(1, 990)], 1, 4),
        ([(80, 700)], 1 + 2, 3 + 4),  # two tiles; the second sees into two chunks
        ([(1, 990), (1, 40), (70, 800)], 1 + 2 + 1, 4 + 4 + 4),  # decodes go together
    ],
    ids=str,
)
def test_only_chunks_that_the_window_reaches_are_read(
    rows: list[tuple[int, int]], with_window: int, without: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (xla.DECODE_CHUNK, xla.PREFILL_CHUNK, xla.QUERY_TILE) == (256, 256, 64)
    reads: list[int] = []
    gather = xla._gather

    def count(pool, blocks):
        jax.debug.callback(lambda: reads.append(1))
        return gather(pool, blocks)

    monkeypatch.setattr(xla, "_gather", count)
    for window, expected in ((50, with_window), (None, without)):
        case = make_case(rows, block_size=16, window=window)
        check(case, *run(case, "xla"))
        jax.effects_barrier()
        assert len(reads) == expected
        reads.clear()


@pytest.mark.parametrize("scale", [None, 0.37, 2.0])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_keys_and_values_are_quantised_to_the_nearest_and_clipped(
    dtype: str, scale: float | None
) -> None:
    """Every value that the pool can hold, every midpoint, their neighbours, and far beyond."""
    stored = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPE[dtype]).astype(np.float32)
    stored = np.sort(stored[np.isfinite(stored)])
    edges = np.concatenate((stored, (stored[1:] + stored[:-1]) / 2, [1e4, -1e4, 1e38, -1e38]))
    edges = edges.astype(np.float32) * np.float32(scale or 1)
    values = np.stack((edges, np.nextafter(edges, np.inf), np.nextafter(edges, -np.inf)), axis=1)
    scales = None if scale is None else np.full(3, scale, np.float32)
    expected = np.stack([store(token[:, None], dtype, scales) for token in values])
    scales = None if scales is None else jnp.asarray(scales)
    assert np.isfinite(expected.astype(np.float32)).all()
    for quantise in (pa.quantise, jax.jit(pa.quantise, static_argnums=1)):
        out = quantise(jnp.asarray(values[..., None]), jnp.dtype(dtype), scales)
        assert bits(np.asarray(out)) == bits(expected)


# Beside a window, which is drawn.
MIXTURES: dict[str, dict[str, Any]] = {
    "float32 with sinks": {"sinks": True},
    "float8 with all features": {
        "pool_dtype": "float8_e4m3fn",
        "kv_scales": True,
        "sinks": True,
        "softcap": 2.0,
    },
    "int8 with a soft cap": {"pool_dtype": "int8", "softcap": 4.0},
}


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[tuple[str, str], Program]]:
    """Each backend with each set of features, to be compiled once for all random batches."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_tiles(patch)
        yield {(name, backend): compiled(backend) for name in MIXTURES for backend in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MIXTURES)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=batches(), seed=st.integers(0, 2**32 - 1), window=st.integers(1, MAX_LENGTH + 1))
def test_random_ragged_batches_with_features_match_the_oracle(
    rows: list[tuple[int, int]],
    seed: int,
    window: int,
    name: str,
    backend: str,
    programs: dict[tuple[str, str], Program],
) -> None:
    case = random_case(rows, seed, window=window, **MIXTURES[name])
    check(case, *run(case, backend, programs[name, backend]))
