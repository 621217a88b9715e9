"""`octavo bench`: measure an engine in this process, or a server over gRPC.

`throughput` sends every request at once, `latency` one after the other, and `serve` goes over
the wire; each prints tables, writes JSON if asked to, and returns an exit code.
docs/benchmarks/README.md defines every figure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.bench.session import Setup, measure_engine, measure_server
from engine.bench.workload import Load, Synthetic, WorkloadError
from engine.credentials import Credentials

__all__ = ["Load", "Synthetic", "WorkloadError", "latency", "serve", "throughput"]

Progress = Callable[[str, int, int], None]


def throughput(
    config: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    workload: Path | None = None,
    synthetic: Synthetic | None = None,
    repeat: int = 1,
    warm_up: bool = True,
    output: Path | None = None,
    progress: Progress | None = None,
) -> int:
    """Send all requests at once to an engine in this process.

    Args:
      config: a YAML file.
      overrides: `dotted.key=value` strings.
      workload: JSON lines as `octavo generate` takes them; excludes `synthetic`.
      synthetic: requests to draw instead; `Synthetic()` if neither is given.
      repeat: runs that count. Each starts with a cache in which it finds nothing.
      warm_up: whether a run that doesn't count comes first.
      output: file for the report in JSON.
      progress: called with (what is being done, done, in all) while the engine is loaded.

    Returns:
      0, or 1 if any request failed or got fewer tokens than it asked for.

    Raises:
      WorkloadError, ConfigError, WeightsError, OSError: it can't be run as given.
    """
    setup = Setup("throughput", workload, synthetic, Load(), repeat, warm_up, output)
    return measure_engine(setup, os.fspath(config), tuple(overrides), progress)


def latency(
    config: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    workload: Path | None = None,
    synthetic: Synthetic | None = None,
    concurrency: int | None = None,
    request_rate: float | None = None,
    repeat: int = 1,
    warm_up: bool = True,
    output: Path | None = None,
    progress: Progress | None = None,
) -> int:
    """Send requests one after the other to an engine in this process.

    Args:
      concurrency: requests under way at once; 1 if neither this nor a rate is given.
      request_rate: requests a second, arriving as a Poisson process, instead.

    The rest is as in `throughput`.
    """
    if concurrency is None and request_rate is None:
        concurrency = 1
    load = _load(concurrency, request_rate, synthetic)
    setup = Setup("latency", workload, synthetic, load, repeat, warm_up, output)
    return measure_engine(setup, os.fspath(config), tuple(overrides), progress)


def serve(
    address: str,
    *,
    credentials: Credentials | None = None,
    workload: Path | None = None,
    synthetic: Synthetic | None = None,
    concurrency: int | None = None,
    request_rate: float | None = None,
    server_pid: int | None = None,
    repeat: int = 1,
    warm_up: bool = True,
    output: Path | None = None,
) -> int:
    """Send requests to a running server.

    Args:
      address: `host:port`.
      credentials: for servers that ask who one is.
      concurrency: requests under way at once; without it and a rate, all are sent at once.
      request_rate: requests a second, arriving as a Poisson process, instead.
      server_pid: the server's process if it runs on this machine: its memory is reported, and
        its CPU time and the client's are told from those of others.

    The rest is as in `throughput`; 1 is also returned if the server can't be reached.
    """
    load = _load(concurrency, request_rate, synthetic)
    setup = Setup("serve", workload, synthetic, load, repeat, warm_up, output)
    return measure_server(setup, address, server_pid, credentials)


def _load(concurrency: int | None, request_rate: float | None, synthetic: Synthetic | None) -> Load:
    seed = synthetic.seed if synthetic else 0
    return Load(concurrency=concurrency, request_rate=request_rate, seed=seed)
