"""The step loop: one thread that owns the scheduler state and keeps the device busy.

Step N + 1 is planned, built and launched before step N's tokens are fetched, so the device
never waits for the host. Everything reaches the loop through one bounded inbox, and every
piece of news leaves through one function, once a step.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.core import batching, scheduler
from engine.core.scheduler import Limits, SchedulerState
from engine.runtime.event_log import Recorder
from engine.runtime.runner import Launched, Runner
from engine.types import FinishReason, InvalidRequest, QueueFull, Request, StepOutput, StepPlan

log = logging.getLogger(__name__)


class Rejected(NamedTuple):
    """A request that was not admitted, and why."""

    request_id: str
    error: InvalidRequest | QueueFull


News = Sequence[StepOutput | Rejected]


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
    """Running sums since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    padded_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    finished: Counter[str] = dataclasses.field(default_factory=Counter)


class _Abort(NamedTuple):
    request_id: str
    reason: FinishReason


class _InFlight(NamedTuple):
    launched: Launched
    launched_at: float
    schedule: float
    build: float
    launch: float
    padded_tokens: int


class EngineLoop:
    """Runs a scheduler and a runner until closed.

    Args:
      runner: warmed up.
      limits: of the scheduler.
      on_news: called on the loop's thread with each step's outputs and rejections; it must
        return quickly.
      record: file to write the event log to.
      on_step: called with each step's figures, for benchmarks.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        on_news: Callable[[News], None],
        record: str | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ):
        self.limits = limits
        self.totals = Totals()
        self.on_step = on_step
        self._runner = runner
        self._on_news = on_news
        self._state = SchedulerState.initial(limits)
        # Room for every request that may wait or run, and for an abort of each.
        self._inbox: queue.Queue[Request | _Abort | None] = queue.Queue(
            2 * (limits.max_waiting + limits.max_num_seqs) + 1
        )
        self._live: dict[str, Request] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._planned: StepPlan | None = None  # planned, but not launched yet
        self._recorder = Recorder(record, limits) if record else None
        self._closing = False
        self._last_wait_end = 0.0
        self._gauges = (0, 0, self._state.pool)
        self._thread = threading.Thread(target=self._run, name="octavo-loop", daemon=True)
        self._thread.start()

    @property
    def gauges(self) -> tuple[int, int, tuple[int, int, int]]:
        """Sequences running and waiting, and (free, cached, owned) blocks, after a step."""
        return self._gauges

    @property
    def is_alive(self) -> bool:
        """Whether the loop still runs."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Hand a request over. Refusals come as `Rejected` news.

        Raises:
          QueueFull: the inbox is full, or the loop is closed.
        """
        if self._closing or not self.is_alive:
            raise QueueFull("the engine is shutting down")
        try:
            self._inbox.put_nowait(request)
        except queue.Full:
            raise QueueFull("too many requests are waiting; try again later") from None

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; unknown ids are ignored. The news says when it has ended."""
        if self.is_alive:
            self._inbox.put(_Abort(request_id, reason))

    def close(self) -> None:
        """Abort what is left and stop. Safe to call twice."""
        if not self._closing:
            self._closing = True
            self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        in_flight: _InFlight | None = None
        try:
            while True:
                if not self._take_events(may_wait=in_flight is None and self._state.is_idle):
                    break
                in_flight = self._step(in_flight)
        except Exception:
            log.exception("the engine loop stopped; its requests end with an error")
            self._fail_everything()
        finally:
            if self._recorder:
                self._recorder.close()

    def _step(self, in_flight: _InFlight | None) -> _InFlight | None:
        """Launch the next step, then take in the one before it."""
        try:
            launched = self._launch()
        except Exception as error:
            return self._recover(error, (in_flight,) if in_flight else ())
        if in_flight is not None:
            try:
                self._commit(in_flight)
            except Exception as error:
                steps = (in_flight, launched) if launched else (in_flight,)
                return self._recover(error, steps)
        return launched

    def _launch(self) -> _InFlight | None:
        begin = time.perf_counter()
        self._state, plan = scheduler.schedule(self._state, self.limits)
        self._planned = plan
        if self._recorder:
            self._recorder.schedule(plan)
        self.totals.preemptions += len(plan.preempted)
        if not plan.rows:
            self._planned = None
            return None
        scheduled = time.perf_counter()
        runner = self._runner
        batch = batching.build(plan, runner.shape.buckets, runner.sink_slot)
        built = time.perf_counter()
        launched = runner.launch(plan, batch)
        self._planned = None
        now = time.perf_counter()
        return _InFlight(
            launched, now, scheduled - begin, built - scheduled, now - built, batch.token_ids.size
        )

    def _commit(self, step: _InFlight) -> None:
        begin = time.perf_counter()
        tokens = step.launched.wait()
        waited = time.perf_counter()
        plan = step.launched.plan
        if self._recorder:
            self._recorder.commit(plan, tokens)
        self._state, outputs = scheduler.commit(self._state, plan, tokens, self.limits)
        self._publish(outputs)
        totals = self.totals
        totals.steps += 1
        totals.computed_tokens += plan.num_tokens
        totals.padded_tokens += step.padded_tokens
        state = self._state
        self._gauges = (state.num_running, state.num_waiting, state.pool)
        if self.on_step:
            self.on_step(
                StepRecord(
                    schedule=step.schedule,
                    build=step.build,
                    launch=step.launch,
                    wait=waited - begin,
                    commit=time.perf_counter() - waited,
                    device=waited - max(step.launched_at, self._last_wait_end),
                    num_rows=len(plan.rows),
                    num_tokens=plan.num_tokens,
                    padded_tokens=step.padded_tokens,
                    num_running=state.num_running,
                    num_waiting=state.num_waiting,
                    owned_blocks=state.pool.owned,
                )
            )
        self._last_wait_end = waited

    def _recover(self, error: Exception, steps: tuple[_InFlight, ...]) -> None:
        """A step failed: its requests end, the device memory is made anew, the rest goes on."""
        log.error("a step failed: %s", error, exc_info=error)
        plans = [step.launched.plan for step in steps]
        if self._planned is not None:  # it failed between its plan and its launch
            plans.append(self._planned)
            self._planned = None
        self.totals.failed_steps += 1
        if self._recorder:
            self._recorder.fail(tuple(plans))
        self._state, outputs = scheduler.fail(self._state, tuple(plans))
        self._runner.reset()
        self._publish(outputs)

    def _take_events(self, *, may_wait: bool) -> bool:
        """Take everything from the inbox. Returns whether to go on."""
        news: list[StepOutput | Rejected] = []
        timeout = None
        if may_wait:
            self._gauges = (0, 0, self._state.pool)
        while True:
            try:
                event = self._inbox.get(block=may_wait, timeout=timeout)
            except queue.Empty:
                break
            may_wait = False
            if event is None:
                self._finish_all(news)
                self._publish(news)
                return False
            if isinstance(event, _Abort):
                news.extend(self._end(event.request_id, event.reason))
            else:
                self._admit(event, news)
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self._live.get(request_id)
            if request is not None and request.deadline == deadline:
                news.extend(self._end(request_id, FinishReason.DEADLINE))
        self._publish(news)
        return True

    def _admit(self, request: Request, news: list[StepOutput | Rejected]) -> None:
        try:
            self._state = scheduler.admit(self._state, self.limits, request)
        except (InvalidRequest, QueueFull) as error:
            news.append(Rejected(request.request_id, error))
            return
        self._live[request.request_id] = request
        if self._recorder:
            self._recorder.admit(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def _end(self, request_id: str, reason: FinishReason) -> tuple[StepOutput, ...]:
        if request_id not in self._live:
            return ()
        if self._recorder:
            self._recorder.abort(request_id, reason)
        self._state, outputs = scheduler.abort(self._state, request_id, reason)
        return outputs

    def _finish_all(self, news: list[StepOutput | Rejected]) -> None:
        for request_id in list(self._live):
            news.extend(self._end(request_id, FinishReason.ABORT))
        self._gauges = (0, 0, self._state.pool)

    def _fail_everything(self) -> None:
        self._closing = True
        ended = [StepOutput(id_, (), FinishReason.ERROR, 0, 0) for id_ in self._live]
        self._publish(ended)

    def _publish(self, news: News) -> None:
        totals = self.totals
        for item in news:
            if isinstance(item, StepOutput):
                totals.generated_tokens += len(item.token_ids)
                if item.finish_reason is not None:
                    self._live.pop(item.request_id, None)
                    totals.finished[item.finish_reason.value] += 1
                    totals.prompt_tokens += item.num_prompt_tokens
                    totals.cached_prompt_tokens += item.num_cached_tokens
        if news:
            self._on_news(news)
