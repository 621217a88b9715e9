"""Chats of several turns: how much of each prompt the cache has, and when the first token comes.

A user's next prompt is all that was said so far and something new. The same chats are held with
the cache off, with a pool for all of them, with one that is too small, with a host tier below that,
and after a restart, with the disk tier and without.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from engine import config_file
from engine.bench import machine
from engine.frontend import Engine
from engine.sampling import SamplingParams

TURN_TOKENS = 32  # of what a user says
ANSWER_TOKENS = 8
CASES = ("off", "on", "small", "host")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the chats are like, and the memory of the cases that have too little or a tier."""

    users: int
    turns: int
    active: int  # users whose turn is served at once
    small: str
    host: str
    disk: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """One answer: seconds to its first token, and tokens of its prompt."""

    ttft: float
    prompt_tokens: int
    cached_tokens: int


@dataclasses.dataclass(frozen=True)
class Figures:
    """A case: what its turns but the first, or the one after a restart, were like."""

    case: str
    turns: int
    hit_rate: float
    ttft_p50: float
    ttft_p90: float
    wall_seconds: float
    swapped_in_blocks: int
    restored_blocks: int


class Chats:
    """All users' conversations so far, as token ids."""

    def __init__(self, sizes: Sizes, texts: Sequence[Sequence[int]] | None = None):
        self.sizes = sizes
        self.texts = [list(text) for text in texts or [()] * sizes.users]
        self._rng = np.random.default_rng([20261123, len(self.texts[0])])

    async def turn(self, engine: Engine) -> list[Turn]:
        """Every user says something and reads the answer; so many at once as are active."""
        places = asyncio.Semaphore(self.sizes.active)
        vocabulary = engine.model_info().architecture.vocab_size
        said = self._rng.integers(100, vocabulary, (self.sizes.users, TURN_TOKENS)).tolist()

        async def one(text: list[int], new: list[int]) -> Turn:
            text += new
            async with places:
                return await _ask(engine, text)

        return await asyncio.gather(*map(one, self.texts, said))


async def _ask(engine: Engine, text: list[int]) -> Turn:
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    begin = time.perf_counter()
    ttft, usage = 0.0, None
    prompt = tuple(text)
    async for delta in engine.generate(prompt, sampling):
        ttft = ttft or time.perf_counter() - begin
        text += delta.token_ids
        usage = delta.usage or usage
    assert usage is not None
    return Turn(ttft, usage.prompt_tokens, usage.cached_tokens)


def _options(case: str, sizes: Sizes) -> tuple[str, ...]:
    """A case's overrides of the config."""
    small = (f"cache.memory={sizes.small}",)
    host = (*small, f"cache.host_memory={sizes.host}")
    return {"off": ("cache.prefix_reuse=false",), "on": (), "small": small, "host": host}[case]


def _figures(case: str, turns: Sequence[Turn], wall: float, engine: Engine) -> Figures:
    stats = engine.stats()
    ttfts = sorted(turn.ttft for turn in turns)
    prompt = sum(turn.prompt_tokens for turn in turns)
    return Figures(
        case,
        len(turns),
        sum(turn.cached_tokens for turn in turns) / prompt,
        statistics.median(ttfts),
        ttfts[int(0.9 * (len(ttfts) - 1))],
        wall,
        stats.swapped_in_blocks,
        stats.restored_blocks,
    )


def run(
    config: Path,
    overrides: Sequence[str],
    sizes: Sizes,
    cases: Sequence[str],
    *,
    rounds: int,
    restart: bool,
    folder: Path,
) -> int:
    """Hold the chats in each case, print a table and write the JSON; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("engine.loading").setLevel(logging.INFO)
    found: list[Figures] = []
    longest = (sizes.turns + 1) * (TURN_TOKENS + ANSWER_TOKENS)  # with the turn after a restart
    fitted = (f"model.max_model_len={longest}", *overrides)  # or the small pool is refused

    def open_engine(*options: str) -> Engine:
        return Engine.from_config(config_file.load(config, (*fitted, *options)))

    def hold(name: str, engine: Engine, chats: Chats, turns: int) -> None:
        begin = time.perf_counter()
        held = [asyncio.run(chats.turn(engine)) for _ in range(turns)]
        wall = time.perf_counter() - begin
        later = held[1:] if turns > 1 else held
        found.append(_figures(name, [turn for some in later for turn in some], wall, engine))
        print(found[-1], flush=True)

    for _ in range(rounds):  # the cases in turn, so that a machine's moods meet all of them
        for case in cases:
            engine = open_engine(*_options(case, sizes))
            try:
                hold(case, engine, Chats(sizes), sizes.turns)
            finally:
                engine.close()
        if restart:
            with tempfile.TemporaryDirectory() as scratch:
                disk = (f"cache.disk_path={scratch}/blocks", f"cache.disk_size={sizes.disk}")
                chats = Chats(sizes)
                options = (*_options("host", sizes), *disk)
                engine = open_engine(*options)
                try:
                    hold("disk", engine, chats, sizes.turns)
                finally:
                    engine.close()
                for name, extra in (("restart, no disk", ()), ("restart, disk", disk)):
                    engine = open_engine(*_options("host", sizes), *extra)
                    try:
                        hold(name, engine, Chats(sizes, chats.texts), 1)
                    finally:
                        engine.close()
    _report(found, sizes, folder)
    return 0


def _report(found: Sequence[Figures], sizes: Sizes, folder: Path) -> None:
    table = Table(title=f"{sizes.users} users, {sizes.turns} turns, {sizes.active} at once")
    for column in ("case", "hit rate", "TTFT p50", "TTFT p90", "wall", "swapped in", "from disk"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in found:
        table.add_row(
            row.case,
            f"{row.hit_rate:.1%}",
            f"{row.ttft_p50 * 1e3:,.0f} ms",
            f"{row.ttft_p90 * 1e3:,.0f} ms",
            f"{row.wall_seconds:.1f} s",
            str(row.swapped_in_blocks),
            str(row.restored_blocks),
        )
    Console().print(table)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"turns-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    tree = {"hardware": machine.hardware(), "sizes": sizes, "cases": found}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(tree), indent=1))
    print(f"wrote {path}")
