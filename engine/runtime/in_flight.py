"""A step between its launch and its tokens, as the step loop remembers it."""

from __future__ import annotations

import time
from typing import NamedTuple

from engine.core.scheduler import SchedulerState
from engine.runtime.figures import StepRecord
from engine.runtime.runner import Launched


class InFlight(NamedTuple):
    """The step, and seconds on the host by phase."""

    launched: Launched
    launched_at: float
    schedule: float
    build: float
    launch: float
    padded_tokens: int

    def record(
        self, begin: float, waited: float, last_wait_end: float, state: SchedulerState
    ) -> StepRecord:
        """Its figures, now that it is committed.

        Args:
          begin, waited: when the loop began to wait for it, and had it.
          last_wait_end: when it had the step before.
          state: after the commit.
        """
        plan = self.launched.plan
        return StepRecord(
            schedule=self.schedule,
            build=self.build,
            launch=self.launch,
            wait=waited - begin,
            commit=time.perf_counter() - waited,
            device=waited - max(self.launched_at, last_wait_end),
            num_rows=len(plan.rows),
            num_tokens=plan.num_tokens,
            padded_tokens=self.padded_tokens,
            num_running=state.num_running,
            num_waiting=state.num_waiting,
            owned_blocks=state.pool.owned,
        )
