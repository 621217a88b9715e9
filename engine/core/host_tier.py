"""Which blocks lie in host memory, by key: the tier below the pool.

It is a cache of copies: a block that the pool evicts is put here, and comes back by a transfer
where it would have been computed again. Nothing here moves a byte; plans say what the runner must.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class _Entry(NamedTuple):
    slot: int
    step: int  # whose plan put it here


class HostTier:
    """Mutable book-keeping of `num_slots` places for blocks; every operation is O(1) a block.

    The least recently put or found entry gives way. An entry stays when its block goes back to
    the pool, so that evicting that one again moves nothing.
    """

    __slots__ = ("_entries", "_free", "num_slots")

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # in order of eviction

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: bytes, step: int) -> int | None:
        """A slot for the block of that key, to be filled by the plan of that step.

        None if it is here already, or if there are no slots at all.
        """
        if key in self._entries:
            self._entries.move_to_end(key)
            return None
        if not self.num_slots:
            return None
        slot = self._free.pop() if self._free else self._entries.popitem(last=False)[1].slot
        self._entries[key] = _Entry(slot, step)
        return slot

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The slots of the longest prefix of `keys` that is here."""
        slots = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                break
            self._entries.move_to_end(key)
            slots.append(entry.slot)
        return slots

    def used_slots(self) -> np.ndarray:
        """int32[H], rising: the slots that hold a block. O(slots), without a loop over them."""
        is_used = np.ones(self.num_slots, bool)
        is_used[self._free] = False
        return np.flatnonzero(is_used).astype(np.int32)

    def forget_since(self, step: int) -> None:
        """Drop what the plans from `step` on put here: they failed."""
        for key in [key for key, entry in self._entries.items() if entry.step >= step]:
            self._free.append(self._entries.pop(key).slot)

    def copy(self) -> HostTier:
        """An independent tier in the same state. O(slots)."""
        other = HostTier(0)
        other.num_slots = self.num_slots
        other._free = self._free.copy()
        other._entries = self._entries.copy()
        return other

    def check(self) -> None:
        """Assert that every slot is free or holds one entry. For tests."""
        used = [entry.slot for entry in self._entries.values()]
        assert sorted(used + self._free) == list(range(self.num_slots)), "a host slot is lost"
