"""How many blocks the running sequences will come to need: what admission must leave room for.

No sequence says how long it will get, but the lengths of those that ended are known. From them
follows how likely each is still there after so many more steps, and so what all of them hold then:
the working set is the most of that (the idea of Gong et al., "Past-Future Scheduler for LLM Serving
under SLA Guarantees", 2025; here with expectations instead of samples, so that it replays).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from engine.core.core import Core
    from engine.core.sequences import Sequence

MEMORY = 512  # outputs that are remembered
LEAST = 16  # below so many, nothing is forecast
MOMENTS = 16  # how many moments from now on are looked at
SPREAD = 2.0  # standard deviations above the mean that are kept free


class Demand(NamedTuple):
    """Blocks that are held at some moments from now on, in expectation, and the variance."""

    mean: np.ndarray  # float64[MOMENTS]
    variance: np.ndarray

    def plus(self, other: Demand) -> Demand:
        """That of these sequences and others together."""
        return Demand(self.mean + other.mean, self.variance + other.variance)

    @property
    def peak(self) -> float:
        """The working set: the most at any of the moments, and some to spare."""
        return float(np.max(self.mean + SPREAD * np.sqrt(self.variance)))


class OutputLengths:
    """Lengths of the latest outputs, in tokens. The same outputs give the same forecasts."""

    __slots__ = ("_latest", "_sorted")

    def __init__(self) -> None:
        self._latest: deque[int] = deque(maxlen=MEMORY)
        self._sorted: np.ndarray | None = None  # made when it is asked for

    def add(self, length: int) -> None:
        """An output of that length has ended by itself."""
        self._latest.append(length)
        self._sorted = None

    def demand(
        self, generated: np.ndarray, held: np.ndarray, most: np.ndarray, block_size: int
    ) -> Demand | None:
        """What sequences are expected to hold from now to their ends.

        A sequence grows by a token a step. An output that is longer than any that ended goes on.

        Args:
          generated: int[n], tokens of each one's output.
          held: int[n], tokens of each, its prompt included.
          most: int[n], what `held` can come to at most.
          block_size: tokens in a block; half of each last one is taken to be empty.

        Returns:
          None while too few outputs have ended to tell.
        """
        if len(self._latest) < LEAST:
            return None
        if self._sorted is None:
            self._sorted = np.sort(np.fromiter(self._latest, np.int64))
        count = len(self._sorted)
        horizon = int(self._sorted[count * 9 // 10])  # few go on for longer
        moments = (np.arange(MOMENTS) * horizon // (MOMENTS - 1))[:, None]  # steps from now
        longer_now = count - np.searchsorted(self._sorted, generated, side="right")
        there_then = count - np.searchsorted(self._sorted, generated + moments, side="left")
        alive = np.minimum(there_then / np.maximum(longer_now, 1), 1.0)
        alive = np.where(longer_now > 0, alive, 1.0)
        alive = np.where(held + moments <= most, alive, 0.0)
        blocks = (held + moments) / block_size + 0.5
        mean = np.sum(alive * blocks, axis=1)
        variance = np.sum(alive * (1 - alive) * blocks**2, axis=1)
        return Demand(mean, variance)

    def copy(self) -> OutputLengths:
        """Independent lengths in the same state."""
        other = OutputLengths()
        other._latest = self._latest.copy()
        return other


class WorkingSet:
    """Whether further sequences are expected to fit beside those that run. For one plan, and made
    only if somebody waits.

    Where all fit at their longest, nothing is forecast; else what the running ones need is worked
    out once.
    """

    def __init__(self, core: Core):
        self._core = core
        # Blocks, if all get as long as they may.
        self._longest = sum([one.block_ids.size for one in core.running])
        self._longest += sum([self._most_of_forks(one) for one in core.running if one.forks])
        self._demand: Demand | None = None  # once it is asked for
        self._next: Demand | None = None  # of the sequence that was asked about last

    def has_room_for(self, seq: Sequence) -> bool:
        """Whether the pool is expected to hold all to their ends, and this one."""
        core = self._core
        if self._longest + self._most_of(seq) <= core.pool.num_blocks - core.public.num_blocks:
            return True
        self._demand = self._demand or self._of(core.running)
        self._next = self._of([seq])
        if self._demand is None or self._next is None:
            return True
        # Blocks that several own, or will, are counted for each of them: take that off again.
        saved = sum([one.num_blocks for one in core.running]) - core.pool.counts.owned
        parents = (one for one in (*core.running, seq) if one.forks)
        saved += sum(len(one.forks) * (one.num_prompt // core.block_size) for one in parents)
        return self._demand.plus(self._next).peak - saved <= core.pool.num_blocks

    def add(self, seq: Sequence) -> None:
        """The sequence that was asked about last is about to run."""
        self._longest += self._most_of(seq)
        if self._demand is not None and self._next is not None:
            self._demand = self._demand.plus(self._next)

    def _most_of(self, seq: Sequence) -> int:
        return self._core.blocks_for(seq.max_total - 1) + self._most_of_forks(seq)

    def _most_of_forks(self, seq: Sequence) -> int:
        return len(seq.forks) * self._core.blocks_for(seq.max_total - 1)

    def _of(self, sequences: Iterable[Sequence]) -> Demand | None:
        core = self._core
        everyone = list(sequences)
        # Forks are as long as their parents so far, and grow like them.
        everyone += [fork for one in everyone if one.forks for fork in one.forks]
        held = np.array([one.num_total for one in everyone])
        num_prompt = np.array([one.num_prompt for one in everyone])
        most = np.array([one.max_total for one in everyone])
        return core.output_lengths.demand(held - num_prompt, held, most, core.block_size)
