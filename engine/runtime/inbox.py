"""What reaches the step loop: requests, and everything that is no request.

All of it is bounded. Sequences of requests and those who ask are counted. Aborts always fit, so
that nobody, the loop's own thread least of all, waits for room; there are never more of them than
the caller has requests.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple

from engine.core.scheduler import SchedulerState
from engine.sampling import InvalidRequest
from engine.types import Domain, FinishReason, QueueFull, Request

MAX_ASKED = 128  # flushes in progress at once, and as many looks
STOPPED = "the engine is closed, or failed; its log says why"


class EngineStopped(RuntimeError):
    """The engine was closed, or its loop failed; it serves nothing any more."""


class Abort(NamedTuple):
    request_id: str
    reason: FinishReason


class Flush(NamedTuple):
    domain: Domain | None
    done: Future[int]


class Look(NamedTuple):
    at: Callable[[SchedulerState], Any]
    done: Future[Any]  # what `at` returns, or raises


class Wake(NamedTuple):
    """Blocks that a request waits for were read."""


Event = Request | Abort | Flush | Wake | Look | None  # None: close


class Inbox:
    """Events in the order in which they came. Everybody puts; the loop's thread alone takes.

    Args:
      max_waiting: most sequences in it.

    Attributes:
      is_closed: whether nothing is taken in any more.
      num_submitted, num_taken: sequences so far. Whoever reads what was taken before what was
        submitted counts nobody twice and misses nobody.
    """

    def __init__(self, max_waiting: int):
        self.is_closed = False
        self.num_submitted = 0
        self.num_taken = 0
        self._max_waiting = max_waiting
        self._room = {kind: threading.BoundedSemaphore(MAX_ASKED) for kind in (Flush, Look)}
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._entry = threading.Lock()  # nothing is submitted once `is_closed` is set

    def submit(self, request: Request) -> None:
        """Put a request in. See `EngineLoop.submit`."""
        with self._entry:
            if self.is_closed:
                raise EngineStopped(STOPPED)
            num_sequences = len(request.names)
            if num_sequences > self._max_waiting:
                raise InvalidRequest(
                    "beam_width" if request.sampling.beam_width > 1 else "n",
                    f"{num_sequences} sequences wait at once, but at most "
                    f"{self._max_waiting} may; ask for fewer or raise scheduler.max_waiting",
                )
            if self.num_submitted - self.num_taken + num_sequences > self._max_waiting:
                raise QueueFull(
                    f"{self._max_waiting} requests are waiting already; try again later"
                )
            self.num_submitted += num_sequences
            self._events.put(request)

    def ask(self, event: Flush | Look) -> None:
        """Put in what somebody waits for, who is told if that can't be.

        It counts until it is answered, or `begin` finds that whoever asked has given up.
        """
        refusal: Exception = EngineStopped(STOPPED)
        with self._entry:
            if not self.is_closed:
                if self._room[type(event)].acquire(blocking=False):
                    self._events.put(event)
                    return
                refusal = QueueFull(
                    f"{MAX_ASKED} calls of this kind are in progress already; try again later"
                )
        event.done.set_exception(refusal)

    def begin(self, event: Flush | Look) -> bool:
        """Whether somebody still waits for an event's answer, which must follow then."""
        room = self._room[type(event)]
        if not event.done.set_running_or_notify_cancel():
            room.release()
            return False
        event.done.add_done_callback(lambda _: room.release())
        return True

    def put(self, event: Abort | Wake) -> None:
        """Put in what always fits."""
        self._events.put(event)

    def close(self) -> None:
        """Take nothing in any more; the loop is told once."""
        with self._entry:
            if not self.is_closed:
                self.is_closed = True
                self._events.put(None)

    def take(self, *, may_wait: bool, timeout: float | None = None) -> list[Event]:
        """All that is there, or if that is nothing and one may wait, the first that comes within
        so many seconds."""
        events: list[Event] = []
        if may_wait:
            with contextlib.suppress(queue.Empty):
                events.append(self._events.get(timeout=timeout))
        # Not more than there are now, however fast they come: running requests go on.
        events += [self._events.get() for _ in range(self._events.qsize())]
        self.num_taken += sum(len(event.names) for event in events if isinstance(event, Request))
        return events


def answer(done: Future[Any], outcome: object) -> None:
    """Settle a future, with an exception or a result, that may be settled or cancelled already."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)
