"""The step loop: what overlaps, how requests end, and what a failure costs."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from engine.core import scheduler
from engine.core.batching import Batch
from engine.runtime import clocks, compiles
from engine.runtime.figures import StepRecord
from engine.runtime.inbox import MAX_ASKED, EngineStopped
from engine.runtime.loop import EngineLoop
from engine.runtime.replay import replay
from engine.runtime.runner import Launched
from engine.sampling import InvalidRequest
from engine.types import Domain, FinishReason, QueueFull, StepPlan, StepTokens
from tests.engines import SmallEngine, make_request, small_engine
from tests.runtime.fake_runner import (
    LIMITS,
    DeviceFailed,
    FakeRunner,
    Listener,
    expected_tokens,
    start_loop,
)
from tests.runtime.tiny import random_ids

ABORT, DEADLINE, ERROR, LENGTH = (
    FinishReason.ABORT,
    FinishReason.DEADLINE,
    FinishReason.ERROR,
    FinishReason.LENGTH,
)
FOREVER = LIMITS.max_model_len - 8  # tokens; steps wait at the gate in the tests that use it


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Failures on purpose don't fill the output."""
    caplog.set_level(logging.CRITICAL + 1, "engine.runtime.loop")


def assert_idle(engine_loop: EngineLoop) -> None:
    """Nothing runs or waits, and every block is free or cached."""
    running, waiting, pool = engine_loop.gauges
    assert (running, waiting, pool.owned) == (0, 0, 0)
    assert pool.free + pool.cached == engine_loop.limits.num_blocks


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; pytest's time limit ends a test that waits in vain."""
    while not condition():
        time.sleep(0.001)


def test_a_step_is_launched_before_the_one_before_it_is_waited_for(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    engine_loop.submit(make_request("a", range(5), 3))
    listener.until_ended("a")
    # The last token is known to be the last when it is planned: nothing is launched for nothing.
    assert runner.events == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "wait 2"]


def test_figures_are_up_to_date_when_the_news_come(runner: FakeRunner) -> None:
    seen: list[tuple[Any, int]] = []
    ended = threading.Event()

    def on_news(news: Any) -> None:
        seen.append((engine_loop.gauges, engine_loop.totals.steps))
        if any(item.finish_reason for item in news):
            ended.set()

    engine_loop = EngineLoop(runner, LIMITS, on_news)  # type: ignore[bad-argument-type]
    engine_loop.submit(make_request("a", range(5), 2))
    ended.wait()
    engine_loop.close()
    (first, steps_then), (last, steps) = seen
    assert (first[0], steps_then) == (1, 1)
    assert first[2].owned == 2
    assert (last[0], last[1], last[2].owned, steps) == (0, 0, 0, 2)


def test_nobody_is_counted_twice_on_the_way_from_the_inbox_into_the_queue(
    runner: FakeRunner,
) -> None:
    seen: list[int] = []

    def on_news(news: Any) -> None:
        seen.append(sum(engine_loop.gauges[:2]))

    engine_loop = EngineLoop(runner, LIMITS, on_news)  # type: ignore[bad-argument-type]
    entered, leave = threading.Event(), threading.Event()
    engine_loop.look(lambda _: (entered.set(), leave.wait()))
    assert entered.wait(10)
    for name in ("a", "b", "a"):  # the last is refused: news as soon as the others are admitted
        engine_loop.submit(make_request(name, range(5), 1))
    assert sum(engine_loop.gauges[:2]) == 3
    leave.set()
    engine_loop.look(lambda _: None).result(10)
    engine_loop.close()
    assert seen[0] == 2
    assert_idle(engine_loop)


