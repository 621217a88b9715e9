"""How many blocks the running sequences will come to need: what admission must leave room for.

No sequence says how long it will get, but the lengths of those that ended are known. From them
follows how likely each is still there after so many more steps, and so what all of them hold then:
the working set is the most of that (the idea of Gong et al., "Past-Future Scheduler for LLM Serving
under SLA Guarantees", 2025; here with expectations instead of samples, so that it replays).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from engine.core.core import Core
    from engine.core.sequences import Sequence

MEMORY = 512  # outputs that are remembered
LEAST = 16  # below so many, nothing is forecast
MOMENTS = 16  # how many moments from now on are looked at
SPREAD = 2.0  # standard deviations above the mean that are kept free


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

    def working_set(
        self, generated: np.ndarray, held: np.ndarray, most: np.ndarray, block_size: int
    ) -> float | None:
        """The most blocks that sequences are expected to hold at a time, from now to their ends.

        A sequence grows by a token a step. An output that is longer than any that ended goes on.

        Args:
          generated: int[n], tokens of each one's output.
          held: int[n], tokens of each, its prompt included.
          most: int[n], what `held` can come to at most.
          block_size: tokens in a block; half of each last one is taken to be empty.

        Returns:
          Blocks, or None while too few outputs have ended to tell.
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
        return float(np.max(mean + SPREAD * np.sqrt(variance)))

    def copy(self) -> OutputLengths:
        """Independent lengths in the same state."""
        other = OutputLengths()
        other._latest = self._latest.copy()
        return other


def fits_with_all(core: Core, seq: Sequence) -> bool:
    """Whether the pool is expected to hold the running sequences to their ends, and this one."""
    everyone = [*core.running, seq]
    forks = [fork for one in everyone for fork in one.forks]
    everyone += forks  # as long as their parents so far, and growing like them
    lengths = np.array([(one.num_total, one.num_prompt, one.max_total) for one in everyone]).T
    held, num_prompt, most = lengths
    blocks = core.output_lengths.working_set(held - num_prompt, held, most, core.block_size)
    if blocks is None:
        return True
    # Blocks that several own, or will, are counted for each of them: take that off again.
    saved = sum(one.num_blocks for one in core.running) - core.pool.counts.owned
    saved += sum(fork.num_prompt // core.block_size for fork in forks)
    return blocks - saved <= core.pool.num_blocks
