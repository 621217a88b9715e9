"""Everything that a scheduler state holds: pool, tiers, sequences, slots and queue, put together.

Mutable, and owned by one `SchedulerState`; the policy is in `planning`.
"""

from __future__ import annotations

import bisect
import heapq
from typing import Literal

from engine.core.block_pool import BlockPool
from engine.core.contiguous import ContiguousPool
from engine.core.forecast import OutputLengths
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
      output_lengths: of sequences that ended by themselves.
      holding: why the head of the queue still waited when the last step was planned.
      in_flight: the numbers of the plans with rows that are not committed, oldest first.
      arrivals: requests admitted so far.
    """

    __slots__ = (
        "arrivals",
        "block_size",
        "fingerprint",
        "free_slots",
        "holding",
        "host",
        "in_flight",
        "max_preemptions",
        "num_slots",
        "output_lengths",
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
        self.output_lengths = OutputLengths()
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
        return len(self.free_slots) - sum(len(seq.forks) for seq in self.running)

    def add(self, request: Request, max_total: int) -> None:
        """Queue a new request, whose prompt and output have at most `max_total` tokens."""
        seq = self._new(request, max_total)
        if request.is_public:
            seq.extend_keys(seq.num_prompt // self.block_size, self.block_size, self.fingerprint)
            self.public.keys.update(seq.keys)
        seq.forks = [self._new(request.fork(fork), max_total) for fork in request.forks]
        for fork in seq.forks:
            fork.parent = seq
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
        seq.start(heapq.heappop(self.free_slots), [*shared, *fresh], capacity)
        seq.num_blocks_named = len(shared)
        seq.set_cached((len(shared) + num_restored) * self.block_size)
        bisect.insort(self.running, seq, key=_rank)
        return fresh[:num_restored]

    def part(self, seq: Sequence) -> list[Sequence]:
        """Start the forks of a sequence whose prompt is computed, on its blocks; return them."""
        forks, seq.forks = seq.forks, []
        blocks = seq.owned_blocks()[: self.blocks_for(seq.num_computed)]
        for fork in forks:
            fork.parent = None
            self.pool.share(blocks)
            capacity = self.blocks_for(fork.max_total - 1)
            fork.part_from(seq, blocks, heapq.heappop(self.free_slots), capacity)
            bisect.insort(self.running, fork, key=_rank)
        return forks

    def pin(self, seq: Sequence) -> None:
        """A public prefix is computed: its sequence ends, and its blocks stay."""
        self.public.pin(seq.request, seq.keys[: seq.num_prompt // self.block_size], self.pool)
        self.remove(seq)

    def unpin(self) -> None:
        """The public prefixes are lost: queue them to be computed again."""
        for request in self.public.unpin(self.pool):
            self.add(request, len(request.prompt_ids) + request.max_tokens)

    def blocks_to_start(self, seq: Sequence) -> int:
        """How many blocks a waiting sequence starts with, those that are found included."""
        capacity = self.blocks_for(seq.max_total - 1)
        if self.is_protected(seq):
            return capacity
        return self.pool.blocks_to_start(self.blocks_for(len(seq.token_ids)), capacity)

    def is_protected(self, seq: Sequence) -> bool:
        """Whether it was preempted so often that it must not be again."""
        return seq.num_preemptions >= self.max_preemptions

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def preempt(self, seq: Sequence) -> None:
        """Take blocks and slot from a running sequence and queue it again, at its rank."""
        seq.num_preemptions += 1
        self._stop(seq)
        self.waiting.add(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, running or waiting, and return what it holds.

        The first of those that wait with it takes its place in the queue.
        """
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

    def copy(self) -> Core:
        """An independent core in the same state. O(pool)."""
        other = object.__new__(Core)
        other.block_size = self.block_size
        other.fingerprint = self.fingerprint
        other.max_preemptions = self.max_preemptions
        other.output_lengths = self.output_lengths.copy()
        other.holding = self.holding
        other.pool = self.pool.copy()
        other.host = self.host.copy()
        other.public = self.public.copy()
        other.sequences = {key: seq.copy() for key, seq in self.sequences.items()}
        for seq in other.sequences.values():
            seq.forks = [other.sequences[fork.request.request_id] for fork in seq.forks]
            if seq.parent is not None:
                seq.parent = other.sequences[seq.parent.request.request_id]
        other.running = [other.sequences[seq.request.request_id] for seq in self.running]
        other.waiting = WaitingQueue(
            other.sequences[seq.request.request_id] for seq in self.waiting.in_order()
        )
        other.num_slots = self.num_slots
        other.free_slots = self.free_slots.copy()
        other.step = self.step
        other.in_flight = self.in_flight.copy()
        other.arrivals = self.arrivals
        return other

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        heapq.heappush(self.free_slots, seq.slot)
        self.pool.release(seq.owned_blocks(), erase=seq.tag.time_to_live > 0)
        seq.clear_cache()


def _rank(seq: Sequence) -> tuple[int, int]:
    return seq.rank
