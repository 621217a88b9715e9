"""The real scheduler on a simulated device: one loop of admit, schedule and commit.

A step takes the time that a cost model says, and a request stops when it has the tokens that its
stream drew for it; all else is decided by `engine.core`, as in the engine.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np

from engine.core import scheduler
from engine.core.limits import Allocator, Limits
from engine.core.picture import Frame, take_picture
from engine.core.scheduler import SchedulerState
from engine.dashboard.recording import Recording
from engine.sampling import InvalidRequest, SamplingParams
from engine.simulate.cost import CostModel
from engine.simulate.samples import Sample, take_sample
from engine.simulate.stream import LAST_TURN, Stream
from engine.types import PlanRow, Request, StepPlan, StepTokens

ALLOCATORS: tuple[Allocator, ...] = get_args(Allocator)
SAMPLE_STEPS = 16
"""Steps from one sample to the next; reading one costs a tenth of a step."""

_STOP = 1  # the token that ends every request; conversations and system prompts have others
_STOP_IDS = frozenset({_STOP})
_GREEDY = SamplingParams(temperature=0.0)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What happened to N requests under one allocator. Times are simulated seconds.

    Attributes:
      limits: what ran; they name the allocator.
      arrival_s: float64[N], nan for requests that never came (a turn before was refused).
      first_token_s, finish_s: float64[N], nan for requests that were refused.
      num_generated: int64[N].
      num_cached: int64[N]: prompt tokens found in the cache.
      samples: the pool, every few steps.
      end_s: when the last step ended.
      num_steps, num_computed: steps, and positions computed in them.
      num_swapped_out, num_swapped_in: blocks, between pool and host tier.
      num_preemptions: requests that lost their blocks, each time counted.
    """

    limits: Limits
    arrival_s: np.ndarray
    first_token_s: np.ndarray
    finish_s: np.ndarray
    num_generated: np.ndarray
    num_cached: np.ndarray
    samples: tuple[Sample, ...]
    end_s: float
    num_steps: int
    num_computed: int
    num_preemptions: int
    num_swapped_out: int
    num_swapped_in: int


def run(
    stream: Stream,
    limits: Limits,
    cost: CostModel,
    allocator: Allocator,
    *,
    max_tokens: int | None = None,
    sample_steps: int = SAMPLE_STEPS,
    progress: Callable[[int], None] = lambda num_ended: None,
    on_plan: Callable[[StepPlan], None] = lambda plan: None,
    recording: Recording | None = None,
) -> Outcome:
    """Serve a stream to its end.

    Args:
      limits: of the scheduler; `contiguous` reuses no prefix and has no host tier, whatever
        they say.
      max_tokens: what every client gives; None: as long as the model's context lasts.
      sample_steps: steps from one sample to the next.
      progress: told now and then how many requests have ended.
      on_plan: told of every step.
      recording: gets frames of the pool.
    """
    limits = dataclasses.replace(
        limits,
        allocator=allocator,
        prefix_reuse=limits.prefix_reuse and allocator == "paged",
        host_blocks=limits.host_blocks if allocator == "paged" else 0,
        # As long as a step can admit; the stream is first come, first served, so what waits in
        # the queue needs no memory here.
        max_waiting=limits.max_num_seqs,
    )
    return _Run(stream, limits, cost, max_tokens, on_plan).run(sample_steps, progress, recording)


