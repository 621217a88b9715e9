"""What the pool holds at one moment, place by place.

A *place* is the room for one token's keys and values in some block. Every place of the pool is
counted as exactly one thing.
"""

from __future__ import annotations

from typing import NamedTuple

from engine.core.contiguous import ContiguousPool
from engine.core.core import Core


class Sample(NamedTuple):
    """One moment, when a step has been planned and runs. The places add up to the pool's.

    Attributes:
      time_s: simulated seconds.
      running, waiting: sequences with blocks; requests without, that have arrived.
      held: places of tokens that are in the cache, or that this step writes.
      coming: of prompt tokens that later steps compute, as the step's budget was too small.
      reserved: that the request owns for tokens it will generate.
      never_used: that it owns, and will have left empty when it ends.
      cached: in blocks that nobody owns and that can be matched.
      unusable: in free blocks, while a request waits that needs a longer run of them.
      free: in other free blocks.
      widest_gap: the most places in which one sequence has no token yet.
    """

    time_s: float
    running: int
    waiting: int
    held: int
    coming: int
    reserved: int
    never_used: int
    cached: int
    unusable: int
    free: int
    widest_gap: int

    @property
    def owned(self) -> int:
        """Places in blocks of running sequences."""
        return self.held + self.coming + self.reserved + self.never_used


def take_sample(core: Core, time_s: float, num_waiting: int) -> Sample:
    """Count the pool's places. Requests carry the position of their last token as their seed."""
    held = coming = reserved = never_used = widest_gap = 0
    for seq in core.running:
        written = seq.num_computed
        known = max(written, len(seq.token_ids))
        gap = seq.num_blocks * core.block_size - known
        will_write = max(0, seq.num_prompt + seq.request.seed - known)  # the last is not fed back
        held += written
        coming += known - written
        reserved += min(gap, will_write)
        never_used += max(0, gap - will_write)
        widest_gap = max(widest_gap, gap)
    counts = core.pool.counts
    free = counts.free * core.block_size
    unusable = free if _cannot_start_next(core) else 0
    return Sample(
        time_s,
        len(core.running),
        num_waiting,
        held,
        coming,
        reserved,
        never_used,
        counts.cached * core.block_size,
        unusable,
        free - unusable,
        widest_gap,
    )


def _cannot_start_next(core: Core) -> bool:
    """Whether the next request waits for a slab alone: nothing overtakes it."""
    head = core.waiting.first()
    if head is None or not core.free_slots or not isinstance(core.pool, ContiguousPool):
        return False
    return core.blocks_for(head.max_total - 1) > core.pool.largest_free_run
