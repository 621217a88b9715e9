"""The life of an engine beside its requests: whether it is well, pauses, and who watches it.

All of it may be called from any thread; what is asked of the step loop is awaited on an event loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from engine.core.scheduler import SchedulerState
from engine.runtime.watchdog import Watchdog
from engine.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.runtime.loop import EngineLoop
    from engine.runtime.news import News

PAUSED = "this server is paused by its operator"


class Resumed(ValueError):
    """A pause that somebody ended before it was reached."""


def _is_at_work(state: SchedulerState) -> bool:
    return bool(state.core.in_flight)


class Life:
    """Of one engine.

    Args:
      loop: its step loop.
      deliver: takes news that don't come from the loop, on any thread.
    """

    def __init__(self, loop: EngineLoop, deliver: Callable[[News], None]):
        self._loop = loop
        self._deliver = deliver
        self._watchdog: Watchdog | None = None

    def watch(self, *, step_timeout: float, recovery_timeout: float, max_failed_steps: int) -> None:
        """Have somebody notice when the device hangs, or keeps failing.

        Args:
          step_timeout: seconds after which a step counts as hung: its requests end with ERROR.
          recovery_timeout: seconds of trouble after which `is_lost` holds.
          max_failed_steps: so many failures in a row, and requests wait until the device works.
        """
        pulse = self._loop.pulse
        pulse.max_failures = max_failed_steps
        self._watchdog = Watchdog(pulse, step_timeout, recovery_timeout, self._end_hung)

    def _end_hung(self) -> None:
        """Tell the requests of a turn that hangs, and have the loop end them too: it may not see
        that they were told, if no later step holds them or the device was not what hung."""
        ends = self._loop.pulse.ends()
        self._deliver(ends)
        for end in ends:
            self._loop.abort(end.request_id, FinishReason.ERROR)

    @property
    def trouble(self) -> str | None:
        """Why it would be no use to send requests now, in words for clients; or None."""
        if not self._loop.is_alive:
            return "the engine of this server has stopped; its log says why. Try another server"
        return self._loop.pulse.trouble

    @property
    def is_paused(self) -> bool:
        """Whether an operator paused it."""
        return self._loop.pulse.is_paused

    @property
    def unready(self) -> str | None:
        """Why requests should rather go elsewhere; or None."""
        return self.trouble or (PAUSED if self.is_paused else None)

    @property
    def is_lost(self) -> bool:
        """Whether the engine has been in trouble for so long that only a new process helps."""
        return self._watchdog is not None and self._watchdog.is_lost

    async def pause(self) -> None:
        """Begin no step any more. Requests keep their blocks and their places, and new ones queue;
        deadlines go on. Returns when the device is at rest. If it fails or is cancelled, nothing
        is paused that was not before.

        Raises:
          EngineStopped: the step loop has ended.
          QueueFull: too many look at the state.
          Resumed: somebody resumed it meanwhile.
        """
        pulse = self._loop.pulse
        was_paused, pulse.is_paused = pulse.is_paused, True
        try:
            is_at_work = True
            while is_at_work:  # there are two steps at most to wait for
                is_at_work = await asyncio.wrap_future(self._loop.look(_is_at_work))
                if not pulse.is_paused:
                    raise Resumed("the engine was resumed before it was at rest; pause it again")
        except BaseException:
            pulse.is_paused = pulse.is_paused and was_paused
            raise

    async def resume(self) -> None:
        """Go on where a pause came in.

        Raises:
          EngineStopped: the step loop has ended.
        """
        self._loop.pulse.is_paused = False
        await asyncio.wrap_future(self._loop.look(lambda state: None))  # it may be asleep

    def close(self) -> None:
        """Watch no more."""
        if self._watchdog is not None:
            self._watchdog.close()
