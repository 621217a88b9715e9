"""Constraints in the step loop: when masks are asked for, and whom a broken one ends."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.runtime import constraints
from engine.runtime.loop import EngineLoop
from engine.runtime.news import BudgetSpent
from engine.runtime.replay import replay
from engine.sampling import Constraint, ConstraintBroken, InvalidRequest
from engine.types import FinishReason, Fork, Request
from tests.engines import make_request
from tests.runtime.fake_runner import DeviceFailed, FakeRunner, Listener, start_loop

BYTE = Constraint("regex", "(?s:.*)")


class Script:
    """A matcher that remembers its tokens, and breaks where it is told to."""

    def __init__(self, log: list[str], name: str, breaks: str = ""):
        self.tokens: list[int] = []
        self._log, self._name, self._breaks = log, name, breaks

    def fill(self, mask: np.ndarray) -> None:
        """Only the token that is next in a row."""
        self._say("fill")
        mask[:] = 1 << len(self.tokens)

    def advance(self, token_id: int) -> None:
        """Any token may come."""
        self.tokens.append(token_id)
        self._say("advance")

    def _say(self, what: str) -> None:
        event = f"{what} {len(self.tokens)} {self._name}"
        self._log.append(event)
        if event == self._breaks:
            raise ConstraintBroken(f"{what} went wrong")


@pytest.fixture
def running(runner: FakeRunner) -> Iterator[tuple[EngineLoop, Listener]]:
    engine_loop, listener = start_loop(runner)
    yield engine_loop, listener
    runner.gate.set()
    engine_loop.close()
    assert engine_loop._constraints._matchers == {}, "a matcher outlives its output"


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Failures on purpose don't fill the output."""
    caplog.set_level(logging.CRITICAL + 1, "engine.runtime.loop")


def constrained(
    runner: FakeRunner, name: str, max_tokens: int, breaks: str = "", forks: int = 0
) -> Request:
    """A request whose matchers write to the runner's events."""
    request = make_request(
        name,
        range(5),
        max_tokens,
        constraint=BYTE,
        n=1 + forks,
        forks=tuple(Fork(f"{name}{index}", index) for index in range(1, forks + 1)),
    )
    matchers = tuple(Script(runner.events, each, breaks) for each in request.names)
    return dataclasses.replace(request, matchers=matchers)


