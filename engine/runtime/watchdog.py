"""Who watches the step loop: a step that hangs, steps that fail one after another, and pauses.

The loop writes into a `Pulse` where it is, a few plain stores a step. A thread of the `Watchdog`
looks at it a few times a second, so a loop that is stuck in a device call is noticed by somebody
who is not.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping

from engine.core import batching
from engine.runtime.in_flight import InFlight
from engine.runtime.news import ended
from engine.runtime.runner import Runner
from engine.types import FinishReason, Request, StepOutput, StepPlan

log = logging.getLogger(__name__)

PROBE_SECONDS = 0.5  # between attempts at a step of nothing, while steps fail
_LOOKS = 8  # in the time that a step may take, at least
_MAX_SECONDS = 0.5  # between looks


class StepHung(RuntimeError):
    """A step came back after its requests had been told that it would not."""


class Pulse:
    """Where the step loop is, for others to see. The loop writes, and anybody may read.

    Args:
      live: the requests that have not ended, by each name that news of theirs come under; the
        loop's own, which it keeps up.

    Attributes:
      since: time.monotonic() seconds when the loop began the turn it is in; None between turns.
      plans: those of this turn that may be on the device: the one it waits for, and the next.
      is_hung: set by who watches, when a turn takes too long; the loop's recovery unsets it.
      num_failures: steps that failed or hung, since the last good one.
      max_failures: so many, and no more requests are tried until a step of nothing succeeds.
      has_memory: whether the device's memory could be made anew after the last failure; without
        it, no request is tried either.
      next_probe: time.monotonic() seconds when a step of nothing may be tried again.
      is_paused: no step is begun.
    """

    __slots__ = (
        *("_live", "has_memory", "is_hung", "is_paused", "max_failures", "next_probe"),
        *("num_failures", "plans", "since"),
    )

    def __init__(self, live: Mapping[str, Request]) -> None:
        self._live = live
        self.since: float | None = None
        self.plans: tuple[StepPlan, ...] = ()
        self.is_hung = False
        self.num_failures = 0
        self.max_failures: float = math.inf
        self.has_memory = True
        self.next_probe = 0.0
        self.is_paused = False

    @property
    def is_failing(self) -> bool:
        """Whether too many steps failed in a row, or what failed left no memory."""
        return self.num_failures >= self.max_failures or not self.has_memory

    @property
    def holds(self) -> bool:
        """Whether no step may begin; requests stay where they are."""
        return self.is_paused or self.is_failing

    @property
    def trouble(self) -> str | None:
        """What keeps the engine from serving, in words for its clients; None if nothing does."""
        if self.is_hung:
            return "a step hangs on this server's device; try another server, or this one later"
        if self.is_failing:
            return (
                f"{self.num_failures} steps in a row failed on this server's device; try another "
                "server, or this one later"
            )
        return None

    def begin(self, in_flight: InFlight | None = None) -> None:
        """A turn begins; this step, if there is one, is on the device."""
        self.plans = () if in_flight is None else (in_flight.launched.plan,)
        self.since = time.monotonic()

    def moved(self) -> None:
        """A part of the turn is done; the next one has its own time."""
        self.since = time.monotonic()

    def end(self, *, is_idle: bool) -> None:
        """The turn is over; `is_idle` if it left no step on its way."""
        self.since = None
        if is_idle:
            self.is_hung = False  # a turn without requests, which nobody was told about

    def came_back(self) -> None:
        """The step that was waited for is done. Raises StepHung if that was given up."""
        if self.is_hung:
            raise StepHung("the step came back after its requests had ended")
        self.num_failures = 0
        self.moved()

    def failed(self, *, has_memory: bool) -> None:
        """A step failed, and its requests have ended; the device's memory is new, or not there."""
        self.is_hung = False
        self.has_memory = has_memory
        self.num_failures += 1

    def ends(self) -> list[StepOutput]:
        """The ends of the requests that this turn's plans are about, as errors."""
        names: dict[str, Request] = {}
        for row in (row for plan in self.plans for row in plan.rows):
            request = row.request
            is_search = request.sampling.beam_width > 1
            for name in request.replies if is_search else (request.request_id,):
                if name in self._live:
                    names[name] = request
        return ended(names, FinishReason.ERROR)


