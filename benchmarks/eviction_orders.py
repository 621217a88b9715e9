"""Orders in which cached blocks could be evicted: the engine's, others, and the optimum.

A block is a name (kind, owner, index): its index is how many come before it in its sequence. Of a
release the last block is added first, and none may be valued below those after it, so that every
order here evicts a block after those that follow it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Protocol

Block = tuple[int, int, int]


class Order(Protocol):
    """Blocks that nobody owns, the next to be evicted first."""

    def __len__(self) -> int: ...

    def __contains__(self, block: object) -> bool: ...

    def begin_release(self) -> None:
        """The blocks that are added until the next call are one sequence's, the last first."""

    def add(self, block: Block) -> None:
        """Its last owner has released it."""

    def remove(self, block: Block) -> None:
        """It is owned again."""

    def hit(self, block: Block) -> None:
        """It was matched, whether or not others own it."""

    def pop(self) -> Block:
        """Evict one."""
        ...


class Ranked:
    """The lowest value goes first, and of equal ones the first that was added: this one LRU."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.hits: defaultdict[Block, int] = defaultdict(int)
        self.time = 0
        self.evicted_value = 0.0
        self._least = 0.0
        self._entries: dict[Block, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Block]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: object) -> bool:
        return block in self._entries

    def value(self, block: Block) -> float:
        """The higher, the longer it stays; it is asked for when the block is added."""
        del block
        return 0.0

    def begin_release(self) -> None:
        self._least = float("-inf")

    def add(self, block: Block) -> None:
        self.time += 1
        self._least = max(self._least, self.value(block))
        self._entries[block] = entry = (self._least, self.time)
        heapq.heappush(self._heap, (*entry, block))

    def remove(self, block: Block) -> None:
        del self._entries[block]

    def hit(self, block: Block) -> None:
        self.time += 1
        self.hits[block] += 1

    def pop(self) -> Block:
        while True:
            self.evicted_value, time, block = heapq.heappop(self._heap)
            if self._entries.get(block) == (self.evicted_value, time):
                del self._entries[block]
                self.hits.pop(block, None)
                return block


class Frequent(Ranked):
    """LFU with ageing: matches since it was computed, over the value of the latest evicted
    (GreedyDual-Size-Frequency with one cost for all; Cherkasova 1998)."""

    def value(self, block: Block) -> float:
        return self.evicted_value + self.hits[block] + 1


class FrequentDeep(Ranked):
    """The same, a block worth more the deeper it lies: twice as much after 64 others, which is far
    more than attention costs there."""

    def value(self, block: Block) -> float:
        return self.evicted_value + (self.hits[block] + 1) * (1 + block[2] / 64)


class LastButOne(Ranked):
    """LRU-2 (O'Neil 1993): by the last match but one; blocks with fewer go before all others."""

    def __init__(self, num_blocks: int):
        super().__init__(num_blocks)
        self._times: defaultdict[Block, tuple[float, float]] = defaultdict(lambda: (-1.0, -1.0))

    def value(self, block: Block) -> float:
        return self._times[block][0]

    def hit(self, block: Block) -> None:
        super().hit(block)
        self._times[block] = (self._times[block][1], self.time)

    def pop(self) -> Block:
        block = super().pop()
        self._times.pop(block, None)
        return block


class Hot(Ranked):
    """LRU, but blocks with eight matches stay for a pool's worth of releases longer."""

    def value(self, block: Block) -> float:
        return self.time + self.num_blocks * (self.hits[block] >= 8)


class Segmented:
    """SLRU: blocks that were never matched go first, while those that were take up their share."""

    share = 0.25

    def __init__(self, num_blocks: int):
        del num_blocks
        self._matched: set[Block] = set()
        self._new: OrderedDict[Block, None] = OrderedDict()
        self._kept: OrderedDict[Block, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._new) + len(self._kept)

    def __contains__(self, block: object) -> bool:
        return block in self._new or block in self._kept

    def begin_release(self) -> None:
        pass

    def add(self, block: Block) -> None:
        (self._kept if block in self._matched else self._new)[block] = None
        while len(self._kept) > self.share * len(self):
            block, _ = self._kept.popitem(last=False)
            self._matched.discard(block)
            self._new[block] = None

    def remove(self, block: Block) -> None:
        del (self._new if block in self._new else self._kept)[block]

    def hit(self, block: Block) -> None:
        self._matched.add(block)

    def pop(self) -> Block:
        block, _ = (self._new or self._kept).popitem(last=False)
        self._matched.discard(block)
        return block


class SegmentedMore(Segmented):
    """The same with three quarters for those that were matched."""

    share = 0.75


class Adaptive:
    """ARC (Megiddo 2003): two lists like SLRU's; blocks that are missed soon after their eviction
    move the border between them."""

    def __init__(self, num_blocks: int):
        self._num_blocks = num_blocks
        self._border = 0.0
        self._matched: set[Block] = set()
        self._lists: tuple[OrderedDict[Block, None], ...] = (OrderedDict(), OrderedDict())
        self._gone: tuple[OrderedDict[Block, None], ...] = (OrderedDict(), OrderedDict())

    def __len__(self) -> int:
        return sum(map(len, self._lists))

    def __contains__(self, block: object) -> bool:
        return any(block in blocks for blocks in self._lists)

    def begin_release(self) -> None:
        pass

    def add(self, block: Block) -> None:
        new, kept = self._gone
        if block in new:
            self._border += max(1.0, len(kept) / len(new))
            del new[block]
            self._matched.add(block)
        elif block in kept:
            self._border -= max(1.0, len(new) / len(kept))
            del kept[block]
            self._matched.add(block)
        self._border = min(max(self._border, 0.0), self._num_blocks)
        self._lists[block in self._matched][block] = None

    def remove(self, block: Block) -> None:
        del self._lists[block in self._lists[1]][block]

    def hit(self, block: Block) -> None:
        self._matched.add(block)

    def pop(self) -> Block:
        new, kept = self._lists
        target = self._border * len(self) / self._num_blocks
        which = not (new and (len(new) > target or not kept))
        block, _ = self._lists[which].popitem(last=False)
        self._gone[which][block] = None
        if len(self._gone[which]) > self._num_blocks:
            self._gone[which].popitem(last=False)
        self._matched.discard(block)
        return block


class Optimum(Ranked):
    """Belady's: what is used next the latest goes first.

    A block is used no later than those that follow it, so this keeps to their order by itself.
    """

    def __init__(self, num_blocks: int, next_use: Callable[[Block], float]):
        super().__init__(num_blocks)
        self._next_use = next_use

    def value(self, block: Block) -> float:
        return -self._next_use(block)


ORDERS: dict[str, Callable[[int], Order]] = {
    "LRU": Ranked,
    "SLRU, 25 %": Segmented,
    "SLRU, 75 %": SegmentedMore,
    "frequency": Frequent,
    "frequency x depth": FrequentDeep,
    "LRU-2": LastButOne,
    "ARC": Adaptive,
    "8 matches stay": Hot,
}
"""By name, each a function of the pool's size. The first is the engine's."""