def test_masks_are_asked_for_between_the_launch_and_the_choice(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    """The step is on the device by then, and the token before it is known."""
    engine_loop, listener = running
    engine_loop.submit(constrained(runner, "a", 3))
    listener.until_ended("a")
    assert runner.events == [
        *("launch 0", "fill 0 a", "choose 0"),
        *("launch 1", "wait 0", "advance 1 a", "fill 1 a", "choose 1"),
        *("launch 2", "wait 1", "advance 2 a", "fill 2 a", "choose 2"),
        "wait 2",
    ]
    assert listener.results["a"].finish_reason is FinishReason.LENGTH


def test_steps_without_a_constrained_row_wait_for_nobody(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    engine_loop.submit(constrained(runner, "a", 1))
    engine_loop.submit(make_request("b", range(5), 4))
    listener.until_ended("a", "b")
    choices = [event for event in runner.events if event.startswith("choose")]
    assert choices == ["choose 0"]


@pytest.mark.parametrize("breaks", ["advance 2 a1", "fill 2 a1"])
def test_a_broken_constraint_ends_its_request_and_no_other(
    runner: FakeRunner, running: tuple[EngineLoop, Listener], breaks: str
) -> None:
    engine_loop, listener = running
    runner.gate.clear()
    engine_loop.submit(constrained(runner, "a", 8, breaks, forks=2))
    engine_loop.submit(constrained(runner, "b", 8))
    runner.gate.set()
    listener.until_ended("a", "a1", "a2", "b")
    error = listener.rejected["a"]
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.message) == ("constraint", f"{breaks.split()[0]} went wrong")
    for name in ("a", "a1", "a2"):
        result = listener.results[name]
        assert result.finish_reason is FinishReason.ERROR
        assert len(result.token_ids) == 2
    assert len(listener.results["b"].token_ids) == 8
    running_now, waiting, pool = engine_loop.gauges
    assert (running_now, waiting, pool.owned) == (0, 0, 0)


def test_where_a_step_s_constraints_take_too_long_the_dearest_request_ends(
    runner: FakeRunner,
    running: tuple[EngineLoop, Listener],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All samples of a request count together, and what they took is its own debt."""
    engine_loop, listener = running
    now = [0.0]
    monkeypatch.setattr(constraints, "thread_time", lambda: now[0])
    seconds = {"a": 0.02, "a1": 0.02, "a2": 0.02, "b": 0.03}
    say = Script._say

    def slow(self: Script, what: str) -> None:
        now[0] += seconds[self._name] * (what == "fill")
        say(self, what)

    monkeypatch.setattr(Script, "_say", slow)
    runner.gate.clear()
    engine_loop.submit(constrained(runner, "a", 30, forks=2))
    engine_loop.submit(constrained(runner, "b", 30))
    runner.gate.set()
    listener.until_ended("a", "a1", "a2", "b")
    assert isinstance(listener.rejected["a"], BudgetSpent)
    assert "60 milliseconds of it for this request's" in str(listener.rejected["a"])
    assert len(listener.results["b"].token_ids) == 30
    assert engine_loop.totals.mask_seconds == pytest.approx(now[0])


def test_a_spent_budget_is_no_fault_of_the_request(
    runner: FakeRunner,
    running: tuple[EngineLoop, Listener],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spent(self: Script, what: str) -> None:
        raise ConstraintBroken("takes too long", is_spent=True)

    monkeypatch.setattr(Script, "_say", spent)
    running[0].submit(constrained(runner, "a", 3))
    running[1].until_ended("a")
    error = running[1].rejected["a"]
    assert isinstance(error, BudgetSpent)
    assert str(error) == "constraint: takes too long"


def test_an_abort_between_launch_and_choice_leaves_the_row_free(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    runner.gate.clear()
    engine_loop.submit(constrained(runner, "a", 8))
    engine_loop.submit(constrained(runner, "b", 2))
    engine_loop.abort("a")
    runner.gate.set()
    listener.until_ended("a", "b")
    assert listener.results["a"].finish_reason is FinishReason.ABORT
    assert len(listener.results["b"].token_ids) == 2


def test_a_choice_that_fails_ends_the_requests_of_its_step(
    runner: FakeRunner,
    running: tuple[EngineLoop, Listener],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine_loop, listener = running
    choose = runner.choose

    def failing(launched: object) -> None:
        if launched.number == 2:  # type: ignore[missing-attribute]
            raise DeviceFailed("step 2 failed")
        choose(launched)  # type: ignore[bad-argument-type]

    monkeypatch.setattr(runner, "choose", failing)
    engine_loop.submit(constrained(runner, "a", 8))
    listener.until_ended("a")
    assert listener.results["a"].finish_reason is FinishReason.ERROR
    assert len(listener.results["a"].token_ids) == 2
    engine_loop.submit(constrained(runner, "b", 2))
    listener.until_ended("b")
    assert len(listener.results["b"].token_ids) == 2


def test_a_recorded_run_replays_without_its_grammars(runner: FakeRunner, tmp_path: Path) -> None:
    """One output that ends, one that breaks, and one that is cut off."""
    log = tmp_path / "events.jsonl"
    engine_loop, listener = start_loop(runner, record=str(log))
    engine_loop.submit(constrained(runner, "a", 3))
    engine_loop.submit(constrained(runner, "b", 8, "fill 2 b"))
    engine_loop.submit(constrained(runner, "c", 4, forks=1))
    results = listener.until_ended("a", "b", "c", "c1")
    engine_loop.close()
    assert "b" in listener.rejected
    seen = replay(log, check=True)
    assert seen.tokens == sum(len(result.token_ids) for result in results) == 3 + 2 + 4 + 4
    assert seen.state.is_idle
