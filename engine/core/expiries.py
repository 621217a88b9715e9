"""When what is kept expires: a queue of times, of which some no longer matter."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

_LEAST = 64  # times that are kept before it pays to tidy up


class Expiries[Item: (int, bytes)]:
    """Times at which items may expire. O(log n) each, amortised.

    An item that is used again, or gone, leaves its time here: whoever takes what is due looks
    whether it still holds.
    """

    __slots__ = ("_heap",)

    def __init__(self, times: Iterable[tuple[int, Item]] = ()) -> None:
        self._heap = list(times)
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time: int, item: Item) -> None:
        """An item may expire then."""
        heapq.heappush(self._heap, (time, item))

    @property
    def next(self) -> int | None:
        """When there may be something in `due`, or None."""
        return self._heap[0][0] if self._heap else None

    def due(self, now: int) -> list[tuple[int, Item]]:
        """Take what may have expired by now, with its time; the earliest first."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        return due

    def tidy(self, count: int, current: Callable[[], Iterable[tuple[int, Item]]]) -> None:
        """Keep only the times that still hold, of `count` items at most, if most don't."""
        if len(self._heap) > 2 * count + _LEAST:
            self._heap = list(current())
            heapq.heapify(self._heap)

    def clear(self) -> None:
        """Nothing is kept any more."""
        self._heap.clear()

    def copy(self) -> Expiries[Item]:
        """An independent queue with the same times."""
        return Expiries(self._heap)
