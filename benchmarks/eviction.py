"""Which cached blocks to evict: hits of several orders on simulated chats, beside the optimum.

The scheduler runs once on each stream and pool, with its own order; what it did is then replayed
under the others, with a second, simpler model of the pool that shares nothing with the engine's.
So all of them, the optimum too, answer the same requests at the same times.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.eviction_orders import ORDERS, Block
from benchmarks.eviction_replay import (
    BLOCK_SIZE,
    End,
    Event,
    Fill,
    Recorder,
    Replay,
    blocks_of,
    optimum,
)
from engine.bench import machine
from engine.core.limits import Limits
from engine.simulate.cost import DEVICES
from engine.simulate.report import figures
from engine.simulate.run import run as simulate
from engine.simulate.stream import LAST_TURN, NO_SYSTEM, Stream, SystemPrompts, sharegpt_like

RATE, TURNS, THINK_S = 5.0, 3.4, 20.0
POOLS = (0.3, 0.6, 1.0)  # over the working set
MOST_BLOCKS = 1_000_000  # of a pool that evicts nothing


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
