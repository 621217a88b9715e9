"""Which cached blocks to evict: hits of several orders on simulated chats, beside the optimum.

The scheduler runs once on each stream and pool, with its own order; what it did is then replayed
under the others, with a second, simpler model of the pool that shares nothing with the engine's.
So all of them, the optimum too, answer the same requests at the same times.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.eviction_orders import ORDERS, Block, Optimum, Order
from engine.bench import machine
from engine.core.limits import Limits
from engine.simulate.cost import DEVICES
from engine.simulate.report import figures
from engine.simulate.run import run as simulate
from engine.simulate.stream import LAST_TURN, NO_SYSTEM, Stream, SystemPrompts, sharegpt_like
from engine.types import StepPlan

BLOCK_SIZE = 16
RATE, TURNS, THINK_S = 5.0, 3.4, 20.0
POOLS = (0.3, 0.6, 1.0)  # over the working set
MOST_BLOCKS = 1_000_000  # of a pool that evicts nothing


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


def working_set(stream: Stream, events: Sequence[Event]) -> int:
    """The most blocks at a time that a request owns, or that a later one begins with."""
    first: dict[Block, int] = {}
    last: dict[Block, int] = {}
    full: defaultdict[int, int] = defaultdict(int)
    for number, event in enumerate(events):
        if isinstance(event, Fill):
            full[event.index] = event.full
            for block in blocks_of(stream, event.index, event.full):
                first.setdefault(block, number)
        elif isinstance(event, End):
            last.update(dict.fromkeys(blocks_of(stream, event.index, full[event.index]), number))
    change = np.zeros(len(events) + 1, np.int64)
    np.add.at(change, list(first.values()), 1)
    np.add.at(change, [last[block] for block in first], -1)
    return int(np.cumsum(change).max())


def streams(requests: int, seed: int) -> Iterator[tuple[str, Stream]]:
    """What is replayed: chats, alone and with what is hard on a cache."""

    def chats(count: int, rate: float, turns: float = TURNS, **options: float) -> Stream:
        return sharegpt_like(
            count,
            rate=rate,
            turns=turns,
            think_s=THINK_S,
            seed=seed,
            **options,  # type: ignore[arg-type]
        )

    half, rate = requests // 2, RATE / 2
    single = sharegpt_like(requests - half, rate=rate, seed=seed + 1)
    yield "chats", chats(requests, RATE)
    yield "half of them with system prompts", chats(requests, RATE, system_share=0.5)
    yield "chats and single requests", merge(chats(half, rate), single)
    yield (
        "the same, half with system prompts",
        merge(
            chats(half, rate, system_share=0.5),
            sharegpt_like(requests - half, rate=rate, system_share=0.5, seed=seed + 1),
        ),
    )
    yield (
        "100 long system prompts, single requests",
        chats(requests, RATE, 1.0, system_share=0.9, system_tokens=1024, num_system_prompts=100),
    )


def merge(one: Stream, other: Stream) -> Stream:
    """Both at once; they may have system prompts in common."""

    def both(name: str, shift: int = 0) -> np.ndarray:
        return np.concatenate([getattr(one, name), getattr(other, name) + shift])

    following = other.next_turn + np.where(other.next_turn == LAST_TURN, 0, len(one))
    systems = [
        stream.system
        or SystemPrompts(np.full(len(stream), NO_SYSTEM), np.zeros(len(stream), np.int64))
        for stream in (one, other)
    ]
    return Stream(
        both("arrival_s"),
        both("prompt_tokens"),
        both("output_tokens"),
        both("conversation", int(one.conversation.max()) + 1),
        np.concatenate([one.next_turn, following]),
        both("think_s"),
        SystemPrompts(*map(np.concatenate, zip(*systems, strict=True))),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Hit rates on one stream and pool: the share of prompt tokens that was not computed.

    Attributes:
      working_set: blocks; see `working_set`.
      num_blocks, host_blocks: of the pool and the tier below it.
      unlimited: where nothing is ever evicted.
      simulated: of the scheduler itself; "LRU" of `orders` replays it.
      orders: by name.
      optimum: of an order that knows what comes.
      missing: blocks that replays were short of, over all of them.
    """

    stream: str
    working_set: int
    num_blocks: int
    host_blocks: int
    unlimited: float
    simulated: float
    orders: dict[str, float]
    optimum: float
    missing: int


def record(stream: Stream, num_blocks: int, host_blocks: int = 0) -> tuple[list[Event], float, int]:
    """Run the scheduler. Returns what it did, its hit rate, and all prompt tokens."""
    limits = Limits(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=256,
        max_step_tokens=2048,
        max_model_len=8192,
        host_blocks=host_blocks,
    )
    recorder = Recorder()
    outcome = simulate(stream, limits, DEVICES["v6e"], "paged", on_plan=recorder)
    finished = ~np.isnan(outcome.finish_s)
    hit_rate = figures(outcome, stream.prompt_tokens).hit_rate
    return recorder.events, hit_rate, int(stream.prompt_tokens[finished].sum())


def measure(name: str, stream: Stream, *, host: float = 0.0) -> Iterator[Result]:
    """Every pool of a stream; `host` is the tier's size over the pool's."""
    unlimited_events, unlimited, _ = record(stream, MOST_BLOCKS)
    needed = working_set(stream, unlimited_events)
    for share in POOLS:
        num_blocks, host_blocks = int(share * needed), int(host * share * needed)
        events, simulated, tokens = record(stream, num_blocks, host_blocks)
        found = {
            order: Replay(stream, num_blocks, make(num_blocks), host_blocks).run(events)
            for order, make in ORDERS.items()
        }
        best = optimum(stream, num_blocks, events, host_blocks)
        yield Result(
            stream=name,
            working_set=needed,
            num_blocks=num_blocks,
            host_blocks=host_blocks,
            unlimited=unlimited,
            simulated=simulated,
            orders={order: one.hits * BLOCK_SIZE / tokens for order, one in found.items()},
            optimum=best.hits * BLOCK_SIZE / tokens,
            missing=sum(one.missing for one in (*found.values(), best)),
        )


def run(*, requests: int, seed: int, folder: Path) -> int:
    """Compare the orders on every stream and pool; print a table, write `eviction.json`.

    Args:
      requests: of each stream.
      seed: of the streams.
      folder: where the JSON goes.
    """
    results: list[Result] = []
    for number, (name, stream) in enumerate(streams(requests, seed)):
        results += measure(name, stream)
        if not number:
            results += measure(f"{name}, a host tier of the pool's size", stream, host=1.0)
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "schema": 1,
        "benchmark": "eviction",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": machine.command_line(),
        "git": machine.git_state(),
        "requests": requests,
        "seed": seed,
        "results": results,
    }
    path = folder / "eviction.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    console = Console()
    console.width = max(console.width, 150)
    console.print(_table(results))
    console.print(f"wrote {path}")
    return 0


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="share of prompt tokens from the cache, %", title_justify="left", box=None)
    table.add_column("stream")
    for heading in ("working set", "pool", *ORDERS, "optimum", "unlimited"):
        table.add_column(heading, justify="right")
    for result in results:
        rates = (*result.orders.values(), result.optimum, result.unlimited)
        table.add_row(
            result.stream,
            f"{result.working_set:,}",
            f"{result.num_blocks:,}",
            *(f"{100 * rate:.1f}" for rate in rates),
        )
    return table
