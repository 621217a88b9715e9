"""xla and reference against a float64 oracle, over shapes, dtypes and ragged batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import xla
from tests.paged_attention.oracle import (
    NATIVE,
    Case,
    Program,
    bits,
    check,
    compiled,
    expect,
    make_case,
    rows_for,
    run,
)
from tests.paged_attention.random_batches import batches, random_case, shrink_tiles

BACKENDS: tuple[str, ...] = ("xla", "reference", *NATIVE)
HEAD_DIMS, RATIOS = (8, 64, 80, 128), (1, 3, 4, 8)
BLOCK_SIZES, DTYPES = (8, 16, 32, 64, 128, 256), ("float32", "bfloat16")

# Every head dim with every ratio; block sizes and dtypes take turns, so that each pair of a
# block size and a dtype occurs.
SHAPES = [
    (head_dim, ratio, BLOCK_SIZES[index % 6], DTYPES[index // 6 % 2])
    for index, (head_dim, ratio) in enumerate(itertools.product(HEAD_DIMS, RATIOS))
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("head_dim", "ratio", "block_size", "dtype"), SHAPES)
def test_a_ragged_batch_matches_the_oracle(
    head_dim: int, ratio: int, block_size: int, dtype: str, backend: str
) -> None:
    rows = rows_for(block_size)
    case = make_case(
        rows,
        head_dim=head_dim,
        ratio=ratio,
        num_kv_heads=2,
        block_size=block_size,
        dtype=dtype,
        num_tokens=sum(new for new, _ in rows) + 5,
        num_seqs=len(rows) + 2,
        table_width=5,
    )
    check(case, *run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bfloat16_pool_serves_float32_queries(backend: str) -> None:
    rows = [(1, 20), (9, 8)]
    case = make_case(rows, dtype="float32", pool_dtype="bfloat16", head_dim=64)
    check(case, *run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_layer_keeps_to_its_part_of_the_pool(layer: int, backend: str) -> None:
    case = make_case([(1, 30), (5, 9), (1, 0)], layer=layer, num_layers=3)
    check(case, *run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_pool_and_a_full_table_are_used_to_the_last_position(backend: str) -> None:
    case = make_case([(1, 31), (8, 16), (32, 0)], num_blocks=11, table_width=4, num_seqs=3)
    assert np.isfinite(case.pool[case.first_block : case.first_block + 11]).any()
    check(case, *run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows",
    [[(1, 0)], [(2, 0)], [(1, 700)], [(70, 300)], [(65, 0), (64, 256), (1, 255), (1, 256)]],
    ids=str,
)
def test_contexts_longer_than_a_chunk_and_rows_longer_than_a_tile(
    rows: list[tuple[int, int]], backend: str
) -> None:
    """The kernel's own tile and chunk sizes, crossed and met exactly."""
    case = make_case(rows, block_size=16)
    check(case, *run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_decodes_than_a_group_of_very_different_lengths(backend: str) -> None:
    lengths = [300, 1, 17, 255, 256, 257, 0, 64] * 5
    case = make_case([(1, length) for length in lengths], block_size=32, num_tokens=48, num_seqs=48)
    check(case, *run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_padding_only_changes_nothing(backend: str) -> None:
    case = make_case([], num_tokens=6, num_seqs=3, num_blocks=4, table_width=2)
    out, pool = run(case, backend)
    assert bits(pool) == bits(case.pool)
    assert (out == 0).all()


def test_very_large_scores_stay_finite() -> None:
    """A softmax that doesn't subtract the largest score would overflow."""
    case = make_case([(1, 20), (6, 10)])
    case = dataclasses.replace(case, scale=300.0)
    for backend in BACKENDS:
        out, _ = run(case, backend)
        np.testing.assert_allclose(out[:7], expect(case).out[:7], rtol=0, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_a_prompt_equal_the_whole(backend: str) -> None:
    """Pool bit for bit, output within float32 rounding, whatever the chunks."""
    length, block_size = 45, 8
    whole = make_case([(length, 0), (1, 30)], block_size=block_size, num_layers=2)
    expected = expect(whole)
    program = compiled(backend)
    out, pool = run(whole, backend, program)
    check(whole, out, pool, expected)
    for chunks in ((9, 9, 9, 9, 9), (1, 9, 34, 1), (44, 1)):
        assert sum(chunks) == length
        chunked_pool, parts, start = whole.pool, [], 0
        for chunk in chunks:
            tokens = [*range(start, start + chunk), length]
            step = dataclasses.replace(
                whole,
                q=whole.q[tokens],
                k=whole.k[tokens],
                v=whole.v[tokens],
                pool=chunked_pool,
                query_starts=np.array([0, chunk, chunk + 1], np.int32),
                kv_lens=np.array([start + chunk, 31], np.int32),
            )
            part, chunked_pool = run(step, backend, program)
            parts.append(part[:chunk])
            start += chunk
        assert bits(chunked_pool) == bits(pool)
        error = np.abs(np.concatenate(parts) - expected.out[:length])
        assert (error <= expected.tolerance[:length]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_physical_placement_gives_the_same_bits(backend: str) -> None:
    case = make_case([(1, 37), (11, 12), (1, 8)], num_blocks=16)
    program = compiled(backend)
    out, pool = run(case, backend, program)
    rng = np.random.default_rng(7)
    for _ in range(3):
        moved, order = move_blocks(case, rng)
        moved_out, moved_pool = run(moved, backend, program)
        assert bits(moved_out) == bits(out)
        assert bits(moved_pool[order]) == bits(pool)


def move_blocks(case: Case, rng: np.random.Generator) -> tuple[Case, np.ndarray]:
    """The same contents elsewhere, and for each old entry of the pool its new place."""
    num_blocks = len(case.pool) // 3
    place = rng.permutation(num_blocks).astype(np.int32)
    order = np.concatenate([layer * num_blocks + place for layer in range(3)])
    pool = np.empty_like(case.pool)
    pool[order] = case.pool
    return dataclasses.replace(case, pool=pool, block_tables=place[case.block_tables]), order


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_depend_on_its_neighbours(backend: str) -> None:
    """The same row, alone among empty rows and between others: equal bits."""
    case = make_case([(6, 11), (1, 23), (9, 0)])
    program = compiled(backend)
    out, _ = run(case, backend, program)
    for row in range(3):
        start, stop = case.query_starts[row : row + 2]
        kept = slice(start, stop)

        def only(values: np.ndarray, kept: slice = kept) -> np.ndarray:
            alone = np.full_like(values, np.nan)
            alone[: kept.stop - kept.start] = values[kept]
            return alone

        alone = dataclasses.replace(
            case,
            q=only(case.q),
            k=only(case.k),
            v=only(case.v),
            query_starts=np.array([0, stop - start, stop - start, stop - start], np.int32),
            kv_lens=np.array([case.kv_lens[row], 0, 0], np.int32),
            block_tables=case.block_tables[[row, 0, 0]],
        )
        single, _ = run(alone, backend, program)
        assert bits(single[: stop - start]) == bits(out[start:stop])


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Program]]:
    """Each backend, to be compiled once for all random batches."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_tiles(patch)
        yield {backend: compiled(backend) for backend in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=batches(), seed=st.integers(0, 2**32 - 1), layer=st.integers(0, 1))
def test_random_ragged_batches_match_the_oracle(
    rows: list[tuple[int, int]],
    seed: int,
    layer: int,
    backend: str,
    programs: dict[str, Program],
) -> None:
    case = random_case(rows, seed, layer)
    check(case, *run(case, backend, programs[backend]))


@pytest.mark.parametrize(("decode", "prefill"), [(16, 64), (64, 16), (1024, 32), (32, 1024)])
def test_chunks_of_decodes_and_of_prompts_may_differ(
    decode: int, prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The padded table must hold the last chunk of either, or its end is read twice."""
    monkeypatch.setattr(xla, "DECODE_CHUNK", decode)
    monkeypatch.setattr(xla, "PREFILL_CHUNK", prefill)
    case = make_case([(1, 71), (1, 39), (20, 52), (5, 20)], table_width=9)
    check(case, *run(case, "xla"))
