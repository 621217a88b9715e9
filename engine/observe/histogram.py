"""Distributions in buckets: counting costs a bisection; two readings give the time between them.

The quantiles are those of Prometheus' `histogram_quantile`, so a terminal and a dashboard agree.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


@dataclasses.dataclass(frozen=True, slots=True)
class Buckets:
    """How often values fell between bounds.

    Attributes:
      bounds: rising; bucket i holds what is above bounds[i - 1] and at most bounds[i].
      counts: of each bucket, and last of what is above all bounds.
      sum: of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def since(self, earlier: Buckets) -> Buckets:
        """What came after an earlier reading of the same histogram."""
        counts = (now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Buckets(self.bounds, tuple(counts), self.sum - earlier.sum)

    def quantile(self, share: float) -> float | None:
        """The value that a share (0 to 1) of all is at or below, linear within its bucket.

        Among values above all bounds it is the highest bound; None if there are no values.
        """
        if not self.count:
            return None
        rank = share * self.count
        upto = list(accumulate(self.counts))
        index = next(i for i, total in enumerate(upto) if total >= rank and self.counts[i])
        if index == len(self.bounds):
            return self.bounds[-1]
        below = self.bounds[index - 1] if index else 0.0
        into = (rank - upto[index] + self.counts[index]) / self.counts[index]
        return below + (self.bounds[index] - below) * into


class Histogram:
    """Counts values. Whoever writes from several threads holds a lock."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]):
        """`bounds` rise strictly."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def read(self) -> Buckets:
        """What was counted so far."""
        return Buckets(self._bounds, tuple(self._counts), self._sum)
