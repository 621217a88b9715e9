"""What reaches the step loop: requests, and everything that is no request."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from engine.core.scheduler import SchedulerState
from engine.types import Domain, FinishReason, Request


class Abort(NamedTuple):
    request_id: str
    reason: FinishReason


class Flush(NamedTuple):
    domain: Domain | None
    done: Future[int]


class Look(NamedTuple):
    at: Callable[[SchedulerState], None]


class Wake(NamedTuple):
    """Blocks that a request waits for were read."""


Event = Request | Abort | Flush | Wake | Look | None  # None: close
