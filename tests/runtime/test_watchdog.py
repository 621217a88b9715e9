"""A device that hangs, keeps failing, or is to rest: what becomes of requests and the engine."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from engine.life import Life, Resumed
from engine.runtime import loop as looping
from engine.runtime import watchdog as watching
from engine.runtime.loop import EngineLoop
from engine.runtime.news import Rejected
from engine.runtime.watchdog import Pulse, Watchdog, report
from engine.types import FinishReason, StepOutput
from tests.engines import make_request
from tests.runtime.fake_runner import LIMITS, FakeRunner, Listener, expected_tokens
from tests.runtime.test_loop import assert_idle, until

DEADLINE, ERROR, LENGTH = FinishReason.DEADLINE, FinishReason.ERROR, FinishReason.LENGTH
FOREVER = 1e6


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Failures on purpose don't fill the output."""
    for name in ("loop", "watchdog"):
        caplog.set_level(logging.CRITICAL + 1, f"engine.runtime.{name}")


Watch = Callable[..., Watchdog]


@pytest.fixture
def watch(running: tuple[EngineLoop, Listener]) -> Iterator[Watch]:
    """Starts a watchdog that ends the requests of hung steps as an engine does."""
    engine_loop, _ = running
    started: list[Watchdog] = []

    def start(step_timeout: float = 0.1, recovery_timeout: float = FOREVER) -> Watchdog:
        pulse = engine_loop.pulse

        def end() -> None:
            for output in pulse.ends():
                hung.setdefault(output.request_id, output)

        started.append(Watchdog(pulse, step_timeout, recovery_timeout, end))
        return started[-1]

    hung: dict[str, StepOutput] = {}
    start.hung = hung  # type: ignore[missing-attribute]
    yield start
    for watchdog in started:
        watchdog.close()


def test_requests_of_a_hung_step_end_at_once_and_others_go_on_when_it_comes_back(
    runner: FakeRunner, running: tuple[EngineLoop, Listener], watch: Watch
) -> None:
    engine_loop, listener = running
    runner.gate.clear()
    for number in range(LIMITS.max_num_seqs):
        engine_loop.submit(make_request(f"runs {number}", range(5), 4))
    runner.at_gate.wait()
    waits = make_request("waits", range(5), 4)
    engine_loop.submit(waits)
    watchdog = watch()
    until(lambda: engine_loop.pulse.trouble)
    hung = watch.hung  # type: ignore[missing-attribute]
    until(lambda: hung)
    on_device = {row.request.request_id for plan in runner.plans for row in plan.rows}
    assert hung.keys() == on_device
    assert {output.finish_reason for output in hung.values()} == {ERROR}
    assert "hangs" in (engine_loop.pulse.trouble or "")
    watchdog.close()  # on a slow machine it would end what comes next, too
    runner.gate.set()
    assert listener.until_ended("waits")[0].token_ids == expected_tokens(waits)
    assert engine_loop.pulse.trouble is None
    assert "reset" in runner.events
    ended = listener.until_ended(*on_device)  # the loop's own news, which streams no longer read
    assert {result.finish_reason for result in ended} == {ERROR}
    assert_idle(engine_loop)


