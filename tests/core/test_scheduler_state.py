"""What the scheduler refuses, and its state as a value."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from engine.core import scheduler
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState, StaleState
from engine.sampling import InvalidRequest
from engine.types import Domain, QueueFull, StepPlan, StepTokens
from tests.core.driver import Driver, make_limits, make_request

# What is refused.


def refusal(driver: Driver, **request: Any) -> str:
    """Why a request is refused."""
    values: dict[str, Any] = {"request_id": "x", "prompt": 3, **request}
    before = driver.state.snapshot()
    with pytest.raises(InvalidRequest) as caught:
        driver.admit(make_request(**values))
    assert driver.state.snapshot() == before, "a refused request changed the state"
    return str(caught.value)


def test_an_empty_prompt_is_refused():
    assert refusal(Driver(), prompt=()) == "prompt: is empty; give at least one token"


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_and_the_longest_is_taken():
    driver = Driver(max_model_len=10)
    assert refusal(driver, prompt=10) == (
        "prompt: has 10 tokens, but with one token of output the model takes at most 9; "
        "shorten it or raise model.max_model_len"
    )
    driver.admit(make_request("a", 9))
    driver.run()
    assert len(driver.tokens_of("a")) == 1


def test_a_request_that_outgrows_the_whole_cache_is_refused_and_one_that_just_fits_is_taken():
    driver = Driver(num_blocks=3)
    assert refusal(driver, prompt=6, max_tokens=8) == (
        "max_tokens: prompt and output may reach 13 tokens, but the whole cache holds 12; "
        "lower max_tokens or enlarge the cache"
    )
    driver.admit(make_request("a", 6, max_tokens=7))
    driver.run()
    assert len(driver.tokens_of("a")) == 7


@pytest.mark.parametrize("max_tokens", [0, -1, -(10**30)])
def test_a_request_for_no_tokens_is_refused(max_tokens: int):
    message = refusal(Driver(), max_tokens=max_tokens)
    assert message == f"max_tokens: {max_tokens} is below 1; ask for at least one token"


@pytest.mark.parametrize("token", [-1, 2**31, 10**30])
def test_a_token_id_that_no_array_on_the_device_could_hold_is_refused(token: int):
    message = refusal(Driver(), prompt=(1, token, 2))
    assert message == f"prompt: token id {token} is not in [0, {2**31 - 1}]"


def test_an_id_that_is_in_use_is_refused_and_free_again_when_its_request_has_ended():
    driver = Driver()
    driver.admit(make_request("x", 3, max_tokens=1))
    assert refusal(driver) == "request_id: 'x' is already running"
    driver.run()
    driver.admit(make_request("x", 3))


def test_a_full_queue_refuses_and_takes_more_when_it_has_drained():
    driver = Driver(max_waiting=2, max_num_seqs=1)
    driver.admit(make_request("a", 3, max_tokens=1), make_request("b", 3, max_tokens=1))
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        driver.admit(make_request("c", 3))
    driver.step()
    driver.admit(make_request("c", 3))
    assert driver.state.num_waiting == 2


def test_a_name_that_is_not_unicode_text_stops_nothing():
    driver = Driver(fingerprint="\udcff")
    for name in "ab":
        driver.admit(make_request(name, range(10), domain=Domain("t", "\ud800"), max_tokens=1))
        driver.run()
    assert driver.outputs[-1].num_cached_tokens == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0; it must be from 1 to 2147483647"),
        ({"num_blocks": 2**31}, f"num_blocks is {2**31}; it must be from 1 to 2147483647"),
        ({"block_size": 0}, "block_size is 0; it must be from 1 to 2147483647"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1; it must be from 1 to 2147483647"),
        ({"max_model_len": 0}, "max_model_len is 0; it must be from 1 to 2147483647"),
        ({"max_waiting": 0}, "max_waiting is 0; it must be from 1 to 2147483647"),
        (
            {"max_num_seqs": 8, "max_step_tokens": 7},
            "max_step_tokens (7) is below max_num_seqs (8), so a step could not take one "
            "token of each sequence",
        ),
    ],
)
def test_limits_that_no_scheduler_could_keep_are_refused(changes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_limits(**changes)


# The state as a value.


def test_a_consumed_state_says_so():
    limits = make_limits()
    old = SchedulerState.initial(limits)
    new = scheduler.admit(old, limits, make_request("a", 3))
    for use in (
        lambda: scheduler.schedule(old, limits),
        lambda: scheduler.admit(old, limits, make_request("b", 3)),
        lambda: scheduler.abort(old, "a"),
        lambda: scheduler.fail(old, ()),
        lambda: scheduler.commit(old, StepPlan(0, ()), StepTokens(()), limits),
        old.snapshot,
        old.copy,
        old.check,
        lambda: old.num_running,
        lambda: old.is_idle,
        lambda: "a" in old,
    ):
        with pytest.raises(StaleState, match=r"was consumed; use the one that was returned"):
            use()
    assert "a" in new


def test_a_copy_goes_its_own_way():
    driver = Driver(num_blocks=6)
    driver.admit(*(make_request(name, 5, max_tokens=10) for name in "abc"))
    driver.step()
    kept = driver.state.copy()
    before = kept.snapshot()
    driver.abort("b")
    driver.run()
    kept.check()
    assert kept.snapshot() == before
    twin = Driver(driver.limits)
    twin.state = kept
    twin.run()
    assert len(twin.tokens_of("b")) == 9  # of ten, one came before the copy was made


def test_equal_histories_give_equal_states_and_plans():
    def story() -> tuple[object, dict[str, object]]:
        driver = Driver(num_blocks=6)
        driver.admit(*(make_request(name, range(5), max_tokens=9) for name in "abc"))
        plans = [
            [(*row[1:5], row.block_ids.tolist(), *row[6:]) for row in driver.step().rows]
            for _ in range(12)
        ]
        return plans, driver.state.snapshot()

    assert story() == story()


def test_a_snapshot_says_who_holds_what_without_saying_what_was_said():
    driver = Driver()
    driver.admit(make_request("a", (1234, 5678), max_tokens=4), make_request("b", 3, priority=1))
    driver.step()
    snapshot = driver.state.snapshot()
    assert (snapshot["step"], snapshot["in_flight"]) == (1, [])
    assert snapshot["pool"] == {"free": 14, "cached": 0, "owned": 2}
    assert snapshot["running"] == [
        {
            "request_id": "a",
            "rank": [0, 0],
            "slot": 0,
            "num_prompt": 2,
            "num_known": 3,
            "num_total": 3,
            "num_computed": 2,
            "num_preemptions": 0,
            "forks": [],
            "blocks": [0],
        },
        {
            "request_id": "b",
            "rank": [1, 1],
            "slot": 1,
            "num_prompt": 3,
            "num_known": 4,
            "num_total": 4,
            "num_computed": 3,
            "num_preemptions": 0,
            "forks": [],
            "blocks": [1],
        },
    ]
    assert "1234" not in repr(snapshot)


def test_steps_are_taken_in_once_and_in_order():
    driver = Driver()
    driver.admit(make_request("a", 3))
    first, second = driver.schedule(), driver.schedule()
    with pytest.raises(ValueError, match="step 1 can't be taken in now: step 0 is next"):
        driver.commit(second)
    driver.commit(first)  # the state is still good
    with pytest.raises(ValueError, match="step 0 can't be taken in now: step 1 is next"):
        driver.commit(first)
    driver.commit(second)
    with pytest.raises(ValueError, match="step 1 can't be taken in now: no step is on its way"):
        driver.commit(second)


def test_an_empty_plan_may_be_taken_in_or_left_out():
    driver = Driver()
    empty = driver.schedule()
    driver.admit(make_request("a", 3))
    plan = driver.schedule()
    driver.commit(empty)
    driver.commit(plan)
    assert driver.tokens_of("a") == [7]


def test_a_step_without_a_token_for_each_row_is_refused():
    driver = Driver()
    driver.admit(make_request("a", 3), make_request("b", 3))
    plan = driver.schedule()
    with pytest.raises(ValueError, match="step 0 has 2 rows, but came with 1 tokens"):
        driver.commit(plan, StepTokens((7,)))
    driver.commit(plan)


def test_the_waiting_queue_does_not_grow_with_requests_that_come_and_go():
    """Removal is lazy; a client that queues and aborts behind a busy head must not fill memory."""
    driver = Driver(max_num_seqs=1, num_blocks=64, max_model_len=256)
    driver.admit(make_request("a", 3, max_tokens=200))
    driver.step()
    driver.admit(make_request("head", 3))
    for index in range(2000):
        driver.admit(make_request(f"r{index}", 3, priority=1))
        driver.abort(f"r{index}")
    core = driver.state.core
    assert len(core.waiting._heap) < 200
    assert core.waiting.first() is driver.state.core.sequences["head"]


def test_limits_are_shown_as_they_were_given():
    limits = make_limits()
    assert Limits(**dataclasses.asdict(limits)) == limits
