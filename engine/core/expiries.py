"""When what is kept expires: a queue of times, of which some no longer matter."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

_LEAST = 64  # times that are kept before it pays to tidy up


class Expiries[Item]:
    """Times at which items may expire. O(log n) each, amortised.

    An item that is used again, or gone, leaves its time here: whoever takes what is due looks
    whether it still holds. Of equal times the one that was added first is due first, whatever the
    items are: in the replay of a log without tokens they are others.
    """

    __slots__ = ("_heap", "_num_added")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Item]] = []  # of (time, number, item)
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time: int, item: Item) -> None:
        """An item may expire then."""
        heapq.heappush(self._heap, (time, self._num_added, item))
        self._num_added += 1

    @property
    def next(self) -> int | None:
        """When there may be something in `due`, or None."""
        return self._heap[0][0] if self._heap else None

    def due(self, now: int) -> list[tuple[int, Item]]:
        """Take what may have expired by now, with its time; the earliest first."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            time, _, item = heapq.heappop(self._heap)
            due.append((time, item))
        return due

    def tidy(self, count: int, current: Callable[[], Iterable[tuple[int, Item]]]) -> None:
        """Keep only the times that still hold, of `count` items at most, if most don't."""
        if len(self._heap) > 2 * count + _LEAST:
            self._heap.clear()
            for time, item in current():
                self.add(time, item)

    def clear(self) -> None:
        """Nothing is kept any more."""
        self._heap.clear()

    def copy(self) -> Expiries[Item]:
        """An independent queue with the same times."""
        other: Expiries[Item] = Expiries()
        other._heap = self._heap.copy()
        other._num_added = self._num_added
        return other
