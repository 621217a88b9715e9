"""The tests can fail: each of these mistakes in the GPU kernels is caught in the interpreter.

A mutant is the source itself with one piece replaced. Should a piece no longer occur exactly
once, the test says so: then write the mutant anew. `make mutants` runs them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels.paged_attention import gpu
from tests.paged_attention.interpreted_gpu import MARKS, run_strictly, with_tiny_key_scales
from tests.paged_attention.oracle import Case, check, make_case

pytestmark = [pytest.mark.mutants, *MARKS]

SOURCE = Path(gpu.__file__ or "").read_text()

DECODE_MUTANTS = {
    "a decode sees one position too many": ("visible = token < left", "visible = token <= left"),
    "a decode sees before its window": (
        "visible & (token > position - window) if plan.has_window else visible",
        "visible",
    ),
    "the first layer is read": ("(first_block + block) * plan", "block * plan"),
    "one block is read for all": ("lax.div(position, block_size), last", "0 * position, last"),
    "all buffers are the first": ("buffers.ring.at[stage, :, pl", "buffers.ring.at[0, :, pl"),
    "values beyond the end stay NaN": (
        "_zero_values(plan, values, seen, buffers, group)\n\n        def",
        "pass\n\n        def",
    ),
    "values before the window stay NaN": ("is_seen &= row >= seen[0]", "pass"),
    "a page is not waited for": (
        "plgpu.barrier_wait(buffers.ready.at[stage])",
        "pass",
    ),
    "earlier parts keep their weight": ("acc * shrink\n            for", "acc\n            for"),
    "sinks are left out": ("jnp.float32(1.0 if plan.has_sinks else 0.0)", "jnp.float32(0.0)"),
}
PROMPT_MUTANTS = {
    "earlier tiles keep their weight": ("total = total * shrink +", "total = total +"),
    "a prompt sees one position ahead": (
        "distance <= position * rows",
        "distance <= position * rows + rows",
    ),
    "the window is one too wide": (
        "distance > (position - window) * rows",
        "distance >= (position - window) * rows - rows + 1",
    ),
    "a tile writes into the next row": (
        "jnp.clip(item.tokens - first, 0, plan.tile_tokens)",
        "plan.tile_tokens",
    ),
    "both warpgroups take the first's queries": (
        "copy = 0 if plan.is_decode else group",
        "copy = 0",
    ),
    "the values' scale is left out": ("value_factors[item.head] / total", "1.0 / total"),
    "the soft cap is left out": (
        "if plan.softcap:\n            scores",
        "if False:\n            scores",
    ),
}
TINY_SCALES_MUTANTS = {
    "a small factor of the scores undoes the mask": (
        "jnp.where(visible, scores, _MASKED)",  # as if it were masked before
        "jnp.where(visible, scores, _MASKED * factor)",
    ),
}


def decodes() -> Case:
    rows = [(1, 0), (1, 700), (1, 63)]  # the second in more parts than are joined at once
    options: dict[str, Any] = {"window": 650, "sinks": True, "seed": 1}
    return make_case(rows, block_size=16, num_kv_heads=1, head_dim=64, dtype="bfloat16", **options)


def prompts() -> Case:
    rows = [(5, 130), (40, 3), (2, 0)]
    options: dict[str, Any] = {"pool_dtype": "int8", "window": 30, "softcap": 1.5, "sinks": True}
    return make_case(
        rows, block_size=32, num_kv_heads=1, ratio=3, head_dim=64, dtype="bfloat16", **options
    )


def tiny_scales() -> Case:
    rows = [(1, 20), (5, 130)]
    return with_tiny_key_scales(
        make_case(
            rows, block_size=32, num_kv_heads=1, head_dim=64, dtype="bfloat16", pool_dtype="int8"
        )
    )


MUTANTS = {
    name: (make, right, wrong)
    for make, mutants in (
        (decodes, DECODE_MUTANTS),
        (prompts, PROMPT_MUTANTS),
        (tiny_scales, TINY_SCALES_MUTANTS),
    )
    for name, (right, wrong) in mutants.items()
}


@pytest.fixture
def kernel() -> Iterator[types.ModuleType]:
    """A copy of the kernel that stands in for it, to be executed by the test."""
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType(gpu.__name__)
        patch.setitem(sys.modules, gpu.__name__, module)
        yield module


def execute(source: str, module: types.ModuleType) -> None:
    exec(compile(source, "mutant of gpu.py", "exec"), module.__dict__)


def mutate(right: str, wrong: str) -> str:
    assert SOURCE.count(right) == 1, f"{right!r} is not in the source once; renew this mutant"
    return SOURCE.replace(right, wrong)


@pytest.mark.parametrize("make", [decodes, prompts, tiny_scales])
def test_the_kernels_themselves_pass(make: Callable[[], Case], kernel: types.ModuleType) -> None:
    execute(SOURCE, kernel)
    check(make(), *run_strictly(make()))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_caught(name: str, kernel: types.ModuleType) -> None:
    make, right, wrong = MUTANTS[name]
    case = make()
    execute(mutate(right, wrong), kernel)
    # What fails inside the interpreter comes out as a JaxRuntimeError.
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check(case, *run_strictly(case))
