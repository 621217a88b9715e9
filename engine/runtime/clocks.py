"""What the step loop does by the clock: requests whose time is up, and caches that may not be kept.

The scheduler has no clock; it is told the time as an event.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping

from engine.core import upkeep
from engine.core.scheduler import SchedulerState
from engine.types import Request

TICK = 0.1  # seconds between two looks at the clock, for what the cache may not keep
_MIN_DEADLINES = 1024  # deadlines of ended requests that are kept before it pays to tidy up


class Deadlines:
    """When requests are to end, by time.monotonic(). O(log requests) each."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, request: Request, live: Mapping[str, Request]) -> None:
        """Take in a request that may have a deadline; `live` are all by the names of their news."""
        if request.deadline is None:
            return
        for name in request.replies:
            heapq.heappush(self._heap, (request.deadline, name))
        if len(self._heap) > 2 * len(live) + _MIN_DEADLINES:
            # Most are of requests that ended long before: keep those that are live.
            self._heap = [
                (each.deadline, name) for name, each in live.items() if each.deadline is not None
            ]
            heapq.heapify(self._heap)

    def take_due(self, live: Mapping[str, Request]) -> list[str]:
        """The names whose time is up, of those that are live."""
        now = time.monotonic()
        due = []
        while self._heap and self._heap[0][0] <= now:
            deadline, name = heapq.heappop(self._heap)
            request = live.get(name)
            if request is not None and request.deadline == deadline:
                due.append(name)
        return due


class CacheClock:
    """The scheduler's clock, which runs only if something in its cache may not be kept forever."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._ticked = 0.0  # seconds after that
        self._is_running = False

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def start_for(self, request: Request) -> None:
        """A request comes in; if it has a time to live, the clock runs from now on."""
        self._is_running = self._is_running or request.cache_ttl > 0

    def tick(self) -> int | None:
        """Milliseconds to tell the scheduler; None if it need not know."""
        if self._is_running and self.now >= self._ticked + TICK:
            self._ticked = self.now
            return int(self._ticked * 1000)
        return None

    def timeout(self, state: SchedulerState) -> float | None:
        """Seconds until something expires, or None."""
        expiry = upkeep.next_expiry(state)
        return None if expiry is None else max(0.0, expiry / 1000 - self.now) + TICK
