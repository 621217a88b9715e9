"""What is noted of requests: on a clock of the test's own, and through a whole engine."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from engine.config_error import ConfigError
from engine.domain_usage import DomainUsage
from engine.frontend import Engine
from engine.observe import requests
from engine.observe.requests import OTHER, RequestFigures, RequestRecord
from engine.sampling import InvalidRequest, SamplingParams
from engine.serve.tenants import Rules, TenantRules
from engine.streams import Delta, ReaderTooSlow, Usage
from engine.types import Domain, FinishReason, Waited
from tests.observe.served import Letters
from tests.steps import by_hand

ACME = Domain("acme")
LENGTH, ABORT, ERROR = FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(requests, "time", clock)
    return clock


def delta(
    tokens: int, *, total: int, index: int = 0, queued: float = 0.0, end: FinishReason | None = None
) -> Delta:
    waited = Waited(queued, {})
    return Delta(index, "", (1,) * tokens, (), (), end, None, Usage(10, 4, total), waited)


def test_times_of_an_answer_add_up_to_its_whole(clock: Clock) -> None:
    figures, records = RequestFigures(), []
    figures.listeners.append(records.append)
    timer = figures.start("mine", ACME, received=clock.now)
    clock.now += 0.5  # the text is read
    timer.submitted(10)
    clock.now += 3.0  # 2 s in the queue, 1 s of prompt
    timer.add(delta(1, total=1, queued=2.0), clock.now)
    clock.now += 0.4  # two tokens in one delta
    timer.add(delta(2, total=3, queued=2.0), clock.now)
    clock.now += 1.0  # preempted for half of it
    timer.add(delta(1, total=4, queued=2.5, end=LENGTH), clock.now)
    timer.close(())
    sums = {name: (read.count, read.sum) for name, read in figures.distributions().items()}
    approx = pytest.approx
    assert sums == {
        "time_to_first_token": (1, approx(3.5)),
        "inter_token_latency": (3, approx(1.4)),
        "e2e_latency": (1, approx(4.9)),
        "queue_time": (1, approx(2.5)),
        "prefill_time": (1, approx(1.0)),
        "decode_time": (1, approx(1.4)),
        "prompt_tokens": (1, 10),
        "generation_tokens": (1, 4),
    }
    (record,) = records
    assert (record.request_id, record.tenant, record.refusal) == ("mine", "acme", None)
    assert record.received == approx(100.0 + 1e9)
    assert (record.submitted, record.seconds) == (approx(0.5), approx(4.9))
    assert (record.prompt_tokens, record.cached_tokens) == (10, 4)
    (answer,) = record.answers
    assert answer == (0, LENGTH, 4, approx(3.5), approx(4.9), 2.5, 2.0)
    tenant = figures.tenants()["acme"].usage
    assert (tenant.in_progress, tenant.prompt_tokens, tenant.cached_prompt_tokens) == (0, 10, 4)
    assert (tenant.generated_tokens, tenant.finished) == (4, {"length": 1})


def test_what_was_aborted_or_failed_is_in_no_distribution_of_whole_answers(clock: Clock) -> None:
    figures = RequestFigures()
    timer = figures.start("mine", ACME, received=clock.now)
    timer.submitted(10)
    timer.add(delta(1, total=1, index=0), clock.now)
    timer.add(delta(1, total=1, index=1, end=ERROR), clock.now)
    timer.close([0, 2])
    read = figures.distributions()
    assert read["time_to_first_token"].count == 2
    assert {name for name, found in read.items() if found.count} == {"time_to_first_token"}
    assert figures.tenants()["acme"].usage.finished == {"error": 1, "abort": 2}


def test_a_refused_request_counts_no_answer(clock: Clock) -> None:
    figures, records = RequestFigures(), []
    figures.listeners.append(records.append)
    timer = figures.start("mine", ACME, received=clock.now)
    timer.refused(InvalidRequest("prompt", "which would be quoted here"))
    timer.close(())
    assert [(record.refusal, record.answers) for record in records] == [("InvalidRequest", ())]
    assert figures.tenants()["acme"].usage.finished == {}
    assert figures.tenants()["acme"].usage.in_progress == 0


def test_tenants_beyond_the_cap_are_one() -> None:
    figures = RequestFigures(max_tenants=2)
    timers = [figures.start("r", Domain(name), received=0.0) for name in ("a", "b", "c", "d", "a")]
    assert {name: found.usage.in_progress for name, found in figures.tenants().items()} == {
        "a": 2,
        "b": 1,
        OTHER: 2,
    }
    for timer in timers:
        timer.close(())
    assert all(found.usage.in_progress == 0 for found in figures.tenants().values())


def test_who_is_called_like_the_others_is_not_among_them() -> None:
    figures = RequestFigures(max_tenants=2)
    for name in ("other", "a", "b", "c"):
        figures.start("r", Domain(name), received=0.0)
    counted = {name: found.usage.in_progress for name, found in figures.tenants().items()}
    assert counted == {"other": 1, "a": 1, OTHER: 2}
    with pytest.raises(ConfigError, match="can't be a tenant's name"):
        Rules({OTHER: TenantRules()})


def test_tenants_that_are_gone_make_room(clock: Clock) -> None:
    figures = RequestFigures(max_tenants=2)
    timers = [figures.start("r", Domain(name), received=0.0) for name in ("a", "b", "c")]
    figures.throttled("a")
    figures.keep_tenants({"b", "c", "d"})
    timers[0].add(delta(1, total=1, end=LENGTH), clock.now)  # of who is gone
    for timer in timers:
        timer.close(())
    figures.start("r", Domain("d"), received=0.0).close(())
    figures.throttled("e")
    assert {name: found.throttled for name, found in figures.tenants().items()} == {
        "b": 0,
        OTHER: 1,
        "d": 0,
    }
    assert figures.usage(Domain("a")) == DomainUsage()


def test_a_listener_that_fails_harms_nobody(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[RequestRecord] = []

    def fail(record: RequestRecord) -> None:
        raise ZeroDivisionError

    figures = RequestFigures()
    figures.listeners += [fail, heard.append]
    figures.start("mine", ACME, received=clock.now).close(())
    assert len(heard) == 1
    assert "ZeroDivisionError" in caplog.text


async def collect(engine: Engine, prompt: Any = "hello", **fields: Any) -> list[Delta]:
    given: dict[str, Any] = {"max_tokens": 5} | fields
    sampling = SamplingParams(**given)
    return [part async for part in engine.generate(prompt, sampling, domain=ACME)]


async def test_an_engine_notes_every_way_in_which_a_request_ends(
    engine: Engine, runner: Letters
) -> None:
    records: list[RequestRecord] = []
    engine.requests.listeners.append(records.append)
    await collect(engine)  # length
    await collect(engine, stop=("c",))  # a stop string
    await collect(engine, n=3)
    with pytest.raises(InvalidRequest):
        await collect(engine, [10**6])
    runner.gate.clear()
    left = asyncio.create_task(collect(engine))
    while not engine.stats().running:
        await asyncio.sleep(0.001)
    left.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await left
    runner.gate.set()
    outcomes = [
        (record.refusal, [(one.finish_reason.value, one.completion_tokens) for one in answers])
        for record in records
        for answers in [record.answers]
    ]
    assert outcomes == [
        (None, [("length", 5)]),
        (None, [("stop", 3)]),
        (None, [("length", 5)] * 3),
        ("InvalidRequest", []),
        (None, [("abort", 0)]),
    ]
    for record in records[:3]:
        assert record.submitted is not None
        for one in record.answers:
            assert one.first_token is not None
            assert one.last_token is not None
            assert record.submitted <= one.first_token <= one.last_token <= record.seconds
            assert one.queued is not None
    read = engine.requests.distributions()
    # Of each answer, all tokens but those of its first delta.
    gaps = sum(5 - 1 for _ in range(4)) + 2
    assert read["inter_token_latency"].count <= gaps
    assert read["e2e_latency"].count == 5
    tenant = engine.requests.tenants()["acme"].usage
    assert tenant == engine.usage(ACME)
    assert tenant.in_progress == 0
    assert tenant.generated_tokens == 5 + 3 + 15
    assert tenant.finished == {"length": 4, "stop": 1, "abort": 1}


async def test_a_reader_that_was_too_slow_counts_alike_for_all_who_ask(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_max_unread", 4)
    records: list[RequestRecord] = []
    engine.requests.listeners.append(records.append)
    stream = engine.generate("hello", SamplingParams(max_tokens=60, n=2), domain=ACME)
    with by_hand(engine) as allow:
        allow(2)  # not more than may be unread, until it has begun to read
        await anext(stream)
    while engine.stats().running or not engine.stats().finished:
        await asyncio.sleep(0.001)
    with pytest.raises(ReaderTooSlow):
        _ = [part async for part in stream]
    (record,) = records
    assert (record.refusal, [each.finish_reason for each in record.answers]) == (
        "ReaderTooSlow",
        [ABORT, ABORT],
    )
    counted = engine.usage(ACME)
    assert counted.finished == engine.stats().finished == {"abort": 2}
    assert engine.requests.tenants()["acme"].usage == counted


async def test_stats_tell_the_latencies(engine: Engine) -> None:
    await collect(engine)
    stats = engine.stats()
    assert stats.time_to_first_token.count == 1
    assert stats.queue_time.count == 1
    assert stats.inter_token_latency.count <= 4
