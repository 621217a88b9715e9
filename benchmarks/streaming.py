"""What streaming over gRPC costs: equal requests through one engine, in process and over the wire.

The runs alternate, A B A B: in this process as `octavo bench throughput` sends them, and through a
server on the same engine, from a client in a process of its own. So all that differs is the way to
the reader. Where steps take a given time and compute nothing, it shows what the host can carry.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from engine import config_file
from engine.bench import machine
from engine.bench.figures import run_figures, summarise
from engine.bench.targets import InProcess
from engine.bench.workload import Item, Load, Synthetic
from engine.config import Config
from engine.frontend import Engine
from engine.serve.run import background_loop
from engine.serve.server import Server
from engine.server_config import ServerConfig

Run = dict[str, Any]  # the figures of `engine.bench`, as plain data

WAYS = ("in process", "over gRPC")
_RATE = "output_tokens_per_second"
_LOOK_SECONDS = 0.02  # between looks at how many run


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is sent.

    Attributes:
      streams: that are open at once.
      requests: in all; each is sent as an earlier one ends.
      input_len, output_len: tokens of each.
    """

    streams: int
    requests: int
    input_len: int
    output_len: int

    @property
    def synthetic(self) -> Synthetic:
        """The requests."""
        return Synthetic(
            num_requests=self.requests, input_len=self.input_len, output_len=self.output_len
        )


def run(
    config: Path,
    overrides: tuple[str, ...],
    sizes: Sizes,
    *,
    rounds: int,
    step_ms: float | None,
    folder: Path,
) -> int:
    """Measure both ways in turn; print a table and write `streaming-STREAMS.json`.

    Args:
      config, overrides: as `octavo bench throughput` takes them. A config for fewer sequences gets
        as many as there are streams.
      sizes: what is sent.
      rounds: of each way, after one that doesn't count.
      step_ms: milliseconds of a step that computes nothing; None: steps are real.
      folder: where the report goes.

    Returns:
      0, or 1 if a request failed or not all streams were open at once.
    """
    loaded = _wide_enough(config_file.load(config, overrides), sizes.streams)
    if step_ms is None:
        engine = Engine.from_config(loaded)
    else:
        from benchmarks.no_device import load

        engine = Engine(load(loaded, step_ms / 1e3))
    held = 0
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    try:
        items = sizes.synthetic.items(engine.model_info().architecture.vocab_size)
        in_process = InProcess(engine)
        with background_loop() as on_loop:
            server = Server(ServerConfig(port=0, max_concurrent=sizes.streams))
            on_loop(server.start())
            try:
                on_loop(server.set_engine(engine))
                for number in range(rounds + 1):
                    here = _here(in_process, items, sizes)
                    there, most = _there(server.address, sizes, engine)
                    held = max(held, most)
                    for way, run in zip(WAYS, (here, there), strict=True):
                        if number:
                            runs[way].append(run)
                        said = f"round {number} of {rounds}, {way}: {run[_RATE]:,.1f} tokens/s"
                        print(said, file=sys.stderr)
            finally:
                on_loop(server.stop())
    finally:
        engine.close()
    report = _report(sizes, overrides, step_ms, runs, held)
    folder.mkdir(parents=True, exist_ok=True)
    steps = "" if step_ms is None else f"-{step_ms:g}ms"
    path = folder / f"streaming-{sizes.streams}{steps}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    Console().print(_table(runs), "", _verdict(sizes, runs, held), sep="\n")
    print(f"wrote {path}", file=sys.stderr)
    failed = sum(run["failed"] for way in WAYS for run in runs[way])
    return 1 if failed or held < sizes.streams else 0


