"""Who owns which physical block: allocation, sharing by key, release, eviction.

A block is in exactly one of three states. *Free*: nobody's, contents meaningless. *Owned*:
held by one or more sequences (its reference count). *Cached*: held by nobody, but its key
still names its contents; it is handed out again on a match, or evicted when blocks run out,
least recently released first, or given up when its time to live is over or its domain is
flushed. A block that goes free with contents that must not stay is named for the next plan to
erase.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from engine.core.retention import PUBLIC, Retention, Tag
from engine.types import Domain


class PoolCounts(NamedTuple):
    """Blocks by state; they add up to the pool."""

    free: int
    cached: int
    owned: int


class Evicted(NamedTuple):
    """A block that was given to somebody else, and what it held: until when that may be kept, in
    milliseconds on the pool's clock, 0 without limit."""

    block: int
    key: bytes
    tag: Tag
    expires: int


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free or cached. Callers check `num_available`."""


class BlockPool:
    """Mutable book-keeping of `num_blocks` blocks; every operation is O(1) a block.

    It is owned by one `SchedulerState`, which never shows it to its callers.
    """

    __slots__ = (
        "_block_of",
        "_cached",
        "_evicted",
        "_free",
        "_key_of",
        "_ref_counts",
        "num_blocks",
        "retention",
    )

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.retention = Retention()
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes out first
        # In order of eviction, with the time when they expire, 0 if they don't.
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._evicted: list[Evicted] = []

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free ones, and cached ones by eviction."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> PoolCounts:
        """Blocks by state."""
        free, cached = len(self._free), len(self._cached)
        return PoolCounts(free, cached, self.num_blocks - free - cached)

    def blocks_to_start(self, known: int, capacity: int) -> int:
        """Blocks that a sequence starts with: `known` have tokens, of `capacity` in the end."""
        del capacity  # further blocks come one by one
        return known

    def has_room(self, count: int, growth: int) -> bool:
        """Whether `count` blocks can be allocated, and `growth` single ones after them."""
        return count + growth <= self.num_available

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each owned once, evicting cached ones if needed."""
        if count > self.num_available:
            raise OutOfBlocks(
                f"{count} blocks asked for, but only {self.num_available} are available"
            )
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix of `keys` that is present. Takes no ownership."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_cached(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are cached: sharing those makes as many fewer available."""
        return sum(block in self._cached for block in blocks)

    def is_shared(self, block: int) -> bool:
        """Whether a block has more than one owner, so that nobody may write to it."""
        return self._ref_counts[block] > 1

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each block, which must be owned or cached."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                assert block in self._cached, f"block {block} is shared, but it is free"
                del self._cached[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int], *, erase: bool = False) -> None:
        """Give up one ownership of each block. Those that go free are erased if `erase` says so.

        The last block goes first, so that of one sequence's cached blocks the end is evicted
        before the beginning: a block without its parents can't be matched.
        """
        for block in reversed(blocks):
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} was released more often than owned"
            self._ref_counts[block] = count
            if count == 0:
                if block in self._key_of:
                    self._cached[block] = self.retention.leave(block)
                else:
                    self._free.append(block)
                    self.retention.free(block, erase=erase)
        self.retention.compact(self._cached)

    def name(self, block: int, key: bytes, tag: Tag = PUBLIC) -> None:
        """Give an owned block the key of its contents, so that later requests can match it.

        If another block has the key already, that one stays the one that is matched and
        this one remains unnamed.
        """
        assert self._ref_counts[block] > 0, f"block {block} is named, but nobody owns it"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key
            self.retention.keep(block, key, tag)

    def cached_blocks(self) -> np.ndarray:
        """int32[C]: the blocks that are cached, in no order that counts."""
        return np.fromiter(self._cached, np.int32, len(self._cached))

    def take_evicted(self) -> list[Evicted]:
        """What was evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def cached(self) -> list[Evicted]:
        """What is cached, that which would be evicted last first."""
        return [
            Evicted(block, self._key_of[block], self.retention.tag_of(block), expires)
            for block, expires in reversed(self._cached.items())
        ]

    def expire(self) -> None:
        """Give up the cached blocks whose time is over."""
        for expires, block in self.retention.due():
            if self._cached.get(block) == expires:
                self._give_up(block)

    def flush(self, domain: Domain | None) -> None:
        """Forget what a domain left, or with None all but what is public. O(pool).

        Nobody finds it any more. Whoever owns blocks of it erases them (`release`).
        """
        for block in self.retention.of(domain):
            if block in self._cached:
                self._give_up(block)
            else:
                self._forget_name(block)

    def forget_names(self) -> None:
        """Drop every key: no block's contents can be matched any more, as they are lost."""
        self._block_of.clear()
        self._key_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()
        self._evicted.clear()
        self.retention.clear()

    def copy(self) -> BlockPool:
        """An independent pool in the same state. O(pool)."""
        other = type(self)(0)
        other.num_blocks = self.num_blocks
        other._ref_counts = self._ref_counts.copy()
        other._free = self._free.copy()
        other._cached = self._cached.copy()
        other._block_of = self._block_of.copy()
        other._key_of = self._key_of.copy()
        other._evicted = self._evicted.copy()
        other.retention = self.retention.copy()
        return other

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given the block lists of all owners. O(pool); for tests."""
        held = [0] * self.num_blocks
        for blocks in owners:
            assert len(set(blocks)) == len(blocks), "a sequence holds a block twice"
            for block in blocks:
                held[block] += 1
        assert held == self._ref_counts, "reference counts differ from the owners' blocks"
        free, cached = set(self._free), set(self._cached)
        owned = {block for block, count in enumerate(held) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is both free and cached"
        assert not free & owned, "a block is both free and owned"
        assert not cached & owned, "a block is both cached and owned"
        assert len(free) + len(cached) + len(owned) == self.num_blocks, "a block is lost"
        assert cached <= self._key_of.keys(), "a cached block has no key"
        assert not free & self._key_of.keys(), "a free block has a key"
        assert self._block_of == {key: block for block, key in self._key_of.items()}
        self.retention.check(set(self._key_of))

    def _evict(self) -> int:
        block, expires = self._cached.popitem(last=False)
        key, tag = self._forget_name(block)
        self._evicted.append(Evicted(block, key, tag, expires))
        self.retention.free(block, erase=expires > 0)
        return block

    def _give_up(self, block: int) -> None:
        """Free a cached block, and have it erased."""
        del self._cached[block]
        self._forget_name(block)
        self._free.append(block)
        self.retention.free(block, erase=True)

    def _forget_name(self, block: int) -> tuple[bytes, Tag]:
        key = self._key_of.pop(block)
        del self._block_of[key]
        return key, self.retention.forget(block, key)
