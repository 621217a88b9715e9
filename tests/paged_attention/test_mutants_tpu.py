"""The tests can fail: each of these mistakes in the TPU kernel is caught by the cases below, which
are among those of test_tpu.py. `make mutants` runs them.

A mutant is the source itself with one piece replaced. Should a piece no longer occur exactly
once, the test says so: then write the mutant anew.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

import pallas_kernels.paged_attention as pa
from pallas_kernels.paged_attention import tpu, tpu_plan
from tests.paged_attention.interpreted import Interpreter, run_interpreted, shrink
from tests.paged_attention.oracle import FEATURES, check
from tests.paged_attention.test_tpu import MIXES, case_of

# A deadlocked kernel hangs in native code, where only a thread can end it.
pytestmark = [pytest.mark.mutants, pytest.mark.timeout(900, method="thread")]

Mutant = tuple[str, str]

KERNEL_MUTANTS: dict[str, Mutant] = {
    # transfers
    "a fetch is not waited for": (
        "            wait_fetch(item, index, slot)\n\n            @pl.when",
        "            @pl.when",
    ),
    "only whole runs of pages are waited for": (
        "pl.loop(many * plan.unroll, stop - first)(lambda _: wait(1))",
        "pass",
    ),
    "the last pages of a fetch are left out": (
        "pl.loop(many * plan.unroll, stop - first)(lambda page: start(page, 1))",
        "pl.loop(many * plan.unroll, stop - first)(lambda page: start(0, 1))",
    ),
    "the products read the slot after": (
        "tile = kv[slot, pl.ds(chunk * pages, pages), head]",
        "tile = kv[_next(slot, plan.slots), pl.ds(chunk * pages, pages), head]",
    ),
    "all pages of a run are the first one": (
        "entries[entry + page + i]",
        "entries[entry + page]",
    ),
    "a page of another row": (
        "source = tables.at[rows[item] * plan.table_parts",
        "source = tables.at[rows[0] * plan.table_parts",
    ),
    "a long row's pages are named by its first part": (
        "* plan.table_parts + part",
        "* plan.table_parts",
    ),
    "the names of pages are not waited for": (
        "copy_entries(item, index, entry_slot).wait()",
        "pass",
    ),
    "names are read from where the next ones arrive": (
        "cursor[_ENTRY] = _next(cursor[_ENTRY], plan.slots + 1)",
        "cursor[_ENTRY] = cursor[_FETCH_ENTRY]",
    ),
    "a slot is fetched into while it is written from": (
        "wait_writes()  # out of the slot that the next fetch overwrites",
        "pass",
    ),
    "a row's next tile fetches what is still being written": (
        "pl.when((ahead != item) & (rows[ahead] == rows[item]))(wait_writes)",
        "pass",
    ),
    "the last writes are not waited for": ("pl.when(step == num_steps - 1)(wait_writes)", "pass"),
    # what is written
    "both halves of a word are written": ("mine = _bits(i, pack)", "mine = jnp.int32(-1)"),
    "a token is written one place on": (
        "place - position + i, pack",
        "place - position + i - 1, pack",
    ),
    "what lies before the new tokens is overwritten": (
        "(place + token >= position) & (place",
        "(place",
    ),
    "what lies after the new tokens is overwritten": (
        "& (place + token < stop_of(item))",
        "",
    ),
    "the first tile of every page is written": (
        "place & (plan.block - 1)",
        "place & (plan.merge_rows - 1)",
    ),
    # masks
    "a token misses its own position": ("seen = column <= last", "seen = column < last"),
    "a token sees one position ahead": ("seen = column <= last", "seen = column <= last + 1"),
    "NaN of rows that nobody wrote gets in": (
        "values = jnp.where(is_context, values, jnp.zeros_like(values))",
        "pass",
    ),
    "the window is one too wide": ("column > last - window[0]", "column >= last - window[0]"),
    "the window is one too narrow": ("column > last - window[0]", "column > last - window[0] + 1"),
    "a window's first chunks have no mask": (
        "whole = jnp.clip(whole, start, whole_stop)",
        "whole = start",
    ),
    "the first position that is seen is skipped": (
        "positions[item] - window[0] + 1, 0)",
        "positions[item] - window[0] + 17, 0)",
    ),
    "the next item is fetched from its first page": ("first_fetch(following), index", "0, index"),
    "the last chunk is left out": (
        "stop = _cdiv(jnp.minimum(stop_of(item) - base, plan.fetch), plan.chunk)",
        "stop = _div(jnp.minimum(stop_of(item) - base, plan.fetch), plan.chunk)",
    ),
    # sums
    "the scale is left out": ("scores = scores * factor(score_factors, group)", "pass"),
    "the scale of values is left out": ("(factor(out_factors, group) / divisor)", "(1 / divisor)"),
    "the cap is left out": ("scores = jnp.tanh(scores)", "scores = scores"),
    "a sink counts once a lane": ("1 / _LANES, jnp", "1.0, jnp"),
    "earlier chunks keep their weight": ("total[group] * shrink +", "total[group] +"),
    "earlier chunks keep their sum": (
        "acc[group] * _tile_lanes(shrink, plan.lanes) + new",
        "acc[group] + new",
    ),
    "the largest score so far is forgotten": (
        "jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))",
        "jnp.broadcast_to(jnp.max(scores, axis=1, keepdims=True), old_top.shape)",
    ),
    "keys are taken for values": ("[:, -plan.part :] for i", "[:, : plan.part] for i"),
    # tiles and stacks of heads
    "a tile's rows are all of its last row": (
        "jnp.where(is_mine, mine, out[:, lanes])",
        "mine",
    ),
    "a stack's values are all of its first head": (
        "out[:, :, head, :, head]",
        "out[:, :, head, :, 0]",
    ),
    "a stack's queries meet every head's keys": (
        "q = jnp.where(own, q, jnp.zeros_like(q))",
        "q = jnp.where(own, q, q)",
    ),
}

PLAN_MUTANTS: dict[str, Mutant] = {
    "a tile's reader is not held back, with more fetches ahead": (
        "PROMPT_SLOTS = 2",
        "PROMPT_SLOTS = 3",
    ),
    "the last decode is left out": (
        "jnp.minimum(steps * DECODE_ROWS, num_decodes)",
        "jnp.minimum(steps * DECODE_ROWS, num_decodes - 1)",
    ),
    "a tile starts where its row does": (
        "start = jnp.maximum(ragged.query_starts[row], tiles * tile)",
        "start = ragged.query_starts[row]",
    ),
    "a chunk of a prompt starts at position 0": (
        "positions=before + start - ragged.query_starts[row]",
        "positions=start - ragged.query_starts[row]",
    ),
    "an item runs on into the next row": (
        "counts=jnp.minimum(ragged.query_starts[row + 1], (tiles + 1) * tile) - start",
        "counts=(tiles + 1) * tile - start",
    ),
    "a row's last piece is left out": ("last - first + 1, 0)", "last - first, 0)"),
}

# The cheapest first: a mutant's other cases don't run once one has caught it.
CASES: list[tuple[Interpreter, list[tuple[int, int]], dict[str, Any]]] = [
    ("on_wait", MIXES["one page first"], {"num_kv_heads": 4, "ratio": 2}),
    ("on_wait", MIXES["all kinds"], {"num_kv_heads": 1, "dtype": "bfloat16"}),
    ("eager", MIXES["prompts that share tiles"], {"num_kv_heads": 1}),
    ("eager", [(1, 600), (40, 280), (1, 1), (1, 256)], {"window": 17, "sinks": True}),
    ("on_wait", [(1, 600), (40, 280), (1, 400)], {"window": 130, "block_size": 32}),
    ("eager", MIXES["all kinds"], FEATURES["float8 with everything"] | {"block_size": 64}),
    ("eager", MIXES["lengths on edges"], {"num_kv_heads": 1, "head_dim": 128}),
    ("eager", MIXES["a prompt over many tiles"], {"num_kv_heads": 1}),
    ("eager", MIXES["more blocks than are named at a time"], {"num_kv_heads": 1}),
]


def execute(name: str, source: str, patch: pytest.MonkeyPatch) -> types.ModuleType:
    """Run source in the place of a module of the package."""
    module = types.ModuleType(f"{pa.__name__}.{name}")
    patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(pa, name, module)
    exec(compile(source, f"mutant of {name}.py", "exec"), module.__dict__)
    return module


def mutate(module: types.ModuleType, mutant: Mutant | None) -> str:
    source = Path(module.__file__ or "").read_text()
    if mutant is None:
        return source
    right, wrong = mutant
    assert source.count(right) == 1, f"{right!r} is not in the source once; renew this mutant"
    return source.replace(right, wrong)


def check_all(capfd: pytest.CaptureFixture[str]) -> None:
    for interpreter, rows, options in CASES:
        case = case_of(rows, **options)
        check(case, *run_interpreted(case, interpreter, capfd))


@pytest.mark.parametrize("name", ["no mistake", *KERNEL_MUTANTS, *PLAN_MUTANTS])
def test_a_mistake_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan_source = mutate(tpu_plan, PLAN_MUTANTS.get(name))
    kernel_source = mutate(tpu, KERNEL_MUTANTS.get(name))
    shrink(monkeypatch, execute("tpu_plan", plan_source, monkeypatch))
    execute("tpu", kernel_source, monkeypatch)
    if name == "no mistake":
        check_all(capfd)
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - a wrong result, a race, a leak …
            check_all(capfd)
        # … but not a mutant that is no program at all
        assert not isinstance(caught.value, (AttributeError, NameError, SyntaxError, TypeError))
