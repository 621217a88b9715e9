"""What reaches the step loop: requests, and everything that is no request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple

from engine.core.scheduler import SchedulerState
from engine.types import Domain, FinishReason, Request


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


def look(state: SchedulerState, event: Look) -> None:
    """Answer who wants to look at a state."""
    if not event.done.set_running_or_notify_cancel():
        return  # whoever asked has given up
    try:
        answer(event.done, event.at(state))
    except Exception as error:  # it must not end the step loop
        answer(event.done, error)


def answer(done: Future[Any], outcome: object) -> None:
    """Settle a future, with an exception or a result, that may be settled or cancelled already."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)
