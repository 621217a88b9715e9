"""Octavo beside other engines on this machine: equal requests, in turn, on the same cores.

Each engine is a process of its own. One at a time runs; the others are stopped, as their threads
may spin while they wait for work. docs/comparing.md says what is compared and what isn't.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from benchmarks.engine import WORKLOADS
from benchmarks.peers import results
from benchmarks.peers.child import Child
from benchmarks.peers.engines import (
    ENGINES,
    OURS,
    PEERS,
    ROOT,
    Setting,
    missing,
    preload,
)
from benchmarks.peers.protocol import Request
from benchmarks.peers.results import Agreement, Measured, Turn
from engine import config_file
from engine.bench import machine
from engine.bench.workload import Item, WorkloadError, read_workload

_FIRST_REQUEST = Request(list(range(100, 116)), 1)

Turns = dict[str, dict[str, list[Turn]]]  # of each workload and engine, by round


def run(
    config: Path,
    overrides: tuple[str, ...],
    *,
    ours: str,
    peers: Sequence[str] | None,
    workloads: Sequence[str],
    rounds: int,
    fresh: bool,
    prefix_caching: bool,
    cores: Sequence[int] | None,
    min_agreement: float,
    venv: Path,
    folder: Path,
) -> int:
    """Measure all engines in turn; print tables and write `compare.json`.

    Args:
      config, overrides: ours, as `octavo bench throughput` takes them; its model is a GGUF file.
      ours: `in-process` or `grpc`.
      peers: names from `engines.PEERS`; None: those that are installed.
      workloads: names of files in `WORKLOADS`, or files.
      rounds: of each workload and engine, after one that doesn't count.
      fresh: start an engine anew for each of its turns.
      prefix_caching: whether requests of a round may share computed prefixes.
      cores: to run on; None: all that this process may use.
      min_agreement: the least share of a peer's answers whose first tokens are ours.
      venv: has the peers.
      folder: where the report goes.

    Returns:
      0, or 1 if answers are not what was asked for or don't agree.

    Raises:
      PeerError: an engine ended or failed.
      ConfigError, WeightsError, WorkloadError, OSError: it can't be run as given.
    """
    names = [OURS[ours], *_installed(peers, venv)]
    if rounds < 1:
        raise WorkloadError(f"--rounds is {rounds}; it must be at least 1")
    loaded = config_file.load(config, overrides)
    asked = {Path(name).stem: _requests(name) for name in workloads}
    longest = max(len(r.prompt_ids) + r.max_tokens for rs in asked.values() for r in rs)
    setting = Setting(
        config_path=config,
        overrides=overrides,
        config=loaded,
        cores=tuple(cores or sorted(os.sched_getaffinity(0))),
        prefix_caching=prefix_caching,
        longest=longest,
        venv=venv.absolute(),
        made=ROOT / "build" / "peers",
    )
    if any(name.startswith("vllm") for name in names) and (lacks := preload(setting.venv)[1]):
        _say(f"vLLM runs without {' and '.join(lacks)}, which its makers ask for: it may be slower")
    folder.mkdir(parents=True, exist_ok=True)
    engines = {name: Measured(ENGINES[name].what) for name in names}
    turns: Turns = {name: {engine: [] for engine in names} for name in asked}
    measure = _measure_fresh if fresh else _measure_paused
    measure(setting, engines, asked, rounds, turns)
    agreements = _agreements(turns, names)
    report = _report(setting, fresh, engines, asked, turns, agreements)
    path = folder / "compare.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return _show(setting, engines, turns, agreements, min_agreement, path)


def _installed(peers: Sequence[str] | None, venv: Path) -> list[str]:
    """The peers that are asked for, or all that there are."""
    if peers is None:
        lacks = {name: missing(name, venv) for name in PEERS}
        if all(lacks.values()):
            raise ValueError(f"there is nothing to compare with: `make peers` fills {venv}")
        for reason in filter(None, lacks.values()):
            _say(f"left out: {reason}")
        return [name for name in PEERS if not lacks[name]]
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"there is no peer {name!r}; known: {', '.join(PEERS)}")
        if reason := missing(name, venv):
            raise ValueError(reason)
    return list(dict.fromkeys(peers))


def _requests(name: str) -> list[Request]:
    """The requests of a named workload, or of a file."""
    named = WORKLOADS / f"{name}.jsonl"
    path = named if named.exists() else Path(name)
    if not path.exists():
        known = ", ".join(sorted(path.stem for path in WORKLOADS.glob("*.jsonl")))
        raise WorkloadError(f"there is no workload {name!r}; known: {known}, or give a file")
    return [_request(item, path) for item in read_workload(path)]


def _request(item: Item, path: Path) -> Request:
    prompt, tokens = item.prompt, item.required_tokens
    if isinstance(prompt, str) or not all(isinstance(token, int) for token in prompt):
        raise WorkloadError(f"{path}: engines are compared on prompt_ids alone")
    if tokens is None or item.sampling.temperature != 0:
        raise WorkloadError(
            f"{path}: engines are compared on greedy requests whose number of tokens is known; "
            "give temperature 0, ignore_eos and max_tokens, and no stop"
        )
    return Request([int(token) for token in prompt], tokens)  # type: ignore[arg-type]


@contextlib.contextmanager
def _started(setting: Setting, name: str, measured: Measured) -> Iterator[Child]:
    """An engine from its start to its end; the time to its first token is taken down."""
    start = ENGINES[name].start(setting)
    begin = time.monotonic()
    with Child(name, start.command, start.env, ROOT) as child:
        child.wait_until_ready()
        child.run([_FIRST_REQUEST])
        took = time.monotonic() - begin
        measured.version = child.version
        measured.startup_seconds.append(took)
        _say(f"{name}: {child.version}, {took:.1f} s to the first token")
        try:
            yield child
        finally:
            peaks = (measured.peak_rss_bytes, child.peak_rss_bytes)
            measured.peak_rss_bytes = max(filter(None, peaks), default=None)


def _measure_paused(
    setting: Setting,
    engines: dict[str, Measured],
    asked: dict[str, list[Request]],
    rounds: int,
    turns: Turns,
) -> None:
    """Start every engine once. All but the one whose turn it is are stopped."""
    with contextlib.ExitStack() as stack:
        children = {}
        for name, measured in engines.items():
            children[name] = stack.enter_context(_started(setting, name, measured))
            children[name].pause()
        for workload, requests in asked.items():
            for number in range(rounds + 1):
                for name, child in children.items():
                    child.resume()
                    done = _turn(child, requests, f"{workload}, round {number} of {rounds}")
                    child.pause()
                    if number:
                        turns[workload][name].append(done)


def _measure_fresh(
    setting: Setting,
    engines: dict[str, Measured],
    asked: dict[str, list[Request]],
    rounds: int,
    turns: Turns,
) -> None:
    """Start an engine anew for each round of a workload, of which the first doesn't count."""
    for workload, requests in asked.items():
        for number in range(1, rounds + 1):
            for name, measured in engines.items():
                with _started(setting, name, measured) as child:
                    _turn(child, requests, f"{workload}, warm-up")
                    done = _turn(child, requests, f"{workload}, round {number} of {rounds}")
                turns[workload][name].append(done)


