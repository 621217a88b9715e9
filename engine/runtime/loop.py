"""The step loop: one thread that owns the scheduler state and keeps the device busy.

Step N + 1 is planned, built and launched before step N's tokens are fetched, so the device
never waits for the host. Everything reaches the loop through one bounded inbox, and every
piece of news leaves through one function, once a step.
"""

from __future__ import annotations

import contextlib
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
from engine.core.block_pool import PoolCounts
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.runtime.event_log import Recorder
from engine.runtime.runner import Launched, Runner
from engine.sampling import InvalidRequest
from engine.types import FinishReason, QueueFull, Request, StepOutput, StepPlan

log = logging.getLogger(__name__)

_MIN_DEADLINES = 1024  # deadlines of ended requests that are kept before it pays to tidy up


class EngineStopped(RuntimeError):
    """The engine was closed, or its loop failed; it serves nothing any more."""


class Rejected(NamedTuple):
    """A request that was not admitted, none of its forks either, and why."""

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
    copied_blocks: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    failed_steps: int = 0
    held_steps: Counter[str] = dataclasses.field(default_factory=Counter)
    finished: Counter[str] = dataclasses.field(default_factory=Counter)


class _Abort(NamedTuple):
    request_id: str
    reason: FinishReason


class _Look(NamedTuple):
    at: Callable[[SchedulerState], None]


