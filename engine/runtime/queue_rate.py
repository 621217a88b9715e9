"""How fast the queue moves: what a client is told who comes when it is full."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

_NOTE_SECONDS = 0.5  # between two notes
_WINDOW = 60  # notes that are kept, so half a minute
LEAST, MOST = 0.1, 60.0  # seconds that a client is told
_UNKNOWN = 1.0


class _Note(NamedTuple):
    at: float  # time.monotonic() seconds
    num_left: int


class QueueRate:
    """Follows how many sequences have left the queue. One thread notes, any may ask."""

    def __init__(self) -> None:
        self._notes: deque[_Note] = deque(maxlen=_WINDOW)

    def note(self, num_left: int) -> None:
        """So many have left the queue since the start, to run or for good."""
        now = time.monotonic()
        if not self._notes or now - self._notes[-1].at >= _NOTE_SECONDS:
            self._notes.append(_Note(now, num_left))

    def seconds_until(self, count: int) -> float:
        """An estimate of when `count` more will have left, at the pace of the last half minute."""
        try:
            first, last = self._notes[0], self._notes[-1]
        except IndexError:
            return _UNKNOWN
        seconds = time.monotonic() - first.at
        num_left = last.num_left - first.num_left
        if num_left <= 0:  # none in all that time, so none is likely to very soon
            return min(max(seconds, _UNKNOWN), MOST)
        return min(max(count * seconds / num_left, LEAST), MOST)
