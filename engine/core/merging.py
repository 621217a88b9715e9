"""Sharing that can't be observed: prompts are computed as if nothing were cached, then merged.

With `Limits.merge_blocks` no prompt is looked up, so a hit is no sooner, smaller or earlier in the
queue than a miss. Once a step is taken in, each block that it filled is exchanged for the one that
other running sequences hold for the same key: memory is shared all the same, a little later.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING

from engine.core.block_pool import BlockPool
from engine.core.limits import Limits
from engine.core.sequences import Sequence

if TYPE_CHECKING:
    from engine.core.core import Core


class MergingPool(BlockPool):
    """A pool that keeps no block beyond its last owner.

    Nobody would look for it, and how many blocks are cached would show what was computed before.
    """

    __slots__ = ()

    def release(self, blocks: AnySequence[int], *, erase: bool = False) -> None:
        """Give up one ownership of each block; those without an owner are free and nameless."""
        super().release(blocks, erase=erase)
        for block, expires in self._cached.items():
            self._forget_name(block)
            self.retention.free(block, erase=expires > 0)
        self._free.extend(self._cached)
        self._cached.clear()


def merge_full_blocks(core: Core, limits: Limits, seq: Sequence, num_tokens: int) -> None:
    """Take in that a step has computed a sequence's first `num_tokens` positions.

    Blocks that are full now get their names, or give way to those that have them already.

    A block that gives way may still be read by a step on its way, whose plan keeps the old table.
    It is free at once all the same: plans made from now on are the first that can have it written,
    and launches run in the order of their plans. The one that takes its place is computed, too, as
    it got its name here.
    """
    if seq.leaves_nothing:
        return
    if seq.beams is not None:  # what beams generate has no names, see `beams`
        num_tokens = min(num_tokens, seq.num_prompt)
    # Of a sequence that was preempted since, and perhaps has started over, only what it has again.
    full = min(num_tokens, seq.num_computed) // limits.block_size
    first = seq.num_blocks_named
    if full <= first:
        return
    seq.extend_keys(full, limits.block_size, limits.fingerprint)
    own: list[int] = seq.table[first:full].tolist()
    merged: list[int] = []
    for block, key in zip(own, seq.keys[first:full], strict=True):
        core.pool.name(block, key, seq.tag)  # has no effect if the key names another one
        merged += core.pool.match([key]) or [block]  # which can't be named if it was flushed
    core.pool.retention.journal.add_stored(seq, full, limits.block_size)
    seq.num_blocks_named = full
    if merged != own:
        exchanged = [pair for pair in zip(own, merged, strict=True) if pair[0] != pair[1]]
        core.pool.share([there for _, there in exchanged])
        core.pool.release([here for here, _ in exchanged], erase=seq.erases)
        seq.replace_blocks(first, merged)
