"""Which cached blocks a request may use: every hit has a miss beside it."""

from __future__ import annotations

import pytest

from engine.types import (
    Domain,
    StepTokens,
    TokenLogprobs,
)
from tests.core.driver import Driver, make_request, row_of, rows_of

ALICE, BOB = Domain(tenant="alice"), Domain(tenant="bob")


def test_a_request_finds_the_blocks_of_the_same_prompt_in_its_own_domain():
    driver = Driver()
    driver.admit(make_request("a", range(10), domain=ALICE, max_tokens=1))
    driver.run()
    driver.admit(make_request("b", range(10), domain=ALICE, max_tokens=1))
    assert rows_of(driver.step()) == [("b", 8, 2)]
    assert driver.outputs[-1].num_cached_tokens == 8


def test_a_request_finds_nothing_of_another_domain():
    driver = Driver()
    driver.admit(make_request("a", range(10), domain=ALICE, max_tokens=1))
    driver.run()
    driver.admit(make_request("b", range(10), domain=BOB, max_tokens=1))
    assert rows_of(driver.step()) == [("b", 0, 10)]
    assert driver.outputs[-1].num_cached_tokens == 0


@pytest.mark.parametrize(
    ("domain", "hit"),
    [
        (Domain("t", "s"), 8),
        (Domain("t", ""), 0),
        (Domain("t", "other"), 0),
        (Domain("other", "s"), 0),
        (Domain("ts", ""), 0),
        (Domain("", "ts"), 0),
    ],
)
def test_tenant_and_salt_must_both_be_equal_for_a_hit(domain: Domain, hit: int):
    driver = Driver()
    driver.admit(make_request("a", range(10), domain=Domain("t", "s"), max_tokens=1))
    driver.run()
    driver.admit(make_request("b", range(10), domain=domain, max_tokens=1))
    assert driver.step().rows[0].start == hit


def test_a_hit_shares_the_physical_blocks_and_leaves_at_least_one_token_to_compute():
    driver = Driver()
    driver.admit(make_request("a", range(8)))
    first = driver.step().rows[0]
    driver.admit(make_request("b", range(8)))
    row = row_of(driver.step(), "b")
    assert (row.start, row.num_tokens, row.samples) == (4, 4, True)
    assert row.block_ids[0] == first.block_ids[0]
    assert row.block_ids[1] != first.block_ids[1]


def test_a_block_that_is_planned_can_be_shared_before_it_is_computed():
    driver = Driver()
    driver.admit(make_request("a", range(9)))
    driver.schedule()
    driver.admit(make_request("b", range(9)))
    assert row_of(driver.schedule(), "b").start == 8


def test_a_block_is_not_shared_within_the_step_that_writes_it():
    driver = Driver(max_step_tokens=32)
    driver.admit(make_request("a", range(9)), make_request("b", range(9)))
    plan = driver.schedule()
    assert rows_of(plan) == [("a", 0, 9), ("b", 0, 9)]
    assert not set(plan.rows[0].block_ids) & set(plan.rows[1].block_ids)


def test_a_follow_up_finds_the_output_of_the_turn_before():
    driver = Driver()
    driver.admit(make_request("a", (1, 2, 3), max_tokens=6))
    driver.run()
    assert driver.tokens_of("a") == [7] * 6
    # Positions 0 to 7 were computed; the last token was sampled but never fed back.
    driver.admit(make_request("b", (1, 2, 3, 7, 7, 7, 7, 7, 7, 50)))
    assert row_of(driver.step(), "b").start == 8


def test_a_prompt_that_differs_in_its_first_token_finds_nothing():
    driver = Driver()
    driver.admit(make_request("a", range(12), max_tokens=1))
    driver.run()
    driver.admit(make_request("b", (99, *range(1, 12)), max_tokens=1))
    assert row_of(driver.step(), "b").start == 0


def test_without_prefix_reuse_nothing_is_kept():
    driver = Driver(prefix_reuse=False)
    for name in "ab":
        driver.admit(make_request(name, range(10), max_tokens=1))
        assert driver.step().rows[0].start == 0
        assert driver.state.pool.cached == 0


def test_a_request_for_prompt_logprobs_computes_its_whole_prompt_and_others_may_use_it():
    driver = Driver()
    driver.admit(make_request("a", range(10), max_tokens=1))
    driver.run()
    driver.admit(make_request("b", range(10), max_tokens=1, prompt_logprobs=0))
    assert row_of(driver.step(), "b").start == 0
    driver.admit(make_request("c", range(10), max_tokens=1))
    assert row_of(driver.step(), "c").start == 8


def entries(first: int, count: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token, -float(token), ()) for token in range(first, first + count))


def test_prompt_logprobs_of_all_chunks_come_with_the_first_token():
    driver = Driver(max_step_tokens=4)
    driver.admit(make_request("a", range(10), prompt_logprobs=0, max_tokens=2))
    for start, count in ((0, 4), (4, 4)):
        plan = driver.schedule()
        tokens = StepTokens((7,), prompt_logprobs={0: entries(start + 1, count)})
        assert driver.commit(plan, tokens) == ()
    plan = driver.schedule()
    (output,) = driver.commit(plan, StepTokens((7,), prompt_logprobs={0: entries(9, 1)}))
    assert output.prompt_logprobs == entries(1, 9)
    (output,) = driver.commit(driver.schedule())
    assert output.prompt_logprobs == ()


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt_without_repeats():
    driver = Driver(num_blocks=5, max_step_tokens=4, max_num_seqs=2)
    driver.admit(make_request("a", 4, max_tokens=8))
    driver.step()
    driver.admit(make_request("b", range(8), prompt_logprobs=0, max_tokens=2))
    restarts = 0
    while "b" in driver.state:
        plan = driver.schedule()
        found = {}
        for index, row in enumerate(plan.rows):
            if row.request.request_id == "b":
                restarts += row.history is not None
                targets = row.request.prompt_ids[row.start + 1 : row.start + row.num_tokens + 1]
                found[index] = entries(targets[0], len(targets)) if targets else ()
        driver.commit(plan, StepTokens((7,) * len(plan.rows), prompt_logprobs=found))
    assert restarts >= 1
    said = [out.prompt_logprobs for out in driver.outputs if out.request_id == "b"]
    assert said[0] == entries(1, 7)


def test_plans_do_not_depend_on_the_values_of_prompt_logprobs():
    """Else a replay, which has tokens only, or a host without them would plan otherwise."""

    def plans(*, with_values: bool) -> list[list[tuple[str, int, int]]]:
        driver = Driver(num_blocks=5)
        driver.admit(
            make_request("a", 7, max_tokens=5), make_request("b", range(7), prompt_logprobs=0)
        )
        seen = []
        while not driver.state.is_idle:
            plan = driver.schedule()
            seen.append(rows_of(plan))
            targets = {
                index: entries(row.start + 1, min(row.num_tokens, 6 - row.start))
                for index, row in enumerate(plan.rows)
                if row.request.request_id == "b" and row.start < 6
            }
            values = targets if with_values else {}
            driver.commit(plan, StepTokens((7,) * len(plan.rows), prompt_logprobs=values))
        return seen

    with_values = plans(with_values=True)
    assert [("b", 8, 1)] in with_values  # preempted, and resumed from what the cache still had
    assert with_values == plans(with_values=False)
