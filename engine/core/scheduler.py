"""Which sequences run in a step, with which blocks: pure functions over a scheduler state.

``admit``, ``abort``, ``schedule``, ``commit`` and ``fail`` take a state and return the next
one. No clock, no I/O, no jax: the same events give the same plans, which is what replay,
simulation and multi-host serving rest on.

The policy, in order. Every running sequence whose prompt is done gets one token (decodes
first, so a long prompt never stalls a stream); then running prompts get chunks; then waiting
requests are admitted, by priority and arrival, each with blocks for all its known tokens, so
that only decodes ever need a block on the way. A decode that finds none preempts the
lowest-ranked running sequence, which is recomputed later. Nothing overtakes the head of the
queue, so nothing starves.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from engine.core.block_pool import PoolCounts
from engine.core.sequences import Core, Sequence
from engine.types import (
    FinishReason,
    InvalidRequest,
    PlanRow,
    QueueFull,
    Request,
    StepOutput,
    StepPlan,
    StepTokens,
    TokenLogprobs,
)

MAX_INT32 = 2**31 - 1  # block ids, positions and token ids are int32 on the device


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler may use. Units: blocks, tokens, sequences.

    `fingerprint` names the weights; it goes into every block key.

    Raises:
      ValueError: a limit is out of range, or a step could not hold one token a sequence.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_step_tokens: int
    max_model_len: int
    max_waiting: int = 1024
    prefix_reuse: bool = True
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size",
            "max_num_seqs",
            "max_step_tokens",
            "max_model_len",
            "max_waiting",
        ):
            value = getattr(self, name)
            if not 1 <= value <= MAX_INT32:
                raise ValueError(f"{name} is {value}; it must be from 1 to {MAX_INT32}")
        if self.max_step_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}), so a step could not take one token of each sequence"
            )


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
        return cls(Core(limits.num_blocks, limits.max_num_seqs))

    def copy(self) -> SchedulerState:
        """An independent, equal state. O(pool)."""
        return SchedulerState(self._peek().copy())

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._peek().running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none: not started yet, or preempted."""
        core = self._peek()
        return len(core.sequences) - len(core.running)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._peek().sequences

    @property
    def pool(self) -> PoolCounts:
        """Blocks by state."""
        return self._peek().pool.counts

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._peek().sequences

    def snapshot(self) -> dict[str, object]:
        """The state as plain data, without token ids: for crash reports and comparisons."""
        core = self._peek()
        return {
            "step": core.step,
            "in_flight": core.in_flight.copy(),
            "pool": core.pool.counts._asdict(),
            "running": [seq.describe() for seq in core.running],
            "waiting": [seq.describe() for seq in core.waiting.in_order()],
        }

    def check(self) -> None:
        """Assert every invariant of DESIGN.md that one state can show. For tests; O(pool)."""
        self._peek().check()

    def _peek(self) -> Core:
        if self._core is None:
            raise StaleState("this state was consumed; use the one that was returned, or copy()")
        return self._core

    def _take(self) -> Core:
        core = self._peek()
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
    num_prompt = len(request.prompt_ids)
    if request.request_id in state:
        raise InvalidRequest("request_id", f"{request.request_id!r} is already running")
    if num_prompt == 0:
        raise InvalidRequest("prompt", "is empty; give at least one token")
    if num_prompt + 1 > limits.max_model_len:
        raise InvalidRequest(
            "prompt",
            f"has {num_prompt} tokens, but with one token of output the model takes at most "
            f"{limits.max_model_len - 1}; shorten it or raise model.max_model_len",
        )
    for token in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= token <= MAX_INT32:
            raise InvalidRequest("prompt", f"token id {token} is not in [0, {MAX_INT32}]")
    if request.max_tokens < 1:
        raise InvalidRequest(
            "max_tokens", f"{request.max_tokens} is below 1; ask for at least one token"
        )
    max_total = min(num_prompt + request.max_tokens, limits.max_model_len)
    longest = max_total - 1  # the last token is sampled but never fed back into the cache
    if _blocks_for(longest, limits) > limits.num_blocks:
        raise InvalidRequest(
            "max_tokens",
            f"prompt and output may reach {longest} tokens, but the whole cache holds "
            f"{limits.num_blocks * limits.block_size}; lower max_tokens or enlarge the cache",
        )
    if state.num_waiting >= limits.max_waiting:
        raise QueueFull(f"{limits.max_waiting} requests are waiting already; try again later")
    core = state._take()
    core.add(request, max_total)
    return SchedulerState(core)


