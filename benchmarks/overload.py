"""More requests than fit: throughput, recomputation and waiting at multiples of the capacity.

Capacity is what is served when all requests come at once. Each load is the same requests as a
Poisson process, simulated (`engine.simulate`) or through an engine in this process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from engine import config_file
from engine.bench import machine
from engine.bench.drive import Driven
from engine.bench.report import BUSY_CORES
from engine.bench.workload import Item, Load
from engine.core.limits import Limits
from engine.sampling import SamplingParams
from engine.simulate.cost import DEVICES
from engine.simulate.report import figures
from engine.simulate.run import run as simulate
from engine.simulate.stream import sharegpt_like

if TYPE_CHECKING:
    from engine.bench.targets import InProcess
    from engine.frontend import Engine

SIMULATED_DEVICE = "v6e"
SIMULATED_LIMITS = Limits(
    num_blocks=1024,
    block_size=16,
    max_num_seqs=512,
    max_step_tokens=2048,
    max_model_len=2048,
    prefix_reuse=False,
)
PROMPT_TOKENS = (32, 160)  # of the real requests, uniform
MEAN_OUTPUT, MAX_OUTPUT = 32, 96  # tokens; geometric, so that nobody knows how long one gets
TABLE_WIDTH = 160
NUM_BLOCKS = 64  # of the real pool: about ten sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run at one load. Seconds are from arrival to the first token.

    Attributes:
      load: requests a second over the capacity; None: all at once, which is how that is found.
      rate: requests a second; None: all at once.
      recomputed_tokens: positions computed again after a preemption.
      recompute_tax: those over all positions computed.
      unfinished: requests that did not get all that they asked for.
      overtaken: the most later requests that got a first token before an earlier one did.
      held: steps in which the head of the queue waited, by reason; None where it is not counted.
      foreign_cores: load of other processes; None where there is none to fear.
    """

    load: float | None
    rate: float | None
    output_tokens_per_s: float
    requests_per_s: float
    preemptions: int
    recomputed_tokens: int
    recompute_tax: float
    unfinished: int
    wait_median_s: float
    wait_max_s: float
    overtaken: int
    held: dict[str, int] | None = None
    foreign_cores: float | None = None


def run_simulated(*, loads: Sequence[float], requests: int, seed: int, folder: Path) -> int:
    """Sweep the loads on a simulated device; print a table, write `overload-simulated.json`.

    Args:
      loads: multiples of the capacity.
      requests: of each load.
      seed: of the stream.
      folder: where the JSON goes.
    """
    everything = _simulate(None, None, requests, seed)
    capacity = everything.requests_per_s
    points = [everything]
    points += [_simulate(load, load * capacity, requests, seed) for load in loads]
    title = f"{requests:,} requests like ShareGPT's (seed {seed}); "
    title += f"{SIMULATED_LIMITS.num_blocks:,} blocks of {SIMULATED_LIMITS.block_size}; "
    title += DEVICES[SIMULATED_DEVICE].name
    return _finish("overload-simulated", title, points, folder)


def _simulate(load: float | None, rate: float | None, requests: int, seed: int) -> Point:
    stream = sharegpt_like(requests, rate=rate, seed=seed)
    outcome = simulate(stream, SIMULATED_LIMITS, DEVICES[SIMULATED_DEVICE], "paged")
    found = figures(outcome, stream.prompt_tokens)
    came = ~np.isnan(outcome.first_token_s)  # prompts beyond the context are refused
    waits = (outcome.first_token_s - outcome.arrival_s)[came]
    return Point(
        load=load,
        rate=rate,
        output_tokens_per_s=found.output_tokens_per_s,
        requests_per_s=found.finished / found.duration_s,
        preemptions=found.preemptions,
        recomputed_tokens=found.recomputed_tokens,
        recompute_tax=found.recomputed_tokens / outcome.num_computed,
        unfinished=int(came.sum()) - found.finished,
        wait_median_s=float(np.median(waits)),
        wait_max_s=float(waits.max()),
        overtaken=_overtaken(outcome.arrival_s[came], outcome.first_token_s[came]),
    )


def run_engine(
    config_path: Path,
    overrides: tuple[str, ...],
    *,
    loads: Sequence[float],
    requests: int,
    repeat: int,
    seed: int,
    folder: Path,
) -> int:
    """Sweep the loads through an engine; print a table, write `overload.json`.

    Args:
      config_path, overrides: as `octavo bench throughput` takes them; the pool is made small.
      loads: multiples of the capacity.
      requests: of each load.
      repeat: sweeps, one after the other, so that a busy minute doesn't fall on one load alone.
      seed: of the requests.
      folder: where the JSON goes.
    """
    small = ("cache.memory=null", f"cache.num_blocks={NUM_BLOCKS}", "model.max_model_len=512")
    config = config_file.load(str(config_path), (*small, *overrides))

    from engine.bench.targets import InProcess
    from engine.frontend import Engine

    engine = Engine.from_config(config)
    try:
        items = _items(engine.model_info().architecture.vocab_size, requests, seed)
        points = asyncio.run(_sweep(engine, InProcess(engine), items, loads, repeat, seed))
    finally:
        engine.close()
    title = f"{requests} requests; {config.cache.num_blocks} blocks of {config.cache.block_size}; "
    return _finish("overload", title + config_path.name, points, folder)


