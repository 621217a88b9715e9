"""Which sequences run in a step, with which blocks: pure functions over a scheduler state.

``admit``, ``abort``, ``schedule``, ``commit`` and ``fail`` take a state and return the next
one. No clock, no I/O, no jax: the same events give the same plans, which is what replay,
simulation and multi-host serving rest on.

What a step does is decided in `planning`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from engine.core import beams, inspection, merging, planning
from engine.core.admission import check_request
from engine.core.block_pool import PoolCounts
from engine.core.core import Core, Holding
from engine.core.limits import Limits
from engine.core.sequences import Sequence
from engine.types import (
    FinishReason,
    Request,
    StepOutput,
    StepPlan,
    StepTokens,
    TokenLogprobs,
)

# Of a tuple of all its fields, as in `planning`: there is one a sequence and step.
_make_output: Callable[[tuple[object, ...]], StepOutput] = partial(tuple.__new__, StepOutput)


class StaleState(RuntimeError):
    """A state was used after it had been passed to a function that returned the next one."""


class SchedulerState:
    """The whole scheduler as a value.

    A function that takes a state *consumes* it, as a jitted function consumes a donated
    buffer: the next state is built in its memory, and using the old one raises `StaleState`.
    So nobody can see a state change, and a step costs nothing a block of the pool. `copy`
    keeps a state for later.
    """

    __slots__ = ("_core",)

    def __init__(self, core: Core):
        self._core: Core | None = core

    @classmethod
    def initial(cls, limits: Limits) -> SchedulerState:
        """No requests, every block free."""
        return cls(Core(limits))

    def copy(self) -> SchedulerState:
        """An independent, equal state. O(pool)."""
        return SchedulerState(inspection.copy(self.core))

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self.core.running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none: not started yet, or preempted."""
        core = self.core
        return len(core.sequences) - len(core.running)

    @property
    def holding(self) -> Holding | None:
        """Why the head of the queue still waited when the last step was planned; None if no
        request did."""
        return self.core.holding

    @property
    def is_idle(self) -> bool:
        """Whether no request is left, and nothing to erase: another plan would be empty."""
        core = self.core
        return not (core.sequences or core.pool.retention.has_erased or core.host.has_erased)

    @property
    def pool(self) -> PoolCounts:
        """Blocks by state."""
        return self.core.pool.counts

    def __contains__(self, request_id: object) -> bool:
        return request_id in self.core.sequences

    def snapshot(self) -> dict[str, object]:
        """The state as plain data, without token ids: for crash reports and comparisons."""
        return inspection.describe(self.core)

    def check(self) -> None:
        """Assert every invariant of DESIGN.md that one state can show. For tests; O(pool)."""
        inspection.check(self.core)

    @property
    def core(self) -> Core:
        """Everything it holds, for simulations and pictures: to look at, and not to change."""
        if self._core is None:
            raise StaleState("this state was consumed; use the one that was returned, or copy()")
        return self._core

    def _take(self) -> Core:
        core = self.core
        self._core = None
        return core


class Committed(NamedTuple):
    """The next state, and the news for the requests."""

    state: SchedulerState
    outputs: tuple[StepOutput, ...]


def admit(state: SchedulerState, limits: Limits, request: Request) -> SchedulerState:
    """Queue a request.

    Raises:
      InvalidRequest: it could never run (empty, too long, an id that is in use, a token
        that is no int32).
      QueueFull: `limits.max_waiting` requests wait already. The state is still good after
        either error.
    """
    max_total = check_request(state.core, limits, request)
    core = state._take()
    core.add(request, max_total)
    return SchedulerState(core)


def abort(
    state: SchedulerState, request_id: str, reason: FinishReason = FinishReason.ABORT
) -> Committed:
    """End a request from outside and return its blocks; an unknown id changes nothing."""
    core = state._take()
    seq = core.sequences.get(request_id)
    outputs = () if seq is None else _finish(core, seq, reason)
    return Committed(SchedulerState(core), outputs)


def schedule(state: SchedulerState, limits: Limits) -> tuple[SchedulerState, StepPlan]:
    """Decide one step. It may be called before earlier plans are committed.

    The plan must then be launched, and launches must run in the order of their plans.
    """
    core = state._take()
    plan = planning.plan_step(core, limits)
    return SchedulerState(core), plan


