"""Merged blocks: memory is shared, and nothing that a caller can see depends on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.core.limits import Limits
from engine.types import Domain, Fork, StepPlan
from tests.core.driver import Driver, make_limits, make_request, row_of, rows_of

ALICE, BOB = Domain("alice"), Domain("bob")
SECRET, OTHER = range(14), range(50, 64)


def merging(**changes: Any) -> Driver:
    return Driver(prefix_reuse=False, merge_blocks=True, **changes)


def two(driver: Driver, domain: Domain = ALICE) -> None:
    """The same prompt twice, one after the other; both are running then."""
    driver.admit(make_request("a", SECRET, domain=ALICE, max_tokens=20))
    driver.step()
    driver.admit(make_request("b", SECRET, domain=domain, max_tokens=20))
    driver.step()


def test_equal_prompts_of_a_domain_come_to_share_their_full_blocks():
    driver = merging()
    two(driver)
    assert driver.state.pool.owned == 3 + 1 + 1  # the prompt's full blocks, and two tails
    a, b = (row_of(driver.step(), name).block_ids.tolist() for name in "ab")
    assert a[:3] == b[:3]
    assert a[3] != b[3]


def test_blocks_of_different_domains_are_not_merged():
    driver = merging()
    two(driver, BOB)
    assert driver.state.pool.owned == 2 * 4


def test_outputs_that_stay_the_same_are_merged_as_they_grow():
    driver = merging()
    two(driver)
    for _ in range(8):
        driver.step()
    tables = [row_of(driver.step(), name).block_ids.tolist() for name in "ab"]
    num_full = (14 + 8) // 4
    assert tables[0][:num_full] == tables[1][:num_full]


def test_nothing_is_merged_before_its_step_is_taken_in():
    driver = merging()
    driver.admit(make_request("a", SECRET))
    first = driver.schedule()
    driver.admit(make_request("b", SECRET))
    second = driver.schedule()
    assert driver.state.pool.owned == 8
    driver.commit(first)
    assert driver.state.pool.owned == 8
    driver.commit(second)
    assert driver.state.pool.owned == 5


def test_a_plan_on_its_way_keeps_its_table():
    driver = merging()
    driver.admit(make_request("a", SECRET, max_tokens=20))
    driver.step()
    driver.admit(make_request("b", SECRET, max_tokens=20))
    filling = driver.schedule()
    before = row_of(filling, "b").block_ids.tolist()
    next_one = driver.schedule()
    driver.commit(filling)  # merges what it filled
    assert row_of(filling, "b").block_ids.tolist() == before
    assert row_of(next_one, "b").block_ids.tolist()[:4] == before
    assert row_of(driver.schedule(), "b").block_ids.tolist()[:3] != before[:3]


def test_a_block_that_was_merged_away_can_be_had_at_once():
    """And by the step after those that still read it, as launches run in order."""
    driver = merging(num_blocks=11)  # apart, two prompts would leave three
    two(driver)
    assert driver.state.pool.free == 6
    driver.admit(make_request("c", OTHER, domain=BOB, max_tokens=1))
    assert row_of(driver.schedule(), "c").block_ids.size == 4


def test_a_shared_block_outlives_the_request_that_filled_it():
    driver = merging()
    two(driver)
    driver.abort("a")
    assert driver.state.pool.owned == 4
    driver.admit(make_request("c", SECRET, domain=ALICE, max_tokens=20))
    driver.step()
    assert driver.state.pool.owned == 3 + 2  # with what a computed and b holds


def test_nothing_is_kept_beyond_the_last_owner():
    driver = merging()
    two(driver)
    driver.run()
    assert driver.state.pool == (16, 0, 0)


def test_a_preempted_sequence_computes_everything_again():
    driver = merging(num_blocks=5, max_num_seqs=2)
    driver.admit(make_request("a", 7, max_tokens=9), make_request("b", 7, max_tokens=9))
    plans = driver.run()
    assert any(plan.preempted for plan in plans)
    starts = [row.start for plan in plans for row in plan.rows if row.history is not None]
    assert len(starts) > 2
    assert set(starts) == {0}
    assert all(output.num_cached_tokens == 0 for output in driver.outputs)


def test_forks_share_before_their_blocks_have_names():
    driver = merging()
    driver.admit(make_request("x", SECRET, max_tokens=20))
    driver.step()
    forks = (Fork("a/1", 1),)
    driver.admit(make_request("a", SECRET, max_tokens=20, forks=forks))
    driver.step()  # a's prompt is x's, and its fork has a's blocks
    assert driver.state.pool.owned == 3 + 2
    driver.run()
    assert driver.state.pool.free == 16


def seen(plan: StepPlan, name: str) -> list[tuple]:
    """What decides when a caller's tokens come, and what the reply says."""
    return [
        (plan.step, row.start, row.num_tokens, row.block_ids.size, row.samples)
        for row in plan.rows
        if row.request.request_id == name
    ]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("victim_is", ["running", "ended"])
def test_a_probe_s_steps_are_the_same_whether_or_not_its_prompt_was_sent(
    merge: bool, victim_is: str
):
    """The pair: with merging they are equal, and with open reuse they are not."""

    def probe(victims: range) -> list:
        driver = merging(num_blocks=64) if merge else Driver(num_blocks=64)
        driver.admit(make_request("v", victims, domain=ALICE, max_tokens=30))
        driver.step()
        if victim_is == "ended":
            driver.abort("v")
        driver.admit(make_request("p", SECRET, domain=ALICE, max_tokens=8))
        steps = []
        while "p" in driver.state:
            steps += seen(driver.step(), "p")
        replies = [output for output in driver.outputs if output.request_id == "p"]
        return [steps, replies]

    assert (probe(SECRET) == probe(OTHER)) == merge


def test_a_failed_step_leaves_nothing_that_could_be_merged():
    driver = merging()
    driver.admit(make_request("a", SECRET, max_tokens=20))
    driver.step()
    driver.admit(make_request("b", SECRET, max_tokens=20))
    plan = driver.schedule()
    driver.fail(plan)
    assert driver.state.pool == (16, 0, 0)
    driver.admit(make_request("c", SECRET, max_tokens=1))
    assert rows_of(driver.step()) == [("c", 0, 14)]


@pytest.mark.parametrize(
    "given",
    [
        {"prefix_reuse": True},
        {"prefix_reuse": False, "host_blocks": 1},
        {"allocator": "contiguous"},
    ],
)
def test_merging_takes_nothing_that_looks_prompts_up(given: dict[str, Any]):
    limits = make_limits(prefix_reuse=False, merge_blocks=True)
    with pytest.raises(ValueError, match="merge_blocks"):
        dataclasses.replace(limits, **given)
    assert isinstance(limits, Limits)
