"""Which blocks lie in host memory, by key: the tier below the pool.

It is a cache of copies: a block that the pool evicts is put here, and comes back by a transfer
where it would have been computed again. Nothing here moves a byte; plans say what the runner must.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engine.core.block_pool import Evicted
from engine.core.expiries import Expiries
from engine.core.retention import Tag
from engine.types import Domain, StepPlan, SwapOut

NO_BLOCK = -1


class _Entry(NamedTuple):
    slot: int
    step: int  # whose plan put it here
    tag: Tag
    expires: int  # milliseconds on the pool's clock; 0: never


class HostTier:
    """Mutable book-keeping of `num_slots` places for blocks; every operation is O(1) a block,
    but for one that expires: O(log slots).

    The least recently put or found entry gives way. An entry stays when its block goes back to
    the pool, so that evicting that one again moves nothing.
    """

    __slots__ = ("_entries", "_erased", "_expiries", "_free", "num_slots")

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # in order of eviction
        self._erased: list[int] = []
        self._expiries: Expiries[bytes] = Expiries()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def put(self, evicted: Evicted, step: int) -> int | None:
        """A slot for what was evicted, to be filled by the plan of that step.

        None if it is here already, or if there are no slots at all.
        """
        if not self.num_slots:
            return None
        _, key, tag, expires = evicted
        if expires:
            self._expiries.tidy(len(self._entries), self._times)
            self._expiries.add(expires, key)
        old = self._entries.get(key)
        if old is not None:
            self._entries[key] = old._replace(expires=expires)
            self._entries.move_to_end(key)
            return None
        if self._free:
            slot = self._free.pop()
        else:
            _, victim = self._entries.popitem(last=False)
            slot = victim.slot
            if victim.expires:
                self._erased.append(slot)  # before it is filled
        self._entries[key] = _Entry(slot, step, tag, expires)
        return slot

    def take_in(self, gone: Iterable[Evicted], step: int) -> Iterator[SwapOut]:
        """Put what the plan of that step evicted, with what must be copied for it."""
        for evicted in gone:
            slot = self.put(evicted, step)
            if slot is not None:
                yield SwapOut(evicted.block, slot, evicted.key, evicted.expires, evicted.tag.domain)

    def restore(self, key: bytes, tag: Tag, expires: int, step: int) -> int | None:
        """A slot for a block that came from below, to be filled before the plan of that step.

        If it is to be erased, that must have been done by then (`take_erased`), and not later.
        """
        return self.put(Evicted(NO_BLOCK, key, tag, expires), step)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The slots of the longest prefix of `keys` that is here."""
        slots = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                break
            slots.append(entry.slot)
        for key in reversed(keys[: len(slots)]):  # the end gives way before the beginning
            self._entries.move_to_end(key)
        return slots

    def undo(self, plans: Sequence[StepPlan]) -> None:
        """Drop what these latest plans put here: they failed. What they were to erase still is."""
        steps = {plan.step for plan in plans}
        self._drop_all(lambda entry: entry.step in steps)
        free = set(self._free)
        for plan in plans:  # unless something was restored there since, which was erased before
            self._erased += [slot for slot in plan.erased_slots if slot in free]

    def expire(self, now: int) -> None:
        """Drop what must not be kept any longer. O(what is due)."""
        for expires, key in self._expiries.due(now):
            if key in self._entries and self._entries[key].expires == expires:
                self._drop(key)

    @property
    def next_expiry(self) -> int | None:
        """When `expire` may have something to do, or None."""
        return self._expiries.next

    def flush(self, domain: Domain | None) -> None:
        """Drop what a domain left, or with None all but what is public. O(slots)."""
        self._drop_all(
            lambda entry: entry.tag.domain is not None and domain in (None, entry.tag.domain)
        )

    def forget_all(self) -> None:
        """Drop everything, what is public too. O(slots)."""
        self._drop_all(lambda entry: True)

    def entries(self) -> list[tuple[bytes, int, Tag, int]]:
        """Key, slot, tag and expiry of each, most recently used first."""
        return [
            (key, entry.slot, entry.tag, entry.expires)
            for key, entry in reversed(self._entries.items())
        ]

    def take_erased(self) -> list[int]:
        """Slots that were given up since the last call; they may be in use again."""
        erased, self._erased = self._erased, []
        return erased

    @property
    def has_erased(self) -> bool:
        """Whether slots wait to be erased."""
        return bool(self._erased)

    def _drop(self, key: bytes) -> None:
        slot = self._entries.pop(key).slot
        self._free.append(slot)
        self._erased.append(slot)

    def _drop_all(self, is_over: Callable[[_Entry], bool]) -> None:
        for key in [key for key, entry in self._entries.items() if is_over(entry)]:
            self._drop(key)

    def _times(self) -> Iterator[tuple[int, bytes]]:
        return ((entry.expires, key) for key, entry in self._entries.items() if entry.expires)

    def used_slots(self) -> np.ndarray:
        """int32[H], rising: the slots that hold a block. O(slots), without a loop over them."""
        is_used = np.ones(self.num_slots, bool)
        is_used[self._free] = False
        return np.flatnonzero(is_used).astype(np.int32)

    def copy(self) -> HostTier:
        """An independent tier in the same state. O(slots)."""
        other = HostTier(0)
        other.num_slots = self.num_slots
        other._free = self._free.copy()
        other._entries = self._entries.copy()
        other._erased = self._erased.copy()
        other._expiries = self._expiries.copy()
        return other

    def check(self) -> None:
        """Assert that every slot is free or holds one entry. For tests."""
        used = [entry.slot for entry in self._entries.values()]
        assert sorted(used + self._free) == list(range(self.num_slots)), "a host slot is lost"
