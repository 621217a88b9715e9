"""The TPU kernel against the float64 oracle, in both of Pallas' interpreters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import tpu_plan
from tests.paged_attention.interpreted import (
    INTERPRETERS,
    Interpreter,
    run_interpreted,
    shrink,
)
from tests.paged_attention.oracle import FEATURES, Case, bits, check, make_case, rows_for, run

# A deadlocked kernel hangs in native code, where only a thread can end it.
pytestmark = pytest.mark.timeout(600, method="thread")

HEAD_DIMS, RATIOS = (64, 80, 96, 128, 256), (1, 2, 3, 4, 8, 16)
BLOCK_SIZES = (16, 32, 64, 128, 256)
DTYPES = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float32", "bfloat16"),
    ("bfloat16", "float8_e4m3fn"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
    ("bfloat16", "float32"),
)
# Every head dim with every ratio; block sizes, dtypes and interpreters take turns. A plain run has
# the black fields of that board, each in one interpreter; `make kernels` has all in all of them.
SHAPES = [
    (head_dim, ratio, BLOCK_SIZES[index % 5], *DTYPES[index % 7])
    for index, (head_dim, ratio) in enumerate(itertools.product(HEAD_DIMS, RATIOS))
]
WHITE = [
    (HEAD_DIMS.index(head_dim) + RATIOS.index(ratio)) % 2 == 1 for head_dim, ratio, *_ in SHAPES
]


def in_turns(values: Iterable[Any], left_out: Iterable[bool] = ()) -> list[Any]:
    """Each value with each interpreter; `make kernels` has those too whose turn it is not, or that
    are left out."""
    return [
        pytest.param(
            value,
            interpreter,
            marks=[] if (index + turn) % 3 == 0 and not is_out else pytest.mark.exhaustive,
            id=f"{value}-{interpreter}",
        )
        for index, (value, is_out) in enumerate(itertools.zip_longest(values, left_out))
        for turn, interpreter in enumerate(INTERPRETERS)
    ]


# (new tokens, context before), each with what it is for. Blocks have 16 tokens, and `shrink`
# makes products of 128 of them and fetches of 256.
MIXES: dict[str, list[tuple[int, int]]] = {
    "one page first": [(1, 3), (1, 600), (1, 0), (1, 255)],
    "lengths on edges": [(1, 15), (1, 16), (1, 127), (1, 128), (1, 255), (1, 256), (1, 511)],
    "more decodes than a step holds": [(1, 37 * i % 300) for i in range(19)],
    "prompts that share tiles": [(5, 0), (3, 13), (30, 2), (2, 300), (17, 0)],
    "a prompt over many tiles": [(70, 0), (1, 9)],
    "a prompt after a long context": [(40, 500)],
    "more blocks than are named at a time": [(1, 2100), (20, 2060)],
    "all kinds": [(1, 0), (20, 15), (0, 0), (3, 16), (1, 270), (33, 240), (1, 31), (16, 0)],
}


def case_of(rows: list[tuple[int, int]], **options: Any) -> Case:
    """A ragged batch with padding on every side, in blocks of 16 if nothing else is said."""
    settings: dict[str, Any] = {"head_dim": 64, "ratio": 4, "block_size": 16} | options
    return make_case(
        rows,
        num_tokens=sum(new for new, _ in rows) + 5,
        num_seqs=len(rows) + 2,
        table_width=max(-(-sum(row) // settings["block_size"]) for row in rows) + 1,
        **settings,
    )


@pytest.mark.parametrize(("shape", "interpreter"), in_turns(SHAPES, WHITE))
def test_a_ragged_batch_matches_the_oracle(
    shape: tuple[int, int, int, str, str],
    interpreter: Interpreter,
    capfd: pytest.CaptureFixture[str],
) -> None:
    head_dim, ratio, block_size, dtype, pool_dtype = shape
    case = case_of(
        rows_for(block_size),
        head_dim=head_dim,
        ratio=ratio,
        block_size=block_size,
        dtype=dtype,
        pool_dtype=pool_dtype,
        num_kv_heads=2,
    )
    check(case, *run_interpreted(case, interpreter, capfd))


@pytest.mark.parametrize("heads", [(1, 1), (3, 4), (8, 4), (8, 1), (12, 2), (5, 7)], ids=str)
def test_any_number_of_heads_stacks_into_registers(
    heads: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    num_kv_heads, ratio = heads
    case = case_of([(1, 20), (4, 3), (1, 40)], num_kv_heads=num_kv_heads, ratio=ratio)
    check(case, *run_interpreted(case, "eager", capfd))


@pytest.mark.parametrize(
    ("mix", "interpreter"),
    [*in_turns([*MIXES][:-1]), *(("all kinds", interpreter) for interpreter in INTERPRETERS)],
)
def test_adversarial_mixes_of_lengths_match_the_oracle(
    mix: str,
    interpreter: Interpreter,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shrink(monkeypatch)
    case = case_of(MIXES[mix])
    check(case, *run_interpreted(case, interpreter, capfd))


@pytest.mark.parametrize(("feature", "interpreter"), in_turns(FEATURES))
def test_each_feature_matches_the_oracle(
    feature: str,
    interpreter: Interpreter,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shrink(monkeypatch)
    dtype = DTYPES[sorted(FEATURES).index(feature) % 2][0]
    case = case_of(MIXES["all kinds"], dtype=dtype, ratio=3, **FEATURES[feature])
    check(case, *run_interpreted(case, interpreter, capfd))


@pytest.mark.parametrize(("window", "interpreter"), in_turns([1, 2, 16, 17, 130, 257, 1000]))
def test_a_window_may_end_anywhere(
    window: int,
    interpreter: Interpreter,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shrink(monkeypatch)
    case = case_of([(1, 600), (40, 280), (1, 1), (1, 256)], window=window)
    check(case, *run_interpreted(case, interpreter, capfd))


@pytest.mark.parametrize("layer", [0, 2])
def test_each_layer_keeps_to_its_part_of_the_pool(layer: int) -> None:
    case = case_of([(1, 30), (5, 9), (1, 0)], layer=layer, num_layers=3)
    check(case, *run(case, "tpu", interpret=True))


def test_a_full_pool_and_a_full_table_are_used_to_the_last_position() -> None:
    rows = [(1, 63), (16, 32), (64, 0)]
    case = make_case(
        rows,
        block_size=16,
        num_blocks=11,
        table_width=4,
        num_seqs=3,
        head_dim=64,
        layer=0,
        num_layers=1,
    )
    check(case, *run(case, "tpu", interpret=True))


def test_a_batch_of_padding_only_changes_nothing() -> None:
    case = make_case([], block_size=16, num_tokens=6, num_seqs=3, num_blocks=4, table_width=2)
    out, pool = run(case, "tpu", interpret=True)
    assert bits(pool) == bits(case.pool)
    assert (out == 0).all()


class OutOfReach(Case):
    """A case whose first row names no block of the pool where its window doesn't reach."""

    def ragged(self) -> pa.Ragged:
        ragged = super().ragged()
        hidden = (self.kv_lens[0] - self.window) // self.pool.shape[2]
        return ragged._replace(block_tables=ragged.block_tables.at[0, :hidden].set(2**20))


