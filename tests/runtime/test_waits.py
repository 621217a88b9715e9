"""What a sequence is told about its time in the queue: from when to when, and what held it back."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from engine.core.core import Holding
from engine.runtime.waits import Waits
from engine.types import (
    FinishReason,
    Fork,
    Held,
    StepOutput,
    StepTokens,
    TokenLogprobs,
    Waited,
)
from tests.core.driver import Driver, make_request


class Timed:
    """A driver, and a clock that a test sets."""

    def __init__(self, **limits: Any):
        self.driver = Driver(**limits)
        self.waits = Waits()
        self.now = 0.0

    def admit(self, name: str, num_prompt: int, **changes: int) -> None:
        request = make_request(name, num_prompt, **changes)
        self.driver.admit(request)
        self.waits.arrived(request.names, self.now)

    def step(self, seconds: float) -> dict[str, Waited]:
        """Plan a step, let it take that long, and commit it. Returns what is told then."""
        plan = self.driver.schedule()
        self.waits.planned(plan, self.driver.state.holding, self.now)
        self.now += seconds
        return self.tell(self.driver.commit(plan))

    def tell(self, outputs: tuple[StepOutput, ...]) -> dict[str, Waited]:
        told = self.waits.tell(outputs, self.now)
        return {output.request_id: output.waited for output in told if output.waited is not None}


def test_a_request_that_starts_with_the_next_step_waited_for_that_alone() -> None:
    timed = Timed()
    timed.admit("a", 4)
    timed.now = 2.0
    assert timed.step(5.0) == {"a": Waited(2.0, {})}
    assert timed.step(5.0) == {}, "it was told before"


def test_the_wait_for_a_disk_counts_though_the_queue_was_joined_after_it() -> None:
    timed = Timed()
    timed.driver.admit(make_request("a", 4))
    timed.waits.arrived(["a"], 0.0, on_disk=3.0)
    timed.now = 2.0
    assert timed.step(5.0) == {"a": Waited(5.0, {"disk": Held(0, 3.0)})}


def test_those_behind_wait_for_what_holds_the_head() -> None:
    timed = Timed(max_num_seqs=1)
    timed.admit("a", 4, max_tokens=3)
    timed.admit("b", 4, max_tokens=2)
    timed.admit("c", 4, max_tokens=2)
    assert timed.step(1.0) == {"a": Waited(0.0, {})}
    assert timed.step(1.0) == {}
    assert timed.step(1.0) == {"a": Waited(0.0, {})}, "at its end it is told again"
    assert timed.step(1.0) == {"b": Waited(3.0, {"slots": Held(3, 3.0)})}
    timed.step(1.0)
    assert timed.step(1.0) == {"c": Waited(5.0, {"slots": Held(5, 5.0)})}


def test_what_held_the_queue_before_a_request_came_is_not_its_own() -> None:
    timed = Timed(max_num_seqs=1)
    timed.admit("a", 4, max_tokens=6)
    timed.admit("b", 4, max_tokens=1)
    for _ in range(4):
        timed.step(1.0)
    timed.now += 0.5
    timed.admit("c", 4, max_tokens=1)
    timed.step(1.0)
    timed.step(1.0)
    timed.step(1.0)
    told = timed.step(1.0)
    assert told == {"c": Waited(3.0, {"slots": Held(3, 3.0)})}


def test_reasons_come_in_the_order_of_their_time() -> None:
    """A prompt that fills the step's tokens first, and then the only other slot."""
    timed = Timed(max_num_seqs=2, max_step_tokens=4)
    timed.admit("a", 4, max_tokens=8)
    timed.admit("b", 3, max_tokens=12)
    timed.admit("c", 2, max_tokens=1)
    told: dict[str, Waited] = {}
    for _ in range(9):
        told |= timed.step(1.0)
    held = {"slots": Held(6, 6.0), "budget": Held(2, 2.0)}
    assert told["c"] == Waited(8.0, held)
    assert list(told["c"].held) == list(held)