_Event = Request | _Abort | _Look | None  # None: close


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
        # `submit` bounds the requests in it. Aborts always fit, so that nobody, this thread least
        # of all, waits for room; there are never more of them than the caller has requests.
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._num_submitted = 0  # sequences in the inbox
        self._taken: list[_Event] = []  # from the inbox, not dealt with yet
        self._entry = threading.Lock()  # guards it; nothing is submitted once `_closing` is set
        self._live: dict[str, Request] = {}  # by each name of theirs
        self._deadlines: list[tuple[float, str]] = []
        self._planned: StepPlan | None = None  # planned, but not launched yet
        self._recorder = Recorder(record, limits) if record else None
        self._closing = False
        self._last_wait_end = 0.0
        self._gauges = (0, 0, self._state.pool)
        self._thread = threading.Thread(target=self._run, name="octavo-loop", daemon=True)
        self._thread.start()

    @property
    def gauges(self) -> tuple[int, int, PoolCounts]:
        """Sequences running and waiting, and blocks by state, after the last step."""
        running, waiting, pool = self._gauges
        return running, waiting + self._num_submitted, pool

    @property
    def is_alive(self) -> bool:
        """Whether the loop still runs."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Hand a request over. Refusals come as `Rejected` news.

        Raises:
          QueueFull: the inbox is full.
          EngineStopped: the loop is closed, or has failed.
        """
        with self._entry:
            if self._closing:
                raise EngineStopped("the engine is closed, or failed; its log says why")
            num_sequences = len(request.names)
            if self._num_submitted + num_sequences > self.limits.max_waiting:
                raise QueueFull(
                    f"{self.limits.max_waiting} requests are waiting already; try again later"
                )
            self._num_submitted += num_sequences
            self._inbox.put(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; unknown ids are ignored. The news says when it has ended."""
        if not self._closing:  # which ends everything by itself
            self._inbox.put(_Abort(request_id, reason))

    def look(self, at: Callable[[SchedulerState], None]) -> None:
        """Have the state between two steps passed to a function, on the loop's thread.

        The function must be quick, must not raise, and must not keep or consume the state. It is
        not called any more once the loop ends.
        """
        if not self._closing:
            self._inbox.put(_Look(at))

    def close(self) -> None:
        """Abort what is left and stop. Safe to call twice."""
        with self._entry:
            if not self._closing:
                self._closing = True
                self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        in_flight: _InFlight | None = None
        try:
            while self._take_events(may_wait=in_flight is None and self._state.is_idle):
                in_flight = self._step(in_flight)
            if in_flight is not None:
                with contextlib.suppress(Exception):  # nobody is left to be told
                    in_flight.launched.wait()
        except Exception:
            log.exception("the engine loop stopped; its requests end with an error")
            self._fail_everything()
        finally:
            self._record(Recorder.close)

    def _step(self, in_flight: _InFlight | None) -> _InFlight | None:
        """Launch the next step, then take in the one before it."""
        if in_flight is None and self._state.is_idle:
            return None
        launched: _InFlight | None = None
        failure: Exception | None = None
        try:
            launched = self._launch()
        except Exception as error:
            failure = error  # the step before it may be good all the same
        if in_flight is not None:
            try:
                self._commit(in_flight)
            except Exception as error:
                return self._recover(error, (in_flight, launched) if launched else (in_flight,))
        if failure is not None:
            return self._recover(failure, ())
        return launched

    def _launch(self) -> _InFlight | None:
        begin = time.perf_counter()
        self._state, plan = scheduler.schedule(self._state, self.limits)
        self._planned = plan
        self._record(lambda recorder: recorder.schedule(plan))
        totals = self.totals
        totals.preemptions += len(plan.preempted)
        totals.copied_blocks += len(plan.block_copies)
        totals.swapped_out_blocks += len(plan.swap_outs)
        totals.swapped_in_blocks += len(plan.swap_ins)
        if (holding := self._state.holding) is not None:
            totals.held_steps[holding] += 1
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
        self._record(lambda recorder: recorder.commit(plan, tokens))
        self._state, outputs = scheduler.commit(self._state, plan, tokens, self.limits)
        totals = self.totals
        totals.steps += 1
        totals.computed_tokens += plan.num_tokens
        totals.padded_tokens += step.padded_tokens
        self._forget_finished(outputs)
        self._publish(outputs)
        if on_step := self.on_step:
            state = self._state
            on_step(
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
        self._record(lambda recorder: recorder.fail(tuple(plans)))
        self._state, outputs = scheduler.fail(self._state, tuple(plans))
        self._runner.reset()
        self._forget_finished(outputs)
        self._publish(outputs)

    def _take_events(self, *, may_wait: bool) -> bool:
        """Take what is in the inbox. Returns whether to go on."""
        self._taken = [self._inbox.get()] if may_wait else []
        # Not more than there are now, however fast they come: running requests go on.
        self._taken += [self._inbox.get() for _ in range(self._inbox.qsize())]
        goes_on = self._apply(self._taken)
        with self._entry:
            self._num_submitted -= sum(
                len(event.names) for event in self._taken if isinstance(event, Request)
            )
        self._taken = []
        return goes_on

    def _apply(self, events: Sequence[_Event]) -> bool:
        """Admit and end requests, those included whose time is up. Returns whether to go on."""
        news: list[StepOutput | Rejected] = []
        for event in events:
            if event is None:
                for request_id in list(self._live):
                    news.extend(self._end(request_id, FinishReason.ABORT))
                self._publish(news)
                return False
            if isinstance(event, _Abort):
                news.extend(self._end(event.request_id, event.reason))
            elif isinstance(event, _Look):
                event.at(self._state)
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
        self._live.update(dict.fromkeys(request.names, request))
        self._record(lambda recorder: recorder.admit(request))
        if request.deadline is not None:
            for name in request.names:
                heapq.heappush(self._deadlines, (request.deadline, name))
            if len(self._deadlines) > 2 * len(self._live) + _MIN_DEADLINES:
                # Most are of requests that ended long before: keep those that are live.
                self._deadlines = [
                    (live.deadline, name)
                    for name, live in self._live.items()
                    if live.deadline is not None
                ]
                heapq.heapify(self._deadlines)

    def _end(self, request_id: str, reason: FinishReason) -> tuple[StepOutput, ...]:
        if self._live.pop(request_id, None) is None:
            return ()
        self._record(lambda recorder: recorder.abort(request_id, reason))
        self._state, outputs = scheduler.abort(self._state, request_id, reason)
        return outputs

    def _fail_everything(self) -> None:
        """Tell every request, admitted or not, that the loop is gone."""
        with self._entry:
            self._closing = True
        events = self._taken
        while not self._inbox.empty():
            events.append(self._inbox.get())
        lost = {
            name: event for event in events if isinstance(event, Request) for name in event.names
        }
        lost |= self._live
        self._live.clear()
        self._num_submitted = 0
        news = [
            StepOutput(name, (), FinishReason.ERROR, len(request.prompt_ids), 0)
            for name, request in lost.items()
        ]
        self._count(news)
        self._on_news(news)

    def _record(self, write: Callable[[Recorder], None]) -> None:
        """Log an event. If the log can't be written, it ends and the engine goes on."""
        if self._recorder is None:
            return
        try:
            write(self._recorder)
        except OSError as error:
            log.error(
                "the event log can't be written (%s) and ends here; it replays up to its last "
                "whole line",
                error.strerror,
            )
            recorder, self._recorder = self._recorder, None
            with contextlib.suppress(OSError):
                recorder.close()

    def _forget_finished(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                del self._live[output.request_id]

    def _publish(self, news: News) -> None:
        """Bring the figures up to date, and then tell who asked."""
        self._count(news)
        state = self._state
        self._gauges = (state.num_running, state.num_waiting, state.pool)
        if news:
            self._on_news(news)

    def _count(self, news: News) -> None:
        totals = self.totals
        for item in news:
            if isinstance(item, StepOutput):
                totals.generated_tokens += len(item.token_ids)
                if item.finish_reason is not None:
                    totals.finished[item.finish_reason.value] += 1
                    totals.prompt_tokens += item.num_prompt_tokens
                    totals.cached_prompt_tokens += item.num_cached_tokens