def probe(runner: Runner, pulse: Pulse) -> None:
    """See whether a device that failed works again, with a step without rows; not more often than
    every `PROBE_SECONDS`, and not in a pause. It mends the pulse if so."""
    if not pulse.is_failing or pulse.is_paused or time.monotonic() < pulse.next_probe:
        return
    pulse.begin()
    bucket = runner.shape.buckets[0]
    try:
        if not pulse.has_memory:
            runner.reset()
            pulse.has_memory = True
        runner.launch(StepPlan(-1, ()), batching.empty(bucket, runner.sink_slot)).wait()
        pulse.came_back()
    except Exception as error:
        log.error("a step of nothing failed too: %s", error)
        renew(runner, pulse)
    pulse.next_probe = time.monotonic() + PROBE_SECONDS


def renew(runner: Runner, pulse: Pulse) -> None:
    """Make the device's memory anew after a failure. If that fails too, `probe` tries it again.

    Raises:
      Exception: it failed, and nobody watches who would end an engine that doesn't recover.
    """
    try:
        runner.reset()
    except Exception as error:
        if math.isinf(pulse.max_failures):
            raise
        log.error("the device's memory could not be made anew: %s", error)
        pulse.failed(has_memory=False)
    else:
        pulse.failed(has_memory=True)


class Watchdog:
    """Looks at a pulse until closed.

    It counts its own looks and asks no clock: a process that was stopped for a while, or a laptop
    that slept, has hung steps of nobody.

    Args:
      pulse: of the loop.
      step_timeout: seconds after which a turn of the loop counts as hung.
      recovery_timeout: seconds of trouble after which `is_lost` says that it won't end.
      on_hung: called on the watchdog's thread, once for each hung turn.

    Attributes:
      is_lost: whether the engine has been in trouble for longer than it may.
    """

    def __init__(
        self,
        pulse: Pulse,
        step_timeout: float,
        recovery_timeout: float,
        on_hung: Callable[[], None],
    ):
        self.is_lost = False
        self._pulse = pulse
        self._step_timeout = step_timeout
        self._recovery_timeout = recovery_timeout
        self._on_hung = on_hung
        self._period = min(step_timeout / _LOOKS, _MAX_SECONDS)
        self._since: float | None = None  # of the pulse, at the last look
        self._stuck = 0.0  # seconds for which that has been the same
        self._troubled = 0.0  # seconds of trouble
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="octavo-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more. Safe to call twice."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._period):
            try:
                self._look()
            except Exception:
                log.exception("the watchdog failed, and goes on")

    def _look(self) -> None:
        pulse, since = self._pulse, self._pulse.since
        is_same = since is not None and since == self._since
        self._since, self._stuck = since, self._stuck + self._period if is_same else 0.0
        if not pulse.is_hung and self._stuck >= self._step_timeout:
            pulse.is_hung = True  # before anybody is told: the loop drops what comes from now on
            log.error("a step hangs for %.1f s; its requests end\n%s", self._stuck, report(pulse))
            self._on_hung()
        self._troubled = 0.0 if pulse.trouble is None else self._troubled + self._period
        if self._troubled >= self._recovery_timeout and not self.is_lost:
            log.critical("no recovery in %.1f s\n%s", self._troubled, report(pulse))
            self.is_lost = True


def report(pulse: Pulse) -> str:
    """What a turn was about, and where each thread is: counts and lines of code, and no text."""
    lines = [
        f"step {plan.step}: {len(plan.rows)} rows, {plan.num_tokens} tokens, "
        f"{len(plan.block_copies)} copies, {len(plan.swap_outs)} swaps out, "
        f"{len(plan.swap_ins)} in, longest context "
        f"{max((row.start + row.num_tokens for row in plan.rows), default=0)}"
        for plan in pulse.plans
    ]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        lines += [line.rstrip() for line in traceback.format_stack(frame)]
    return "\n".join(lines)
