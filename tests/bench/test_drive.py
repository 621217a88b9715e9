from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from engine.bench.drive import Driven, Piece, drive
from engine.bench.workload import Item, Load
from engine.sampling import SamplingParams
from engine.types import FinishReason

EXACTLY_3 = SamplingParams(max_tokens=3, ignore_eos=True)


def items(count: int, sampling: SamplingParams = EXACTLY_3) -> list[Item]:
    return [Item(f"{index}", sampling) for index in range(count)]


class Server:
    """Answers with the pieces given, and remembers how many requests were under way at most."""

    def __init__(self, *pieces: Piece, pause: float = 0.0):
        self.pieces = pieces
        self.pause = pause
        self.order: list[str] = []
        self.under_way = self.most_under_way = 0

    async def send(self, item: Item) -> AsyncIterator[Piece]:
        assert isinstance(item.prompt, str)
        self.order.append(item.prompt)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for piece in self.pieces:
                await asyncio.sleep(self.pause)
                yield piece
        finally:
            self.under_way -= 1


def answer(*counts: int, reason: FinishReason | None = FinishReason.LENGTH) -> list[Piece]:
    pieces = [Piece(count, None, 7, 2) for count in counts]
    pieces[-1] = pieces[-1]._replace(finish_reason=reason)
    return pieces


async def failures(sampling: SamplingParams, *pieces: Piece) -> str | None:
    [served] = (await drive(items(1, sampling), Server(*pieces).send, Load())).served
    return served.failure


async def test_deltas_with_tokens_are_timed_and_counts_kept() -> None:
    server = Server(*answer(1, 0, 2), pause=0.01)
    driven = await drive(items(1), server.send, Load())
    [served] = driven.served
    assert [delta.num_tokens for delta in served.arrived] == [1, 2]
    assert (served.prompt_tokens, served.cached_tokens, served.output_tokens) == (7, 2, 3)
    first, last = (delta.time for delta in served.arrived)
    assert 0.0 == served.arrival < first < last <= served.end == driven.wall
    assert last - first >= 0.02  # asyncio.sleep never wakes early: the empty delta lay between
    assert served.failure is None


async def test_all_requests_are_sent_at_once_and_their_waiting_counts() -> None:
    server = Server(*answer(3), pause=0.01)
    driven = await drive(items(6), server.send, Load(), max_pending=2)
    assert server.most_under_way == 2
    assert [served.arrival for served in driven.served] == [0.0] * 6
    assert driven.served[-1].arrived[0].time >= 0.03


async def test_a_closed_loop_keeps_its_concurrency_and_the_order() -> None:
    server = Server(*answer(3), pause=0.01)
    driven = await drive(items(6), server.send, Load(concurrency=3))
    assert server.most_under_way == 3
    assert server.order == [f"{index}" for index in range(6)]
    # The second three arrive when the first are done.
    assert all(served.arrival >= 0.01 for served in driven.served[3:])


async def test_an_open_loop_measures_from_when_a_request_was_due() -> None:
    load = Load(request_rate=1000.0)
    server = Server(*answer(3), pause=0.02)
    driven = await drive(items(5), server.send, load, max_pending=1)
    assert [served.arrival for served in driven.served] == load.arrivals(5)
    last = max(driven.served, key=lambda served: served.end)  # whoever is due together may be it
    assert last.end - last.arrival >= 0.05  # it waited for four others
    assert driven.wall == last.end - driven.served[0].arrival


async def test_too_few_tokens_are_a_failure() -> None:
    failure = await failures(EXACTLY_3, *answer(1, 1))
    assert failure is not None
    assert failure.startswith("3 tokens were asked for, but 2 came (finish reason length")
    assert await failures(EXACTLY_3, *answer(2, 1)) is None
    assert await failures(EXACTLY_3, *answer(2, 2)) is not None


async def test_an_answer_that_may_end_early_is_no_failure_if_it_does() -> None:
    stop = answer(1, reason=FinishReason.STOP)
    assert await failures(SamplingParams(max_tokens=3), *stop) is None


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.ERROR])
async def test_an_answer_that_was_cut_off_is_a_failure(reason: FinishReason) -> None:
    failure = await failures(SamplingParams(), *answer(1, 1, reason=reason))
    assert failure == f"ended with {reason.value} after 2 tokens"


async def test_a_stream_without_an_end_is_a_failure() -> None:
    expected = "the stream ended without a finish reason"
    assert await failures(EXACTLY_3, *answer(3, reason=None)) == expected
    assert await failures(EXACTLY_3) == expected


async def test_a_request_that_raises_fails_alone() -> None:
    async def send(item: Item) -> AsyncIterator[Piece]:
        yield Piece(1, None, 7, 0)
        if item.prompt == "1":
            raise RuntimeError("no more")
        yield Piece(2, FinishReason.LENGTH, 7, 0)

    driven: Driven = await drive(items(3), send, Load())
    assert [served.failure for served in driven.served] == [None, "RuntimeError: no more", None]
