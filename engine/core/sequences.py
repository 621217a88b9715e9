"""The scheduler's own book-keeping: sequences, the waiting queue, and both put together.

Everything here is mutable and owned by one `SchedulerState`; the policy is in `scheduler`.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable

import numpy as np

from engine.core.block_keys import child_key, root_key
from engine.core.block_pool import BlockPool
from engine.core.host_tier import HostTier
from engine.core.limits import Limits
from engine.types import Request, TokenLogprobs

NO_SLOT = -1


class Sequence:
    """One request on its way.

    Attributes:
      rank: (priority, arrival); lower goes first, and no two are equal.
      token_ids: the prompt and the tokens generated so far, as far as the host knows them.
      num_total: tokens including those that planned steps sample but that are not known yet.
      num_computed: positions whose keys and values are in the cache or planned to be.
      max_total: prompt and output at their longest.
      first_step: the first plan it may be in; an earlier one with its id is another's.
      slot: row of the device state while running, else NO_SLOT.
      block_ids: int32[capacity], read-only; the first num_blocks entries hold positions 0
        onwards. Filled entries never change, so plans keep views of it.
      keys: of the blocks whose tokens are known, as far as they were needed.
      num_blocks_named: blocks that others may match.
      shares_tail: the last block may be another's too, and must not be written to if it is.
      num_cached_tokens: prompt tokens found in the cache when the request first ran.
      prompt_logprobs: of the prompt tokens after the first, as far as computed.
      forks: sequences that part from this one where its prompt ends; they wait with it.
      parent: the one that this one waits with, or None.
    """

    __slots__ = (
        "block_ids",
        "first_step",
        "forks",
        "has_state",
        "keys",
        "max_total",
        "num_blocks",
        "num_blocks_named",
        "num_cached_tokens",
        "num_computed",
        "num_prompt",
        "num_total",
        "parent",
        "prompt_logprobs",
        "rank",
        "request",
        "shares_tail",
        "slot",
        "token_ids",
        "was_started",
    )

    def __init__(self, request: Request, rank: tuple[int, int], max_total: int, first_step: int):
        self.request = request
        self.rank = rank
        self.max_total = max_total
        self.first_step = first_step
        self.token_ids = list(request.prompt_ids)
        self.num_prompt = len(request.prompt_ids)
        self.num_total = self.num_prompt
        self.num_cached_tokens = 0
        self.keys: list[bytes] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.was_started = False
        self.forks: list[Sequence] = []
        self.parent: Sequence | None = None
        self.clear_cache()

    def clear_cache(self) -> None:
        """Forget blocks and slot, as before the first start. The caller has released them."""
        self.num_computed = 0
        self.slot = NO_SLOT
        self.has_state = False
        self.block_ids = np.zeros(0, np.int32)
        self.num_blocks = 0
        self.num_blocks_named = 0
        self.shares_tail = False

    @property
    def num_pending(self) -> int:
        """Tokens that planned steps sample and that are not known yet."""
        return self.num_total - len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that no step has computed or is planned to compute."""
        return self.num_total - self.num_computed

    @property
    def tail(self) -> int:
        """The block that holds the last positions."""
        return int(self.block_ids[self.num_blocks - 1])

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every prompt position must be computed, for its log-probabilities.

        They are complete with the first token. Their values must not decide: a plan depends on
        tokens alone, as a replay has nothing else.
        """
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and len(self.token_ids) == self.num_prompt

    def start(self, slot: int, blocks: list[int], capacity: int) -> None:
        """Run with these blocks, of `capacity` that it can come to need."""
        self.slot = slot
        self.block_ids = np.zeros(capacity, np.int32)
        self.append_blocks(blocks)

    def set_cached(self, num_tokens: int) -> None:
        """The first positions need not be computed: their blocks were found."""
        self.num_computed = num_tokens
        if not self.was_started:
            self.was_started = True
            self.num_cached_tokens = num_tokens

    def part_from(self, parent: Sequence, slot: int, capacity: int) -> None:
        """Run from where another sequence with the same tokens is, on the same blocks."""
        self.start(slot, parent.owned_blocks(), capacity)
        self.num_blocks_named = parent.num_blocks_named
        self.num_computed = parent.num_computed
        self.keys = parent.keys.copy()
        self.num_cached_tokens = parent.num_cached_tokens
        self.was_started = self.shares_tail = parent.shares_tail = True

    def replace_tail(self, block: int) -> int:
        """Map the last positions to another block. Returns the one they were in."""
        old = self.tail
        self.block_ids = self.block_ids.copy()  # plans on their way keep the old one
        self.block_ids[self.num_blocks - 1] = block
        self.block_ids.setflags(write=False)
        self.shares_tail = False
        return old

    def append_blocks(self, blocks: list[int]) -> None:
        """Map the next positions to these blocks."""
        stop = self.num_blocks + len(blocks)
        self.block_ids.setflags(write=True)
        self.block_ids[self.num_blocks : stop] = blocks
        self.block_ids.setflags(write=False)
        self.num_blocks = stop

    def take_history(self) -> tuple[int, ...] | None:
        """The tokens generated so far if the slot's device state is not set yet, else None."""
        if self.has_state:
            return None
        self.has_state = True
        return tuple(self.token_ids[self.num_prompt :])

    def extend_keys(self, count: int, block_size: int, fingerprint: str) -> None:
        """Make sure that `keys` names the first `count` blocks, whose tokens are known."""
        while len(self.keys) < count:
            index = len(self.keys)
            parent = self.keys[-1] if index else root_key(self.request.domain, fingerprint)
            block = self.token_ids[index * block_size : (index + 1) * block_size]
            self.keys.append(child_key(parent, block))

    def add_prompt_logprobs(self, start: int, entries: tuple[TokenLogprobs, ...]) -> None:
        """Take in what the chunk from position `start` says; repeats are dropped."""
        known = len(self.prompt_logprobs)
        if start <= known:
            self.prompt_logprobs.extend(entries[known - start :])

    def owned_blocks(self) -> list[int]:
        """The physical blocks it holds, in order of position."""
        return self.block_ids[: self.num_blocks].tolist()

    def describe(self) -> dict[str, object]:
        """Plain data without token ids, for snapshots."""
        return {
            "request_id": self.request.request_id,
            "rank": list(self.rank),
            "slot": self.slot,
            "num_prompt": self.num_prompt,
            "num_known": len(self.token_ids),
            "num_total": self.num_total,
            "num_computed": self.num_computed,
            "blocks": self.owned_blocks(),
        }

    def copy(self) -> Sequence:
        """An independent sequence; the request is shared, as it is frozen. The caller sets
        `parent` and `forks`, which are still the old ones."""
        other = object.__new__(Sequence)
        for name in Sequence.__slots__:
            value = getattr(self, name)
            copied = value.copy() if isinstance(value, (list, np.ndarray)) else value
            setattr(other, name, copied)
        other.block_ids.setflags(write=False)
        return other


