"""The step loop: one thread that owns the scheduler state and keeps the device busy.

Step N + 1 is planned, built and launched before step N's tokens are fetched, so the device
never waits for the host. Everything reaches the loop through one bounded inbox, and every piece of
news leaves through one function, once a step.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from engine.core import batching, scheduler, upkeep
from engine.core.block_pool import PoolCounts
from engine.core.limits import Limits
from engine.core.reloading import close_queue, has_drained, reload
from engine.core.scheduler import SchedulerState
from engine.runtime.clocks import CacheClock, Deadlines
from engine.runtime.constraints import Broken, Constraints
from engine.runtime.disk_tier import DiskTier
from engine.runtime.figures import Gauges, StepRecord, Totals
from engine.runtime.in_flight import InFlight
from engine.runtime.inbox import (
    STOPPED,
    Abort,
    EngineStopped,
    Event,
    Flush,
    Inbox,
    Look,
    NewWeights,
    Reload,
    Wake,
    answer,
)
from engine.runtime.news import News, Rejected, ended
from engine.runtime.recorder import EventLog, Recorder
from engine.runtime.runner import Runner
from engine.runtime.tiers import Arrival, Tiers
from engine.runtime.waits import Waits
from engine.runtime.watchdog import PROBE_SECONDS, Pulse, probe, renew
from engine.sampling import InvalidRequest
from engine.types import Domain, FinishReason, QueueFull, Request, StepOutput, StepPlan

log = logging.getLogger(__name__)


class EngineLoop:
    """Runs a scheduler and a runner until closed.

    Args:
      runner: warmed up.
      limits: of the scheduler.
      on_news: called on the loop's thread with each step's outputs and rejections; it must
        return quickly.
      record: file to write the event log to.
      record_tokens: with requests and token ids in full.
      on_step: called with each step's figures, for benchmarks.
      disk: the tier below the runner's host tier.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        on_news: Callable[[News], None],
        record: str | None = None,
        record_tokens: bool = False,
        on_step: Callable[[StepRecord], None] | None = None,
        disk: DiskTier | None = None,
    ):
        self.limits = limits
        self.totals = Totals()
        self.on_step = on_step
        self._runner = runner
        self._on_news = on_news
        self._state = SchedulerState.initial(limits)
        self._inbox = Inbox(limits.max_waiting, limits.max_waiting_tokens)
        self._taken: list[Event] = []  # from the inbox, not dealt with yet
        self._live: dict[str, Request] = {}  # by each name that news of theirs come under
        self.pulse = Pulse(self._live)
        self._deadlines = Deadlines()
        self._clock = CacheClock()
        self._planned: StepPlan | None = None  # planned, but not launched yet
        self._exchange: Reload | None = None  # of the weights, once what has begun has ended
        self.tiers = Tiers(
            disk,
            runner.host if disk else None,
            limits,
            wake=lambda: self._inbox.put(Wake()),
            clock=lambda: self._clock.now,
        )
        self._record = EventLog(record, limits, tokens=record_tokens)
        self._waits = Waits()
        self._constraints = Constraints()
        self._last_wait_end = 0.0
        self._gauges = Gauges(0, 0, 0, self._state.pool)
        self.num_pinned_blocks = self.num_host_blocks = 0  # of public prefixes; in the host tier
        self._thread = threading.Thread(target=self._run, name="octavo-loop", daemon=True)
        self._thread.start()

    @property
    def gauges(self) -> tuple[int, int, PoolCounts]:
        """Sequences running and waiting, and blocks by state, after the last step."""
        return self._gauges.seen(self._inbox.num_submitted)

    @property
    def is_alive(self) -> bool:
        """Whether the loop still runs."""
        return self._thread.is_alive()

    def check_room(self, num_sequences: int) -> None:
        """Raise QueueFull if `submit` would: before a request is read, which may take long."""
        self._inbox.check_room(self.gauges[1], num_sequences)

    def submit(self, request: Request) -> None:
        """Hand a request over. Refusals come as `Rejected` news.

        Raises:
          InvalidRequest: it has more sequences than may ever wait.
          QueueFull: the inbox is full.
          EngineStopped: the loop is closed, or has failed.
        """
        self._inbox.submit(request)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; unknown ids are ignored. The news says when it has ended."""
        if not self._inbox.is_closed:  # which ends everything by itself
            self._inbox.put(Abort(request_id, reason))

    def flush(self, domain: Domain | None) -> Future[int]:
        """Forget what a domain left in the cache, or with None all but what is public.

        Returns:
          How many cached blocks were given up; or EngineStopped, QueueFull, or the disk's OSError.
        """
        done: Future[int] = Future()
        self._inbox.ask(Flush(domain, done))
        return done

    def reload(self, weights: NewWeights) -> Future[None]:
        """Exchange the weights once all that has begun has ended; the queue waits, and all that is
        cached is forgotten. EngineStopped, or QueueFull if another exchange is in progress."""
        done: Future[None] = Future()
        self._inbox.ask(Reload(weights, done))
        return done

    def look[T](self, at: Callable[[SchedulerState], T]) -> Future[T]:
        """Have the state between two steps passed to a function, on the loop's thread.

        The function must be quick, and must not keep or consume the state.

        Returns:
          What it returns or raises; or EngineStopped or QueueFull.
        """
        done: Future[T] = Future()
        self._inbox.ask(Look(at, done))
        return done

    def close(self) -> None:
        """Abort what is left and stop. Safe to call twice."""
        self._inbox.close()
        self._thread.join()

    def _run(self) -> None:
        in_flight: InFlight | None = None
        try:
            while self._take_events(in_flight):
                in_flight = self._step(in_flight)
                self.pulse.end(is_idle=in_flight is None)
            with contextlib.suppress(Exception):  # nobody is left to be told
                if in_flight is not None:
                    in_flight.launched.wait()
                    self.tiers.keep(in_flight.launched)
                self.tiers.save(self._state, lambda: self._runner.kv_pool)
        except BaseException:  # a panic in an extension is no Exception
            log.exception("the engine loop stopped; its requests end with an error")
            self._fail_everything()
        finally:
            if self._exchange is not None:
                answer(self._exchange.done, EngineStopped(STOPPED))
            self._record(Recorder.close)

    def _step(self, in_flight: InFlight | None) -> InFlight | None:
        """Launch the next step, then take in the one before it."""
        if in_flight is None and self._rests:
            probe(self._runner, self.pulse)
            return None
        self.pulse.begin(in_flight)
        launched: InFlight | None = None
        failure: Exception | None = None
        try:
            launched = None if self.pulse.holds else self._launch()
        except Exception as error:
            failure = error  # the step before it may be good all the same
        if in_flight is not None:
            try:
                self._commit(in_flight)
            except Exception as error:
                return self._recover(error, (in_flight, launched) if launched else (in_flight,))
        if failure is not None:
            return self._recover(failure, ())
        return self._choose(launched)

    def _launch(self) -> InFlight | None:
        begin = time.perf_counter()
        self._state, plan = scheduler.schedule(self._state, self.limits)
        self._planned = plan
        self.pulse.plans += (plan,)
        self._record(lambda recorder: recorder.schedule(plan))
        self._waits.planned(plan, self._state.holding, begin)
        self.totals.add_plan(plan, self._state, self.limits)
        if not plan.rows:
            self._runner.move_blocks(plan)
            self._planned = None
            return None
        scheduled = time.perf_counter()
        batch = batching.build(plan, self._runner.shape.buckets, self._runner.sink_slot)
        built = time.perf_counter()
        launched = self._runner.launch(plan, batch)
        self._planned = None
        now = time.perf_counter()
        return InFlight(
            launched, now, scheduled - begin, built - scheduled, now - built, batch.token_ids.size
        )

    def _commit(self, step: InFlight) -> None:
        begin = time.perf_counter()
        tokens = step.launched.wait()
        self.pulse.came_back()
        waited = time.perf_counter()
        self.tiers.keep(step.launched)
        plan = step.launched.plan
        self._record(lambda recorder: recorder.commit(plan, tokens))
        self._state, outputs = scheduler.commit(self._state, plan, tokens, self.limits)
        self.totals.add_step(plan.num_tokens, step.padded_tokens)
        self._forget_finished(outputs)
        broken = self._constraints.advance(outputs)
        self._publish(self._waits.tell(outputs, time.perf_counter()))
        self._give_up(broken)
        if on_step := self.on_step:
            on_step(step.record(begin, waited, self._last_wait_end, self._state))
        self._last_wait_end = waited

    def _choose(self, step: InFlight | None) -> InFlight | None:
        """Have constrained tokens chosen, now that those before them are known."""
        if step is None or step.launched.masks is None:
            return step
        try:
            broken = self._constraints.fill(step.launched.plan, step.launched.masks)
            self.totals.mask_seconds = self._constraints.seconds
            self.pulse.moved()  # they are bounded by themselves, and say nothing of the device
            self._runner.choose(step.launched)
        except Exception as error:
            return self._recover(error, (step,))
        self._give_up(broken)
        return step

    def _give_up(self, broken: Broken) -> None:
        """End requests whose outputs can't be kept to their constraints, with all samples."""
        news: list[StepOutput | Rejected] = []
        for name, error in broken.items():
            if (request := self._live.get(name)) is not None:  # else another sample's end was its
                news.append(Rejected(request.request_id, error))
                for reply in request.replies:
                    news += self._end(reply, FinishReason.ERROR)
        if news:
            self._publish(news)

    def _recover(self, error: Exception, steps: tuple[InFlight, ...]) -> None:
        """A step failed: its requests end, the device memory is made anew, the rest goes on."""
        log.error("a step failed: %s", error, exc_info=error)
        plans = [step.launched.plan for step in steps]
        if self._planned is not None:  # it failed between its plan and its launch
            plans.append(self._planned)
            self._planned = None
        self.totals.failed_steps += 1
        self._record(lambda recorder: recorder.fail(tuple(plans)))
        self._state, outputs = scheduler.fail(self._state, tuple(plans))
        now = time.perf_counter()
        self._waits.failed(now)
        renew(self._runner, self.pulse)
        self._forget_finished(outputs)
        self._publish(self._waits.tell(outputs, now))

    @property
    def _rests(self) -> bool:
        """Whether no step is to be begun."""
        return self._state.is_idle or self.pulse.holds

    def _take_events(self, in_flight: InFlight | None) -> bool:
        """Take what is in the inbox. Returns whether to go on."""
        is_due = self._exchange is not None and has_drained(self._state)  # nobody may come any more
        may_wait = in_flight is None and self._rests and not is_due
        timeout = self._timeout() if may_wait else None
        self._taken = self._inbox.take(may_wait=may_wait, timeout=timeout)
        self.pulse.begin(in_flight)  # some events are about the device
        goes_on = self._apply(self._taken)
        self.pulse.end(is_idle=in_flight is None)
        self._taken = []
        return goes_on

    def _timeout(self) -> float | None:
        """Seconds until blocks may not be kept any longer, or a request waits no longer."""
        held = PROBE_SECONDS if self.pulse.holds else None  # nor do deadlines pass unseen
        due = (self._clock.timeout(self._state), self.tiers.timeout, held)
        return min((time for time in due if time is not None), default=None)

    def _tick(self) -> None:
        """Let the scheduler know the time, when it has moved on enough to matter."""
        if (now := self._clock.tick()) is not None:
            self._record(lambda recorder: recorder.tick(now))
            self._state = upkeep.tick(self._state, now)

    def _flush(self, event: Flush, news: list[StepOutput | Rejected]) -> None:
        if not self._inbox.begin(event):
            return
        # Requests that wait for their blocks: so that they leave nothing either.
        self._admit_all(self.tiers.release_domain(event.domain), news)
        cached = self._state.pool.cached
        self._record(lambda recorder: recorder.flush(event.domain))
        self._state = upkeep.flush(self._state, event.domain)
        cached -= self._state.pool.cached
        removed = self.tiers.flush(event.domain, self._state.core.step)
        removed.add_done_callback(lambda disk: answer(event.done, disk.exception() or cached))

    def _drain(self, event: Reload) -> None:
        """Let what has begun end; nothing else begins until then."""
        if self._inbox.begin(event):
            self._record(Recorder.drain)
            self._state = close_queue(self._state)
            self._exchange = event

    def _reload(self, event: Reload, news: list[StepOutput | Rejected]) -> None:
        """Go on with other weights; or with the old ones, and nothing that was cached."""
        self._admit_all(self.tiers.release(), news)  # they wait for blocks of the old ones
        outcome: Exception | None = None
        try:
            event.weights.install(self._runner, self.tiers)
            self.limits = event.weights.limits
        except Exception as error:
            log.exception("the new weights could not be installed")
            outcome = error
            renew(self._runner, self.pulse)
        fingerprint = self.limits.fingerprint
        self._record(lambda recorder: recorder.reload(fingerprint))
        self._state = reload(self._state, fingerprint)
        self._exchange = None
        answer(event.done, outcome)

    def _apply(self, events: Sequence[Event]) -> bool:
        """Admit and end requests, those included whose time is up. Returns whether to go on."""
        self._tick()
        news: list[StepOutput | Rejected] = []
        for event in events:
            if event is None:
                self._admit_all(self.tiers.release(), news)
                for request_id in list(self._live):
                    news.extend(self._end(request_id, FinishReason.ABORT))
                self._publish(news)
                return False
            if isinstance(event, Abort):
                self._admit_all(self.tiers.release(event.request_id), news)
                news.extend(self._end(event.request_id, event.reason))
            elif isinstance(event, Flush):
                self._flush(event, news)
            elif isinstance(event, Look):
                self._inbox.show(event, self._state)
            elif isinstance(event, Reload):
                self._drain(event)
            elif isinstance(event, Request):
                self._admit_all(self.tiers.release(*event.names), news)  # they were here first
                if not self.tiers.hold(self._state, event):
                    self._admit(Arrival(event), news)
        self._admit_all(self.tiers.arrivals(), news)
        for request_id in self._deadlines.take_due(self._live):
            news.extend(self._end(request_id, FinishReason.DEADLINE))
        if self._exchange is not None and has_drained(self._state):
            self._reload(self._exchange, news)
        self._publish(news)
        return True

    def _admit_all(self, arrivals: Sequence[Arrival], news: list[StepOutput | Rejected]) -> None:
        for arrival in arrivals:
            self._admit(arrival, news)

    def _admit(self, arrival: Arrival, news: list[StepOutput | Rejected]) -> None:
        request = arrival.request
        self._clock.start_for(request)
        self._tick()
        try:
            self._state = scheduler.admit(self._state, self.limits, request)
        except (InvalidRequest, QueueFull) as error:
            if isinstance(error, QueueFull):
                error = self._inbox.full(request, str(error))
            news.append(Rejected(request.request_id, error))
            return
        self._live.update(dict.fromkeys(request.replies, request))
        self._constraints.add(request)
        self._waits.arrived(request.replies, time.perf_counter(), on_disk=arrival.seconds)
        self._record(lambda recorder: recorder.admit(request))
        if arrival.blocks:
            first, count = arrival.first, len(arrival.blocks)
            self._state = self.tiers.restore(self._state, arrival)
            self._record(lambda recorder: recorder.restore(request.request_id, first, count))
        self._deadlines.add(request, self._live)

    def _end(self, request_id: str, reason: FinishReason) -> tuple[StepOutput, ...]:
        if request_id not in self._live:
            return ()
        self._record(lambda recorder: recorder.abort(request_id, reason))
        self._state, outputs = scheduler.abort(self._state, request_id, reason)
        self._forget_finished(outputs)  # with one beam of a search, all end
        return self._waits.tell(outputs, time.perf_counter())

    def _fail_everything(self) -> None:
        """Tell every request, admitted or not, that the loop is gone."""
        requests = [arrival.request for arrival in self.tiers.release()]
        requests += self._inbox.give_up(self._taken)
        lost = {name: each for each in requests for name in each.replies} | self._live
        self._live.clear()
        self._gauges = Gauges(0, 0, self._inbox.num_taken, self._gauges.pool)
        news = ended(lost, FinishReason.ERROR)
        self.totals.add_news(news)
        self._on_news(news)

    def _forget_finished(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._constraints.forget(output.request_id)
                request = self._live.pop(output.request_id, None)
                if request is not None:  # or it is a public prefix that was lost
                    self._record(functools.partial(Recorder.forget, request=request))

    def _publish(self, news: News) -> None:
        """Bring the figures up to date, and then tell who asked."""
        self.totals.add_news(news)
        state, core = self._state, self._state.core
        core.pool.retention.journal.publish()
        self._inbox.rate.note(self.totals.num_finished + state.num_running)
        num_waiting = state.num_waiting + self.tiers.num_held
        self._gauges = Gauges(state.num_running, num_waiting, self._inbox.num_taken, state.pool)
        self.num_pinned_blocks, self.num_host_blocks = core.public.num_blocks, len(core.host)
        if news:
            self._on_news(news)
