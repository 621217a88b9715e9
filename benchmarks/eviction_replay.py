"""What a scheduler did with its blocks, and what another order of eviction would have made of it.

A pool of names with the engine's rules, which shares no code with the engine: replaying its own
order gives its own hits, and so the others can be believed.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.eviction_orders import Block, Optimum, Order
from engine.simulate.stream import Stream
from engine.types import StepPlan

BLOCK_SIZE = 16


class Start(NamedTuple):
    """A request starts, or starts again, with so many tokens known."""

    index: int
    known: int


class Grow(NamedTuple):
    """A request takes one more block."""

    index: int


class Fill(NamedTuple):
    """So many blocks of a request are full, and can be matched from now on."""

    index: int
    full: int


class End(NamedTuple):
    """A request gives its blocks back."""

    index: int


Event = Start | Grow | Fill | End


class Recorder:
    """Turns plans into events. Requests carry the position of their last token as their seed."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._running: set[int] = set()

    def __call__(self, plan: StepPlan) -> None:
        for request_id in plan.preempted:
            self._end(int(request_id))
        for row in plan.rows:
            index = int(row.request.request_id)
            if index not in self._running:
                self._running.add(index)
                known = len(row.request.prompt_ids) + row.output_position
                self.events.append(Start(index, known))
            elif row.num_tokens == 1 and row.start % BLOCK_SIZE == 0:
                self.events.append(Grow(index))
        for row in plan.rows:  # a block isn't matched within the plan that fills it
            full = (row.start + row.num_tokens) // BLOCK_SIZE
            if full > row.start // BLOCK_SIZE:
                self.events.append(Fill(int(row.request.request_id), full))
        for row in plan.rows:
            if row.samples and row.output_position == row.request.seed:
                self._end(int(row.request.request_id))

    def _end(self, index: int) -> None:
        self._running.remove(index)
        self.events.append(End(index))


class Replayed(NamedTuple):
    """Blocks of prompts that were found when requests first started, and those of the host tier
    among them; and blocks for which there was no room, as the events were another order's."""

    hits: int
    restored: int
    missing: int


class Replay:
    """A pool of names under some order, and a host tier below it (the least recently put or found
    goes first, as in the engine)."""

    def __init__(self, stream: Stream, num_blocks: int, order: Order, host_blocks: int = 0):
        self._stream = stream
        self._order = order
        self._owners: dict[Block, int] = {}
        self._free = num_blocks
        self._host: OrderedDict[Block, None] = OrderedDict()
        self._host_blocks = host_blocks
        self._named: dict[int, list[Block | None]] = {}  # None: another block has the name
        self._unnamed: dict[int, int] = {}
        self._seen: set[int] = set()
        self._missing = 0

    def run(self, events: Iterable[Event], at: Callable[[int], None] = lambda n: None) -> Replayed:
        """Replay all. `at` is told the number of each event before it is dealt with."""
        hits = restored = 0
        for number, event in enumerate(events):
            at(number)
            if isinstance(event, Start):
                found, back = self._start(*event)
                if event.index not in self._seen:
                    self._seen.add(event.index)
                    hits += found
                    restored += back
            elif isinstance(event, Grow):
                self._take(1)
                self._unnamed[event.index] += 1
            elif isinstance(event, Fill):
                self._name(*event)
            else:
                self._end(event.index)
        return Replayed(hits, restored, self._missing)

    def _start(self, index: int, known: int) -> tuple[int, int]:
        wanted = blocks_of(self._stream, index, (known - 1) // BLOCK_SIZE)
        found = _leading(wanted, lambda block: block in self._owners or block in self._order)
        restored = _leading(wanted[len(found) :], self._host.__contains__)
        for block in found:
            if block not in self._owners:
                self._order.remove(block)
            self._order.hit(block)
            self._owners[block] = self._owners.get(block, 0) + 1
        for block in restored:
            self._host.move_to_end(block)
        self._named[index] = [*found]
        self._unnamed[index] = -(-known // BLOCK_SIZE) - len(found)
        self._take(self._unnamed[index])
        self._name(index, len(found) + len(restored))
        return len(found) + len(restored), len(restored)

    def _name(self, index: int, count: int) -> None:
        named = self._named[index]
        if count <= len(named):
            return
        for block in blocks_of(self._stream, index, count)[len(named) :]:
            is_new = block not in self._owners and block not in self._order
            if is_new:
                self._owners[block] = 1
            named.append(block if is_new else None)
            self._unnamed[index] -= 1

    def _end(self, index: int) -> None:
        self._free += self._unnamed.pop(index)
        self._order.begin_release()
        for block in reversed(self._named.pop(index)):
            if block is None:
                self._free += 1
                continue
            self._owners[block] -= 1
            if not self._owners[block]:
                del self._owners[block]
                self._order.add(block)

    def _take(self, count: int) -> None:
        for _ in range(count):
            if self._free <= 0 and len(self._order):
                self._put(self._order.pop())
            else:
                self._missing += self._free <= 0
                self._free -= 1

    def _put(self, block: Block) -> None:
        if not self._host_blocks:
            return
        self._host[block] = None
        self._host.move_to_end(block)
        if len(self._host) > self._host_blocks:
            self._host.popitem(last=False)


def blocks_of(stream: Stream, index: int, count: int) -> list[Block]:
    """The names of a request's first blocks: a system prompt's, and then the conversation's."""
    whole = number = 0
    if stream.system is not None:
        whole = int(stream.system.tokens[index]) // BLOCK_SIZE
        number = int(stream.system.number[index])
    conversation = int(stream.conversation[index])
    return [
        (0, number, block) if block < whole else (1, conversation, block) for block in range(count)
    ]


def _leading(blocks: Sequence[Block], is_there: Callable[[Block], bool]) -> list[Block]:
    found = []
    for block in blocks:
        if not is_there(block):
            break
        found.append(block)
    return found


def optimum(stream: Stream, num_blocks: int, events: Sequence[Event], host_blocks: int) -> Replayed:
    """Replay with what comes known: the most hits that any order can have on these events, where
    there is no host tier."""
    uses: defaultdict[Block, list[int]] = defaultdict(list)
    for number in reversed(range(len(events))):
        event = events[number]
        if isinstance(event, Start):
            for block in blocks_of(stream, event.index, (event.known - 1) // BLOCK_SIZE):
                uses[block].append(number)
    now = 0

    def next_use(block: Block) -> float:
        numbers = uses.get(block, [])
        while numbers and numbers[-1] <= now:
            numbers.pop()
        return numbers[-1] if numbers else float("inf")

    def at(number: int) -> None:
        nonlocal now
        now = number

    replay = Replay(stream, num_blocks, Optimum(num_blocks, next_use), host_blocks)
    return replay.run(events, at)
