"""Everything that a scheduler state holds: pool, tiers, sequences, slots and queue, put together.

Mutable, and owned by one `SchedulerState`; the policy is in `planning`.
"""

from __future__ import annotations

import bisect
import heapq
from typing import Literal

from engine.core.beams import BeamGroup, most_blocks
from engine.core.block_pool import BlockPool
from engine.core.contiguous import ContiguousPool
from engine.core.forecast import Forecast
from engine.core.host_tier import HostTier
from engine.core.limits import Limits
from engine.core.merging import MergingPool
from engine.core.public import PublicPrefixes
from engine.core.sequences import NO_SLOT, Sequence, WaitingQueue
from engine.types import Request

# Why the head of the queue waits: a token that is still being computed, the step's budget, a slot,
# a block, the blocks that running sequences are expected to need, or a preemption just now.
Holding = Literal["token", "budget", "slots", "blocks", "forecast", "preemption"]


class Core:
    """Everything a scheduler state holds.

    Attributes:
      sequences: every one in the engine, by id.
      running: those that hold blocks, by rank.
      waiting: the others, but for those that wait with a parent.
      pool, host: the blocks, and the copies of evicted ones in host memory.
      public: prefixes that every domain may match.
      num_slots: rows of the device state; the most sequences that can run.
      free_slots: a heap, so that the lowest slot is used first.
      step: the number of the next plan.
      forecast: what sequences that ended tell of those that run.
      holding: why the head of the queue still waited when the last step was planned.
      in_flight: the numbers of the plans with rows that are not committed, oldest first.
      arrivals: requests admitted so far.
    """

    __slots__ = (
        "arrivals",
        "block_size",
        "fingerprint",
        "forecast",
        "free_slots",
        "holding",
        "host",
        "in_flight",
        "max_preemptions",
        "num_slots",
        "pool",
        "public",
        "running",
        "sequences",
        "step",
        "waiting",
    )

    def __init__(self, limits: Limits):
        paged = MergingPool if limits.merge_blocks else BlockPool
        self.pool = (paged if limits.allocator == "paged" else ContiguousPool)(limits.num_blocks)
        self.host = HostTier(limits.host_blocks)
        self.public = PublicPrefixes()
        self.block_size = limits.block_size
        self.fingerprint = limits.fingerprint
        self.max_preemptions = limits.max_preemptions
        self.forecast = Forecast()
        self.holding: Holding | None = None
        self.sequences: dict[str, Sequence] = {}
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue()
        self.num_slots = limits.max_num_seqs
        self.free_slots = list(range(limits.max_num_seqs))
        self.step = 0
        self.in_flight: list[int] = []
        self.arrivals = 0

    @property
    def num_unclaimed_slots(self) -> int:
        """Slots that are neither taken nor kept for the forks of running sequences."""
        return len(self.free_slots) - sum([len(seq.forks) for seq in self.running if seq.forks])

    def add(self, request: Request, max_total: int) -> None:
        """Queue a new request, whose prompt and output have at most `max_total` tokens."""
        seq = self._new(request, max_total)
        if request.is_public:
            seq.extend_keys(seq.num_prompt // self.block_size, self.block_size, self.fingerprint)
            self.public.keys.update(seq.keys)
        seq.forks = [self._new(request.fork(fork), max_total) for fork in request.forks]
        for fork in seq.forks:
            fork.parent = seq
        if request.sampling.beam_width > 1:
            BeamGroup([seq, *seq.forks])
        self.waiting.add(seq)

    def _new(self, request: Request, max_total: int) -> Sequence:
        seq = Sequence(request, (request.priority, self.arrivals), max_total, self.step)
        self.arrivals += 1
        self.sequences[request.request_id] = seq
        return seq

    def start(self, seq: Sequence, shared: list[int], num_restored: int) -> list[int]:
        """Move a waiting sequence to the running ones, with blocks for all its known tokens.

        `shared` hold its first positions already. The `num_restored` after them are returned, for
        the caller to have them filled from the host tier.
        """
        capacity = self.blocks_for(seq.max_total - 1)
        needed = self.blocks_to_start(seq)
        self.waiting.remove(seq)
        self.pool.share(shared)
        fresh = self.pool.allocate(needed - len(shared))
        blocks = [*shared, *fresh]
        if seq.beams is not None:
            num_known = self.blocks_for(len(seq.token_ids))
            blocks, seq.beams.reserve = blocks[:num_known], blocks[num_known:]
        seq.start(heapq.heappop(self.free_slots), blocks, capacity)
        seq.num_blocks_named = len(shared)
        seq.set_cached((len(shared) + num_restored) * self.block_size)
        bisect.insort(self.running, seq, key=_rank)
        return fresh[:num_restored]

    def part(self, seq: Sequence) -> list[Sequence]:
        """Start the forks of a sequence whose prompt is computed, on its blocks; return them."""
        forks = seq.forks.copy()
        for fork in forks:
            self.branch(fork, seq)
        return forks

    def branch(self, seq: Sequence, source: Sequence) -> None:
        """Have a sequence go on from where another is, on its blocks. It waits with that one, or
        runs, and then lets go of what it holds."""
        if seq.parent is not None:
            seq.parent.forks.remove(seq)
            seq.parent = None
            slot = heapq.heappop(self.free_slots)
            bisect.insort(self.running, seq, key=_rank)
        else:
            slot = seq.slot
            self.pool.release(seq.owned_blocks(), erase=seq.erases)
        blocks = source.owned_blocks()[: self.blocks_for(source.num_computed)]
        self.pool.share(blocks)
        seq.part_from(source, blocks, slot, self.blocks_for(seq.max_total - 1))

    def blocks_to_start(self, seq: Sequence) -> int:
        """How many blocks a waiting sequence starts with, those that are found included."""
        capacity = self.blocks_for(seq.max_total - 1)
        if self.is_protected(seq):
            if seq.beams is None:
                return capacity
            width = len(seq.beams.members)
            return most_blocks(seq.num_prompt, seq.max_total, width, self.block_size)
        return self.pool.blocks_to_start(self.blocks_for(len(seq.token_ids)), capacity)

    def is_protected(self, seq: Sequence) -> bool:
        """Whether it was preempted so often that it must not be again."""
        return seq.num_preemptions >= self.max_preemptions

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def preempt(self, seq: Sequence, *, counts: bool = True) -> list[str]:
        """Take blocks and slot from a running sequence and queue it again, at its rank.

        Of beams, all lose theirs and start over. Returns the ids of those that did. It `counts`
        towards what a sequence may be asked for, unless it is the device's doing.
        """
        self.forecast.demand = None
        members = [seq] if seq.beams is None else seq.beams.members
        stopped = [one for one in reversed(members) if one.slot != NO_SLOT]
        for one in members:
            one.num_preemptions += counts
        for one in stopped:
            self._stop(one)
        if seq.beams is not None:
            self.pool.release(seq.beams.reserve, erase=seq.erases)
            seq = seq.beams.restart(self.step)
        self.waiting.add(seq)
        return [one.request.request_id for one in stopped]

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, running or waiting, and return what it holds; beams go together.

        The first of those that wait with it takes its place in the queue.
        """
        if seq.beams is not None:
            self.pool.release(seq.beams.reserve, erase=seq.erases)
            for one in reversed(seq.beams.members):  # so that nobody inherits a place
                one.beams = None
                self.remove(one)
            return
        del self.sequences[seq.request.request_id]
        if seq.parent is not None:
            seq.parent.forks.remove(seq)
        elif seq.slot == NO_SLOT:
            self.waiting.remove(seq)
        else:
            self._stop(seq)
        if seq.forks:
            heir, *heir.forks = seq.forks
            for fork in heir.forks:
                fork.parent = heir
            heir.parent = None
            self.waiting.add(heir)

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        heapq.heappush(self.free_slots, seq.slot)
        self.pool.release(seq.owned_blocks(), erase=seq.erases)
        seq.clear_cache()


def _rank(seq: Sequence) -> tuple[int, int]:
    return seq.rank
