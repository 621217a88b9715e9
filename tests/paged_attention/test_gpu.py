"""The GPU kernels against the float64 oracle in JAX's interpreter, and lowered for an H100."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import gpu, gpu_items
from pallas_kernels.paged_attention.gpu_plan import ROWS, Plan
from tests.paged_attention.interpreted_gpu import MARKS, program, run_strictly, with_tiny_key_scales
from tests.paged_attention.oracle import Case, check, make_case

pytestmark = MARKS

PREPARE = jax.jit(gpu_items.prepare, static_argnames=("block_size", "max_query_len"))

# (new tokens, context before): decodes before, on and after a block's and a buffer's edge, an
# empty row, prompts that end inside a tile, a long context that is cut.
ROWS_OF_ALL_KINDS = [(1, 0), (5, 130), (1, 127), (0, 0), (1, 15), (33, 16), (1, 300), (2, 63)]


def case_of(rows: list[tuple[int, int]], **options: Any) -> Case:
    """A bfloat16 batch with padding on every side."""
    block_size = options.setdefault("block_size", 16)
    defaults: dict[str, Any] = {"dtype": "bfloat16", "head_dim": 64}
    return make_case(
        rows,
        **(defaults | options),
        num_tokens=sum(new for new, _ in rows) + 3,
        num_seqs=len(rows) + 2,
        table_width=max(-(-sum(row) // block_size) for row in rows) + 1,
    )


@pytest.mark.parametrize(
    ("head_dim", "ratio", "block_size", "dtype", "pool_dtype"),
    [
        (64, 1, 16, "bfloat16", "bfloat16"),
        (80, 3, 32, "float32", "bfloat16"),
        (192, 5, 128, "bfloat16", "bfloat16"),
        (64, 9, 64, "float32", "int8"),
        (128, 4, 256, "bfloat16", "float8_e4m3fn"),
    ],
)
def test_shapes_and_dtypes_match_the_oracle(
    head_dim: int, ratio: int, block_size: int, dtype: str, pool_dtype: str
) -> None:
    case = case_of(
        ROWS_OF_ALL_KINDS,
        head_dim=head_dim,
        ratio=ratio,
        block_size=block_size,
        dtype=dtype,
        pool_dtype=pool_dtype,
        num_kv_heads=1 if head_dim > 64 else 2,
    )
    check(case, *run_strictly(case))


@pytest.mark.parametrize(
    "feature",
    [
        {"window": 27, "softcap": 2.0, "sinks": True},
        {"window": 150, "pool_dtype": "int8", "softcap": 3.0, "sinks": True},
    ],
    ids=str,
)
def test_features_match_the_oracle(feature: dict[str, Any]) -> None:
    case = case_of(ROWS_OF_ALL_KINDS, **feature)
    check(case, *run_strictly(case))


@pytest.mark.parametrize("thread_blocks", [gpu_items.THREAD_BLOCKS, 1])
def test_a_long_context_is_cut_and_joined(
    thread_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In many short items, or in few long ones of several buffers."""
    monkeypatch.setattr(gpu_items, "THREAD_BLOCKS", thread_blocks)
    rows = [(1, 700), (1, 2), (1, 255), (0, 0), (1, 383)]
    case = case_of(rows, num_kv_heads=1, window=650, sinks=True)
    assert case.is_decode_only
    check(case, *run_strictly(case))