def test_time_after_a_preemption_counts_too() -> None:
    timed = Timed(num_blocks=5, max_num_seqs=2)
    timed.admit("a", 7, max_tokens=9)
    timed.admit("b", 7, max_tokens=9)
    told: dict[str, list[Waited]] = {"a": [], "b": []}
    for _ in range(20):
        for name, waited in timed.step(1.0).items():
            told[name].append(waited)
    assert told["a"] == [Waited(0.0, {})] * 2
    first, *later = told["b"]
    assert first == Waited(0.0, {})
    assert later[-1].seconds >= 1.0
    assert later[-1].held["preemption"].steps >= 1


def test_who_is_ended_in_the_queue_is_told_how_long_it_was_there() -> None:
    timed = Timed(max_num_seqs=1)
    timed.admit("a", 4)
    timed.admit("b", 4)
    timed.step(3.0)
    outputs = timed.driver.abort("b", FinishReason.DEADLINE)
    assert timed.tell(outputs) == {"b": Waited(3.0, {"slots": Held(1, 3.0)})}
    assert timed.waits._sequences.keys() == {"a"}


def test_after_a_failed_step_those_that_ran_wait_again() -> None:
    timed = Timed(max_num_seqs=2)
    timed.admit("a", 4)
    timed.step(1.0)
    timed.driver.fail()
    timed.waits.failed(timed.now)
    timed.now += 2.0
    assert timed.step(1.0) == {"a": Waited(2.0, {})}


@pytest.mark.parametrize("seed", range(4))
def test_sums_agree_with_asking_each_request_in_each_step(seed: int) -> None:
    """The reference does what is too dear: it touches everyone that waits, once a step."""
    rng = random.Random(seed)
    timed = Timed(num_blocks=8, max_num_seqs=3, max_step_tokens=8)
    steps: dict[str, Counter[Holding]] = {}
    told: dict[str, Waited] = {}
    for number in range(300):
        waiting = {seq.request.request_id for seq in timed.driver.state.core.waiting.in_order()}
        if len(waiting) < 6 and rng.random() < 0.4:
            name = f"n{number}"
            timed.admit(name, rng.randint(1, 9), max_tokens=rng.randint(1, 12))
            steps[name] = Counter()
        told |= timed.step(float(rng.randint(1, 5)))
        for name in told.keys() & steps.keys():
            if name not in timed.driver.state:
                expected = steps.pop(name)
                assert {key: held.steps for key, held in told[name].held.items()} == expected
        holding = timed.driver.state.holding
        for seq in timed.driver.state.core.waiting.in_order():
            if holding is not None and seq.request.request_id in steps:
                steps[seq.request.request_id][holding] += 1
    assert sum(bool(waited.held) for waited in told.values()) > 10


@pytest.mark.parametrize("sampling", [{}, {"beam_width": 2, "n": 2}])
def test_a_fork_is_out_of_the_queue_when_its_prompt_begins(sampling: dict[str, Any]) -> None:
    timed = Timed(max_step_tokens=4)
    forks = (Fork("a.1", 1),)
    request = make_request("a", 10, max_tokens=2, forks=forks, **sampling)
    timed.driver.admit(request)
    timed.waits.arrived(request.replies, timed.now)
    timed.now = 2.0
    told: dict[str, Waited] = {}
    tops = ((3, -0.5), (4, -0.7), (5, -0.9))
    while not timed.driver.state.is_idle:
        plan = timed.driver.schedule()
        timed.waits.planned(plan, timed.driver.state.holding, timed.now)
        timed.now += 1.0
        rows = range(len(plan.rows))
        logprobs = {row: TokenLogprobs(3, -0.5, tops) for row in rows} if sampling else {}
        tokens = StepTokens((3,) * len(plan.rows), logprobs)
        told |= timed.tell(timed.driver.commit(plan, tokens))
    assert {name: waited.seconds for name, waited in told.items()} == {"a": 2.0, "a.1": 2.0}