def _turn(child: Child, requests: Sequence[Request], what: str) -> Turn:
    done = results.turn(requests, *child.run(requests))
    foreign = done.run.machine.foreign_cores
    load = "" if foreign is None else f", {foreign:.3f} cores of foreign load"
    failed = f", {done.run.failed} FAILED" if done.failures else ""
    rate = done.run.output_tokens_per_second
    _say(f"{what}, {child.name}: {rate:,.1f} output tokens/s{load}{failed}")
    return done


def _agreements(turns: Turns, names: Sequence[str]) -> dict[str, Agreement | None]:
    """Each peer's answers beside ours, of all workloads together."""
    ours, *peers = names
    return {
        peer: results.agreement(
            pair for rows in turns.values() for pair in results.pairs(rows[ours], rows[peer])
        )
        for peer in peers
    }


def _report(
    setting: Setting,
    fresh: bool,
    engines: dict[str, Measured],
    asked: dict[str, list[Request]],
    turns: Turns,
    agreements: dict[str, Agreement | None],
) -> dict[str, Any]:
    return {
        **machine.provenance("compare"),
        "cores": setting.cores,
        "prefix_caching": setting.prefix_caching,
        "fresh": fresh,
        "preloaded": preload(setting.venv)[0].replace(str(setting.venv), setting.venv.name),
        "overrides": setting.overrides,
        "config": setting.config,
        "engines": engines,
        "workloads": {
            workload: {
                "requests": len(requests),
                "engines": results.workload_report(turns[workload]),
            }
            for workload, requests in asked.items()
        },
        "agreement": {
            peer: None if agreed is None else agreed._asdict()
            for peer, agreed in agreements.items()
        },
    }


def _show(
    setting: Setting,
    engines: dict[str, Measured],
    turns: Turns,
    agreements: dict[str, Agreement | None],
    min_agreement: float,
    path: Path,
) -> int:
    """Print the tables and what is wrong with them; returns the exit code."""
    console = Console(width=max(Console().width, 200))  # a narrower table would lose figures
    cores = ", ".join(map(str, setting.cores))
    caching = "on" if setting.prefix_caching else "off"
    for workload, rows in turns.items():
        title = f"{workload}: cores {cores}, prefix caching {caching}"
        console.print(results.workload_table(title, rows, next(iter(engines))), "")
    console.print(results.engines_table(engines, agreements))
    for warning in results.warnings(turns):
        console.print(warning, style="bold yellow", markup=False)
    complaints = results.complaints(turns, agreements, min_agreement)
    for complaint in complaints:
        console.print(complaint, style="bold red", markup=False)
    _say(f"wrote {path}")
    return 1 if complaints else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