@pytest.mark.parametrize("pool_dtype", ["bfloat16", "float8_e4m3fn"])
def test_blocks_before_the_window_are_not_read(pool_dtype: str) -> None:
    """Neither as pages, whose names lead out of the pool here, nor in a page: NaN would be seen."""
    case = case_of([(1, 500), (40, 300)], window=20, num_kv_heads=1, pool_dtype=pool_dtype)
    pool, tables = case.pool.copy(), case.block_tables.copy()
    for row, first_seen in ((0, 481), (1, 281)):
        for position in range(first_seen):
            block, offset = case.place(row, position)
            pool[block, :, offset] = np.nan
        tables[row, : first_seen // 16] = 10**6
    poisoned = dataclasses.replace(case, pool=pool)
    kept = program()

    def astray(q, k, v, pool, ragged, *rest):
        return kept(q, k, v, pool, ragged._replace(block_tables=jnp.asarray(tables)), *rest)

    out, _ = run_strictly(poisoned, astray)
    np.testing.assert_array_equal(out, run_strictly(case, kept)[0])
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_keys_of_a_tiny_scale_are_masked(softcap: float | None) -> None:
    """The factor of the scores, which it is part of, must not bring hidden ones near the rest."""
    case = with_tiny_key_scales(case_of(ROWS_OF_ALL_KINDS, pool_dtype="int8", softcap=softcap))
    check(case, *run_strictly(case))


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
def test_decode_items_cover_every_context_once(num_kv_heads: int) -> None:
    rng = np.random.default_rng(num_kv_heads)
    for num_seqs, longest in ((1, 130_000), (7, 5_000), (300, 9_000)):
        lens = rng.integers(0, longest + 1, num_seqs)
        ragged = make_ragged([(min(1, length), max(0, length - 1)) for length in lens])
        work = PREPARE(ragged, block_size=16, max_query_len=1)
        items = work.decode_items(num_kv_heads)
        table, count = np.asarray(items.table), int(items.count[0])
        assert count <= len(table), "more items than there is room for"
        for row, length in enumerate(lens):
            spans = [(start, stop) for r, _, _, _, start, stop in table[:count] if r == row]
            edges = [0, *(stop for _, stop in spans)]
            assert [start for start, _ in spans] == edges[:-1]
            assert edges[-1] == length
            assert np.asarray(items.starts)[row + 1] - np.asarray(items.starts)[row] == len(spans)


@pytest.mark.parametrize("tile_tokens", [1, 16, 64])
def test_prompt_items_cover_every_token_once(tile_tokens: int) -> None:
    rng = np.random.default_rng(tile_tokens)
    rows = [(int(new), int(rng.integers(0, 50))) for new in rng.integers(0, 300, 9)] + [(1, 9)]
    ragged = make_ragged(rows)
    work = PREPARE(ragged, block_size=16, max_query_len=300)
    items = work.prompt_items(tile_tokens)
    table = np.asarray(items.table)[: int(items.count[0])]
    assert int(items.count[0]) <= len(items.table)
    assert (np.diff(table[:, 5]) <= 0).all(), "the most expensive items come first"
    covered = np.zeros(len(ragged.positions), np.int64)
    for _, token, position, tokens, start, stop in table:
        covered[token : token + tokens] += 1
        assert position == ragged.positions[token]
        assert (start, stop) == (0, position + tokens)
    in_prompts = np.repeat([new > 1 for new, _ in rows], [new for new, _ in rows])
    np.testing.assert_array_equal(covered, in_prompts)


def make_ragged(rows: list[tuple[int, int]]) -> pa.Ragged:
    news, befores = np.array(rows).T
    starts = np.concatenate(([0], np.cumsum(news)))
    positions = [np.arange(before, before + new) for new, before in rows]
    width = max(1, -(-int((news + befores).max()) // 16))
    return pa.Ragged(
        token_rows=jnp.asarray(np.repeat(np.arange(len(rows)), news), jnp.int32),
        positions=jnp.asarray(np.concatenate(positions), jnp.int32),
        query_starts=jnp.asarray(starts, jnp.int32),
        kv_lens=jnp.asarray(np.where(news > 0, news + befores, 0), jnp.int32),
        block_tables=jnp.zeros((len(rows), width), jnp.int32),
    )


@pytest.mark.parametrize("width", [64, 128, 192, 256])
@pytest.mark.parametrize("pool_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_every_plan_fits_and_fills_the_matrix_units(
    width: int, pool_dtype: str, out_dtype: str
) -> None:
    for group in range(1, ROWS + 1):
        for is_decode in (True, False):
            plan = Plan(
                is_decode=is_decode,
                width=width,
                group=group,
                num_kv_heads=2,
                block_size=16,
                pool_dtype=jnp.dtype(pool_dtype),
                out_dtype=jnp.dtype("float32" if is_decode else out_dtype),
                has_window=False,
                softcap=None,
                has_sinks=False,
                interpret=None,
            )
            slots, stages = plan.buffers
            assert slots >= 1
            assert stages >= 2
            assert not is_decode or stages % 2 == 0, "each warpgroup has buffers of its own"
            rows = plan.tile_tokens * plan.rows_a_token
            assert rows <= ROWS
            assert rows % 8 == 0
            assert plan.rows_a_token >= group


@pytest.mark.parametrize(
    ("head_dim", "pool_dtype", "feature"),
    [
        (128, "bfloat16", {}),
        (256, "float8_e4m3fn", {"window": 30, "softcap": 30.0, "sinks": True}),
    ],
)
def test_the_kernels_lower_for_an_h100(
    head_dim: int, pool_dtype: str, feature: dict[str, Any]
) -> None:
    """`make gpu-aot` compiles them in full; this needs no GPU plugin."""
    case = case_of([(1, 20), (9, 30)], head_dim=head_dim, ratio=4, pool_dtype=pool_dtype, **feature)

    def call(q, k, v, pool, ragged, sinks, kv_scales):
        work = pa.prepare(ragged, block_size=16, max_query_len=9, backend="gpu")
        return pa.paged_attention(
            q,
            k,
            v,
            pool,
            work,
            first_block=jnp.int32(case.first_block),
            scale=case.scale,
            backend="gpu",
            window=case.window,
            softcap=case.softcap,
            sinks_N=sinks,
            kv_scales_2K=kv_scales,
        )

    arguments = (case.q, case.k, case.v, case.pool, case.ragged(), case.sinks, case.kv_scales)
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("decode", "prompt", "join"):
        assert f"paged_attention_{kernel}" in text


SHAPE = pa.Shape(
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
    dtype="bfloat16",
    cache_dtype="bfloat16",
)


def test_what_the_kernels_take_is_not_refused() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"cache_dtype": "int8"},
        {"cache_dtype": "float8_e4m3fn", "dtype": "float32"},
        {"head_dim": 80, "block_size": 256},
        {"num_heads": 64, "num_kv_heads": 1},
    ]
    for change in changes:
        shape = dataclasses.replace(SHAPE, **change)
        for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"):
            assert gpu.unsupported(shape, device) is None


@pytest.mark.parametrize(
    ("change", "device", "reason"),
    [
        ({}, "NVIDIA B200", "NVIDIA B200 is not a Hopper GPU, which the gpu kernels"),
        ({}, "NVIDIA A100-SXM4-40GB", "is not a Hopper GPU"),
        ({"cache_dtype": "float32"}, "", "bfloat16, float8_e4m3fn or int8"),
        ({"dtype": "float16"}, "", "bfloat16 or float32 queries"),
        ({"head_dim": 320}, "", "head dims up to 256"),
        ({"block_size": 8}, "", "blocks of 16, 32, 64, 128 or 256"),
        ({"num_heads": 65, "num_kv_heads": 1}, "", "up to 64 query heads"),
    ],
)
def test_what_they_do_not_take_is_refused_with_a_reason(
    change: dict[str, Any], device: str, reason: str
) -> None:
    refusal = gpu.unsupported(dataclasses.replace(SHAPE, **change), device)
    assert refusal is not None
    assert reason in refusal
