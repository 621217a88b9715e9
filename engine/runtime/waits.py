"""How long each request was in the queue, and what held the queue's head back in that time.

The scheduler says once a step why the head waits, and nothing is done for those behind it: what
has added up is noted when a request joins the queue, and the difference when it leaves is its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.core.core import Holding
from engine.types import Held, StepOutput, StepPlan, Waited


class Waits:
    """Follows the sequences of a step loop, whose clock it is told; seconds throughout."""

    def __init__(self) -> None:
        self._sums: dict[Holding, Held] = {}  # since the start
        self._holding: Holding | None = None  # since the last plan
        self._last = 0.0  # the last time that was told
        self._sequences: dict[str, _Wait] = {}

    def arrived(self, names: Iterable[str], now: float, on_disk: float = 0.0) -> None:
        """The sequences of a request joined the queue, after a wait for blocks on disk."""
        self._advance(now)
        group: list[_Wait] = []
        for name in names:
            self._sequences[name] = _Wait(group, now, self._sums, on_disk)
            group.append(self._sequences[name])

    def planned(self, plan: StepPlan, holding: Holding | None, now: float) -> None:
        """A step was planned: some left the queue, others are in it again."""
        self._advance(now)
        for row in plan.rows:
            sequence = self._sequences.get(row.request.request_id)
            if sequence is not None and not (sequence.since is None and sequence.has_run):
                for one in sequence.bound():  # it starts, or resumes
                    one.leave(now, self._sums)
                sequence.has_run = True
        for name in plan.preempted:
            if (sequence := self._sequences.get(name)) is not None:
                for one in sequence.bound():
                    one.join(now, self._sums)
        self._holding = holding
        if holding is not None:
            steps, seconds = self._sums.get(holding, Held(0, 0.0))
            # Made anew, as those in the queue hold on to the old ones.
            self._sums = self._sums | {holding: Held(steps + 1, seconds)}

    def failed(self, now: float) -> None:
        """All that run are in the queue again."""
        self._advance(now)
        for sequence in self._sequences.values():
            sequence.join(now, self._sums)

    def tell(self, outputs: tuple[StepOutput, ...], now: float) -> tuple[StepOutput, ...]:
        """The outputs, with what is new about waiting: after each start, and at the end."""
        self._advance(now)
        return tuple([self._tell(output, now) for output in outputs])

    def _tell(self, output: StepOutput, now: float) -> StepOutput:
        sequence = self._sequences.get(output.request_id)
        if sequence is None:
            return output
        if output.finish_reason is not None:
            del self._sequences[output.request_id]
            sequence.leave(now, self._sums)  # if it ended in the queue
            for one in sequence.bound():  # one of them waits for the prompt in its place
                if one is not sequence:
                    one.join(now, self._sums)
        elif not sequence.is_news:
            return output
        sequence.is_news = False
        return output._replace(waited=sequence.waited())

    def _advance(self, now: float) -> None:
        if self._holding is not None:
            steps, seconds = self._sums[self._holding]
            held = Held(steps, seconds + now - self._last)
            self._sums = self._sums | {self._holding: held}
        self._last = now


class _Wait:
    """One sequence's time in the queue, which it may join several times.

    Attributes:
      since: when it joined the queue, or None while it runs, or waits for its prompt alone.
      has_run: whether it ever had a row of its own. Until then, it waits with the others of its
        request that run or wait for it.
      is_news: whether it has left the queue and nobody was told.
    """

    __slots__ = ("_group", "_held", "_seconds", "_then", "has_run", "is_news", "since")

    def __init__(self, group: list[_Wait], now: float, sums: dict[Holding, Held], on_disk: float):
        self._group = group
        self.since: float | None = None
        self.has_run = self.is_news = False
        self._seconds = on_disk
        self._held: dict[str, Held] = {"disk": Held(0, on_disk)} if on_disk else {}
        self.join(now, sums)

    def bound(self) -> list[_Wait]:
        """It, and the others of its request that have not run yet, which do as it does."""
        return [one for one in self._group if one is self or not one.has_run]

    def join(self, now: float, sums: dict[Holding, Held]) -> None:
        if self.since is None:
            self.since, self._then = now, sums

    def leave(self, now: float, sums: dict[Holding, Held]) -> None:
        if self.since is None:
            return
        self._seconds += now - self.since
        for reason, (steps, seconds) in sums.items():
            steps_then, seconds_then = self._then.get(reason, (0, 0.0))
            if steps > steps_then or seconds > seconds_then:
                before = self._held.get(reason, (0, 0.0))
                self._held[reason] = Held(
                    before[0] + steps - steps_then, before[1] + seconds - seconds_then
                )
        self.since, self._then, self.is_news = None, {}, True

    def waited(self) -> Waited:
        ordered = sorted(self._held.items(), key=lambda item: -item[1].seconds)
        return Waited(self._seconds, dict(ordered))
