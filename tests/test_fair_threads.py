"""Threads that tenants share: whose turn it is, what counts, and what a close leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from engine.fair_threads import FairThreads
from engine.runtime.inbox import EngineStopped
from engine.types import QueueFull


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_tenants_take_turns_and_what_is_cancelled_is_not_done(gate: threading.Event) -> None:
    threads = FairThreads("texts", 1, 10)
    done: list[str] = []
    first = asyncio.create_task(threads.do("mallory", gate.wait))
    await asyncio.sleep(0)
    tasks = []
    for name in ("alice 1", "alice 2", "alice 3", "bob 1", "carol 1", "bob 2"):
        tenant = name.split()[0]
        tasks.append(asyncio.create_task(threads.do(tenant, lambda name=name: done.append(name))))
        await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *tasks, return_exceptions=True)
    assert done == ["alice 1", "bob 1", "carol 1", "alice 3", "bob 2"]
    threads.close()


async def test_no_tenant_has_all_threads_and_what_has_begun_counts(gate: threading.Event) -> None:
    threads = FairThreads("texts", 3, 4)
    begun = threading.Semaphore(0)

    def work() -> None:
        begun.release()
        gate.wait()

    tasks = [asyncio.create_task(threads.do("alice", work)) for _ in range(4)]
    await asyncio.to_thread(lambda: (begun.acquire(), begun.acquire()))
    assert await threads.do("bob", lambda: "at once") == "at once"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    more = [asyncio.create_task(threads.do("alice", work)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="4 texts are being read already"):
        await threads.do("alice", work)
    assert not begun.acquire(blocking=False)
    gate.set()
    await asyncio.gather(*more)
    threads.close()


async def test_an_error_is_the_asker_s_and_a_close_tells_who_waits(gate: threading.Event) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    threads = FairThreads("texts", 1, 4)
    with pytest.raises(ValueError, match="a bug"):
        await threads.do("alice", fail)
    begun = asyncio.create_task(threads.do("alice", gate.wait))
    waits = asyncio.create_task(threads.do("bob", gate.wait))
    while not threads._at_work["alice"]:
        await asyncio.sleep(0.001)
    threads.close()
    with pytest.raises(EngineStopped):
        await waits
    with pytest.raises(EngineStopped):
        await threads.do("carol", gate.wait)
    gate.set()
    assert await begun


async def test_who_asks_for_the_same_waits_for_one_and_may_leave_alone(
    gate: threading.Event,
) -> None:
    threads = FairThreads("grammars", 2, 2)
    begun = threading.Semaphore(0)

    def work() -> str:
        begun.release()
        gate.wait()
        return "done"

    tasks = [asyncio.create_task(threads.do("alice", work, key="a")) for _ in range(5)]
    await asyncio.to_thread(begun.acquire)
    waiting = [asyncio.create_task(threads.do("alice", work, key="b")) for _ in range(5)]
    other = asyncio.create_task(threads.do("bob", work, key="a"))  # nobody waits for another tenant
    await asyncio.to_thread(begun.acquire)
    with pytest.raises(QueueFull):
        await threads.do("alice", work, key="c")
    for task in (tasks[0], *waiting):
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not threads._waiting  # all who wanted b have left
    late = asyncio.create_task(threads.do("alice", work, key="a"))
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*tasks[1:], late, other) == ["done"] * 6
    assert tasks[0].cancelled()
    assert not begun.acquire(blocking=False)
    assert not threads._shared
    assert not threads._askers
    assert await threads.do("alice", work, key="a") == "done"  # once more
    threads.close()
