"""What the device's cache holds, told step by step to whoever mirrors it: numbered batches of
changes, a bounded history of them to resume from, and everything that is there to begin with.

The step loop publishes, on its thread. Readers go through the history at their own pace, so a slow
one costs nothing, until what it has not read is gone.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from engine.core.journal import BlockRemoved, BlockStored, Change, Journal, PoolCleared
from engine.core.scheduler import SchedulerState

if TYPE_CHECKING:
    from engine.runtime.loop import EngineLoop

# What the history holds: some hundred bytes an entry without tokens, a few times that with them.
MAX_BATCHES = 2**14
MAX_CHANGES = 2**16


class Batch(NamedTuple):
    """What one step changed. `time` is in seconds since 1970."""

    number: int
    time: float
    changes: tuple[Change, ...]


class Snapshot(NamedTuple):
    """Every block that can be found after the batch of that number, parents before children."""

    number: int
    blocks: tuple[BlockStored, ...]


class HistoryExpired(LookupError):
    """What was asked for is not in the history any more, or never was."""


class KvEvents:
    """The changes of one engine's cache.

    Batches are numbered without gaps, from the time of the start in microseconds on: after a
    restart all numbers are higher than before, so that a reader who resumes where it was is told
    that it can't, and is not given another life's changes as the next ones.

    Args:
      with_tokens: whether blocks come with their token ids, which are the text of prompts.

    Attributes:
      journal: tells it of changes.
    """

    def __init__(self, *, with_tokens: bool = False):
        self.journal = Journal(self._add, with_tokens=with_tokens)
        self._lock = threading.Lock()
        self._last = self._first = time.time_ns() // 1000
        self._live: dict[bytes, BlockStored] = {}
        self._history: deque[Batch] = deque()
        self._num_changes = 0  # in the history
        self._readers: dict[int, Callable[[], None]] = {}
        self._names = itertools.count()

    def attach(self, state: SchedulerState) -> None:
        """Follow this state, of which nothing is cached yet, and those that it becomes."""
        state.core.pool.retention.journal = self.journal

    def _add(self, changes: list[Change]) -> None:
        """Make a batch of changes, and wake the readers."""
        with self._lock:
            for change in changes:
                match change:
                    case BlockStored():
                        self._live[change.key] = change
                    case BlockRemoved():
                        self._live.pop(change.key, None)
                    case PoolCleared():
                        self._live.clear()
            self._last += 1
            self._history.append(Batch(self._last, time.time(), tuple(changes)))
            self._num_changes += len(changes)
            while len(self._history) > MAX_BATCHES or self._num_changes > MAX_CHANGES:
                self._num_changes -= len(self._history.popleft().changes)
            readers = tuple(self._readers.values())
        for wake in readers:
            wake()

    def snapshot(self) -> Snapshot:
        """What there is now. O(blocks)."""
        with self._lock:
            number, blocks = self._last, list(self._live.values())
        return Snapshot(number, tuple(sorted(blocks, key=lambda block: block.index)))

    def after(self, number: int, most: int = 64) -> list[Batch]:
        """The batches that follow the one of that number, as far as there are any.

        Raises:
          HistoryExpired: some of them are gone, or that one was never published.
        """
        with self._lock:
            oldest = self._history[0].number if self._history else self._last + 1
            if not oldest - 1 <= number <= self._last:
                raise HistoryExpired(
                    f"batch {number} is not among the latest ones, {oldest - 1} to {self._last}"
                )
            first = number + 1 - oldest
            stop = min(first + most, len(self._history))
            return [self._history[index] for index in range(first, stop)]

    def on_batch(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have a function called after each batch, on the step loop's thread; it must return at
        once and not raise. Returns what ends that."""
        name = next(self._names)
        with self._lock:
            self._readers[name] = wake

        def stop() -> None:
            with self._lock:
                del self._readers[name]

        return stop


def follow_cache(loop: EngineLoop, detail: Literal["none", "hashes", "tokens"]) -> KvEvents | None:
    """What the cache of a loop holds, in the detail of `server.kv_events`. The loop must not have
    had any requests."""
    if detail == "none":
        return None
    events = KvEvents(with_tokens=detail == "tokens")
    loop.look(events.attach).result()
    return events
