"""Runs an event log through the scheduler again and compares every plan with the recorded one.

A log without tokens is replayed with their pseudo ids: other tokens, but the same plans.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.core import scheduler, upkeep
from engine.core.limits import Limits
from engine.core.reloading import close_queue, reload
from engine.core.restoring import restore
from engine.core.scheduler import SchedulerState
from engine.runtime.event_log import (
    MAX_PROMPT_TOKENS,
    STOPS,
    Abort,
    Admit,
    AdmitRequest,
    Commit,
    CommitTokens,
    Drain,
    Event,
    Fail,
    Flush,
    Header,
    LogError,
    Reload,
    Restore,
    Schedule,
    Tick,
    Top,
    marked_positions,
    plan_digest,
    read,
)
from engine.sampling import SamplingParams
from engine.types import (
    Domain,
    Fork,
    QueueFull,
    Request,
    StepOutput,
    StepPlan,
    StepTokens,
    TokenLogprobs,
)


class Moment(NamedTuple):
    """A replay after one event.

    Attributes:
      line: of the log that holds the event, counted from 1.
      event: what happened.
      state: after it; it is consumed by the next event, so copy what is to be kept.
      plan: the one that was made or taken in, if the event is about one.
      outputs: news of requests.
    """

    line: int
    event: Event
    state: SchedulerState
    plan: StepPlan | None
    outputs: tuple[StepOutput, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay saw: counts, and the state at the end of the log."""

    requests: int
    steps: int
    tokens: int
    preemptions: int
    holds_tokens: bool
    state: SchedulerState


def replay(
    path: str | Path,
    *,
    check: bool = False,
    on_step: Callable[[SchedulerState, int, int], None] = lambda state, tokens, preemptions: None,
) -> Replayed:
    """Run a log through the scheduler and compare every plan with the recorded one.

    Args:
      path: a log that `Recorder` wrote; a torn last line is ignored.
      check: also assert all invariants after every event (slow: O(pool) each).
      on_step: called after each plan with the state, which is consumed by the next event, and how
        many tokens and preemptions there were.

    Raises:
      LogError: the file is not such a log, or a plan differs; names the line.
    """
    header, after = moments(path, check=check)
    state = SchedulerState.initial(header.limits)
    requests = steps = tokens = preemptions = 0
    for moment in after:
        state = moment.state
        requests += isinstance(moment.event, Admit | AdmitRequest)
        tokens += sum(len(output.token_ids) for output in moment.outputs)
        if isinstance(moment.event, Schedule) and moment.plan:
            steps += 1
            preemptions += len(moment.plan.preempted)
            on_step(state, tokens, preemptions)
    return Replayed(requests, steps, tokens, preemptions, header.holds_tokens, state)


def moments(path: str | Path, *, check: bool = False) -> tuple[Header, Iterator[Moment]]:
    """The header of a log, and what its replay looks like after each event; see `replay`."""
    header, events = read(path)
    return header, _moments(path, header.limits, events, check)


def _moments(
    path: str | Path, limits: Limits, events: Iterator[tuple[int, Event]], check: bool
) -> Iterator[Moment]:
    replayed = Replay(limits)
    for number, event in events:
        try:
            plan, outputs = replayed.apply(event)
        except (ValueError, QueueFull) as error:
            raise LogError(f"{path}:{number}: {error}") from None
        if check:
            replayed.state.check()
        yield Moment(number, event, replayed.state, plan, outputs)


