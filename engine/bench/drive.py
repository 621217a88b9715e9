"""Sends the requests of a workload, and notes when each of their tokens came back.

It knows nothing of what serves them: an engine in this process or a server at an address.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from engine.bench.figures import Arrived, Served
from engine.bench.workload import Item, Load
from engine.types import FinishReason

_BROKEN = (FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.ERROR)


class Piece(NamedTuple):
    """What a benchmark needs of a delta, be it the engine's or the client's."""

    num_tokens: int
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int


Send = Callable[[Item], AsyncIterator[Piece]]


class Driven(NamedTuple):
    """A run's requests in the order of the workload, and its wall time in seconds."""

    served: tuple[Served, ...]
    wall: float


async def drive(
    items: Sequence[Item], send: Send, load: Load, max_pending: int | None = None
) -> Driven:
    """Send every request as the load says, and read all answers to their ends.

    Args:
      items: the requests.
      send: starts one and streams its answer.
      load: when they are sent.
      max_pending: most requests in the engine at once, so that its queue is never full; those
        beyond it wait here, and their waiting counts.

    A request that raises is a failed one; the others go on.
    """
    arrivals = load.arrivals(len(items))
    turns = asyncio.Semaphore(load.concurrency or max_pending or len(items))
    start = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - start

    async def one(index: int, item: Item) -> Served:
        arrival = 0.0
        if arrivals is not None:
            arrival = arrivals[index]
            await asyncio.sleep(arrival - now())
        async with turns:
            if load.concurrency is not None:
                arrival = now()
            return await _serve(item, send, arrival, now)

    served = await asyncio.gather(*(one(index, item) for index, item in enumerate(items)))
    first = min(request.arrival for request in served)
    return Driven(tuple(served), max(request.end for request in served) - first)


async def _serve(item: Item, send: Send, arrival: float, now: Callable[[], float]) -> Served:
    arrived: list[Arrived] = []
    last: Piece | None = None
    failure = None
    try:
        async for piece in send(item):
            if piece.num_tokens:
                arrived.append(Arrived(now(), piece.num_tokens))
            last = piece
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    end = now()
    if failure is None:
        failure = _shortcoming(item, sum(delta.num_tokens for delta in arrived), last)
    return Served(
        arrival=arrival,
        arrived=tuple(arrived),
        end=end,
        prompt_tokens=last.prompt_tokens if last else 0,
        cached_tokens=last.cached_tokens if last else 0,
        failure=failure,
    )


def _shortcoming(item: Item, num_tokens: int, last: Piece | None) -> str | None:
    """What an answer lacks of what was asked for, else None."""
    if last is None or last.finish_reason is None:
        return "the stream ended without a finish reason"
    if last.finish_reason in _BROKEN:
        return f"ended with {last.finish_reason.value} after {num_tokens} tokens"
    required = item.required_tokens
    if required is not None and num_tokens != required:
        return (
            f"{required} tokens were asked for, but {num_tokens} came "
            f"(finish reason {last.finish_reason.value}, {last.prompt_tokens} prompt tokens)"
        )
    return None
