"""The scheduling policy, one sentence a test; `test_stateful` covers what nobody thought of."""

from __future__ import annotations

import pytest

from engine.types import Fork, PlanRow, StepOutput, StepPlan
from tests.core.driver import Driver, make_request, row_of, rows_of

# What a step holds.


def test_a_step_takes_decodes_first_then_running_prompts_then_new_requests():
    driver = Driver(max_step_tokens=8)
    driver.admit(make_request("a", 2))
    driver.step()
    driver.admit(make_request("b", 12), make_request("c", 3))
    assert rows_of(driver.step()) == [("a", 2, 1), ("b", 0, 7)]
    assert rows_of(driver.step()) == [("a", 3, 1), ("b", 7, 5), ("c", 0, 2)]
    assert rows_of(driver.step()) == [("a", 4, 1), ("b", 12, 1), ("c", 2, 1)]


def test_a_long_prompt_never_stalls_a_stream():
    driver = Driver(num_blocks=64, max_model_len=256, max_step_tokens=8)
    driver.admit(make_request("stream", 2, max_tokens=60))
    driver.step()
    driver.admit(make_request("long", 200))
    while "stream" in driver.state:
        plan = driver.step()
        assert plan.rows[0].request.request_id == "stream"
        assert plan.num_tokens <= 8
    assert len(driver.tokens_of("stream")) == 60


def test_a_step_never_exceeds_its_token_budget_and_wastes_none_of_it():
    driver = Driver(num_blocks=64, max_model_len=128, max_step_tokens=10)
    driver.admit(*(make_request(name, 21, max_tokens=1) for name in "abc"))
    assert [plan.num_tokens for plan in driver.run()] == [10, 10, 10, 10, 10, 10, 3]


def test_no_more_sequences_run_than_there_are_slots():
    driver = Driver(max_num_seqs=2)
    driver.admit(*(make_request(name, 2) for name in "abc"))
    plan = driver.step()
    assert [row.slot for row in plan.rows] == [0, 1]
    assert (driver.state.num_running, driver.state.num_waiting) == (2, 1)


def test_a_freed_slot_is_used_again_and_its_new_owner_brings_its_history():
    driver = Driver(max_num_seqs=1)
    driver.admit(make_request("a", 2, max_tokens=1), make_request("b", 2))
    driver.step()
    row = row_of(driver.step(), "b")
    assert (row.slot, row.history) == (0, ())
    assert row_of(driver.step(), "b").history is None


def test_an_idle_scheduler_plans_an_empty_step():
    driver = Driver()
    assert driver.schedule() == StepPlan(step=0, rows=())


def test_a_plan_needs_counts_and_not_values():
    driver = Driver()
    driver.admit(make_request("a", (1, 2, 3), max_tokens=3))
    first, second, third = driver.schedule(), driver.schedule(), driver.schedule()
    rows = [plan.rows[0] for plan in (first, second, third)]
    assert [row.token_ids for row in rows] == [(1, 2, 3), (), ()]
    assert [(row.start, row.num_tokens) for row in rows] == [(0, 3), (3, 1), (4, 1)]
    assert [row.output_position for row in rows] == [0, 1, 2]
    assert all(row.samples for row in rows)
    assert driver.schedule().rows == ()  # max_tokens is reached, whatever the values are
    for plan, token in ((first, 11), (second, 12), (third, 13)):
        driver.commit(plan, {"a": token})
    assert driver.tokens_of("a") == [11, 12, 13]
    assert driver.state.is_idle


def test_rows_and_outputs_have_all_their_fields():
    """They are made without their constructors, which would miss one."""
    driver = Driver()
    driver.admit(make_request("a", 4, max_tokens=2, n=2, forks=(Fork("f", 1),)))
    plans = driver.run()
    rows = [row for plan in plans for row in plan.rows]
    assert len(rows) >= 4
    assert driver.outputs
    assert {len(row) for row in rows} == {len(PlanRow._fields)}
    assert {len(output) for output in driver.outputs} == {len(StepOutput._fields)}


def test_a_token_that_is_known_is_sent_and_one_that_is_not_is_left_to_the_slot():
    driver = Driver()
    driver.admit(make_request("a", 2))
    driver.commit(driver.schedule(), {"a": 42})
    assert driver.schedule().rows[0].token_ids == (42,)
    assert driver.schedule().rows[0].token_ids == ()


def test_a_plan_is_cut_off_from_later_changes_and_from_its_reader():
    driver = Driver()
    driver.admit(make_request("a", 4, max_tokens=20))
    plan = driver.step()
    (block_ids,) = (row.block_ids for row in plan.rows)
    before = block_ids.tolist()
    for _ in range(10):
        driver.step()
    driver.abort("a")
    assert block_ids.tolist() == before
    for row in plan.rows:
        with pytest.raises(ValueError, match="read-only"):
            row.block_ids[0] = 5


# Who goes first.


def test_priority_goes_before_arrival_and_arrival_decides_among_equals():
    driver = Driver(max_num_seqs=1)
    driver.admit(
        make_request("late", 2, priority=1, max_tokens=1),
        make_request("first", 2, max_tokens=1),
        make_request("second", 2, max_tokens=1),
        make_request("urgent", 2, priority=-1, max_tokens=1),
    )
    order = [plan.rows[0].request.request_id for plan in driver.run()]
    assert order == ["urgent", "first", "second", "late"]


def test_nothing_overtakes_the_head_of_the_queue():
    driver = Driver(num_blocks=8)
    driver.admit(make_request("a", 16, max_tokens=12))
    driver.step()
    driver.admit(make_request("big", 20, max_tokens=4), make_request("small", 1, max_tokens=1))
    while "a" in driver.state:
        assert [name for name, *_ in rows_of(driver.step())] == ["a"]
    assert [name for name, *_ in rows_of(driver.step())] == ["big"]
    assert "small" in {name for plan in driver.run() for name, *_ in rows_of(plan)}