def _wide_enough(config: Config, streams: int) -> Config:
    """The config, for at least so many sequences at once."""
    scheduler, buckets = config.scheduler, config.buckets
    if scheduler.max_num_seqs >= streams:
        return config
    scheduler = dataclasses.replace(
        scheduler,
        max_num_seqs=streams,
        max_step_tokens=max(scheduler.max_step_tokens, streams),
        max_waiting=max(scheduler.max_waiting, streams),
    )

    def upto(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
        return sizes if not sizes or sizes[-1] == largest else (*sizes, largest)

    buckets = dataclasses.replace(
        buckets,
        decode_seqs=upto(buckets.decode_seqs, scheduler.max_num_seqs),
        prefill_tokens=upto(buckets.prefill_tokens, scheduler.max_step_tokens),
        prefill_seqs=upto(buckets.prefill_seqs, scheduler.max_num_seqs),
    )
    return dataclasses.replace(config, scheduler=scheduler, buckets=buckets)


def _here(target: InProcess, items: Sequence[Item], sizes: Sizes) -> Run:
    """The requests, read in this process on an event loop of their own."""
    load = Load(concurrency=sizes.streams)
    driven, engine_figures, machine_figures = asyncio.run(target.run(items, load))
    figures = run_figures(driven.served, driven.wall, engine_figures, machine_figures)
    return msgspec.to_builtins(figures)


def _there(address: str, sizes: Sizes, engine: Engine) -> tuple[Run, int]:
    """The same requests, read by a client in another process, and the most that ran at once."""
    held = 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "engine", "bench", "serve", "--no-warm-up"),
            *("--address", address, "--concurrency", str(sizes.streams)),
            *("--num-requests", str(sizes.requests), "--output", str(report)),
            *("--input-len", str(sizes.input_len), "--output-len", str(sizes.output_len)),
            *("--server-pid", str(os.getpid())),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as client:
            while client.poll() is None:
                held = max(held, engine.stats().running)
                time.sleep(_LOOK_SECONDS)
            assert client.stdout is not None
            said = client.stdout.read().decode()
        if not report.exists() or not report.stat().st_size:
            raise ValueError(f"the client failed: {said.strip()}")
        return msgspec.json.decode(report.read_bytes())["runs"][0], held


def _ratios(runs: Mapping[str, Sequence[Run]]) -> list[float]:
    """Tokens a second over gRPC over those in process, of each round."""
    here, there = ([run[_RATE] for run in runs[way]] for way in WAYS)
    return [over / within for within, over in zip(here, there, strict=True)]


def _report(
    sizes: Sizes,
    overrides: tuple[str, ...],
    step_ms: float | None,
    runs: Mapping[str, Sequence[Run]],
    held: int,
) -> dict[str, Any]:
    return {
        **machine.provenance("streaming", machine.jax_device() if step_ms is None else None),
        "sizes": sizes,
        "step_ms": step_ms,
        "overrides": overrides,
        "streams_held": held,
        "ratios": _ratios(runs),
        "summary": {way: summarise(runs[way]) for way in WAYS},
        "runs": runs,
    }


def _table(runs: Mapping[str, Sequence[Run]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("medians", no_wrap=True)
    for way in WAYS:
        table.add_column(way, justify="right", no_wrap=True)
    summary = {way: summarise(runs[way]) for way in WAYS}
    rates = [summary[way][_RATE] for way in WAYS]
    table.add_row("output tokens/s", *(f"{rate.median:,.1f}" for rate in rates))
    table.add_row("from, to", *(f"{rate.min:,.1f}, {rate.max:,.1f}" for rate in rates))
    for label, name in (("time to first token", "ttft"), ("between tokens", "itl")):
        for column in ("p50", "p90", "p99"):
            values = [summary[way][f"{name}_seconds.{column}"].median for way in WAYS]
            table.add_row(f"{label}, {column}, ms", *(f"{1e3 * v:,.2f}" for v in values))
    costs = [statistics.median(map(_cpu_ms, runs[way])) for way in WAYS]
    table.add_row("CPU time a token, ms", *(f"{cost:,.3f}" for cost in costs))
    for label, name in (("own", "own_cores"), ("foreign", "foreign_cores")):
        loads = [summary[way].get(f"machine.{name}") for way in WAYS]
        table.add_row(f"{label} CPU load, cores", *(f"{x.median:.2f}" if x else "-" for x in loads))
    return table


def _cpu_ms(run: Run) -> float:
    """CPU time of engine and client for each token; other work on the machine moves it little."""
    cores = run["machine"]["own_cores"] or math.nan
    return 1e3 * cores * run["wall_seconds"] / run["output_tokens"]


def _verdict(sizes: Sizes, runs: Mapping[str, Sequence[Run]], held: int) -> str:
    ratios = _ratios(runs)
    return (
        f"over gRPC come {statistics.median(ratios):.1%} of the tokens/s in process (by round: "
        f"{min(ratios):.1%} to {max(ratios):.1%}); {held} of {sizes.streams} streams ran at once"
    )