def test_only_pages_that_the_window_reaches_are_fetched(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shrink(monkeypatch)
    case = case_of([(1, 600), (20, 300)], window=40)
    check(case, *run_interpreted(OutOfReach(**vars(case)), "on_wait", capfd))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 8}, "blocks of 8 tokens; it takes 16, 32, 64, 128, 256"),
        ({"head_dim": 320}, "head dim 320; it takes up to 256"),
        ({"num_heads": 128, "num_kv_heads": 128, "block_size": 256}, "vector memory.*mesh.tensor"),
        ({"num_kv_heads": 32, "block_size": 256}, "; take blocks of 128 or split the heads"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(change: dict[str, Any], reason: str) -> None:
    right: dict[str, Any] = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "block_size": 16,
        "dtype": "bfloat16",
        "cache_dtype": "bfloat16",
    }
    pa.check_supported(pa.Shape(**right), "tpu")
    with pytest.raises(ValueError, match=reason):
        pa.check_supported(pa.Shape(**right | change), "tpu")


@pytest.mark.parametrize("vmem", [16, 64, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 32])
@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("tile", [0, 128])
def test_sizes_keep_within_the_target_s_vector_memory(
    vmem: int, num_kv_heads: int, block: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpu_plan, "vmem_bytes", lambda: vmem * 2**20)
    plan = tpu_plan.Plan(
        num_heads=32,
        num_kv_heads=num_kv_heads,
        width=128,
        block=block,
        dtype=jnp.dtype("bfloat16"),
        out_dtype=jnp.dtype("bfloat16"),
        tile=min(tile, 2 * vmem),
    )
    ring = plan.slots * plan.fetch * plan.token_bytes
    assert plan.chunk % plan.block == 0
    assert plan.fetch % plan.chunk == 0
    assert plan.pages & (plan.pages - 1) == 0
    smallest = plan.slots * max(block, 128) * plan.token_bytes
    assert ring <= max(vmem * 2**20 // 3, smallest)
    if smallest <= vmem * 2**20 // 3:
        assert plan.vmem <= vmem * 2**20
