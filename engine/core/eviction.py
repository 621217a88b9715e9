"""The order in which cached blocks are evicted: the least recently released goes first.

On chats it is as good as any that was tried; where most prompts come once, ARC is better
(docs/benchmarks/2026-11-23-eviction.md).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class EvictionOrder:
    """Blocks that nobody owns and that may be matched, the next to go first. O(1) a block.

    Of one sequence the pool adds the last block first. So a block leaves after those that follow
    it, without which they can't be matched.
    """

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def __iter__(self) -> Iterator[int]:
        """In the order of eviction."""
        return iter(self._blocks)

    def add(self, block: int) -> None:
        """Take in a block that its last owner has released."""
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        """Take out a block that is here: it was matched."""
        del self._blocks[block]

    def pop(self) -> int:
        """Take out the block that is evicted next."""
        return self._blocks.popitem(last=False)[0]

    def clear(self) -> None:
        """Take out all."""
        self._blocks.clear()

    def copy(self) -> EvictionOrder:
        """An independent order in the same state. O(blocks)."""
        other = EvictionOrder()
        other._blocks = self._blocks.copy()
        return other