def abort(
    state: SchedulerState, request_id: str, reason: FinishReason = FinishReason.ABORT
) -> Committed:
    """End a request from outside and return its blocks; an unknown id changes nothing."""
    core = state._take()
    seq = core.sequences.get(request_id)
    outputs = () if seq is None else (_finish(core, seq, (), reason),)
    return Committed(SchedulerState(core), outputs)


def schedule(state: SchedulerState, limits: Limits) -> tuple[SchedulerState, StepPlan]:
    """Decide one step. It may be called before earlier plans are committed.

    The plan must then be launched, and launches must run in the order of their plans.
    """
    core = state._take()
    rows: list[PlanRow] = []
    preempted = _schedule_decodes(core, limits, rows)
    num_decodes = len(rows)
    budget = limits.max_step_tokens - num_decodes
    for seq in core.running:
        if seq.num_uncomputed > 1 and budget > 0:
            num_tokens = min(seq.num_uncomputed, budget)
            rows.append(_advance(seq, num_tokens, limits.block_size))
            budget -= num_tokens
    if not preempted:  # who was just preempted must not come straight back
        _admit_waiting(core, limits, rows, budget)
    if limits.prefix_reuse:
        for row in rows[num_decodes:]:
            _name_full_blocks(core.sequences[row.request.request_id], core, limits)
    plan = StepPlan(step=core.step, rows=tuple(rows), preempted=tuple(preempted))
    if rows:
        core.in_flight.append(core.step)
    core.step += 1
    return SchedulerState(core), plan


def commit(state: SchedulerState, plan: StepPlan, tokens: StepTokens, limits: Limits) -> Committed:
    """Take in what a step computed. Rows of requests that ended since its plan are dropped.

    Raises:
      ValueError: plans are not committed once each and in the order they were made (empty
        ones may be left out), or `tokens` has fewer entries than the plan has rows. The state
        is still good.
    """
    in_flight = state._peek().in_flight
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
        if index in tokens.prompt_logprobs and seq.needs_whole_prompt:
            seq.add_prompt_logprobs(row.start, tokens.prompt_logprobs[index])
        if not row.samples:
            continue
        token = tokens.token_ids[index]
        seq.token_ids.append(token)
        if limits.prefix_reuse:
            _name_full_blocks(seq, core, limits)
        if token in row.request.stop_ids:
            reason = FinishReason.STOP
        elif len(seq.token_ids) == seq.max_total:
            reason = FinishReason.LENGTH
        else:
            reason = None
        logprobs = tokens.logprobs.get(index)
        outputs.append(_output(seq, (token,), reason, () if logprobs is None else (logprobs,)))
        if reason is not None:
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
            if seq is not None and plan.step >= seq.first_step:
                outputs.append(_finish(core, seq, (), FinishReason.ERROR))
    while core.running:
        core.preempt(core.running[-1])
    core.pool.forget_names()
    return Committed(SchedulerState(core), tuple(outputs))


def _schedule_decodes(core: Core, limits: Limits, rows: list[PlanRow]) -> list[str]:
    """One token for every running sequence that lacks just one. Returns who was preempted."""
    preempted: list[str] = []
    running, block_size = core.running, limits.block_size
    index = 0
    while index < len(running):
        seq = running[index]
        index += 1
        if seq.num_uncomputed != 1 or seq.num_total >= seq.max_total:
            continue
        if seq.num_computed == seq.num_blocks * block_size:
            # Only sequences ranked after this one are given up for it, and those have no row
            # yet. If there are none, it goes itself: the higher ranks keep what they have.
            while core.pool.num_available == 0:
                victim = running[-1]
                core.preempt(victim)
                preempted.append(victim.request.request_id)
                if victim is seq:
                    return preempted
            seq.append_blocks(core.pool.allocate(1))
        rows.append(_advance(seq, 1, block_size))
    return preempted


