"""What the step loop counts of lookups, over the scheduler alone."""

from __future__ import annotations

from typing import Any

import pytest

from engine.runtime.figures import Totals
from engine.types import Fork, Request
from tests.core.driver import Driver, make_request


def count(driver: Driver, *requests: Request) -> Totals:
    totals = Totals()
    driver.admit(*requests)
    while not driver.state.is_idle:
        plan = driver.schedule()
        totals.add_plan(plan, driver.state, driver.limits)
        driver.commit(plan)
    return totals


def looked_up(driver: Driver, **fields: Any) -> tuple[int, int]:
    totals = count(driver, make_request("r", range(42), **fields))
    return totals.prefix_cache_queries, totals.prefix_cache_hits


def test_a_prompt_is_looked_up_once_however_many_samples_and_chunks_it_has() -> None:
    driver = Driver()
    assert looked_up(driver) == (42, 0)
    assert looked_up(driver, forks=(Fork("r.1", 1), Fork("r.2", 2))) == (42, 40)


@pytest.mark.parametrize("fields", [{"is_private": True}, {"prompt_logprobs": 0}], ids=str)
def test_who_may_not_look_is_not_counted(fields: dict[str, Any]) -> None:
    driver = Driver()
    looked_up(driver)
    assert looked_up(driver, **fields) == (0, 0)


@pytest.mark.parametrize("limits", [{}, {"merge_blocks": True}], ids=["off", "constant"])
def test_where_nothing_is_looked_up_nothing_is_counted(limits: dict[str, Any]) -> None:
    driver = Driver(prefix_reuse=False, **limits)
    assert looked_up(driver) == looked_up(driver) == (0, 0)


def test_who_lost_its_blocks_is_not_counted_again() -> None:
    driver = Driver(num_blocks=6)
    totals = count(driver, *(make_request(name, 6, max_tokens=12) for name in "abc"))
    assert totals.preemptions > 0
    assert (totals.prefix_cache_queries, totals.prefix_cache_hits) == (18, 0)