def test_each_step_s_figures_add_up(runner: FakeRunner) -> None:
    records: list[StepRecord] = []
    engine_loop, listener = start_loop(runner, on_step=records.append)
    engine_loop.submit(make_request("a", range(20), 3))
    listener.until_ended("a")
    engine_loop.close()
    assert [(r.num_rows, r.num_tokens) for r in records] == [(1, 16), (1, 4), (1, 1), (1, 1)]
    assert [r.owned_blocks for r in records] == [5, 6, 6, 0]  # the next step is planned already
    assert all(record.padded_tokens >= record.num_tokens for record in records)
    for record in records:
        times = (record.schedule, record.build, record.launch, record.wait, record.commit)
        assert min(times) >= 0
        assert record.device > 0


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_aborted_request_ends_and_returns_its_blocks(
    runner: FakeRunner, running: tuple[EngineLoop, Listener], count: int
) -> None:
    engine_loop, listener = running
    request = make_request("a", range(5), FOREVER)
    runner.gate.clear() if count == 0 else None
    engine_loop.submit(request)
    listener.until_tokens("a", count)
    engine_loop.abort("a")
    engine_loop.abort("a")
    engine_loop.abort("never heard of")
    runner.gate.set()
    [result] = listener.until_ended("a")
    if result.finish_reason is ABORT:  # it may have been faster
        assert result.token_ids == expected_tokens(request)[: len(result.token_ids)]
        assert_idle(engine_loop)
    engine_loop.submit(make_request("b", range(5), 2))
    assert listener.until_ended("b")[0].finish_reason is LENGTH
    assert_idle(engine_loop)


def test_a_name_may_be_used_again_right_after_its_abort(runner: FakeRunner) -> None:
    news: list[Any] = []
    ended = threading.Event()

    def on_news(items: Any) -> None:
        news.extend(items)
        if items[-1].num_prompt_tokens == 9:
            engine_loop.abort("a")  # the loop knows who is meant
            if items[-1].finish_reason is not None:
                ended.set()

    engine_loop = EngineLoop(runner, LIMITS, on_news)  # type: ignore[bad-argument-type]
    runner.gate.clear()
    engine_loop.submit(make_request("a", range(5), FOREVER))
    runner.at_gate.wait()
    again = make_request("a", range(9), FOREVER, seed=50)
    engine_loop.abort("a")
    engine_loop.submit(again)  # both are taken at once
    runner.gate.set()
    ended.wait()
    engine_loop.close()
    first = [item for item in news if item.num_prompt_tokens == 5]
    second = [item for item in news if item.num_prompt_tokens == 9]
    assert first[-1].finish_reason is second[-1].finish_reason is ABORT
    tokens = tuple(token for item in second for token in item.token_ids)
    assert 0 < len(tokens) <= 3  # the abort comes at most two steps after the first
    assert tokens == expected_tokens(again)[: len(tokens)]
    assert_idle(engine_loop)