def test_what_was_told_to_end_holds_nothing_when_the_host_was_slow_and_no_step_follows(
    runner: FakeRunner, running: tuple[EngineLoop, Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_loop, _ = running
    told: list[StepOutput | Rejected] = []
    life = Life(engine_loop, told.extend)
    goes_on = threading.Event()
    tell, launch = engine_loop._waits.tell, runner.launch

    def slow_tell(*args: Any) -> Any:
        goes_on.wait(30)
        return tell(*args)

    def pausing_launch(*args: Any) -> Any:
        engine_loop.pulse.is_paused = True
        return launch(*args)

    monkeypatch.setattr(engine_loop._waits, "tell", slow_tell)
    monkeypatch.setattr(runner, "launch", pausing_launch)
    life.watch(step_timeout=0.1, recovery_timeout=FOREVER, max_failed_steps=100)
    engine_loop.submit(make_request("a", range(5), 50))
    until(lambda: told)
    goes_on.set()
    until(lambda: not sum(engine_loop.gauges[:2]))
    assert_idle(engine_loop)
    assert len(runner.plans) == 1
    life.close()


def test_an_idle_loop_and_one_that_is_slow_but_moves_are_left_alone(
    runner: FakeRunner, running: tuple[EngineLoop, Listener], watch: Watch
) -> None:
    engine_loop, listener = running
    watchdog = watch(step_timeout=4.0)  # eight looks, which are the test's own
    watchdog.close()

    def looks(count: int) -> bool:
        for _ in range(count):
            watchdog._look()
        return True

    looks(20)  # idle for longer than a step may take
    slow = threading.Event()
    slow.wait = lambda timeout=None: looks(5)  # type: ignore[method-assign]
    runner.gate = slow
    engine_loop.submit(make_request("a", range(5), 8))  # all of it takes longer than a step may
    assert listener.until_ended("a")[0].finish_reason is LENGTH
    assert not watch.hung  # type: ignore[missing-attribute]


def test_what_is_done_between_two_steps_is_watched_too(
    running: tuple[EngineLoop, Listener],
) -> None:
    """An exchange of weights, and blocks that come back, are about the device."""
    engine_loop, _ = running
    pulse = engine_loop.pulse
    assert engine_loop.look(lambda state: pulse.since).result(10) is not None
    until(lambda: pulse.since is None)


def test_what_the_host_does_after_a_step_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((1.0, 20.0, 40.0))
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: next(times)))
    pulse = Pulse({})
    pulse.begin()
    pulse.came_back()
    assert pulse.since == 20.0
    pulse.moved()
    assert pulse.since == 40.0


def test_a_process_that_was_stopped_for_a_while_is_not_hung() -> None:
    """The watchdog counts its own looks, and the clock may have jumped between two of them."""
    pulse = Pulse({})
    watchdog = Watchdog(pulse, 8.0, 8.0, lambda: pytest.fail("told"))
    watchdog.close()
    pulse.begin()
    pulse.since = time.monotonic() - 1000
    for _ in range(8):
        watchdog._look()
    assert not pulse.is_hung


def test_a_device_that_does_not_come_back_is_lost(
    runner: FakeRunner, running: tuple[EngineLoop, Listener], watch: Watch
) -> None:
    engine_loop, _ = running
    runner.gate.clear()
    engine_loop.submit(make_request("a", range(5), 4))
    runner.at_gate.wait()
    watchdog = watch(recovery_timeout=0.2)
    watchdog.close()  # it looks when the test says
    while not engine_loop.pulse.trouble:
        watchdog._look()
    assert not watchdog.is_lost
    while not watchdog.is_lost:
        watchdog._look()


