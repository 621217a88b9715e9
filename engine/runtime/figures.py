"""What is counted: of the step loop, a record of each step and sums since the start; of a disk
tier, what it did and holds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from engine.core.block_pool import PoolCounts
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.runtime.block_file import Miss
from engine.types import PlanRow, StepOutput, StepPlan


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """One step's figures: seconds on the host by phase, tokens, rows and blocks.

    `wait` is what the loop waited for the device; `device` is from the end of the previous
    step's wait (or this one's launch, if later) to the end of its own.
    """

    schedule: float
    build: float
    launch: float
    wait: float
    commit: float
    device: float
    num_rows: int
    num_tokens: int
    padded_tokens: int
    num_running: int
    num_waiting: int
    owned_blocks: int


@dataclasses.dataclass(slots=True)
class Totals:
    """Running sums since the start.

    What is counted of prompts when their answers end is counted once an answer; lookups are counted
    when requests first run, once a request, and so differ.

    Attributes:
      prefix_cache_queries, prefix_cache_hits: prompt tokens that were looked up in the cache, and
        those that were found; as vLLM counts them, of requests that may look.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    padded_tokens: int = 0
    preemptions: int = 0
    copied_blocks: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    failed_steps: int = 0
    mask_seconds: float = 0.0
    held_steps: Counter[str] = dataclasses.field(default_factory=Counter)
    finished: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def num_finished(self) -> int:
        """Sequences that have ended, in whatever way."""
        return sum(self.finished.values())

    def add_plan(self, plan: StepPlan, state: SchedulerState, limits: Limits) -> None:
        """A step was planned, which led to this state."""
        self.preemptions += len(plan.preempted)
        self.copied_blocks += len(plan.block_copies)
        self.swapped_out_blocks += len(plan.swap_outs)
        self.swapped_in_blocks += len(plan.swap_ins)
        if state.holding is not None:
            self.held_steps[state.holding] += 1
        if limits.prefix_reuse:
            for row in plan.rows:  # those that start here, and don't part from another's prompt
                if row.history is not None and row.start < len(row.request.prompt_ids):
                    self._add_start(row, state)

    def _add_start(self, row: PlanRow, state: SchedulerState) -> None:
        seq = state.core.sequences[row.request.request_id]
        if not seq.looks_nothing_up and not seq.num_preemptions:
            self.prefix_cache_queries += len(row.request.prompt_ids)
            self.prefix_cache_hits += row.start

    def add_step(self, num_tokens: int, padded_tokens: int) -> None:
        """A step was done that computed so many tokens, in a shape of so many."""
        self.steps += 1
        self.computed_tokens += num_tokens
        self.padded_tokens += padded_tokens

    def add_news(self, news: Sequence[object]) -> None:
        """These reach the requests."""
        for item in news:
            if isinstance(item, StepOutput):
                self.generated_tokens += len(item.token_ids)
                if item.finish_reason is not None:
                    self.finished[item.finish_reason.value] += 1
                    self.prompt_tokens += item.num_prompt_tokens
                    self.cached_prompt_tokens += item.num_cached_tokens


class Gauges(NamedTuple):
    """Sequences running and waiting, those taken from the inbox so far, and the blocks by state."""

    num_running: int
    num_waiting: int
    num_taken: int
    pool: PoolCounts

    def seen(self, num_submitted: int) -> tuple[int, int, PoolCounts]:
        """Running, waiting, blocks: those among the waiting that are still in the inbox, to which
        so many were submitted so far."""
        return self.num_running, self.num_waiting + num_submitted - self.num_taken, self.pool


class TierCounts(NamedTuple):
    """What a disk tier did since it was opened, and holds now."""

    hits: int  # blocks
    misses: dict[Miss, int]  # blocks, by reason
    written: int  # blocks
    dropped: int  # blocks not written: no room in the queue, writing off, forgotten, erased, closed
    evicted: int  # blocks, of any layout
    bytes_read: int  # of blocks, without headers
    bytes_written: int
    num_files: int  # of any layout
    num_bytes: int  # of those files
    queued_bytes: int  # waiting to be written