class Replay:
    """A scheduler that is fed events.

    Attributes:
      state: after those so far.
    """

    def __init__(self, limits: Limits):
        self.state = SchedulerState.initial(limits)
        self._limits = limits
        self._plans: dict[int, StepPlan] = {}  # those that may still be committed or fail
        self._num_requests = 0

    def apply(self, event: Event) -> tuple[StepPlan | None, tuple[StepOutput, ...]]:
        """Feed it one. Returns the plan that the event is about, and the news.

        Raises:
          ValueError, QueueFull: it can't have happened here, or a plan differs from the recorded
            one. The replay can't go on then.
        """
        plan: StepPlan | None = None
        outputs: tuple[StepOutput, ...] = ()
        limits = self._limits
        match event:
            case Admit():
                self._admit(self._request(event))
            case AdmitRequest(admit_request=request):
                self._admit(request)
            case Abort(abort=request_id, reason=reason):
                self.state, outputs = scheduler.abort(self.state, request_id, reason)
            case Schedule():
                self.state, plan = scheduler.schedule(self.state, limits)
                _compare(plan, event)
                self._plans[plan.step] = plan
            case Commit(commit=step, rows=num_rows):
                plan = self._planned(step, num_rows)
                plan, tokens = _pseudo_tokens(plan, event)
                outputs = self._commit(plan, tokens)
            case CommitTokens(commit_tokens=step, tokens=token_ids, beams=tops):
                plan = self._planned(step, len(token_ids))
                outputs = self._commit(plan, StepTokens(token_ids, _logprobs(plan, tops)))
            case Restore(restore=request_id, first=first, count=count):
                self.state, _, _ = restore(self.state, limits, request_id, first, count)
            case Tick(tick=now):
                self.state = upkeep.tick(self.state, now)
            case Flush(flush=domain):
                self.state = upkeep.flush(self.state, Domain(*domain) if domain else None)
            case Drain():
                self.state = close_queue(self.state)
            case Reload(reload=fingerprint):
                self.state = reload(self.state, fingerprint)
                self._limits = dataclasses.replace(limits, fingerprint=fingerprint)
            case Fail(fail=steps):
                plans = tuple(self._planned(step) for step in steps)
                self.state, outputs = scheduler.fail(self.state, plans)
        return plan, outputs

    def _admit(self, request: Request) -> None:
        self.state = scheduler.admit(self.state, self._limits, request)
        self._num_requests += 1

    def _request(self, event: Admit) -> Request:
        """A request with pseudo ids, that leads to the same plans."""
        length, num_forks = event.admit, event.forks
        if num_forks >= self._limits.max_num_seqs:
            raise ValueError(f"{num_forks} forks can't run with {self._limits.max_num_seqs} slots")
        held = sum(seq.num_prompt for seq in self.state.core.sequences.values())
        if held + length * (num_forks + 1) > MAX_PROMPT_TOKENS:
            raise ValueError(
                f"a prompt of {length} tokens makes more than {MAX_PROMPT_TOKENS} of all prompts "
                "at a time, which is the most that a log may hold"
            )
        prompt = [0] * length
        positions = marked_positions(length, self._limits.block_size)
        for position, mark in itertools.zip_longest(positions, event.marks):
            if position is None or mark is None:
                raise ValueError(f"{len(event.marks)} marks don't fit a prompt of {length} tokens")
            prompt[position] = mark
        name = f"r{self._num_requests}"
        return Request(
            name,
            tuple(prompt),
            _sampling(event),
            stop_ids=frozenset({STOPS}) if event.beams else frozenset(),
            max_tokens=event.max_tokens,
            domain=Domain(*event.domain),
            priority=event.priority,
            cache_ttl=event.cache_ttl,
            is_private=event.is_private,
            is_public=event.is_public,
            forks=tuple(Fork(f"{name}.{number}", 0) for number in range(1, num_forks + 1)),
        )

    def _planned(self, step: int, num_rows: int | None = None) -> StepPlan:
        """A plan that ends now; with `num_rows`, one that must have so many."""
        plan = self._plans.pop(step, None)
        if plan is None:
            raise ValueError(f"step {step} was not planned, or was taken in already")
        if num_rows not in (None, len(plan.rows)):
            raise ValueError(f"{num_rows} tokens for {len(plan.rows)} rows")
        return plan

    def _commit(self, plan: StepPlan, tokens: StepTokens) -> tuple[StepOutput, ...]:
        self.state, outputs = scheduler.commit(self.state, plan, tokens, self._limits)
        self._plans = {later: known for later, known in self._plans.items() if later > plan.step}
        return outputs


def _pseudo_tokens(plan: StepPlan, event: Commit) -> tuple[StepPlan, StepTokens]:
    """A plan with the step's pseudo ids, where those that ended a sequence are its stop ids."""
    token_ids = [0] * len(plan.rows)
    for index, mark in event.marks:
        if index >= len(token_ids):
            raise ValueError(f"row {index} of {len(token_ids)} has a token")
        token_ids[index] = mark
    if event.stops:
        rows = list(plan.rows)
        for index in event.stops:
            if index >= len(rows):
                raise ValueError(f"row {index} of {len(rows)} met a stop token")
            request = dataclasses.replace(
                rows[index].request, stop_ids=frozenset({token_ids[index]})
            )
            rows[index] = rows[index]._replace(request=request)
        plan = dataclasses.replace(plan, rows=tuple(rows))
    return plan, StepTokens(tuple(token_ids), _logprobs(plan, event.beams))


def _sampling(event: Admit) -> SamplingParams:
    """What of a request's sampling plans depend on."""
    if (beams := event.beams) is None:
        return SamplingParams(temperature=0.0, prompt_logprobs=0 if event.prompt_logprobs else None)
    return SamplingParams(
        n=beams.n,
        beam_width=beams.width,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
    )


def _logprobs(plan: StepPlan, tops: tuple[tuple[int, Top], ...]) -> dict[int, TokenLogprobs]:
    """The likeliest tokens of beams, by row of the plan."""
    for index, _ in tops:
        if index >= len(plan.rows):
            raise ValueError(f"row {index} of {len(plan.rows)} has log-probabilities")
    return {index: TokenLogprobs(0, 0.0, top) for index, top in tops}


def _compare(plan: StepPlan, event: Schedule) -> None:
    """Raise if the plan is not the recorded one; say how they differ."""
    if plan.step != event.schedule:
        raise ValueError(f"step {event.schedule} was recorded here, but {plan.step} is next")
    if plan_digest(plan) == event.digest:
        return
    recorded, now = (event.rows, event.tokens), (len(plan.rows), plan.num_tokens)
    if recorded == now:
        raise ValueError(
            f"step {plan.step} differs: it has as many rows and tokens as recorded, but other "
            "requests, blocks, slots or positions"
        )
    raise ValueError(
        f"step {plan.step} differs: recorded {recorded[0]} rows with {recorded[1]} tokens, "
        f"now {now[0]} with {now[1]}"
    )
