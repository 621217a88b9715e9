"""How much may wait, in tokens too, and when those who don't fit are told to come again."""

from __future__ import annotations

import dataclasses

import pytest

from engine.runtime import queue_rate
from engine.runtime.queue_rate import LEAST, MOST, QueueRate
from engine.types import FinishReason, QueueFull
from tests.core.driver import Driver
from tests.core.driver import make_request as make_core_request
from tests.engines import make_request
from tests.runtime.fake_runner import LIMITS, FakeRunner, start_loop

SMALL = dataclasses.replace(LIMITS, max_waiting_tokens=12)


def test_the_inbox_takes_so_many_tokens_and_one_prompt_of_any_length() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    engine_loop, listener = start_loop(runner, SMALL)
    engine_loop.submit(make_request("first", range(5), 2))
    runner.at_gate.wait()
    # The loop waits at the gate, so these stay in its inbox.
    engine_loop.submit(make_request("long", range(20), 2))
    with pytest.raises(QueueFull, match=r"20 tokens .* the 1 of this one .* more than 12"):
        engine_loop.submit(make_request("refused", range(1), 2))
    runner.gate.set()
    listener.until_ended("first", "long")
    runner.gate.clear()
    for name, length in (("a", 5), ("b", 6), ("c", 1)):  # twelve, once the first has begun
        engine_loop.submit(make_request(name, range(length), 2))
    runner.gate.set()
    ended = listener.until_ended("a", "b", "c")
    assert {result.finish_reason for result in ended} == {FinishReason.LENGTH}
    engine_loop.close()


def test_the_queue_takes_so_many_tokens_samples_of_a_prompt_counted_once() -> None:
    driver = Driver(max_num_seqs=1, max_waiting_tokens=12)
    driver.admit(make_core_request("runs", 5))
    driver.step()
    driver.admit(make_core_request("long", 20))  # the queue was empty
    with pytest.raises(QueueFull, match="20 tokens are waiting already"):
        driver.admit(make_core_request("refused", 1))
    driver.abort("long")
    driver.admit(make_core_request("a", 7), make_core_request("b", 5))
    with pytest.raises(QueueFull, match="with the 1 of this one"):
        driver.admit(make_core_request("refused", 1))
    driver.run()


def test_without_a_limit_the_queue_takes_any_number_of_tokens() -> None:
    driver = Driver(max_num_seqs=1)
    driver.admit(*(make_core_request(f"r{number}", 60) for number in range(8)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only element."""
    now = [1000.0]
    monkeypatch.setattr(queue_rate.time, "monotonic", lambda: now[0])
    return now


def test_the_estimate_follows_the_pace_of_the_last_half_minute(clock: list[float]) -> None:
    rate = QueueRate()
    assert rate.seconds_until(1) == 1.0  # nothing is known
    for step in range(200):  # four in a second
        rate.note(step)
        clock[0] += 0.25
    assert rate.seconds_until(1) == pytest.approx(0.25, rel=0.05)
    assert rate.seconds_until(8) == pytest.approx(2.0, rel=0.05)
    assert rate.seconds_until(10**6) == MOST
    for step in range(400):  # and then one in two seconds
        rate.note(200 + step // 8)
        clock[0] += 0.25
    assert rate.seconds_until(1) == pytest.approx(2.0, rel=0.1)


def test_a_queue_that_stands_still_is_given_ever_more_time(clock: list[float]) -> None:
    rate = QueueRate()
    rate.note(5)
    clock[0] += 10
    assert rate.seconds_until(1) == 10.0
    clock[0] += 1000  # the loop hangs, and notes nothing
    assert rate.seconds_until(1) == MOST


def test_a_fast_queue_is_not_told_to_come_at_once(clock: list[float]) -> None:
    rate = QueueRate()
    for step in range(20):
        rate.note(step * 10**6)
        clock[0] += 1
    assert rate.seconds_until(1) == LEAST