def test_the_report_names_the_step_and_where_each_thread_is(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, _ = running
    runner.gate.clear()
    engine_loop.submit(make_request("secret name", range(5), 4))
    runner.at_gate.wait()
    text = report(engine_loop.pulse)
    assert "rows, 5 tokens" in text
    assert "thread octavo-loop:" in text
    assert "fake_runner.py" in text
    assert "secret name" not in text


@pytest.fixture
def _quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (watching, looping):
        monkeypatch.setattr(module, "PROBE_SECONDS", 0.01)


@pytest.mark.usefixtures("_quick_probes")
def test_after_failures_in_a_row_requests_wait_until_the_device_works(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    engine_loop.pulse.max_failures = 2
    runner.fail_waits = set(range(10**6))
    names = ["b", "c", "d"]
    for name in ("a", "b"):  # a step each
        engine_loop.submit(make_request(name, range(5), 4))
        listener.until_ended(name)
    until(lambda: engine_loop.pulse.trouble)
    assert "steps in a row failed" in (engine_loop.pulse.trouble or "")
    for name in names[1:]:
        engine_loop.submit(make_request(name, range(5), 4))
    late = make_request("late", range(5), 4, deadline=time.monotonic() + 0.05)
    engine_loop.submit(late)
    assert listener.until_ended("late")[0].finish_reason is DEADLINE
    probes = [plan for plan in runner.plans if plan.step == -1]
    until(lambda: len([plan for plan in runner.plans if plan.step == -1]) > len(probes) + 1)
    assert all(listener.results[name].finish_reason is None for name in names[1:])
    runner.fail_waits = set()
    assert {r.finish_reason for r in listener.until_ended(*names[1:])} == {LENGTH}
    assert engine_loop.pulse.trouble is None
    assert_idle(engine_loop)


@pytest.mark.usefixtures("_quick_probes")
def test_a_device_without_memory_for_a_while_loses_nobody_who_waits(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    engine_loop.pulse.max_failures = 2
    runner.fail_waits, runner.fail_reset = {0}, True
    engine_loop.submit(make_request("lost", range(5), 4))
    listener.until_ended("lost")
    engine_loop.submit(make_request("waits", range(5), 4))
    until(lambda: runner.events.count("reset") > 4)  # by probes too
    assert engine_loop.pulse.trouble
    runner.fail_reset = False
    assert listener.until_ended("waits")[0].finish_reason is LENGTH
    assert engine_loop.pulse.trouble is None
    assert_idle(engine_loop)


def test_probes_keep_their_pace_whatever_is_asked_and_rest_in_a_pause(
    runner: FakeRunner,
    running: tuple[EngineLoop, Listener],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine_loop, _ = running

    def num_probes() -> int:
        for _ in range(5):
            engine_loop.look(lambda state: None).result(10)
        return len(runner.plans)

    monkeypatch.setattr(watching, "PROBE_SECONDS", FOREVER)
    runner.fail_waits = set(range(100))
    engine_loop.pulse.max_failures = 0
    assert num_probes() == num_probes() == 1
    engine_loop.pulse.is_paused = True
    engine_loop.pulse.next_probe = 0.0
    assert num_probes() == 1
    engine_loop.pulse.is_paused = False
    until(lambda: num_probes() == 2)


async def test_a_pause_that_is_resumed_or_given_up_is_none() -> None:
    at_work: list[Future[bool]] = []

    def look(at: object) -> Future[bool]:
        at_work.append(Future())
        return at_work[-1]

    loop: Any = SimpleNamespace(pulse=Pulse({}), look=look)
    life = Life(loop, lambda news: None)
    pausing = asyncio.create_task(life.pause())
    await asyncio.sleep(0)
    assert life.is_paused
    pausing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pausing
    assert not life.is_paused
    pausing = asyncio.create_task(life.pause())
    await asyncio.sleep(0)
    resuming = asyncio.create_task(life.resume())
    await asyncio.sleep(0)
    for future in at_work[1:]:
        future.set_result(False)
    with pytest.raises(Resumed, match="pause it again"):
        await pausing
    await resuming
    assert not life.is_paused


def test_single_failures_with_good_steps_between_them_are_no_trouble(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    engine_loop.pulse.max_failures = 2
    for number in range(4):
        runner.fail_waits = {len(runner.plans)}
        engine_loop.submit(make_request(f"bad {number}", range(5), 3))
        listener.until_ended(f"bad {number}")
        engine_loop.submit(make_request(f"good {number}", range(5), 3))
        listener.until_ended(f"good {number}")
        assert listener.results[f"good {number}"].finish_reason is LENGTH
        assert engine_loop.pulse.trouble is None


def test_a_pause_begins_no_step_and_keeps_blocks_and_places(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    runner.gate.clear()
    runs = make_request("runs", range(5), 20)
    engine_loop.submit(runs)
    runner.at_gate.wait()
    engine_loop.pulse.is_paused = True
    runner.gate.set()
    while engine_loop.look(lambda state: bool(state.core.in_flight)).result(10):
        pass
    launched = len(runner.plans)
    waits = make_request("waits", range(5), 3)
    engine_loop.submit(waits)
    late = make_request("late", range(5), 3, deadline=time.monotonic() + 0.01)
    engine_loop.submit(late)
    assert listener.until_ended("late")[0].finish_reason is DEADLINE
    running_now, waiting, pool = engine_loop.gauges
    assert (running_now, waiting) == (1, 1)
    assert pool.owned
    assert len(runner.plans) == launched
    engine_loop.pulse.is_paused = False
    engine_loop.look(lambda state: None).result(10)
    ended = listener.until_ended("runs", "waits")
    assert [result.token_ids for result in ended] == [expected_tokens(runs), expected_tokens(waits)]


def test_a_paused_loop_can_be_closed(
    runner: FakeRunner, running: tuple[EngineLoop, Listener]
) -> None:
    engine_loop, listener = running
    engine_loop.pulse.is_paused = True
    engine_loop.submit(make_request("a", range(5), 4))
    engine_loop.close()
    assert listener.until_ended("a")[0].finish_reason is FinishReason.ABORT