def test_a_priority_inversion_lasts_no_longer_than_what_runs_already():
    """An urgent request waits for running ones, but for nobody who came to wait beside it."""
    driver = Driver(num_blocks=8, max_num_seqs=2)
    driver.admit(*(make_request(name, 8, max_tokens=8) for name in "ab"))
    driver.step()
    driver.admit(
        make_request("c", 8, max_tokens=8), make_request("urgent", 24, priority=-1, max_tokens=8)
    )
    for _ in range(7):  # both that run have seven tokens to go
        assert {name for name, *_ in rows_of(driver.step())} == {"a", "b"}
    assert rows_of(driver.step()) == [("urgent", 0, 16)]


def test_an_urgent_request_takes_no_blocks_from_a_running_one_until_a_decode_needs_one():
    driver = Driver(num_blocks=4)
    driver.admit(make_request("a", 8, max_tokens=8))
    driver.step()
    driver.admit(make_request("urgent", 12, priority=-1, max_tokens=1))
    assert rows_of(driver.step()) == [("a", 8, 1)]
    assert "urgent" in driver.state


# Preemption.


def make_tight_driver() -> Driver:
    """Three sequences of one block each, about to need a second, and only one is left."""
    driver = Driver(num_blocks=6)
    driver.admit(*(make_request(name, 3, max_tokens=12) for name in "abc"))
    driver.step()
    driver.step()
    assert driver.state.pool.free == 3
    return driver


def test_preemption_gives_up_the_lowest_rank_and_nobody_else():
    driver = make_tight_driver()
    for _ in range(4):
        plan = driver.step()
        assert len(plan.rows) == 3
    plan = driver.step()  # each needs a third block, and none is left
    assert plan.preempted == ("c",)
    assert [name for name, *_ in rows_of(plan)] == ["a", "b"]


def test_a_priority_decides_who_is_preempted():
    driver = Driver(num_blocks=5)
    driver.admit(make_request("a", 7, priority=1))
    driver.step()
    driver.admit(make_request("b", 7))
    driver.step()
    assert driver.step().preempted == ()
    assert driver.step().preempted == ("a",)  # although it came first and took the last block


def test_a_sequence_that_finds_no_block_and_ranks_lowest_goes_itself():
    driver = Driver(num_blocks=5)
    driver.admit(make_request("a", 8), make_request("b", 8))
    driver.step()
    plan = driver.step()  # a takes the fifth block, and b has none to take it from
    assert plan.preempted == ("b",)
    assert rows_of(plan) == [("a", 8, 1)]


def test_who_was_preempted_does_not_come_back_in_the_same_step():
    driver = make_tight_driver()
    plans = driver.run()
    for plan in plans:
        assert not set(plan.preempted) & {name for name, *_ in rows_of(plan)}
        if plan.preempted:
            assert all(row.history is None for row in plan.rows)


def test_a_resumed_sequence_equals_an_uninterrupted_one():
    """Tokens are a function of position here, so a lost or doubled one would show."""

    def outputs(num_blocks: int) -> tuple[dict[str, list[int]], int]:
        driver = Driver(num_blocks=num_blocks)
        driver.admit(*(make_request(name, 3, max_tokens=12) for name in "abc"))
        preemptions = 0
        while not driver.state.is_idle:
            plan = driver.schedule()
            preemptions += len(plan.preempted)
            driver.commit(
                plan,
                {row.request.request_id: row.start + row.num_tokens for row in plan.rows},
            )
        return {name: driver.tokens_of(name) for name in "abc"}, preemptions

    interrupted, preemptions = outputs(6)
    uninterrupted, none = outputs(16)
    assert preemptions > 0
    assert none == 0
    assert interrupted == uninterrupted == {name: list(range(3, 15)) for name in "abc"}


def test_a_resumed_sequence_recomputes_prompt_and_output_and_restores_its_slot():
    driver = Driver(num_blocks=6, prefix_reuse=False)
    driver.admit(*(make_request(name, 3, max_tokens=12) for name in "abc"))
    seen = []
    while not driver.state.is_idle:
        plan = driver.schedule()
        rows = [row for row in plan.rows if row.request.request_id == "c"]
        seen += [(row.start, row.num_tokens, row.history, row.output_position) for row in rows]
        driver.commit(plan, {"c": 90 + len(driver.tokens_of("c"))})
    resumed = [entry for entry in seen[1:] if entry[2] is not None]
    assert resumed
    for start, num_tokens, history, output_position in resumed:
        assert start == 0
        assert output_position == num_tokens - 3 == len(history)
        assert history == tuple(range(90, 90 + len(history)))


def test_a_preempted_sequence_waits_for_the_token_that_is_on_its_way():
    driver = Driver(num_blocks=5)
    driver.admit(make_request("a", 7), make_request("b", 7))
    first, second = driver.schedule(), driver.schedule()
    assert driver.schedule().preempted == ("b",)
    driver.abort("a")  # now there is room, but two tokens of b are not known yet
    assert driver.schedule().rows == ()
    driver.commit(first, {"b": 11})
    assert driver.schedule().rows == ()
    driver.commit(second, {"b": 12})
    assert driver.schedule().rows[0].history == (11, 12)


def test_a_sequence_that_fills_the_whole_pool_alone_can_finish():
    driver = Driver(num_blocks=4, max_model_len=64)
    driver.admit(make_request("a", 9, max_tokens=8), make_request("b", 1, max_tokens=16))
    driver.run()
    assert len(driver.tokens_of("a")) == 8
    assert len(driver.tokens_of("b")) == 16
