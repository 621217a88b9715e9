"""Swap or compute: what the planner takes from the host tier, and sends there, by measured cost."""

from __future__ import annotations

from typing import Any

import pytest

from engine.core.costs import compute_ns, keeping_pays, restoring_pays
from engine.core.restoring import missing_blocks, restore
from engine.types import StepPlan
from tests.core.driver import Driver, make_limits, make_request, row_of

BLOCK = 4


def run_with(**costs: Any) -> tuple[Driver, list[StepPlan], StepPlan]:
    """A prompt of six blocks whose blocks are evicted, and asked for again."""
    driver = Driver(num_blocks=8, max_model_len=32, max_step_tokens=32, host_blocks=16, **costs)
    driver.admit(make_request("a", 25, max_tokens=2))
    plans = driver.run()
    driver.admit(make_request("b", 30, max_tokens=2))
    plans += driver.run()
    a = make_request("a", 25, max_tokens=2)
    driver.admit(make_request("c", a.prompt_ids, max_tokens=2))
    return driver, plans, driver.step()


@pytest.mark.parametrize(
    ("costs", "start"),
    [
        ({}, 24),  # nothing was measured
        ({"compute_ns": 10, "swap_in_ns": 39}, 24),  # a block of 4 tokens takes 40 to compute
        ({"compute_ns": 10, "swap_in_ns": 40}, 0),
        ({"compute_ns": 10, "swap_in_ns": 30, "transfer_ns": 59}, 24),  # once for all six
        ({"compute_ns": 10, "swap_in_ns": 30, "transfer_ns": 60}, 0),
        # 24 tokens with 288 positions before them, at half a nanosecond each.
        ({"compute_ns": 10, "swap_in_ns": 50, "attend_ps": 500, "transfer_ns": 83}, 24),
        ({"compute_ns": 10, "swap_in_ns": 50, "attend_ps": 500, "transfer_ns": 84}, 0),
    ],
)
def test_blocks_come_back_where_that_is_quicker_than_computing_them(
    costs: dict[str, int], start: int
) -> None:
    driver, _, plan = run_with(**costs)
    assert row_of(plan, "c").start == start
    assert len(plan.swap_ins) == start // BLOCK
    driver.run()
    assert driver.tokens_of("c") == [7, 7]


def test_what_would_never_be_taken_back_is_not_sent() -> None:
    """The last block of the longest sequence is worth most: its tokens come after 28 others."""
    costs = {"max_model_len": 32, "compute_ns": 10, "attend_ps": 1000, "swap_in_ns": 100}
    assert compute_ns(make_limits(**costs), 7, 1) == 160  # 4 * 10 + 4 * 28 + 4 * 4 / 2
    assert keeping_pays(make_limits(**costs, swap_out_ns=59))
    assert not keeping_pays(make_limits(**costs, swap_out_ns=60))
    _, plans, _ = run_with(compute_ns=10, swap_in_ns=20, swap_out_ns=19)
    assert sum(len(plan.swap_outs) for plan in plans) > 0
    _, plans, _ = run_with(compute_ns=10, swap_in_ns=20, swap_out_ns=20)
    assert sum(len(plan.swap_outs) for plan in plans) == 0


def test_a_part_of_the_blocks_never_pays_where_all_don_t() -> None:
    """So the planner need not look for the best part."""
    limits = make_limits(compute_ns=3, attend_ps=700, swap_in_ns=40, transfer_ns=9)
    for first in range(6):
        for count in range(1, 12):
            if not restoring_pays(limits, first, count):
                assert not any(restoring_pays(limits, first, part) for part in range(count))


def test_restored_blocks_are_found_by_the_planner_and_those_at_hand_stay() -> None:
    driver = Driver(host_blocks=4, max_step_tokens=32)
    request = make_request("a", 30)
    assert missing_blocks(driver.state, driver.limits, request).first == 0
    assert len(missing_blocks(driver.state, driver.limits, request).keys) == 7
    driver.admit(request)
    driver.state, _, slots = restore(driver.state, driver.limits, "a", 0, 2)
    assert len({slot for slot in slots if slot is not None}) == 2
    assert missing_blocks(driver.state, driver.limits, request).first == 2
    driver.state, _, more = restore(driver.state, driver.limits, "a", 2, 2)
    assert not set(slots) & set(more), "blocks of the same prompt gave way"
    plan = driver.step()
    assert row_of(plan, "a").start == 16
    assert [swap.slot for swap in plan.swap_ins] == [*slots, *more]


@pytest.mark.parametrize(
    ("request_id", "first", "count"), [("b", 0, 1), ("a", -1, 1), ("a", 0, 8), ("a", 7, 1)]
)
def test_blocks_that_no_request_waits_for_are_refused(
    request_id: str, first: int, count: int
) -> None:
    driver = Driver(host_blocks=4)
    driver.admit(make_request("a", 30))
    before = driver.state.snapshot()
    with pytest.raises(ValueError, match="blocks"):
        restore(driver.state, driver.limits, request_id, first, count)
    assert driver.state.snapshot() == before