class _Run:
    """The state of one simulation."""

    def __init__(
        self,
        stream: Stream,
        limits: Limits,
        cost: CostModel,
        max_tokens: int | None,
        on_plan: Callable[[StepPlan], None],
    ):
        self.stream = stream
        self.limits = limits
        self.cost = cost
        self.max_tokens = max_tokens
        self.on_plan = on_plan
        self.state = SchedulerState.initial(limits)
        self.arrivals = _Arrivals(stream)
        self.clock_s = 0.0
        count = len(stream)
        self.arrival_s = np.full(count, math.nan)
        self.first_token_s = np.full(count, math.nan)
        self.finish_s = np.full(count, math.nan)
        self.num_generated = np.zeros(count, np.int64)
        self.num_cached = np.zeros(count, np.int64)
        self.samples: list[Sample] = []
        self.num_ended = self.num_steps = self.num_computed = self.num_preemptions = 0
        self.num_swapped_out = self.num_swapped_in = 0

    def run(
        self, sample_steps: int, progress: Callable[[int], None], recording: Recording | None
    ) -> Outcome:
        while True:
            self._admit()
            if not self.state.is_idle:
                self._step(sample_steps)
                if recording is not None:
                    recording.add(self.clock_s, self._frame)
                if self.num_steps % 256 == 0:
                    progress(self.num_ended)
            elif (due := self.arrivals.next_s) < math.inf:
                self.clock_s = max(self.clock_s, due)
            else:
                break
        progress(self.num_ended)
        if recording is not None:
            recording.add(self.clock_s, self._frame, is_last=True)
        return Outcome(
            self.limits,
            self.arrival_s,
            self.first_token_s,
            self.finish_s,
            self.num_generated,
            self.num_cached,
            tuple(self.samples),
            self.clock_s,
            self.num_steps,
            self.num_computed,
            self.num_preemptions,
            self.num_swapped_out,
            self.num_swapped_in,
        )

    def _frame(self) -> Frame:
        """What the pool looks like now, and all that wait."""
        live = self.state.core.sequences.values()
        generated = int(self.num_generated.sum())
        generated += sum(len(seq.token_ids) - seq.num_prompt for seq in live)
        picture = take_picture(self.state)
        num_waiting = picture.num_waiting + self.arrivals.num_due(self.clock_s)
        picture = dataclasses.replace(picture, num_waiting=num_waiting)
        return Frame(picture, self.clock_s, generated, self.num_preemptions)

    def _admit(self) -> None:
        """Queue what has arrived, in order, as far as the queue goes."""
        limits, arrivals = self.limits, self.arrivals
        while self.state.num_waiting < limits.max_waiting and arrivals.next_s <= self.clock_s:
            index, self.arrival_s[index] = arrivals.pop()
            try:
                self.state = scheduler.admit(self.state, limits, self._request(index))
            except InvalidRequest:
                self.num_ended += 1 + arrivals.num_turns_after(index)

    def _request(self, index: int) -> Request:
        """A request whose tokens name its system prompt and then its conversation, so that what
        turns share matches, and nothing else does.

        Its seed, which names a draw, is the position of its last token.

        Raises:
          InvalidRequest: the prompt is too long; before it is made, as it may be very long.
        """
        prompt = int(self.stream.prompt_tokens[index])
        room = self.limits.max_model_len - prompt
        if room < 1:
            raise InvalidRequest("prompt", f"has {prompt} tokens")
        longest = room if self.max_tokens is None else min(room, self.max_tokens)
        system = self.stream.system
        token = 2 * int(self.stream.conversation[index]) + 2
        prompt_ids = (token,) * prompt
        if system is not None and (shared := int(system.tokens[index])):
            prompt_ids = (2 * int(system.number[index]) + 3,) * shared + prompt_ids[shared:]
        return Request(
            str(index),
            prompt_ids,
            _GREEDY,
            longest,
            seed=min(int(self.stream.output_tokens[index]), longest) - 1,
            stop_ids=_STOP_IDS,
        )

    def _step(self, sample_steps: int) -> None:
        self.state, plan = scheduler.schedule(self.state, self.limits)
        self.num_preemptions += len(plan.preempted)
        self.on_plan(plan)
        rows = plan.rows
        if not rows:
            assert plan.preempted, "requests wait, and nothing can run"
            return
        if self.num_steps % sample_steps == 0:
            num_waiting = self.state.num_waiting + self.arrivals.num_due(self.clock_s)
            core = self.state.core
            self.samples.append(take_sample(core, self.clock_s, num_waiting))
        self.num_steps += 1
        self._tick(plan)
        # Here and in `_tick`, all the Python a token costs beside the scheduler's: 0.2 µs to its 2.
        positions = [row.output_position for row in rows]
        tokens = [
            _STOP if position == row.request.seed else row.request.prompt_ids[-1]
            for position, row in zip(positions, rows, strict=True)
        ]
        self._note(rows, positions, tokens)
        committed = scheduler.commit(self.state, plan, StepTokens(tuple(tokens)), self.limits)
        self.state = committed.state

    def _tick(self, plan: StepPlan) -> None:
        """Let the time of a step pass."""
        starts = [row.start for row in plan.rows]
        counts = [row.num_tokens for row in plan.rows]
        swapped = len(plan.swap_outs) + len(plan.swap_ins)
        num_tokens = sum(counts)
        # n positions from s on see s + 1, s + 2, … s + n positions.
        pairs = int(math.sumprod(starts, counts))
        pairs += (int(math.sumprod(counts, counts)) + num_tokens) // 2
        context = sum(starts) + num_tokens
        swapped_tokens = swapped * self.limits.block_size
        self.clock_s += self.cost.step_s(num_tokens, pairs, context, swapped_tokens)
        self.num_computed += num_tokens
        self.num_swapped_out += len(plan.swap_outs)
        self.num_swapped_in += len(plan.swap_ins)

    def _note(self, rows: tuple[PlanRow, ...], positions: list[int], tokens: list[int]) -> None:
        """Write down which requests have their first and their last token after this step."""
        for row in (rows[index] for index in _indices(positions, 0)):
            if row.samples:
                seq = self.state.core.sequences[row.request.request_id]
                self.first_token_s[int(row.request.request_id)] = self.clock_s
                self.num_cached[int(row.request.request_id)] = seq.num_cached_tokens
        for row in (rows[index] for index in _indices(tokens, _STOP)):
            if row.samples:
                index = int(row.request.request_id)
                self.finish_s[index] = self.clock_s
                self.num_generated[index] = row.output_position + 1
                self.num_ended += 1
                self.arrivals.answered(index, self.clock_s)


