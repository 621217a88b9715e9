"""A runner without a device, whose steps wait and fail when told, and a listener for news.

The token of a row is a function of its request's seed and its output position alone, as the
real one's is of what those name.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import defaultdict
from typing import Any

import numpy as np

from engine.config import BucketConfig, SchedulerConfig
from engine.core import batching
from engine.core.batching import Batch
from engine.core.buckets import bucket_set
from engine.core.limits import Limits
from engine.runtime.loop import EngineLoop
from engine.runtime.news import News, Rejected
from engine.runtime.runner import RunnerShape
from engine.sampling import InvalidRequest
from engine.types import QueueFull, Request, StepPlan, StepTokens
from tests.engines import Result

VOCAB_SIZE = 64
LIMITS = Limits(
    num_blocks=32,
    block_size=4,
    max_num_seqs=4,
    max_step_tokens=16,
    max_model_len=64,
    max_waiting=8,
)


def expected_tokens(request: Request) -> tuple[int, ...]:
    """What the fake runner generates."""
    return tuple(request.seed + position for position in range(request.max_tokens))


class DeviceFailed(RuntimeError):
    """What a device raises."""


@dataclasses.dataclass
class FakeLaunched:
    """A step of the fake runner."""

    plan: StepPlan
    runner: FakeRunner
    number: int
    masks: np.ndarray | None = None
    is_chosen: bool = False

    def wait(self) -> StepTokens:
        """Wait for the gate, then fail or give the tokens."""
        self.runner.at_gate.set()
        self.runner.gate.wait()
        self.runner.at_gate.clear()
        self.runner.events.append(f"wait {self.number}")
        if self.number in self.runner.fail_waits:
            raise DeviceFailed(f"step {self.number} failed on the device")
        assert self.is_chosen
        rows = self.plan.rows
        return StepTokens(tuple(row.request.seed + row.output_position for row in rows))


class FakeRunner:
    """Stands in for `Runner`.

    Attributes:
      gate: steps end only while it is set.
      at_gate: set while a step is waited for: until the gate opens, the loop takes nothing in.
      fail_launches, fail_waits: numbers of the launches, from 0, that fail.
      fail_reset: whether the device can't be brought back.
      events: what happened, in order.
      plans: those launched.
    """

    def __init__(self, limits: Limits = LIMITS):
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()
        self.fail_launches: set[int] = set()
        self.fail_waits: set[int] = set()
        self.fail_reset = False
        self.events: list[str] = []
        self.plans: list[StepPlan] = []
        self.sink_slot = limits.max_num_seqs
        scheduler = SchedulerConfig(
            max_num_seqs=limits.max_num_seqs, max_step_tokens=limits.max_step_tokens
        )
        buckets = bucket_set(BucketConfig(), scheduler, -(-limits.max_model_len // 4))
        self.shape = RunnerShape(
            limits.num_blocks, limits.block_size, limits.max_num_seqs, "float32", buckets
        )

    def launch(self, plan: StepPlan, batch: Batch) -> FakeLaunched:
        """Start a step, or fail."""
        number = len(self.plans)
        self.plans.append(plan)
        self.events.append(f"launch {number}")
        if number in self.fail_launches:
            raise DeviceFailed(f"launch {number} failed")
        launched = FakeLaunched(plan, self, number)
        if batch.sampling.constrained.any():
            launched.masks = batching.masks(batch.slots.size, VOCAB_SIZE)
        else:
            launched.is_chosen = True
        return launched

    def choose(self, launched: FakeLaunched) -> None:
        """Have the tokens of a step with masks chosen."""
        self.events.append(f"choose {launched.number}")
        launched.is_chosen = True

    def move_blocks(self, plan: StepPlan) -> None:
        """What a plan without rows is for."""
        if plan.moves_blocks:
            self.events.append(f"erase {len(plan.erased_blocks)}")

    def reset(self) -> None:
        """Begin anew."""
        self.events.append("reset")
        if self.fail_reset:
            raise DeviceFailed("the device is gone")


class Listener:
    """Keeps a loop's news by request and lets tests wait for them.

    A wait without an end is ended by pytest's time limit.
    """

    def __init__(self) -> None:
        self.results: dict[str, Result] = defaultdict(Result)
        self.rejected: dict[str, InvalidRequest | QueueFull] = {}
        self._changed = threading.Condition()

    def __call__(self, news: News) -> None:
        with self._changed:
            for item in news:
                if isinstance(item, Rejected):
                    self.rejected[item.request_id] = item.error
                else:
                    self.results[item.request_id].add(item)
            self._changed.notify_all()

    def until_tokens(self, request_id: str, count: int) -> None:
        """Return when a request has so many tokens."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.results[request_id].token_ids) >= count)

    def until_ended(self, *request_ids: str) -> list[Result]:
        """The results of requests, when all have ended or were rejected."""

        def has_ended(request_id: str) -> bool:
            ended = self.results[request_id].finish_reason is not None
            return ended or request_id in self.rejected

        with self._changed:
            self._changed.wait_for(lambda: all(map(has_ended, request_ids)))
            return [self.results[request_id] for request_id in request_ids]


def start_loop(runner: Any, limits: Limits = LIMITS, **options: Any) -> tuple[EngineLoop, Listener]:
    """A running loop, and who hears its news."""
    listener = Listener()
    return EngineLoop(runner, limits, listener, **options), listener
