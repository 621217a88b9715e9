"""How a sequence ends: by itself, from outside, or with the step that carried it."""

from __future__ import annotations

import dataclasses

import pytest

from engine.types import (
    FinishReason,
    StepOutput,
)
from tests.core.driver import Driver, make_request, row_of, rows_of

# How a sequence ends.


def test_a_stop_token_ends_a_sequence_and_is_part_of_its_tokens():
    driver = Driver()
    driver.admit(make_request("a", 3, stop_ids=frozenset({5, 6})))
    driver.step({"a": 4})
    driver.step({"a": 5})
    assert driver.tokens_of("a") == [4, 5]
    assert [out.finish_reason for out in driver.outputs] == [None, FinishReason.STOP]
    assert driver.state.is_idle


def test_a_stop_token_that_is_also_the_last_one_counts_as_a_stop():
    driver = Driver()
    driver.admit(make_request("a", 3, max_tokens=1, stop_ids=frozenset({7})))
    driver.step()
    assert driver.outputs[-1].finish_reason is FinishReason.STOP


def test_what_was_planned_past_a_stop_is_dropped():
    driver = Driver()
    driver.admit(make_request("a", 3, stop_ids=frozenset({5})))
    first, second = driver.schedule(), driver.schedule()
    driver.commit(first, {"a": 5})
    assert driver.commit(second, {"a": 6}) == ()
    assert driver.tokens_of("a") == [5]


def test_a_sequence_ends_after_max_tokens():
    driver = Driver()
    driver.admit(make_request("a", 3, max_tokens=5))
    driver.run()
    assert len(driver.tokens_of("a")) == 5
    assert driver.outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_sequence_ends_at_the_models_context_even_if_max_tokens_says_more():
    driver = Driver(num_blocks=4, max_model_len=16)
    driver.admit(make_request("a", 10, max_tokens=1000))
    driver.run()
    assert len(driver.tokens_of("a")) == 6
    assert driver.outputs[-1].finish_reason is FinishReason.LENGTH


def test_an_abort_returns_every_block_and_says_so_once():
    driver = Driver()
    driver.admit(make_request("a", 10), make_request("b", 3))
    driver.step()
    (output,) = driver.abort("a", FinishReason.DEADLINE)
    assert output == StepOutput("a", (), FinishReason.DEADLINE, 10, 0)
    assert driver.abort("a") == ()
    assert driver.abort("never seen") == ()
    driver.abort("b")
    assert driver.state.is_idle
    assert driver.state.pool.owned == 0


def test_a_waiting_request_can_be_aborted():
    driver = Driver(max_num_seqs=1)
    driver.admit(*(make_request(name, 3, max_tokens=2) for name in "abc"))
    driver.step()
    driver.abort("b")
    driver.run()
    assert driver.tokens_of("b") == []
    assert driver.tokens_of("c") == [7, 7]


@pytest.mark.parametrize("same_object", [True, False])
def test_a_planned_step_of_an_aborted_request_is_dropped_even_if_its_id_comes_back(
    same_object: bool,
):
    driver = Driver()
    request = make_request("a", 3)
    driver.admit(request)
    stale = driver.schedule()
    driver.abort("a")
    driver.admit(request if same_object else dataclasses.replace(request))
    assert driver.commit(stale, {"a": 66}) == ()
    driver.step({"a": 8})
    assert driver.tokens_of("a") == [8]


def test_a_failed_step_of_an_aborted_request_does_not_end_its_successor():
    driver = Driver()
    request = make_request("a", 3, max_tokens=2)
    driver.admit(request)
    stale = driver.schedule()
    driver.abort("a")
    driver.admit(request)
    assert driver.fail(stale) == ()
    driver.run()
    assert driver.tokens_of("a") == [7, 7]


# Failed steps.


def test_a_failed_step_ends_its_own_requests_and_the_others_start_over():
    driver = Driver(max_step_tokens=4, max_num_seqs=3)
    driver.admit(make_request("a", 3), make_request("b", 9), make_request("c", 2))
    driver.step()
    failed = driver.schedule()
    assert [name for name, *_ in rows_of(failed)] == ["a", "b"]
    outputs = driver.fail(failed)
    assert [(out.request_id, out.finish_reason) for out in outputs] == [
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
    ]
    driver.run()
    assert len(driver.tokens_of("c")) == 8


def test_if_the_memory_is_lost_between_steps_everything_is_recomputed_and_nothing_ends():
    driver = Driver()
    driver.admit(make_request("a", 5), make_request("b", 9))
    driver.step()
    driver.step({"a": 1, "b": 2})
    assert driver.fail() == ()
    plan = driver.schedule()
    assert rows_of(plan) == [("a", 0, 7), ("b", 0, 9)]  # b: nine of eleven, the budget's rest
    assert [row.history for row in plan.rows] == [(7, 1), (7, 2)]
    driver.commit(plan)
    driver.run()
    assert len(driver.tokens_of("a")) == len(driver.tokens_of("b")) == 8


def test_after_a_failed_step_no_cached_name_is_left():
    driver = Driver()
    driver.admit(make_request("a", range(10), max_tokens=1))
    driver.run()
    assert driver.state.pool.cached == 2
    driver.admit(make_request("b", 3))
    driver.fail(driver.schedule())
    assert driver.state.pool == (16, 0, 0)
    driver.admit(make_request("c", range(10), max_tokens=1))
    assert row_of(driver.step(), "c").start == 0


def test_a_request_in_two_failed_steps_ends_once():
    driver = Driver()
    driver.admit(make_request("a", 3))
    assert len(driver.fail(driver.schedule(), driver.schedule())) == 1