async def _sweep(
    engine: Engine,
    target: InProcess,
    items: Sequence[Item],
    loads: Sequence[float],
    repeat: int,
    seed: int,
) -> list[Point]:
    everything = await _measure(engine, target, items, None, None, seed)  # and warms up
    points = [await _measure(engine, target, items, None, None, seed) for _ in range(repeat)]
    capacity = statistics.median(point.requests_per_s for point in [everything, *points])
    for _ in range(repeat):
        for load in loads:
            points.append(await _measure(engine, target, items, load, load * capacity, seed))
    return points


async def _measure(
    engine: Engine,
    target: InProcess,
    items: Sequence[Item],
    load: float | None,
    rate: float | None,
    seed: int,
) -> Point:
    before = engine.stats()
    driven, _, meter = await target.run(items, Load(request_rate=rate, seed=seed))
    after = engine.stats()
    computed = after.computed_tokens - before.computed_tokens
    served = [request for request in driven.served if request.failure is None]
    # The last token of a request is never fed back.
    needed = sum(r.prompt_tokens - r.cached_tokens + r.output_tokens - 1 for r in served)
    waits = [request.arrived[0].time - request.arrival for request in served]
    held = {
        name: steps - before.held_steps.get(name, 0) for name, steps in after.held_steps.items()
    }
    throughput = sum(r.output_tokens for r in served) / driven.wall
    name = "all at once" if load is None else f"{load:g}x"
    print(f"{name}: {driven.wall:.1f} s, {throughput:.1f} output tokens/s", file=sys.stderr)
    return Point(
        load=load,
        rate=rate,
        output_tokens_per_s=throughput,
        requests_per_s=len(served) / driven.wall,
        preemptions=after.preemptions - before.preemptions,
        recomputed_tokens=computed - needed,
        recompute_tax=(computed - needed) / computed,
        unfinished=len(items) - len(served),
        wait_median_s=statistics.median(waits),
        wait_max_s=max(waits),
        overtaken=_overtaken_in(driven),
        held={name: steps for name, steps in held.items() if steps},
        foreign_cores=meter.foreign_cores,
    )


def _items(vocab_size: int, count: int, seed: int) -> list[Item]:
    """Requests whose prompts share nothing, generated greedily to their full length."""
    draw = np.random.RandomState(seed)
    items = []
    for _ in range(count):
        prompt = draw.randint(0, vocab_size, draw.randint(*PROMPT_TOKENS)).tolist()
        length = min(int(draw.geometric(1 / MEAN_OUTPUT)), MAX_OUTPUT)
        sampling = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        items.append(Item(tuple(prompt), sampling))
    return items


def _overtaken_in(driven: Driven) -> int:
    served = [request for request in driven.served if request.arrived]
    arrival = np.array([request.arrival for request in served])
    return _overtaken(arrival, np.array([request.arrived[0].time for request in served]))


def _overtaken(arrival_s: np.ndarray, first_token_s: np.ndarray) -> int:
    """The most requests that came after another one and had a token before it did."""
    first = first_token_s[np.argsort(arrival_s, kind="stable")]
    return max(int((first[index + 1 :] < when).sum()) for index, when in enumerate(first))


def _finish(name: str, title: str, points: Sequence[Point], folder: Path) -> int:
    """Print the table and write the JSON; returns 1 if a request did not finish."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        **machine.provenance(name),
        "points": points,
    }
    path = folder / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(_table(title, points))
    foreign = [point.foreign_cores for point in points if point.foreign_cores is not None]
    if foreign:
        style = "bold red" if max(foreign) > BUSY_CORES else ""
        console.print(f"foreign CPU load: up to {max(foreign):.2f} cores", style=style)
    console.print(f"wrote {path}")
    return int(any(point.unfinished for point in points))


def _table(title: str, points: Sequence[Point]) -> Table:
    """A row for each load: medians over its runs, and the worst wait of all of them."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = ("load", "requests/s", "output tokens/s", "of the best", "preemptions")
    columns += ("recomputed", "tax", "wait p50", "worst", "overtaken", "unfinished", "held back by")
    for column in columns:
        justify = "left" if column == "held back by" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    rows = list(_by_load(points))
    best = max(_median(runs, "output_tokens_per_s") for runs in rows)
    for runs in rows:
        first, rate = runs[0], _median(runs, "output_tokens_per_s")
        table.add_row(
            "all at once" if first.load is None else f"{first.load:g}x",
            "" if first.rate is None else f"{first.rate:,.2f}",
            f"{rate:,.1f}",
            f"{rate / best:.1%}",
            f"{_median(runs, 'preemptions'):,.0f}",
            f"{_median(runs, 'recomputed_tokens'):,.0f}",
            f"{_median(runs, 'recompute_tax'):.2%}",
            f"{_median(runs, 'wait_median_s'):,.2f} s",
            f"{max(run.wait_max_s for run in runs):,.2f} s",
            f"{max(run.overtaken for run in runs):,}",
            f"{sum(run.unfinished for run in runs):,}",
            ", ".join(f"{name} {steps}" for name, steps in sorted((first.held or {}).items())),
        )
    return table


def _by_load(points: Sequence[Point]) -> Iterator[list[Point]]:
    for load in dict.fromkeys(point.load for point in points):
        yield [point for point in points if point.load == load]


def _median(runs: Sequence[Point], name: str) -> float:
    values: list[Any] = [getattr(run, name) for run in runs]
    return float(statistics.median(values))
