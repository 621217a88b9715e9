"""Small limits, requests and a scheduler on strings of tokens, for tests that read as stories.

A `Driver` holds the current state, so that a test names only what it is about.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.core import scheduler
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.sampling import SamplingParams
from engine.types import FinishReason, PlanRow, Request, StepOutput, StepPlan, StepTokens


def make_limits(**changes: Any) -> Limits:
    """A pool of 16 blocks of 4 tokens for up to 4 sequences and 16 tokens a step."""
    values: dict[str, Any] = {
        "num_blocks": 16,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_step_tokens": 16,
        "max_model_len": 64,
        "max_waiting": 8,
        "fingerprint": "weights",
    }
    return Limits(**{**values, **changes})


def make_request(request_id: str, prompt: int | range | tuple[int, ...], **changes: Any) -> Request:
    """A greedy request; a number stands for a prompt of that many tokens of its own.

    Fields of `SamplingParams` may be given among those of `Request`.
    """
    if isinstance(prompt, int):
        first = int.from_bytes(request_id.encode()[-3:]) * 100
        prompt = range(first, first + prompt)
    names = {field.name for field in dataclasses.fields(Request)}
    sampling = {name: changes.pop(name) for name in list(changes) if name not in names}
    sampling.setdefault("temperature", 0.0)
    changes.setdefault("max_tokens", 8)
    return Request(request_id, tuple(prompt), SamplingParams(**sampling), **changes)


class Driver:
    """A scheduler whose state need not be passed around. Checks it after every step."""

    def __init__(self, limits: Limits | None = None, **changes: Any):
        self.limits = limits or make_limits(**changes)
        self.state = SchedulerState.initial(self.limits)
        self.outputs: list[StepOutput] = []

    def admit(self, *requests: Request) -> None:
        """Queue requests, in order."""
        for request in requests:
            self.state = scheduler.admit(self.state, self.limits, request)
            self.state.check()

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.ABORT
    ) -> tuple[StepOutput, ...]:
        """End a request from outside."""
        return self._keep(*scheduler.abort(self.state, request_id, reason))

    def schedule(self) -> StepPlan:
        """Plan a step."""
        self.state, plan = scheduler.schedule(self.state, self.limits)
        self.state.check()
        return plan

    def commit(
        self, plan: StepPlan, tokens: StepTokens | dict[str, int] | None = None
    ) -> tuple[StepOutput, ...]:
        """Take a step in; rows sample token 7 unless `tokens` says otherwise by request."""
        if not isinstance(tokens, StepTokens):
            chosen = tokens or {}
            ids = (chosen.get(row.request.request_id, 7) for row in plan.rows)
            tokens = StepTokens(tuple(ids))
        return self._keep(*scheduler.commit(self.state, plan, tokens, self.limits))

    def fail(self, *plans: StepPlan) -> tuple[StepOutput, ...]:
        """Let steps fail."""
        return self._keep(*scheduler.fail(self.state, plans))

    def step(self, tokens: StepTokens | dict[str, int] | None = None) -> StepPlan:
        """Plan a step and take it in at once."""
        plan = self.schedule()
        self.commit(plan, tokens)
        return plan

    def run(self, max_steps: int = 1000) -> list[StepPlan]:
        """Step until no request is left."""
        plans = []
        while not self.state.is_idle:
            assert len(plans) < max_steps, f"not idle after {max_steps} steps"
            plans.append(self.step())
        return plans

    def tokens_of(self, request_id: str) -> list[int]:
        """Every token that came out for a request."""
        return [t for out in self.outputs if out.request_id == request_id for t in out.token_ids]

    def _keep(
        self, state: SchedulerState, outputs: tuple[StepOutput, ...]
    ) -> tuple[StepOutput, ...]:
        self.state = state
        self.state.check()
        self.outputs += outputs
        return outputs


def rows_of(plan: StepPlan) -> list[tuple[str, int, int]]:
    """(request id, start, number of tokens) of each row."""
    return [(row.request.request_id, row.start, row.num_tokens) for row in plan.rows]


def row_of(plan: StepPlan, request_id: str) -> PlanRow:
    """The row of one request."""
    return next(row for row in plan.rows if row.request.request_id == request_id)