def commit(state: SchedulerState, plan: StepPlan, tokens: StepTokens, limits: Limits) -> Committed:
    """Take in what a step computed. Rows of requests that ended since its plan are dropped.

    Raises:
      ValueError: plans are not committed once each and in the order they were made (empty
        ones may be left out), or `tokens` has fewer entries than the plan has rows. The state
        is still good.
    """
    in_flight = state.core.in_flight
    if plan.rows and plan.step not in in_flight[:1]:
        raise ValueError(
            f"step {plan.step} can't be taken in now: "
            + (f"step {in_flight[0]} is next" if in_flight else "no step is on its way")
        )
    if len(tokens.token_ids) < len(plan.rows):
        raise ValueError(
            f"step {plan.step} has {len(plan.rows)} rows, but came with "
            f"{len(tokens.token_ids)} tokens"
        )
    core = state._take()
    if plan.rows:
        core.in_flight.pop(0)
    outputs: list[StepOutput] = []
    sequences = core.sequences
    for index, row in enumerate(plan.rows):
        seq = sequences.get(row.request.request_id)
        if seq is None or plan.step < seq.first_step:
            continue
        if limits.merge_blocks:
            merging.merge_full_blocks(core, limits, seq, row.start + row.num_tokens)
        if index in tokens.prompt_logprobs and seq.needs_whole_prompt:
            seq.add_prompt_logprobs(row.start, tokens.prompt_logprobs[index])
        if not row.samples:
            continue
        if seq.beams is not None:
            if seq is seq.beams.members[0]:
                outputs += beams.advance(core, seq.beams, index, tokens)
            continue
        token = tokens.token_ids[index]
        seq.token_ids.append(token)
        full = (seq.num_blocks_named + 1) * limits.block_size  # a call a token would cost more
        if limits.prefix_reuse and len(seq.token_ids) >= full:
            planning.name_full_blocks(seq, core, limits)
        if token in row.request.stop_ids:
            reason = FinishReason.STOP
        elif len(seq.token_ids) == seq.max_total:
            reason = FinishReason.LENGTH
        else:
            reason = None
        entry = tokens.logprobs.get(index)
        outputs.append(_output(seq, (token,), reason, () if entry is None else (entry,)))
        if reason is not None:
            if seq.request.is_public:
                core.public.pin(core, seq)
                continue
            core.forecast.add(len(seq.token_ids) - seq.num_prompt)
            core.remove(seq)
    return Committed(SchedulerState(core), tuple(outputs))


def fail(state: SchedulerState, plans: tuple[StepPlan, ...]) -> Committed:
    """Take in that these plans failed on the device, and the cache's contents with them.

    Give every plan that is not committed: the tokens of one that is left out would still be
    waited for. Their requests end with ERROR; every other running sequence starts over, and
    no cached block can be matched any more.
    """
    core = state._take()
    outputs = []
    for plan in plans:
        if plan.step in core.in_flight:
            core.in_flight.remove(plan.step)
        for row in plan.rows:
            seq = core.sequences.get(row.request.request_id)
            if seq is None or plan.step < seq.first_step:
                continue
            if not (seq.request.is_public and core.public.try_again(core, seq)):
                outputs += _finish(core, seq, FinishReason.ERROR)
    while core.running:
        core.preempt(core.running[-1], counts=False)
    core.public.unpin(core)
    core.pool.forget_names()
    core.host.undo(plans)
    return Committed(SchedulerState(core), tuple(outputs))


def _finish(core: Core, seq: Sequence, reason: FinishReason) -> tuple[StepOutput, ...]:
    """End a sequence early; of beams all, with news for each output that was asked for."""
    names = (seq.request.request_id,)
    if seq.beams is not None:
        seq = seq.beams.members[0]
        names = seq.request.replies
    core.remove(seq)
    news = _output(seq, (), reason, ())
    return tuple(news._replace(request_id=name) for name in names)


def _output(
    seq: Sequence,
    token_ids: tuple[int, ...],
    reason: FinishReason | None,
    logprobs: tuple[TokenLogprobs, ...],
) -> StepOutput:
    of_prompt: tuple[TokenLogprobs, ...] = ()
    if seq.prompt_logprobs and token_ids and len(seq.token_ids) == seq.num_prompt + 1:
        of_prompt = tuple(seq.prompt_logprobs)
        seq.prompt_logprobs.clear()  # kilobytes a token, and they are delivered once
    name, prompt, cached = seq.request.request_id, seq.num_prompt, seq.num_cached_tokens
    return _make_output((name, token_ids, reason, prompt, cached, logprobs, of_prompt, None, None))