class _Arrivals:
    """Requests in the order of their arrival; a later turn has one once the turn before ends."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._first = stream.first_turns
        self._first_s = stream.arrival_s[self._first]
        self._num_popped = 0
        self._later: list[tuple[float, int]] = []  # a heap

    @property
    def next_s(self) -> float:
        """When the next request arrives; infinity if none is known to come."""
        first = math.inf
        if self._num_popped < len(self._first):
            first = float(self._first_s[self._num_popped])
        return min(first, self._later[0][0]) if self._later else first

    def pop(self) -> tuple[int, float]:
        """The next request and when it arrives."""
        arrival_s = self.next_s
        if self._later and self._later[0][0] == arrival_s:
            return heapq.heappop(self._later)[1], arrival_s
        index = int(self._first[self._num_popped])
        self._num_popped += 1
        return index, arrival_s

    def num_due(self, clock_s: float) -> int:
        """Requests that have arrived and were not popped."""
        first = int(np.searchsorted(self._first_s, clock_s, "right")) - self._num_popped
        return first + sum(arrival_s <= clock_s for arrival_s, _ in self._later)

    def answered(self, index: int, clock_s: float) -> None:
        """A request has its answer, so that the next turn of its conversation can come."""
        following = int(self._stream.next_turn[index])
        if following != LAST_TURN:
            due = clock_s + float(self._stream.think_s[following])
            due = max(due, float(self._stream.arrival_s[following]))
            heapq.heappush(self._later, (due, following))

    def num_turns_after(self, index: int) -> int:
        """Turns that never come if this one is refused."""
        count = 0
        while (index := int(self._stream.next_turn[index])) != LAST_TURN:
            count += 1
        return count


def _indices(values: list[int], wanted: int) -> Iterator[int]:
    """Where a value stands in a list."""
    index = -1
    for _ in range(values.count(wanted)):
        index = values.index(wanted, index + 1)
        yield index
