"""What reaches the step loop: requests, and everything that is no request.

All of it is bounded. Sequences of requests and those who ask are counted. Aborts always fit, so
that nobody, the loop's own thread least of all, waits for room; there are never more of them than
the caller has requests.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from engine.core.admission import tokens_waiting
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.runtime.queue_rate import QueueRate
from engine.sampling import InvalidRequest
from engine.types import Domain, FinishReason, QueueFull, Request

if TYPE_CHECKING:
    from engine.runtime.runner import Runner
    from engine.runtime.tiers import Tiers

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


class NewWeights(Protocol):
    """What the engine can go on with, ready in the device's memory."""

    @property
    def limits(self) -> Limits:
        """The scheduler's, with the fingerprint of these weights."""
        ...

    def install(self, runner: Runner, tiers: Tiers) -> None:
        """Take the place of the old ones, and forget what was computed with them. No step may be
        on its way."""
        ...


class Reload(NamedTuple):
    """Go on with other weights, when what has begun has ended."""

    weights: NewWeights
    done: Future[None]


class Wake(NamedTuple):
    """Blocks that a request waits for were read."""


_MOST: dict[type, int] = {Flush: MAX_ASKED, Look: MAX_ASKED, Reload: 1}  # in progress at once
Event = Request | Abort | Flush | Wake | Look | Reload | None  # None: close


class Inbox:
    """Events in the order in which they came. Everybody puts; the loop's thread alone takes.

    Args:
      max_waiting: most sequences in it.
      max_waiting_tokens: most tokens of their prompts, without limit if None; one of any length
        may be in it.

    Attributes:
      is_closed: whether nothing is taken in any more.
      num_submitted, num_taken: sequences so far. Whoever reads what was taken before what was
        submitted counts nobody twice and misses nobody.
      rate: how fast the queue moves, as the loop notes it.
    """

    def __init__(self, max_waiting: int, max_waiting_tokens: int | None = None):
        self.rate = QueueRate()
        self.is_closed = False
        self.num_submitted = 0
        self.num_taken = 0
        self._max_waiting = max_waiting
        self._max_tokens = max_waiting_tokens
        self._tokens_submitted = self._tokens_taken = 0
        self._room = {kind: threading.BoundedSemaphore(most) for kind, most in _MOST.items()}
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
                raise self.full(
                    request, f"{self._max_waiting} requests are waiting already; try again later"
                )
            tokens, num_prompt = (
                self._tokens_submitted - self._tokens_taken,
                len(request.prompt_ids),
            )
            most = self._max_tokens
            if most is not None and tokens and tokens + num_prompt > most:
                raise self.full(request, tokens_waiting(tokens, num_prompt, most))
            self._tokens_submitted += num_prompt
            self.num_submitted += num_sequences
            self._events.put(request)

    def check_room(self, num_waiting: int, num_sequences: int) -> None:
        """Raise QueueFull if so many wait already that there is no room for these."""
        if num_waiting and num_waiting + num_sequences > self._max_waiting:
            raise QueueFull(
                f"{num_waiting} requests are waiting already; try again later",
                self.rate.seconds_until(num_sequences),
            )

    def full(self, request: Request, message: str) -> QueueFull:
        """The refusal of a request for which there is no room now."""
        return QueueFull(message, self.rate.seconds_until(len(request.names)))

    def ask(self, event: Flush | Look | Reload) -> None:
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
                    f"{_MOST[type(event)]} calls of this kind are in progress already; try "
                    "again later"
                )
        event.done.set_exception(refusal)

    def begin(self, event: Flush | Look | Reload) -> bool:
        """Whether somebody still waits for an event's answer, which must follow then."""
        room = self._room[type(event)]
        if not event.done.set_running_or_notify_cancel():
            room.release()
            return False
        event.done.add_done_callback(lambda _: room.release())
        return True

    def show(self, event: Look, state: SchedulerState) -> None:
        """Answer who wants to look at the state, if somebody still does."""
        if not self.begin(event):
            return
        try:
            answer(event.done, event.at(state))
        except Exception as error:  # it must not end the step loop
            answer(event.done, error)

    def put(self, event: Abort | Wake) -> None:
        """Put in what always fits."""
        self._events.put(event)

    def give_up(self, taken: Sequence[Event]) -> list[Request]:
        """Close, and tell everybody who asked; `taken` are events that were not dealt with.

        Returns:
          The requests that are left.
        """
        self.close()
        events = [*taken, *self.take(may_wait=False)]
        for event in events:
            if isinstance(event, Flush | Look | Reload):
                answer(event.done, EngineStopped(STOPPED))
        return [event for event in events if isinstance(event, Request)]

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
        requests = [event for event in events if isinstance(event, Request)]
        self.num_taken += sum(len(request.names) for request in requests)
        self._tokens_taken += sum(len(request.prompt_ids) for request in requests)
        return events


def answer(done: Future[Any], outcome: object) -> None:
    """Settle a future, with an exception or a result, that may be settled or cancelled already."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)
