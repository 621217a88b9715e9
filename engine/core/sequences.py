"""One request on its way, as the scheduler keeps it, and the queue of those that wait.

Everything here is mutable and owned by one `SchedulerState`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

import numpy as np

from engine.core.block_keys import child_key, joined_key, public_root_key, root_key
from engine.core.retention import PUBLIC, Tag
from engine.types import Request, TokenLogprobs

if TYPE_CHECKING:
    from engine.core.beams import BeamGroup

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
      table: the view of those num_blocks entries.
      keys: of the blocks whose tokens are known, as far as they were needed.
      num_public: how many of `keys` are a public prefix's.
      tag: of the other blocks.
      leaves_nothing: its blocks get no names, and are erased when it gives them up: it is private,
        or its domain was flushed.
      num_blocks_named: blocks that others may match.
      shares_tail: the last block may be another's too, and must not be written to if it is.
      num_cached_tokens: prompt tokens found in the cache when the request first ran.
      num_preemptions: times it lost its blocks.
      prompt_logprobs: of the prompt tokens after the first, as far as computed.
      forks: sequences that part from this one where its prompt ends; they wait with it.
      parent: the one that this one waits with, or None.
      beams: the search that it is part of, or None.
    """

    __slots__ = (
        "beams",
        "block_ids",
        "first_step",
        "forks",
        "has_state",
        "keys",
        "leaves_nothing",
        "max_total",
        "num_blocks",
        "num_blocks_named",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_public",
        "num_total",
        "parent",
        "prompt_logprobs",
        "rank",
        "request",
        "shares_tail",
        "slot",
        "table",
        "tag",
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
        self.num_preemptions = 0
        self.keys: list[bytes] = []
        self.num_public = 0
        self.tag = Tag(request.domain, request.cache_ttl)
        self.leaves_nothing = request.is_private
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.was_started = False
        self.forks: list[Sequence] = []
        self.parent: Sequence | None = None
        self.beams: BeamGroup | None = None
        self.clear_cache()

    def clear_cache(self) -> None:
        """Forget blocks and slot, as before the first start. The caller has released them."""
        self.num_computed = 0
        self.slot = NO_SLOT
        self.has_state = False
        self.block_ids = self.table = np.zeros(0, np.int32)
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

    def tail(self, block_size: int) -> int:
        """The block that holds the last computed position, where that block is not full."""
        return int(self.block_ids[self.num_computed // block_size])

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
        self.num_blocks = 0
        self.append_blocks(blocks)

    def set_cached(self, num_tokens: int) -> None:
        """The first positions need not be computed: their blocks were found."""
        self.num_computed = num_tokens
        if not self.was_started:
            self.was_started = True
            self.num_cached_tokens = num_tokens

    def part_from(self, parent: Sequence, blocks: list[int], slot: int, capacity: int) -> None:
        """Run from where another sequence with the same tokens is, on its blocks so far."""
        self.start(slot, blocks, capacity)
        self.num_blocks_named = parent.num_blocks_named
        self.num_computed = parent.num_computed
        self.keys = parent.keys.copy()
        self.num_public = parent.num_public
        self.num_cached_tokens = parent.num_cached_tokens
        self.was_started = self.shares_tail = parent.shares_tail = True

    def replace_tail(self, block: int, block_size: int) -> int:
        """Map the last positions to another block. Returns the one they were in."""
        old = self.tail(block_size)
        self.replace_blocks(self.num_computed // block_size, [block])
        self.shares_tail = False
        return old

    def replace_blocks(self, first: int, blocks: list[int]) -> None:
        """Map blocks from that index on to others; plans on their way keep the old table."""
        block_ids = self.block_ids.copy()
        block_ids[first : first + len(blocks)] = blocks
        self._set_table(block_ids)

    def append_blocks(self, blocks: list[int]) -> None:
        """Map the next positions to these blocks."""
        stop = self.num_blocks + len(blocks)
        self.block_ids.setflags(write=True)
        self.block_ids[self.num_blocks : stop] = blocks
        self.num_blocks = stop
        self._set_table(self.block_ids)

    def take_history(self) -> tuple[int, ...] | None:
        """The tokens generated so far if the slot's device state is not set yet, else None."""
        if self.has_state:
            return None
        self.has_state = True
        return tuple(self.token_ids[self.num_prompt :])

    def extend_keys(
        self, count: int, block_size: int, fingerprint: str, public: Set[bytes] = frozenset()
    ) -> None:
        """Make sure that `keys` names the first `count` blocks, whose tokens are known.

        While they are in `public` they are everybody's; from there on they are its domain's.
        """
        while (index := len(self.keys)) < count:
            tokens = self.token_ids[index * block_size : (index + 1) * block_size]
            parent = self.keys[-1] if index else None
            if self.num_public == index and (public or self.request.is_public):
                key = child_key(parent or public_root_key(fingerprint), tokens)
                if self.request.is_public or key in public:
                    self.keys.append(key)
                    self.num_public += 1
                    continue
            if self.num_public == index:
                root = root_key(self.request.domain, fingerprint)
                parent = joined_key(root, parent) if parent else root
            assert parent is not None  # its first key is from its root
            self.keys.append(child_key(parent, tokens))

    @property
    def looks_nothing_up(self) -> bool:
        """Whether its prompt is computed whole, whatever is cached of it."""
        return self.needs_whole_prompt or self.request.is_private

    @property
    def erases(self) -> bool:
        """Whether the blocks that it gives up, and that nobody can find, are erased."""
        return self.leaves_nothing or self.tag.time_to_live > 0

    def tag_of(self, index: int) -> Tag:
        """Whose the contents of its block of that index are, counted from the prompt's start."""
        return PUBLIC if index < self.num_public else self.tag

    def add_prompt_logprobs(self, start: int, entries: tuple[TokenLogprobs, ...]) -> None:
        """Take in what the chunk from position `start` says; repeats are dropped."""
        known = len(self.prompt_logprobs)
        if start <= known:
            self.prompt_logprobs.extend(entries[known - start :])

    def owned_blocks(self) -> list[int]:
        """The physical blocks it holds, in order of position."""
        return self.table.tolist()

    def copy(self) -> Sequence:
        """An independent sequence; the request is shared, as it is frozen. The caller sets
        `parent`, `forks` and `beams`, which are still the old ones."""
        other = object.__new__(Sequence)
        for name in Sequence.__slots__:
            value = getattr(self, name)
            copied = value.copy() if isinstance(value, (list, np.ndarray)) else value
            setattr(other, name, copied)
        other._set_table(other.block_ids)
        return other

    def _set_table(self, block_ids: np.ndarray) -> None:
        block_ids.setflags(write=False)
        self.block_ids, self.table = block_ids, block_ids[: self.num_blocks]


class WaitingQueue:
    """Sequences without blocks, by rank. O(log n) amortised.

    Removal leaves the rank in the heap, to be skipped later; when most of the heap is such
    leftovers it is made anew, so that requests which come and go don't fill it. `num_tokens` is the
    sum of the prompts'.
    """

    __slots__ = ("_heap", "_present", "num_tokens")

    def __init__(self, sequences: Iterable[Sequence] = ()):
        self._present: dict[tuple[int, int], Sequence] = {}
        self._heap: list[tuple[int, int]] = []
        self.num_tokens = 0
        for seq in sequences:
            self.add(seq)

    def __len__(self) -> int:
        return len(self._present)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self._present[seq.rank] = seq
        self.num_tokens += seq.num_prompt
        heapq.heappush(self._heap, seq.rank)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is queued."""
        del self._present[seq.rank]
        self.num_tokens -= seq.num_prompt
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
