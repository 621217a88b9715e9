"""What the step loop tells those who asked: tokens, ends, and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.sampling import InvalidRequest
from engine.types import FinishReason, QueueFull, Request, StepOutput


class BudgetSpent(QueueFull):
    """An output's constraint took more time or memory than it may. That depends on the machine too,
    so another try may succeed; but it need not, as it does with a full queue."""


class Rejected(NamedTuple):
    """A request that was not admitted, or can't go on, and why; nor does any of its forks."""

    request_id: str
    error: InvalidRequest | QueueFull


News = Sequence[StepOutput | Rejected]


def ended(requests: Mapping[str, Request], reason: FinishReason) -> list[StepOutput]:
    """The ends of requests that gave nothing more, by the names that their news come under."""
    return [
        StepOutput(name, (), reason, len(request.prompt_ids), 0)
        for name, request in requests.items()
    ]
