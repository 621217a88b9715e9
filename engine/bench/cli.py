"""`octavo bench`: throughput, latency and a running server, on a workload or on random tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from engine.connect_options import ConnectOptions
from engine.progress import ProgressBar

_CONNECT = ConnectOptions()

bench = cyclopts.App(name="bench", help="Measure an engine or a server.")

ConfigPath = Annotated[Path, Parameter(name=["--config", "-c"])]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="key=value that replaces the config's, dotted."),
]


@cyclopts.Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What to send, how often, and where the report goes.

    Attributes:
      workload: JSON lines as `octavo generate` takes them; without it, random tokens.
      num_requests: how many requests of random tokens; 64 unless given.
      input_len: tokens of each random prompt; 256 unless given.
      output_len: tokens of each of their answers; 128 unless given.
      shared_prefix: how many of a random prompt's tokens are the same in all; 0 unless given.
      seed: of random tokens and arrivals.
      repeat: runs that count; medians are shown.
      warm_up: whether a run that doesn't count comes first.
      output: file for the report in JSON.
    """

    workload: Path | None = None
    num_requests: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    shared_prefix: int | None = None
    seed: int | None = None
    repeat: int = 1
    warm_up: bool = True
    output: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """As the functions of `engine.bench` take them."""
        from engine.bench import Synthetic, WorkloadError

        names = ("num_requests", "input_len", "output_len", "shared_prefix", "seed")
        given = {name: getattr(self, name) for name in names}
        drawn = {name: value for name, value in given.items() if value is not None}
        if self.workload is not None and drawn:
            option = min(drawn).replace("_", "-")
            raise WorkloadError(f"--{option} is for random tokens; leave it out with --workload")
        return {
            "workload": self.workload,
            "synthetic": None if self.workload else Synthetic(**drawn),
            "repeat": self.repeat,
            "warm_up": self.warm_up,
            "output": self.output,
        }


@bench.command
def throughput(
    workload: Workload = Workload(), *, config: ConfigPath, set_: Overrides = None
) -> int:
    """Send all requests at once to an engine in this process.

    Args:
      config: a YAML file; see configs/.
    """
    from engine import bench

    with ProgressBar() as progress:
        return bench.throughput(
            config, overrides=set_ or (), progress=progress, **workload.arguments()
        )


@bench.command
def latency(
    workload: Workload = Workload(),
    *,
    config: ConfigPath,
    set_: Overrides = None,
    concurrency: int | None = None,
    request_rate: float | None = None,
) -> int:
    """Send requests one after the other to an engine in this process.

    Args:
      config: a YAML file; see configs/.
      concurrency: requests under way at once; 1 if neither this nor a rate is given.
      request_rate: requests a second, arriving at random, instead.
    """
    from engine import bench

    with ProgressBar() as progress:
        return bench.latency(
            config,
            overrides=set_ or (),
            concurrency=concurrency,
            request_rate=request_rate,
            progress=progress,
            **workload.arguments(),
        )


@bench.command(name="serve")
def bench_serve(
    workload: Workload = Workload(),
    connect: ConnectOptions = _CONNECT,
    *,
    address: str = "127.0.0.1:50051",
    concurrency: int | None = None,
    request_rate: float | None = None,
    server_pid: int | None = None,
) -> int:
    """Send requests to a running server.

    Args:
      address: host:port of the server.
      concurrency: requests under way at once; all at once if neither this nor a rate is given.
      request_rate: requests a second, arriving at random, instead.
      server_pid: the server's process, if it runs on this machine, for its memory and CPU time.
    """
    from engine import bench

    return bench.serve(
        address,
        credentials=connect.credentials(),
        concurrency=concurrency,
        request_rate=request_rate,
        server_pid=server_pid,
        **workload.arguments(),
    )