def test_a_deadline_ends_a_request_wherever_it_is(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    now = time.monotonic()
    late = make_request("late", range(5), FOREVER, deadline=now - 1)
    engine_loop.submit(late)
    assert listener.until_ended("late")[0] == type(listener.results["late"])(
        (), DEADLINE, num_cached_tokens=0
    )
    runner.gate.clear()
    for number in range(4):  # these take all the slots
        engine_loop.submit(make_request(f"run{number}", range(5), FOREVER, deadline=now + 0.05))
    engine_loop.submit(make_request("waits", range(5), FOREVER, deadline=now + 0.05))
    engine_loop.submit(make_request("patient", range(5), 2, deadline=now + 1e6))
    until(lambda: time.monotonic() > now + 0.05)
    runner.gate.set()
    ended = listener.until_ended(*(f"run{number}" for number in range(4)), "waits", "patient")
    assert [result.finish_reason for result in ended] == [DEADLINE] * 5 + [LENGTH]
    assert engine_loop.totals.finished == {"deadline": 6, "length": 1}
    assert_idle(engine_loop)


def test_deadlines_of_requests_that_ended_are_not_kept(
    running: tuple[EngineLoop, Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "_MIN_DEADLINES", 4)
    engine_loop, listener = running
    for number in range(50):
        request = make_request(f"r{number}", range(3), 1, deadline=time.monotonic() + 1e6)
        engine_loop.submit(request)
        listener.until_ended(f"r{number}")
    assert len(engine_loop._deadlines._heap) <= 6


def test_a_request_that_can_never_run_is_rejected_and_others_go_on(
    running: tuple[EngineLoop, Listener],
) -> None:
    engine_loop, listener = running
    engine_loop.submit(make_request("long", range(LIMITS.max_model_len), 1))
    engine_loop.submit(make_request("good", range(5), 2))
    listener.until_ended("long", "good")
    assert isinstance(listener.rejected["long"], InvalidRequest)
    assert listener.results["good"].finish_reason is LENGTH
    assert_idle(engine_loop)


def test_a_full_queue_refuses_at_once_and_takes_requests_again_later(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    runner.gate.clear()
    engine_loop.submit(make_request("first", range(5), 2))
    runner.at_gate.wait()
    # The loop waits at the gate, so these stay in its inbox.
    names = [f"r{number}" for number in range(LIMITS.max_waiting)]
    for name in names:
        engine_loop.submit(make_request(name, range(5), 2))
    with pytest.raises(QueueFull, match="try again later") as raised:
        engine_loop.submit(make_request("more", range(5), 2))
    assert raised.value.retry_after > 0
    for _ in range(3):
        engine_loop.abort("r0")  # still fits, and takes no request's place
    runner.gate.set()
    results = listener.until_ended("first", *names)
    assert [result.finish_reason for result in results] == [LENGTH, ABORT] + [LENGTH] * 7
    engine_loop.submit(make_request("more", range(5), 2))
    assert listener.until_ended("more")[0].finish_reason is LENGTH


def test_the_scheduler_s_refusal_comes_as_news(runner: FakeRunner) -> None:
    limits = dataclasses.replace(LIMITS, max_num_seqs=1, max_waiting=2)
    listener = Listener()

    def on_news(items: Any) -> None:
        listener(items)
        if len(listener.results["runs"].token_ids) == 2:
            engine_loop.submit(make_request("one too many", range(5), 2))

    runner.gate.clear()
    engine_loop = EngineLoop(runner, limits, on_news)  # type: ignore[bad-argument-type]
    engine_loop.submit(make_request("runs", range(5), FOREVER))
    runner.at_gate.wait()
    for name in ("waits", "waits too"):
        engine_loop.submit(make_request(name, range(5), 2))
    runner.gate.set()
    listener.until_ended("runs", "waits", "waits too", "one too many")
    engine_loop.close()
    assert isinstance(listener.rejected["one too many"], QueueFull)
    assert engine_loop.totals.finished == {"length": 3}


def test_close_ends_what_runs_what_waits_and_what_was_not_looked_at_yet(
    runner: FakeRunner,
) -> None:
    engine_loop, listener = start_loop(runner)
    runner.gate.clear()
    engine_loop.submit(make_request("r0", range(5), FOREVER))
    runner.at_gate.wait()
    names = [f"r{number}" for number in range(1, 8)]
    for name in names:
        engine_loop.submit(make_request(name, range(5), FOREVER))
    closer = threading.Thread(target=engine_loop.close)
    closer.start()
    until(lambda: engine_loop._inbox.is_closed)
    with pytest.raises(EngineStopped, match="closed"):
        engine_loop.submit(make_request("late", range(5), 2))
    runner.gate.set()
    closer.join()
    results = listener.until_ended("r0", *names)
    assert {result.finish_reason for result in results} == {ABORT}
    assert_idle(engine_loop)
    assert not engine_loop.is_alive
    engine_loop.close()
    engine_loop.abort("r0")


def test_whatever_is_accepted_while_the_loop_closes_hears_its_end(runner: FakeRunner) -> None:
    for _ in range(20):
        engine_loop, listener = start_loop(FakeRunner())
        accepted: list[str] = []
        start = threading.Event()

        def submit(prefix: str, into: EngineLoop, names: list[str], go: threading.Event) -> None:
            go.wait()
            for number in range(30):
                try:
                    into.submit(make_request(f"{prefix}{number}", range(5), FOREVER))
                except (QueueFull, EngineStopped):
                    continue
                names.append(f"{prefix}{number}")

        threads = [
            threading.Thread(target=submit, args=(prefix, engine_loop, accepted, start))
            for prefix in "ab"
        ]
        for thread in threads:
            thread.start()
        start.set()
        engine_loop.close()
        for thread in threads:
            thread.join()
        listener.until_ended(*accepted)


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> SmallEngine:
    return small_engine(tiny_model)


class FlakyRunner:
    """The real runner, one of whose launches fails: before, after or while the device works."""

    def __init__(self, engine: SmallEngine, number: int, how: str):
        self.shape, self.sink_slot = engine.runner.shape, engine.runner.sink_slot
        self.failed: list[StepPlan] = []
        self._runner = engine.runner
        self._number, self._how = number, how

    def launch(self, plan: StepPlan, batch: Batch) -> Any:
        self._number -= 1
        if self._number != -1:
            return self._runner.launch(plan, batch)
        self.failed.append(plan)
        if self._how == "before":
            raise DeviceFailed("nothing was launched")
        launched = self._runner.launch(plan, batch)
        if self._how == "after":
            raise DeviceFailed("the pool is donated, and its successor lost")
        return FailingLaunch(launched)

    def move_blocks(self, plan: StepPlan) -> None:
        self._runner.move_blocks(plan)

    def reset(self) -> None:
        self._runner.reset()


@dataclasses.dataclass
class FailingLaunch:
    """A step that fails on the device."""

    launched: Launched
    masks: None = None

    @property
    def plan(self) -> StepPlan:
        return self.launched.plan

    def wait(self) -> StepTokens:
        self.launched.wait()
        raise DeviceFailed("the device failed")


@pytest.mark.parametrize("how", ["before", "after", "while it runs"])
@pytest.mark.parametrize("number", [0, 1, 3, 6])
def test_a_failed_step_ends_its_own_requests_and_no_others(
    small: SmallEngine, number: int, how: str
) -> None:
    # Seven requests for four slots: some run, and some wait for their turn.
    requests = [
        make_request(f"r{i}", random_ids(5 + 7 * i, seed=i), 4 + i, priority=i % 2, seed=i)
        for i in range(7)
    ]
    flaky = FlakyRunner(small, number, how)
    engine_loop, listener = start_loop(flaky, small.limits)
    num_compiles = compiles.counter()
    for request in requests:
        engine_loop.submit(request)
    listener.until_ended(*(request.request_id for request in requests))
    [failed] = flaky.failed
    own = {row.request.request_id for row in failed.rows}
    # A step that fails after the next was launched takes that one with it.
    for request in requests:
        result = listener.results[request.request_id]
        if result.finish_reason is not ERROR:
            assert request.request_id not in own
            assert result.token_ids == small.run_one(request).token_ids
    errors = {name for name, result in listener.results.items() if result.finish_reason is ERROR}
    assert own <= errors
    assert errors == own or how == "while it runs"
    assert len(errors) < len(requests)
    assert engine_loop.totals.failed_steps == 1
    again = dataclasses.replace(requests[0], request_id="again")
    engine_loop.submit(again)
    assert listener.until_ended("again")[0].token_ids == small.run_one(again).token_ids
    assert_idle(engine_loop)
    assert num_compiles() == 0  # neither the reset nor anything after it
    engine_loop.close()


def test_a_failure_drops_the_prefix_cache(small: SmallEngine) -> None:
    prompt = random_ids(40)
    # The first request takes two launches, as its prompt is longer than a step; a hit takes one.
    flaky = FlakyRunner(small, 3, "while it runs")
    engine_loop, listener = start_loop(flaky, small.limits)
    cached = []
    for name in ("first", "hit", "fails", "miss", "hit again"):
        engine_loop.submit(make_request(name, prompt, 1))
        [result] = listener.until_ended(name)
        cached.append((name, result.finish_reason, result.num_cached_tokens))
    engine_loop.close()
    assert cached == [
        ("first", LENGTH, 0),
        ("hit", LENGTH, 32),
        ("fails", ERROR, 32),
        ("miss", LENGTH, 0),
        ("hit again", LENGTH, 32),
    ]


def test_what_the_step_before_a_failed_launch_computed_still_counts(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    runner.gate.clear()
    engine_loop.submit(make_request("plug", range(3), 1))
    runner.at_gate.wait()
    runner.fail_launches = {2}  # 0 is the plug, 1 both prompts, 2 a decode of `long`
    engine_loop.submit(make_request("short", range(5), 1))
    engine_loop.submit(make_request("long", range(5), 5))
    runner.gate.set()
    short, long = listener.until_ended("short", "long")
    assert (short.finish_reason, len(short.token_ids)) == (LENGTH, 1)
    assert (long.finish_reason, len(long.token_ids)) == (ERROR, 1)
    assert runner.events[-3:] == ["launch 2", "wait 1", "reset"]
    assert_idle(engine_loop)


@pytest.mark.parametrize("cause", ["reset", "commit", "admit"])
def test_a_loop_that_can_not_go_on_tells_every_request(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    engine_loop, listener = start_loop(runner)
    runner.gate.clear()
    engine_loop.submit(make_request("runs", range(5), FOREVER))
    runner.at_gate.wait()
    names = [f"r{number}" for number in range(7)]
    for name in names:
        engine_loop.submit(make_request(name, range(5), 2))

    def broken(*arguments: Any) -> Any:
        raise AssertionError("a bug")

    match cause:
        case "reset":
            runner.fail_waits = {0}
            runner.fail_reset = True
        case "commit":
            monkeypatch.setattr(scheduler, "commit", broken)
            monkeypatch.setattr(scheduler, "fail", broken)
        case "admit":
            monkeypatch.setattr(scheduler, "admit", broken)
    runner.gate.set()
    results = listener.until_ended("runs", *names)
    assert {result.finish_reason for result in results} == {ERROR}
    assert engine_loop.totals.prompt_tokens == 8 * 5
    with pytest.raises(EngineStopped, match="failed"):
        engine_loop.submit(make_request("late", range(5), 2))
    engine_loop.abort("runs")
    engine_loop.close()
    assert not engine_loop.is_alive


def test_a_log_that_can_not_be_written_ends_and_the_engine_goes_on(
    runner: FakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    caplog.set_level(logging.ERROR, "engine.runtime.loop")
    engine_loop, listener = start_loop(runner, record=str(full))
    for number in range(40):
        name = f"r{number}"
        engine_loop.submit(make_request(name, range(20), FOREVER // 2))
        assert listener.until_ended(name)[0].finish_reason is LENGTH
    engine_loop.close()
    [message] = [r.getMessage() for r in caplog.records if r.name == "engine.runtime.recorder"]
    assert "the event log can't be written (No space left on device)" in message


def test_failures_and_deadlines_replay(runner: FakeRunner, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    runner.fail_launches, runner.fail_waits = {9}, {4}
    engine_loop, listener = start_loop(runner, record=str(log))
    names = [f"r{number}" for number in range(8)]
    for number, name in enumerate(names):
        deadline = time.monotonic() - 1 if number == 3 else None
        request = make_request(name, range(5 + 3 * number), 6, deadline=deadline)
        engine_loop.submit(request)
    results = listener.until_ended(*names)
    engine_loop.close()
    assert {result.finish_reason for result in results} >= {ERROR, DEADLINE}
    seen = replay(log, check=True)
    assert seen.requests == 8
    assert seen.tokens == sum(len(result.token_ids) for result in results)
    assert seen.state.is_idle


def test_who_looks_sees_a_state_between_two_steps(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running

    def look() -> Future[tuple[str, bool]]:
        return engine_loop.look(lambda state: (threading.current_thread().name, "a" in state))

    assert look().result(10) == ("octavo-loop", False)  # which wakes an idle loop
    runner.gate.clear()
    engine_loop.submit(make_request("a", range(5), FOREVER))
    seen = look()
    runner.gate.set()
    assert seen.result(10) == ("octavo-loop", True)
    with pytest.raises(KeyError, match="nobody"):
        engine_loop.look(lambda state: state.core.sequences["nobody"]).result(10)
    engine_loop.abort("a")
    listener.until_ended("a")
    engine_loop.close()
    with pytest.raises(EngineStopped):
        look().result(10)


def test_who_looks_at_a_loop_that_fails_is_told(
    running: tuple[EngineLoop, Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_loop, _ = running
    entered, leave = threading.Event(), threading.Event()
    first = engine_loop.look(lambda _: (entered.set(), leave.wait()))
    assert entered.wait(10)
    monkeypatch.setattr(engine_loop, "_apply", None)  # not callable: the loop's own fault
    waiting = engine_loop.look(lambda state: state.num_running)
    leave.set()
    assert first.result(10)
    with pytest.raises(EngineStopped):
        waiting.result(10)


def test_who_asks_when_too_many_do_is_refused_and_those_who_have_left_count(
    running: tuple[EngineLoop, Listener],
) -> None:
    engine_loop, listener = running
    entered, leave = threading.Event(), threading.Event()
    first = engine_loop.look(lambda _: (entered.set(), leave.wait()))
    assert entered.wait(10)
    flushes = [engine_loop.flush(Domain("alice", str(number))) for number in range(MAX_ASKED)]
    assert all(done.cancel() for done in flushes[1:])
    with pytest.raises(QueueFull, match=f"{MAX_ASKED} calls of this kind are in progress"):
        engine_loop.flush(None).result(10)
    looks = [engine_loop.look(lambda state: state.num_running) for _ in range(MAX_ASKED - 1)]
    with pytest.raises(QueueFull):
        engine_loop.look(lambda state: state.num_running).result(10)
    engine_loop.submit(make_request("a", range(5), 2))  # they are in nobody else's way
    leave.set()
    assert first.result(10)
    assert flushes[0].result(10) == 0
    assert [seen.result(10) for seen in looks] == [0] * len(looks)
    assert listener.until_ended("a")[0].finish_reason is LENGTH
    entered.clear()
    leave.clear()
    engine_loop.look(lambda _: (entered.set(), leave.wait()))
    assert entered.wait(10)
    flushes = [engine_loop.flush(None) for _ in range(MAX_ASKED)]  # there is room for all again
    leave.set()
    assert sum(done.result(10) for done in flushes) > 0


def test_a_flush_counts_until_the_disk_has_done_its_part(
    running: tuple[EngineLoop, Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_loop, _ = running
    on_disk: Future[None] = Future()
    monkeypatch.setattr(engine_loop.tiers, "flush", lambda domain, step: on_disk)
    flushes = [engine_loop.flush(None) for _ in range(MAX_ASKED)]
    engine_loop.look(lambda _: None).result(10)  # the inbox is empty
    with pytest.raises(QueueFull):
        engine_loop.flush(None).result(10)
    on_disk.set_result(None)
    assert {done.result(10) for done in flushes} == {0}
    assert engine_loop.flush(None).result(10) == 0


class NoWeights:
    """Other weights for the fake runner, which has none."""

    limits = dataclasses.replace(LIMITS, fingerprint="other")

    def install(self, runner: Any, tiers: Any) -> None:
        """There is nothing to exchange."""


@pytest.mark.parametrize("end", ["answer", "failure", "abort"])
def test_weights_are_exchanged_when_the_last_request_ends_though_nobody_comes_after_it(
    runner: FakeRunner, running: tuple[EngineLoop, Listener], end: str
) -> None:
    engine_loop, listener = running
    if end == "failure":
        runner.fail_waits = {2}
    runner.gate.clear()
    engine_loop.submit(make_request("a", range(5), 5))
    runner.at_gate.wait()
    exchanged = engine_loop.reload(NoWeights())
    if end == "abort":
        engine_loop.abort("a")
    runner.gate.set()
    exchanged.result(60)
    assert engine_loop.limits.fingerprint == "other"
    listener.until_ended("a")
    assert_idle(engine_loop)
