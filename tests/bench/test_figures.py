from __future__ import annotations

import pytest

from engine.bench.figures import (
    Arrived,
    Distribution,
    EngineFigures,
    MachineFigures,
    Served,
    Spread,
    inter_token_latencies,
    internal_fragmentation,
    padding_waste,
    run_figures,
    step_figures,
    summarise,
)
from engine.runtime.figures import StepRecord

ENGINE = EngineFigures(None, None, None, None, preemptions=0, compiles=0, block_size=16)
MACHINE = MachineFigures(None, None, None)


def test_percentiles_interpolate_between_order_statistics() -> None:
    # Of 1 … 11 the median is the sixth; p90 lies at 0.9 * 10 = index 9, p99 at index 9.9.
    figures = Distribution.of([11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6])
    assert figures is not None
    assert (figures.mean, figures.p50, figures.p90, figures.max) == (6.0, 6.0, 10.0, 11)
    assert figures.p99 == pytest.approx(10.9)
    assert Distribution.of([4.0]) == Distribution(4.0, 4.0, 4.0, 4.0, 4.0)
    assert Distribution.of([]) is None


def test_the_time_between_deltas_is_shared_by_the_tokens_of_the_later_one() -> None:
    arrived = [Arrived(10.0, 1), Arrived(11.0, 1), Arrived(14.0, 3), Arrived(14.5, 2)]
    assert inter_token_latencies(arrived) == [1.0, 1.0, 1.0, 1.0, 0.25, 0.25]


def test_the_first_delta_has_no_inter_token_latency_however_many_tokens_it_has() -> None:
    assert inter_token_latencies([Arrived(3.0, 5)]) == []
    assert inter_token_latencies([]) == []
    assert inter_token_latencies([Arrived(3.0, 5), Arrived(5.0, 1)]) == [2.0]


def test_fragmentation_counts_the_empty_slots_of_each_decode() -> None:
    # 3 tokens in the cache, then 4, then 5, in blocks of 4: 1 + 0 + 3 of 4 + 4 + 8 are empty.
    assert internal_fragmentation([(3, 3)], block_size=4) == pytest.approx(4 / 16)
    # and with a sequence of 8 tokens, which fills its blocks
    assert internal_fragmentation([(3, 3), (8, 1)], block_size=4) == pytest.approx(4 / 24)
    assert internal_fragmentation([(3, 0)], block_size=4) is None


def test_padding_waste_is_the_share_of_what_was_computed() -> None:
    assert padding_waste(computed=30, padded=40) == 0.25
    assert padding_waste(computed=0, padded=0) is None


def record(schedule: float, wait: float, num_tokens: int = 2) -> StepRecord:
    return StepRecord(
        schedule=schedule,
        build=0.1,
        launch=0.1,
        wait=wait,
        commit=0.1,
        device=0.5,
        num_rows=2,
        num_tokens=num_tokens,
        padded_tokens=4,
        num_running=2,
        num_waiting=0,
        owned_blocks=3,
    )


def test_step_times_are_medians_and_shares_of_the_wall_time() -> None:
    records = [record(0.1, 1.0), record(0.3, 2.0), record(0.2, 3.0, num_tokens=8)]
    steps = step_figures(records, wall=10.0)
    assert steps is not None
    assert (steps.count, steps.tokens_mean, steps.rows_mean) == (3, 4.0, 2.0)
    assert (steps.schedule.median, steps.schedule.share) == (0.2, pytest.approx(0.06))
    assert steps.schedule.p99 == pytest.approx(0.3 - 0.02 * 0.1)
    assert (steps.wait.median, steps.wait.share) == (2.0, pytest.approx(0.6))
    # build, launch and commit take 0.03 each; the device's own time overlaps and is not added
    assert steps.outside == pytest.approx(1 - 0.06 - 0.6 - 3 * 0.03)
    assert steps.device.share == pytest.approx(0.15)
    assert step_figures([], wall=1.0) is None


def served(
    arrival: float, *arrived: Arrived, end: float, failure: str | None = None, cached: int = 0
) -> Served:
    return Served(arrival, arrived, end, 10, cached, failure)


def test_a_run_counts_what_was_served_as_asked() -> None:
    run = run_figures(
        [
            served(0.0, Arrived(1.0, 1), Arrived(2.0, 2), end=2.5, cached=5),
            served(1.0, Arrived(4.0, 1), end=4.0),
            served(1.0, Arrived(1.5, 4), end=1.6, failure="gone"),
        ],
        wall=4.0,
        engine=ENGINE,
        machine=MACHINE,
    )
    assert (run.requests, run.failed) == (3, 1)
    assert (run.prompt_tokens, run.output_tokens) == (20, 4)
    assert (run.output_tokens_per_second, run.total_tokens_per_second) == (1.0, 6.0)
    assert run.requests_per_second == 0.5
    assert run.prefix_cache_hit_share == 0.25
    assert run.ttft_seconds is not None
    assert (run.ttft_seconds.mean, run.ttft_seconds.max) == (2.0, 3.0)
    assert run.itl_seconds is not None
    assert (run.itl_seconds.mean, run.itl_seconds.max) == (0.5, 0.5)
    assert run.e2e_seconds is not None
    assert (run.e2e_seconds.mean, run.e2e_seconds.max) == (2.75, 3.0)


def test_a_run_in_which_all_failed_has_no_latencies() -> None:
    run = run_figures([served(0.0, end=1.0, failure="gone")], 1.0, ENGINE, MACHINE)
    assert (run.output_tokens_per_second, run.ttft_seconds, run.itl_seconds) == (0.0, None, None)
    assert run.prefix_cache_hit_share is None


def test_a_summary_has_median_and_range_of_what_every_run_has() -> None:
    runs = [
        {"rate": 3.0, "ttft": {"p50": 1}, "steps": None},
        {"rate": 1.0, "ttft": {"p50": 5}, "steps": {"count": 1}},
        {"rate": 2.0, "ttft": {"p50": 3}, "steps": {"count": 2}},
    ]
    assert summarise(runs) == {
        "rate": Spread(2.0, 1.0, 3.0),
        "ttft.p50": Spread(3, 1, 5),
    }
