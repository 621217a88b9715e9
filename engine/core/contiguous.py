"""The naive allocator: one consecutive run of blocks a request, sized for its longest reply.

Servers kept their cache this way before paging; here it takes the place of `BlockPool` under the
same scheduler, so that `octavo simulate` compares the two on one stream of requests.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np

from engine.core.block_pool import Evicted, OutOfBlocks, PoolCounts
from engine.core.retention import PUBLIC, Retention, Tag
from engine.types import Domain


class ContiguousPool:
    """Mutable book-keeping of `num_blocks` blocks in a row, handed out as slabs.

    A slab comes from the shortest free run that holds it (best fit), the lowest one of equals, and
    on release it merges with the free runs beside it. Best fit, because it costs a binary search
    where first fit walks the runs; on ShareGPT-like lengths neither serves more than 3% more
    tokens than the other (`octavo simulate`, contexts of 2,048 and 8,192, several max_tokens). A
    slab is never shared, found again by a key, or grown: what a request may ever need is reserved
    when it starts.

    An operation costs O(log runs) and moving the tail of one short list; there is at most one free
    run more than there are slabs.
    """

    __slots__ = (
        "_num_free",
        "_run_at",
        "_run_before",
        "_runs",
        "_slabs",
        "num_blocks",
        "retention",
    )

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.retention = Retention()  # of nothing
        self._num_free = 0
        self._runs: list[tuple[int, int]] = []  # (length, first block) of free runs, sorted
        self._run_at: dict[int, int] = {}  # length of the free run that begins at a block
        self._run_before: dict[int, int] = {}  # and of the one that ends just before it
        self._slabs: dict[int, int] = {}  # length of the slab that begins at a block
        if num_blocks:
            self._free_run(0, num_blocks)

    @property
    def largest_free_run(self) -> int:
        """Blocks in the longest run that is free: no larger slab can be had now."""
        return self._runs[-1][0] if self._runs else 0

    @property
    def num_available(self) -> int:
        """Blocks that one allocation can get. More may be free, in other runs (`counts`)."""
        return self.largest_free_run

    @property
    def counts(self) -> PoolCounts:
        """Blocks by state; none is ever cached."""
        return PoolCounts(self._num_free, 0, self.num_blocks - self._num_free)

    def blocks_to_start(self, known: int, capacity: int) -> int:
        """How many blocks a sequence takes to start: all that it may ever need."""
        del known
        return capacity

    def has_room(self, count: int, growth: int) -> bool:
        """Whether a slab of `count` blocks is free. None of those that run will grow."""
        del growth
        return count <= self.largest_free_run

    def allocate(self, count: int) -> list[int]:
        """Take a slab of `count` blocks, in ascending order.

        Raises:
          OutOfBlocks: no free run is so long, whatever the runs add up to.
        """
        if count == 0:
            return []
        index = bisect.bisect_left(self._runs, (count, 0))
        if index == len(self._runs):
            raise OutOfBlocks(
                f"a run of {count} blocks asked for, but the longest of the {self._num_free} free "
                f"blocks has {self.largest_free_run}"
            )
        length, first = self._runs[index]
        self._take_run(first, length)
        if length > count:
            self._free_run(first + count, length - count)
        self._slabs[first] = count
        return list(range(first, first + count))

    def release(self, blocks: Sequence[int], *, erase: bool = False) -> None:
        """Give a whole slab back. There is nothing to erase: its contents are only simulated."""
        del erase
        if not blocks:
            return
        first, count = blocks[0], len(blocks)
        assert self._slabs.get(first) == count, f"no slab of {count} blocks begins at {first}"
        del self._slabs[first]
        before = self._run_before.get(first, 0)
        after = self._run_at.get(first + count, 0)
        if before:
            self._take_run(first - before, before)
        if after:
            self._take_run(first + count, after)
        self._free_run(first - before, before + count + after)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """No block is known by its contents."""
        del keys
        return []

    def num_cached(self, blocks: Iterable[int]) -> int:
        """None is ever cached."""
        del blocks
        return 0

    def is_shared(self, block: int) -> bool:
        """No block ever is."""
        del block
        return False

    def share(self, blocks: Sequence[int]) -> None:
        """There is nothing to share: only an empty list is taken."""
        assert not blocks, "a slab has one owner"

    def name(self, block: int, key: bytes, tag: Tag = PUBLIC) -> None:
        """Nothing: no block will be looked for."""

    def cached_blocks(self) -> np.ndarray:
        """int32[0]: no block is ever cached."""
        return np.zeros(0, np.int32)

    def take_evicted(self) -> list[Evicted]:
        """Nothing is evicted, as nothing is cached."""
        return []

    def expire(self) -> None:
        """Nothing: none is kept."""

    def flush(self, domain: Domain | None) -> None:
        """Nothing: none is kept."""

    def forget_names(self) -> None:
        """Nothing: there are none."""

    def copy(self) -> ContiguousPool:
        """An independent pool in the same state. O(runs)."""
        other = ContiguousPool(0)
        other.num_blocks = self.num_blocks
        other._num_free = self._num_free
        other._runs = self._runs.copy()
        other._run_at = self._run_at.copy()
        other._run_before = self._run_before.copy()
        other._slabs = self._slabs.copy()
        return other

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given the block lists of all owners. O(pool); for tests."""
        held = [list(blocks) for blocks in owners]
        assert {blocks[0]: len(blocks) for blocks in held} == self._slabs, "slabs differ"
        assert all(blocks == [*range(blocks[0], blocks[0] + len(blocks))] for blocks in held)
        runs = [(first, length, True) for length, first in self._runs]
        runs += [(first, length, False) for first, length in self._slabs.items()]
        end, was_free = 0, False
        for first, length, is_free in sorted(runs):
            assert first == end, f"block {min(first, end)} is lost, or owned twice"
            assert length > 0, f"the run at block {first} is empty"
            assert not (is_free and was_free), f"free runs meet at block {first}"
            end, was_free = first + length, is_free
        assert end == self.num_blocks, "the runs don't add up to the pool"
        assert self._runs == sorted(self._runs), "free runs are out of order"
        assert self._run_at == {first: length for length, first in self._runs}
        assert self._run_before == {first + length: length for length, first in self._runs}
        assert self._num_free == sum(length for length, _ in self._runs)

    def _free_run(self, first: int, length: int) -> None:
        bisect.insort(self._runs, (length, first))
        self._run_at[first] = self._run_before[first + length] = length
        self._num_free += length

    def _take_run(self, first: int, length: int) -> None:
        del self._runs[bisect.bisect_left(self._runs, (length, first))]
        del self._run_at[first], self._run_before[first + length]
        self._num_free -= length
