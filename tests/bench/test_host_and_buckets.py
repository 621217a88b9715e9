"""The arithmetic of the benchmarks of the host's part of a step, and of sets of buckets."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import buckets as sets
from benchmarks.host import DISPATCH, FORWARD, Idle, Run, hand_overs, idle_in, runs_of
from engine.bench.workload import Item, WorkloadError
from engine.config import BucketConfig
from engine.core.buckets import Bucket
from engine.core.limits import Limits
from engine.sampling import SamplingParams


def op(program: str, number: int, start: int, duration: int) -> dict[str, Any]:
    """Of a trace, microseconds."""
    args = {"hlo_module": program, "run_id": str(number), "hlo_op": "x"}
    return {"ph": "X", "name": "x", "ts": start, "dur": duration, "args": args}


def hand_over(start: int, duration: int) -> dict[str, Any]:
    return {"ph": "X", "name": DISPATCH, "ts": start, "dur": duration}


def test_a_program_runs_from_its_first_op_to_the_end_of_its_last() -> None:
    events = [
        {"ph": "M", "name": "thread_name", "args": {"name": "python"}},
        op("jit_sample", 8, 300, 50),
        op(FORWARD, 7, 150, 100),
        op(FORWARD, 7, 100, 60),
        {"ph": "X", "name": "ThunkExecutor::Execute", "ts": 0, "dur": 1000},
    ]
    runs = runs_of(events)
    assert [each.program for each in runs] == [FORWARD, "jit_sample"]
    spans = [time * 1e6 for each in runs for time in each[1:]]
    assert spans == pytest.approx([100, 250, 300, 350])


def test_a_hand_over_within_another_is_the_same_one() -> None:
    events = [hand_over(10, 20), hand_over(11, 18), hand_over(40, 5), hand_over(40, 5)]
    assert hand_overs(events) == pytest.approx([30e-6, 45e-6])


def test_the_device_waits_where_a_hand_over_comes_after_the_program_before() -> None:
    runs = [
        Run(FORWARD, 0.0, 4.0),
        Run("jit_sample", 4.25, 5.0),
        Run(FORWARD, 5.0, 9.0),  # handed over at 1: 4 s ahead
        Run("jit_sample", 9.0, 10.0),
        Run(FORWARD, 11.0, 15.0),  # handed over at 10.5: half a second late
    ]
    expected = Idle(seconds=15.0, between=1.25, late=1, lead=1.75, forwards=3)
    assert idle_in(runs, [-1.0, 1.0, 10.5]) == expected


@pytest.mark.parametrize("handed_over", [[0.0], [0.0, 1.0, 2.0], []])
def test_a_trace_that_lost_events_says_nothing(handed_over: list[float]) -> None:
    with pytest.raises(ValueError, match="2 forward passes"):
        idle_in([Run(FORWARD, 0, 1), Run(FORWARD, 1, 2)], handed_over)


LIMITS = Limits(
    num_blocks=64,
    block_size=4,
    max_num_seqs=4,
    max_step_tokens=16,
    max_model_len=64,
    max_waiting=8,
    fingerprint="weights",
)


def item(prompt: int, tokens: int) -> Item:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return Item(tuple(range(100 * prompt, 101 * prompt)), sampling)  # none begins as another does


def test_the_plans_of_a_workload_compute_every_position_once() -> None:
    """Other than the last token of each answer, which is never fed back."""
    items = [item(3, 5), item(20, 1), item(7, 2)]
    plans = sets.plans_of(items, LIMITS)
    # What comes of a step is known one step later: until then, one more may be planned.
    needed = sum((3 + 4, 20, 7 + 1))
    assert needed <= sum(plan.num_tokens for plan in plans) <= needed + len(items)
    assert plans[0].num_tokens == LIMITS.max_step_tokens


def test_padding_is_what_the_first_bucket_that_fits_adds() -> None:
    plans = sets.plans_of([item(3, 3)], LIMITS)
    assert [plan.num_tokens for plan in plans] == [3, 1, 1]
    padding = sets.padding_of(plans, (Bucket(2, 2, 16), Bucket(16, 4, 16)))
    assert padding == sets.Padding(tokens=5, padded_tokens=20, rows=3, padded_rows=8)
    assert (padding.waste, padding.waste_of_rows) == (0.75, 0.625)


def test_a_set_is_read_from_its_three_parts() -> None:
    expected = BucketConfig(decode_seqs=(1, 4), prefill_tokens=(32, 512), prefill_seqs=(16,))
    assert sets.parse("1,4/32,512/16") == expected


@pytest.mark.parametrize("text", ["1,4/32", "1,4/32/x", "", "1//2"])
def test_what_is_no_set_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(WorkloadError, match="1,4,16,64/64,256,512/16,64"):
        sets.parse(text)


def test_a_union_has_every_bucket_of_the_sets() -> None:
    buckets = (Bucket(1, 1, 8), Bucket(64, 64, 8), Bucket(32, 16, 8), Bucket(512, 64, 8))
    assert sets.union(buckets) == BucketConfig(
        decode_seqs=(1, 64), prefill_tokens=(32, 512), prefill_seqs=(16, 64)
    )
