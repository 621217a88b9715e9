"""Who watches a running engine: one picture is taken for all of them, and none for nobody.

A viewer is sent the latest frame whenever it is ready for one. One that is slow gets fewer, and
nothing is kept for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from engine.core.picture import Frame
from engine.dashboard.frames import encode

log = logging.getLogger(__name__)

INTERVAL_S = 0.2
"""Seconds from one frame to the next."""
MAX_VIEWERS = 16
TAKE_TIMEOUT_S = 30.0
"""Seconds that a frame may take; a step of the engine comes before it."""


class TooManyViewers(RuntimeError):
    """As many watch as may."""


class Viewers:
    """Takes frames while somebody watches. It belongs to one event loop.

    Args:
      take: takes a frame; what it raises ends the viewers' streams.
      interval_s: least seconds from one frame to the next, by default `INTERVAL_S`.
      max_viewers: one more is refused.
    """

    def __init__(
        self,
        take: Callable[[], Awaitable[Frame]],
        *,
        interval_s: float | None = None,
        max_viewers: int = MAX_VIEWERS,
    ):
        self._take = take
        self._interval_s = INTERVAL_S if interval_s is None else interval_s
        self._max_viewers = max_viewers
        self._num_viewers = 0
        self._task: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()  # a new one for each frame
        self._number = 0  # of the latest frame
        self._frame: Frame | None = None
        self._change: bytes = b""  # from the frame before the latest
        self._whole: bytes | None = None  # the latest, afresh; made when somebody needs it

    @property
    def num_viewers(self) -> int:
        """How many watch."""
        return self._num_viewers

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncGenerator[AsyncGenerator[bytes]]:
        """Watch while the context is open; gives the frames, as JSON.

        The stream ends when the engine does.

        Raises:
          TooManyViewers: as many watch as may.
        """
        if self._num_viewers >= self._max_viewers:
            raise TooManyViewers(f"{self._max_viewers} watch already; close one of their pages")
        self._num_viewers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        frames = self._frames(self._task)
        try:
            yield frames
        finally:
            await frames.aclose()
            self._num_viewers -= 1
            if not self._num_viewers and self._task is not None:
                self._task.cancel()
                self._task = self._frame = self._whole = None
                self._change = b""

    def close(self) -> None:
        """End the streams of all who watch."""
        if self._task is not None:
            self._task.cancel()

    async def _frames(self, task: asyncio.Task[None]) -> AsyncGenerator[bytes]:
        seen = None
        while True:
            if self._frame is None or self._number == seen:
                arrived = asyncio.ensure_future(self._arrived.wait())
                try:
                    await asyncio.wait((arrived, task), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    arrived.cancel()
                if task.done():
                    return
                continue
            follows = seen is not None and self._number == seen + 1
            seen = self._number
            yield self._change if follows else self._afresh()

    def _afresh(self) -> bytes:
        assert self._frame is not None
        if self._whole is None:
            self._whole = _dump(self._frame, None)
        return self._whole

    async def _run(self) -> None:
        """Take frames until it is cancelled, or the engine ends."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + self._interval_s
            try:
                async with asyncio.timeout(TAKE_TIMEOUT_S):
                    frame = await self._take()
            except Exception as error:
                log.warning("the picture ends here: %s", error or type(error).__name__)
                self._task = self._frame = None  # the next viewer tries anew
                return
            self._change = b"" if self._frame is None else _dump(frame, self._frame)
            self._frame, self._whole = frame, None
            self._number += 1
            arrived, self._arrived = self._arrived, asyncio.Event()
            arrived.set()
            await asyncio.sleep(max(0.0, due - clock()))


def _dump(frame: Frame, before: Frame | None) -> bytes:
    return msgspec.json.encode(encode(frame, before))