def _admit_waiting(core: Core, limits: Limits, rows: list[PlanRow], budget: int) -> None:
    """Start waiting requests, strictly in order, while slots, tokens and blocks last."""
    block_size = limits.block_size
    while budget > 0 and core.free_slots and (seq := core.waiting.first()) is not None:
        if seq.num_pending:
            return  # preempted with a token on the way, whose value the recomputation needs
        num_known = len(seq.token_ids)
        hits: list[int] = []
        if limits.prefix_reuse and not seq.needs_whole_prompt:
            # The last known token is always computed: its logits choose the next one.
            most = (num_known - 1) // block_size
            seq.extend_keys(most, block_size, limits.fingerprint)
            hits = core.pool.match(seq.keys[:most])
        needed = _blocks_for(num_known, limits) - len(hits) + core.pool.num_cached(hits)
        # One block of growth for each running sequence, so that an admission doesn't make
        # the very next steps preempt.
        if core.running and needed + len(core.running) > core.pool.num_available:
            return
        core.start(seq, hits, _blocks_for(seq.max_total - 1, limits), block_size)
        num_tokens = min(seq.num_uncomputed, budget)
        rows.append(_advance(seq, num_tokens, block_size))
        budget -= num_tokens


def _advance(seq: Sequence, num_tokens: int, block_size: int) -> PlanRow:
    """Plan the next `num_tokens` positions of a sequence that has the blocks for them."""
    start = seq.num_computed
    stop = start + num_tokens
    total = seq.num_total
    samples = stop == total
    row = PlanRow(
        seq.request,
        seq.slot,
        start,
        num_tokens,
        tuple(seq.token_ids[start:stop]),
        seq.block_ids[: -(-stop // block_size)],
        samples,
        total - seq.num_prompt,
        None if seq.has_state else seq.take_history(),
    )
    seq.num_computed = stop
    if samples:
        seq.num_total = total + 1
    return row


def _name_full_blocks(seq: Sequence, core: Core, limits: Limits) -> None:
    """Let later plans match the blocks whose tokens are known and computed, or planned to be.

    A planned block may be matched before it is computed, because launches run in order. It
    is not matched within its own plan: kernels may not order writes and reads of one step.
    """
    full = min(seq.num_computed, len(seq.token_ids)) // limits.block_size
    if full > seq.num_blocks_named:
        seq.extend_keys(full, limits.block_size, limits.fingerprint)
        for index in range(seq.num_blocks_named, full):
            core.pool.name(int(seq.block_ids[index]), seq.keys[index])
        seq.num_blocks_named = full


def _finish(
    core: Core, seq: Sequence, token_ids: tuple[int, ...], reason: FinishReason
) -> StepOutput:
    core.remove(seq)
    return _output(seq, token_ids, reason, ())


def _output(
    seq: Sequence,
    token_ids: tuple[int, ...],
    reason: FinishReason | None,
    logprobs: tuple[TokenLogprobs, ...],
) -> StepOutput:
    first = bool(token_ids) and len(seq.token_ids) == seq.num_prompt + 1
    prompt_logprobs = tuple(seq.prompt_logprobs) if first else ()
    if first:
        seq.prompt_logprobs.clear()  # kilobytes a token, and they are delivered once
    return StepOutput(
        seq.request.request_id,
        token_ids,
        reason,
        seq.num_prompt,
        seq.num_cached_tokens,
        logprobs,
        prompt_logprobs,
    )


def _blocks_for(num_tokens: int, limits: Limits) -> int:
    return -(-num_tokens // limits.block_size)