class WaitingQueue:
    """Sequences without blocks, by rank. O(log n) amortised.

    Removal leaves the rank in the heap, to be skipped later; when most of the heap is such
    leftovers it is made anew, so that requests which come and go don't fill it.
    """

    __slots__ = ("_heap", "_present")

    def __init__(self, sequences: Iterable[Sequence] = ()):
        self._present: dict[tuple[int, int], Sequence] = {}
        self._heap: list[tuple[int, int]] = []
        for seq in sequences:
            self.add(seq)

    def __len__(self) -> int:
        return len(self._present)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self._present[seq.rank] = seq
        heapq.heappush(self._heap, seq.rank)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is queued."""
        del self._present[seq.rank]
        if len(self._heap) > 2 * len(self._present) + 64:
            self._heap = sorted(self._present)

    def first(self) -> Sequence | None:
        """The lowest-ranked sequence, or None."""
        while self._heap and self._heap[0] not in self._present:
            heapq.heappop(self._heap)
        return self._present[self._heap[0]] if self._heap else None

    def in_order(self) -> list[Sequence]:
        """All of them by rank. O(n log n)."""
        return [self._present[rank] for rank in sorted(self._present)]


class Core:
    """Everything a scheduler state holds.

    Attributes:
      sequences: every one in the engine, by id.
      running: those that hold blocks, by rank.
      waiting: the others, but for those that wait with a parent.
      pool, host: the blocks, and the copies of evicted ones in host memory.
      num_slots: rows of the device state; the most sequences that can run.
      free_slots: a heap, so that the lowest slot is used first.
      step: the number of the next plan.
      in_flight: the numbers of the plans with rows that are not committed, oldest first.
      arrivals: requests admitted so far.
    """

    __slots__ = (
        "arrivals",
        "block_size",
        "free_slots",
        "host",
        "in_flight",
        "num_slots",
        "pool",
        "running",
        "sequences",
        "step",
        "waiting",
    )

    def __init__(self, limits: Limits):
        self.pool = BlockPool(limits.num_blocks)
        self.host = HostTier(limits.host_blocks)
        self.block_size = limits.block_size
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

        Args:
          seq: a waiting one.
          shared: blocks that already hold its first positions.
          num_restored: blocks after them whose contents lie in the host tier; the caller has
            them filled.

        Returns:
          Those blocks.
        """
        capacity = self.blocks_for(seq.max_total - 1)
        needed = self.pool.blocks_to_start(self.blocks_for(len(seq.token_ids)), capacity)
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
        for fork in forks:
            fork.parent = None
            self.pool.share(seq.owned_blocks())
            capacity = self.blocks_for(fork.max_total - 1)
            fork.part_from(seq, heapq.heappop(self.free_slots), capacity)
            bisect.insort(self.running, fork, key=_rank)
        return forks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def preempt(self, seq: Sequence) -> None:
        """Take blocks and slot from a running sequence and queue it again, at its rank."""
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
        other.pool = self.pool.copy()
        other.host = self.host.copy()
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

    def check(self) -> None:
        """Assert the invariants of pool, sequences and slots. O(pool); for tests."""
        self.pool.check(seq.owned_blocks() for seq in self.running)
        self.host.check()
        waiting = self.waiting.in_order()
        parents = (*self.running, *waiting)
        forks = [fork for seq in parents for fork in seq.forks]
        assert len(parents) + len(forks) == len(self.sequences), "a sequence is lost"
        assert all(fork.parent is seq for seq in parents for fork in seq.forks)
        assert all(seq.parent is None for seq in parents)
        assert [seq.rank for seq in self.running] == sorted(seq.rank for seq in self.running)
        slots = [seq.slot for seq in self.running]
        assert sorted(slots + self.free_slots) == list(range(self.num_slots)), "slots differ"
        assert self.num_unclaimed_slots >= 0, "a slot is kept for two"
        for seq in (*waiting, *forks):
            assert seq.slot == NO_SLOT
            assert seq.num_blocks == seq.num_computed == 0
        for seq in self.running:
            assert seq.slot != NO_SLOT
            assert seq.num_pending >= 0
            assert seq.num_total <= seq.max_total
            assert seq.num_blocks_named <= seq.num_blocks
            first = seq.num_computed // self.block_size  # the next step writes from here on
            for block in seq.owned_blocks()[first + seq.shares_tail :]:
                assert not self.pool.is_shared(block), "a block that will be written is shared"

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        heapq.heappush(self.free_slots, seq.slot)
        self.pool.release(seq.owned_blocks())
        seq.clear_cache()


def _rank(seq: Sequence) -> tuple[int, int]:
    return seq.rank
