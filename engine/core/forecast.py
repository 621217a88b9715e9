"""How many blocks the running sequences will come to need: what admission must leave room for.

No sequence says how long it will get, but the lengths of those that ended are known. From them
follows how likely each is still there after so many more steps, and so what all of them hold then:
the working set is the most of that (the idea of Gong et al., "Past-Future Scheduler for LLM Serving
under SLA Guarantees", 2025; here with expectations instead of samples, so that it replays).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from engine.core.core import Core
    from engine.core.sequences import Sequence

MEMORY = 512  # outputs that are remembered
LEAST = 16  # below so many, nothing is forecast
MOMENTS = 16  # how many moments from now on are looked at
SPREAD = 2.0  # standard deviations above the mean that are kept free
RENEWED = 2  # steps after which the running sequences are looked at anew


class Demand(NamedTuple):
    """Blocks that sequences are expected to hold at some moments, and the variance.

    Attributes:
      step: the plan that it was made for.
      moments: int64[MOMENTS], steps from that one.
      mean, variance: float64[MOMENTS].
    """

    step: int
    moments: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    def is_good_at(self, step: int) -> bool:
        """Whether a later plan may go by it too, as all moments but the first are still ahead."""
        return step - self.step <= min(RENEWED, int(self.moments[1]))

    def plus(self, other: Demand) -> Demand:
        """That of these sequences and others together, whose moments are the same."""
        mean, variance = self.mean + other.mean, self.variance + other.variance
        return self._replace(mean=mean, variance=variance)

    @property
    def peak(self) -> float:
        """The working set: the most at any of the moments, and some to spare."""
        return float((self.mean + SPREAD * np.sqrt(self.variance)).max())


class Forecast:
    """What the lengths of the latest outputs tell of those to come; the same tell the same.

    Attributes:
      demand: of the running sequences, if it was asked for lately.
    """

    __slots__ = ("_at_least", "_latest", "demand")

    def __init__(self) -> None:
        self.demand: Demand | None = None
        self._latest: deque[int] = deque()
        self._at_least = np.zeros(1, np.int64)  # how many are so long; 0 for the last, and beyond

    def add(self, length: int) -> None:
        """An output of that length has ended by itself."""
        if len(self._latest) == MEMORY:
            self._at_least[: self._latest.popleft() + 1] -= 1
        self._latest.append(length)
        longer = length + 2 - len(self._at_least)
        if longer > 0:
            self._at_least = np.pad(self._at_least, (0, longer))
        self._at_least[: length + 1] += 1

    def moments(self) -> np.ndarray | None:
        """int64[MOMENTS]: when to look, in steps from now; None while too few have ended to tell.

        At the last of them nine in ten have ended; few go on for longer.
        """
        count = len(self._latest)
        if count < LEAST:
            return None
        horizon = int(np.count_nonzero(self._at_least >= count - count * 9 // 10)) - 1
        return np.arange(MOMENTS) * horizon // (MOMENTS - 1)

    def blocks(
        self,
        moments: np.ndarray,
        generated: np.ndarray,
        held: np.ndarray,
        most: np.ndarray,
        block_size: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What sequences are expected to hold at some moments, if they grow by a token a step.

        An output that is longer than any that ended goes on.

        Args:
          moments: int[m], steps from now.
          generated: int[n], tokens of each one's output.
          held: int[n], tokens of each, its prompt included.
          most: int[n], what `held` can come to at most.
          block_size: tokens in a block; half of each last one is taken to be empty.

        Returns:
          float64[m], the blocks of all of them in expectation; and the variance.
        """
        later = moments[:, None]
        longer_now = self._at_least.take(generated + 1, mode="clip")
        there_then = self._at_least.take(generated + later, mode="clip")
        there_then[:, longer_now == 0] = 1  # nobody knows: it goes on
        alive = np.minimum(there_then / np.maximum(longer_now, 1), 1.0)
        alive *= held + later <= most
        blocks = (held / block_size + 0.5) + later / block_size
        expected = alive * blocks
        variance = expected * (blocks - expected)
        return expected.sum(axis=1), variance.sum(axis=1)

    def copy(self) -> Forecast:
        """An independent one in the same state."""
        other = Forecast()
        other.demand = self.demand
        other._latest = self._latest.copy()
        other._at_least = self._at_least.copy()
        return other


class WorkingSet:
    """Whether further sequences are expected to fit beside those that run. For one plan, and made
    only if somebody waits.

    Where all fit at their longest, nothing is forecast. Else what the running ones need is worked
    out once in a while: in between, what starts is added, at its longest if that fits, and what
    ends was expected to.
    """

    def __init__(self, core: Core):
        self._core = core
        # Blocks, if all get as long as they may.
        self._longest = sum([one.block_ids.size for one in core.running])
        self._longest += sum([self._most_of_forks(one) for one in core.running if one.forks])
        self._saved: int | None = None  # blocks counted once for each of several owners
        self._then: Demand | None = None  # with the sequence that was asked about last

    def has_room_for(self, seq: Sequence) -> bool:
        """Whether the pool is expected to hold all to their ends, and this one."""
        core = self._core
        self._then = None
        most = self._most_of(seq)
        if self._longest + most <= core.pool.num_blocks - core.public.num_blocks:
            return True
        known = core.forecast.demand
        if known is None or not known.is_good_at(core.step):
            moments = core.forecast.moments()
            if moments is None:
                return True
            known = core.forecast.demand = self._of(core.running, moments)
        if self._saved is None:
            self._saved = sum([one.num_blocks for one in core.running]) - core.pool.counts.owned
            self._saved += sum([self._saved_by_forks(one) for one in core.running if one.forks])
        room = core.pool.num_blocks + self._saved + self._saved_by_forks(seq)
        self._then = known._replace(mean=known.mean + most)  # at its longest, for a start
        if self._then.peak > room:
            later = np.maximum(known.moments - (core.step - known.step), 0)
            self._then = known.plus(self._of([seq], later))
        return self._then.peak <= room

    def add(self, seq: Sequence, num_shared: int) -> None:
        """The sequence that was asked about last is about to run, with so many blocks of others."""
        core = self._core
        self._longest += self._most_of(seq)
        if self._saved is not None:
            self._saved += num_shared + self._saved_by_forks(seq)
        core.forecast.demand = self._then

    def _most_of(self, seq: Sequence) -> int:
        return self._core.blocks_for(seq.max_total - 1) + self._most_of_forks(seq)

    def _most_of_forks(self, seq: Sequence) -> int:
        return len(seq.forks) * self._core.blocks_for(seq.max_total - 1)

    def _saved_by_forks(self, seq: Sequence) -> int:
        return len(seq.forks) * (seq.num_prompt // self._core.block_size)

    def _of(self, sequences: Items[Sequence], moments: np.ndarray) -> Demand:
        core = self._core
        # Forks are as long as their parents so far, and grow like them.
        everyone = [*sequences, *(fork for one in sequences if one.forks for fork in one.forks)]
        held = np.array([one.num_total for one in everyone])
        prompt = np.array([one.num_prompt for one in everyone])
        most = np.array([one.max_total for one in everyone])
        mean, variance = core.forecast.blocks(moments, held - prompt, held, most, core.block_size)
        return Demand(core.step, moments, mean, variance)
