"""Which outputs are under a constraint, and how far their matchers have come.

It stands beside the scheduler, whose plans don't depend on it: a matcher follows the tokens that
were committed, so a row that is planned again, after a preemption or a failure, finds it where its
sequence is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from time import thread_time
from typing import NamedTuple

import numpy as np

from engine.runtime.news import BudgetSpent
from engine.sampling import ConstraintBroken, InvalidRequest, Matcher
from engine.types import Request, StepOutput, StepPlan

# Processor time that all outputs of a step may take together: so much at once, and so much for each
# step. Everybody's step waits for it.
BURST_SECONDS = 0.25
SECONDS_PER_STEP = 0.05

_TOO_DEAR = (
    "constraint: what may come next took too long for all outputs of a step together, and {:.0f} "
    "milliseconds of it for this request's, the most; try again, or make it less ambiguous"
)
Broken = Mapping[str, InvalidRequest | BudgetSpent]


class _Output(NamedTuple):
    """A sequence under a constraint, and the request that it is of."""

    matcher: Matcher
    owner: str


class Constraints:
    """The matchers of running sequences, by the sequences' names. The step loop's own.

    Attributes:
      seconds: of processor time that they have taken.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._matchers: dict[str, _Output] = {}
        self._left = BURST_SECONDS
        self._taken: dict[str, float] = {}  # seconds for this step, by request

    def add(self, request: Request) -> None:
        """Take over a request's matchers, if it has any."""
        for name, matcher in zip(request.names, request.matchers, strict=False):
            self._matchers[name] = _Output(matcher, request.request_id)

    def forget(self, name: str) -> None:
        """A sequence has ended."""
        self._matchers.pop(name, None)

    def advance(self, outputs: Sequence[StepOutput]) -> Broken:
        """Take in a step's tokens.

        Returns:
          Why sequences can't go on, by name.
        """
        broken: dict[str, InvalidRequest | BudgetSpent] = {}
        for output in outputs if self._matchers else ():
            if (found := self._matchers.get(output.request_id)) is not None:
                with self._work(output.request_id, found, broken):
                    for token in output.token_ids:
                        found.matcher.advance(token)
        return broken

    def fill(self, plan: StepPlan, masks: np.ndarray) -> Broken:
        """Say what the rows of a plan may choose, all earlier steps being committed.

        Where all of them together take too long, the requests that took most of it end, as many as
        it needs for the others to fit.

        Args:
          plan: the next step. Rows whose sequences have ended since may choose anything.
          masks: int32[S, ceil(V / 32)], all bits set.

        Returns:
          Why sequences can't go on, by name.
        """
        broken: dict[str, InvalidRequest | BudgetSpent] = {}
        for mask, row in zip(masks, plan.rows, strict=False):
            name = row.request.request_id
            if row.samples and (found := self._matchers.get(name)) is not None:
                with self._work(name, found, broken):
                    found.matcher.fill(mask)
        self._left = min(BURST_SECONDS, self._left + SECONDS_PER_STEP - sum(self._taken.values()))
        while self._left < 0 and self._taken:
            owner = max(self._taken, key=self._taken.__getitem__)
            self._left += (seconds := self._taken.pop(owner))
            for name in [name for name, each in self._matchers.items() if each.owner == owner][:1]:
                broken.setdefault(name, BudgetSpent(_TOO_DEAR.format(1000 * seconds)))
        self._taken.clear()
        return broken

    @contextlib.contextmanager
    def _work(
        self, name: str, output: _Output, broken: dict[str, InvalidRequest | BudgetSpent]
    ) -> Iterator[None]:
        """Take the time of a matcher's work, and note why it can't go on if so."""
        start = thread_time()
        try:
            yield
        except ConstraintBroken as error:
            if error.is_spent:
                broken[name] = BudgetSpent(f"constraint: {error}")
            else:
                broken[name] = InvalidRequest("constraint", str(error))
        seconds = thread_time() - start
        self.seconds += seconds
        self._taken[output.owner] = self._taken.get(output.owner, 0.0) + seconds
