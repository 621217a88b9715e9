"""Who watches: one picture for all, none for nobody, and nothing kept for the slow."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine.core.picture import Frame, take_picture
from engine.dashboard.viewers import TooManyViewers, Viewers
from tests.core.driver import Driver, make_request
from tests.dashboard.reader import Reader


class Source:
    """Takes frames of a scheduler that goes on by a step each time.

    Where `due` is set, each frame waits until the test releases it, so that no viewer misses one
    because the machine was slow.
    """

    def __init__(self) -> None:
        self.driver = Driver(max_waiting=1000)
        self.frames: list[Frame] = []
        self.error: Exception | None = None
        self.due: asyncio.Semaphore | None = None

    async def take(self) -> Frame:
        if self.error is not None:
            raise self.error
        if self.due is not None:
            await self.due.acquire()
        self.driver.admit(make_request(f"r{len(self.frames)}", 5, max_tokens=3))
        self.driver.step()
        frame = Frame(take_picture(self.driver.state), float(len(self.frames)), 0, 0)
        self.frames.append(frame)
        await asyncio.sleep(0)
        return frame


@pytest.fixture
def source() -> Source:
    return Source()


def read(data: bytes) -> dict[str, Any]:
    return json.loads(data)


async def test_nobody_watches_and_nothing_is_taken(source: Source) -> None:
    viewers = Viewers(source.take, interval_s=0.001)
    await asyncio.sleep(0.01)
    assert source.frames == []
    async with viewers.watch() as frames:
        await anext(frames)
    taken = len(source.frames)
    await asyncio.sleep(0.02)
    assert len(source.frames) == taken
    assert viewers.num_viewers == 0


async def test_viewers_share_the_frames_and_each_reads_the_whole(source: Source) -> None:
    source.due = asyncio.Semaphore(0)
    viewers = Viewers(source.take, interval_s=0.001)
    async with viewers.watch() as first, viewers.watch() as second:
        readers = Reader(), Reader()
        for _ in range(20):
            source.due.release()
            for reader, frames in zip(readers, (first, second), strict=True):
                reader.apply(read(await anext(frames)))
                reader.check(source.frames[int(reader.frame["time"])])
        assert len(source.frames) == 20  # and not forty
    assert "pool" not in readers[0].frame


async def test_a_slow_viewer_misses_frames_and_starts_afresh(source: Source) -> None:
    viewers = Viewers(source.take, interval_s=0.001)
    async with viewers.watch() as frames, viewers.watch() as quick:
        reader = Reader()
        reader.apply(read(await anext(frames)))
        while len(source.frames) < 10:
            await anext(quick)
        frame = read(await anext(frames))
        assert "pool" in frame
        assert frame["time"] >= 9
        reader.apply(frame)
        reader.check(source.frames[int(frame["time"])])


async def test_a_viewer_that_comes_back_starts_afresh(source: Source) -> None:
    source.due = asyncio.Semaphore(0)
    viewers = Viewers(source.take, interval_s=0.001)
    for _ in range(2):
        async with viewers.watch() as frames:
            source.due.release()
            assert "pool" in read(await anext(frames))
            source.due.release()
            assert "pool" not in read(await anext(frames))


async def test_one_viewer_too_many_is_refused_until_another_leaves(source: Source) -> None:
    viewers = Viewers(source.take, interval_s=0.001, max_viewers=1)
    async with viewers.watch():
        with pytest.raises(TooManyViewers, match="1 watch already"):
            async with viewers.watch():
                pass
    async with viewers.watch() as frames:
        await anext(frames)


async def test_when_the_engine_ends_the_streams_end_and_others_can_start(source: Source) -> None:
    viewers = Viewers(source.take, interval_s=0.001)
    async with viewers.watch() as frames:
        await anext(frames)
        source.error = RuntimeError("the engine is gone")
        rest = [frame async for frame in frames]
        assert len(rest) <= 2
        source.error = None
        async with viewers.watch() as again:
            assert "pool" in read(await anext(again))
    assert viewers.num_viewers == 0


async def test_frames_come_no_faster_than_they_may(source: Source) -> None:
    clock = asyncio.get_running_loop().time
    begin = clock()
    async with Viewers(source.take, interval_s=0.05).watch() as frames:
        async for _ in frames:
            if len(source.frames) >= 4:
                break
    least = 0.05 * (len(source.frames) - 1)
    assert clock() - begin > least - 0.001  # asyncio's timers may be early by the clock's tick
