"""One benchmark from its options to its exit code: load or connect, warm up, run, report."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.workload import Item, Load, Synthetic, WorkloadError, read_workload
from engine.event_loop import new_event_loop

if TYPE_CHECKING:
    from engine.bench.report import Report, Subject
    from engine.bench.targets import Target
    from engine.credentials import Credentials


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """What is to be measured, and how often. The fields are those of `engine.bench`."""

    benchmark: str
    workload: Path | None
    synthetic: Synthetic | None
    load: Load
    repeat: int
    warm_up: bool
    output: Path | None

    def __post_init__(self) -> None:
        if self.workload is not None and self.synthetic is not None:
            raise WorkloadError(
                f"--workload {self.workload} says what to ask for, so --num-requests, "
                "--input-len, --output-len, --shared-prefix and --seed have no use; leave out "
                "one or the other"
            )
        if self.repeat < 1:
            raise WorkloadError(f"--repeat is {self.repeat}; it must be at least 1")

    def read(self) -> Callable[[int], tuple[Item, ...]]:
        """Find out early whether files can be read and written: a run may take long.

        Returns:
          The requests, once the size of the vocabulary is known.

        Raises:
          WorkloadError, OSError: they can't.
        """
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.open("ab").close()
        if self.workload is None:
            return (self.synthetic or Synthetic()).items
        items = read_workload(self.workload)
        return lambda _: items


def measure_engine(
    setup: Setup,
    config_path: str,
    overrides: tuple[str, ...],
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Measure an engine in this process; returns the exit code."""
    from engine import config_file

    config = config_file.load(config_path, overrides)
    make_items = setup.read()

    from engine.bench import machine
    from engine.bench.report import Subject
    from engine.bench.targets import InProcess
    from engine.frontend import Engine

    engine = Engine.from_config(config, progress=progress)
    try:
        info = engine.model_info()
        subject = Subject(
            model=info.name,
            dtype=info.dtype,
            max_model_len=info.max_model_len,
            weights_fingerprint=info.weights_fingerprint,
            config=config,
            overrides=overrides,
            device=machine.jax_device(),
        )
        items = make_items(info.architecture.vocab_size)
        report = asyncio.run(_measure(setup, items, subject, InProcess(engine)))
    finally:
        engine.close()
    return _finish(report, setup.output)


def measure_server(
    setup: Setup,
    address: str,
    server_pid: int | None = None,
    credentials: Credentials | None = None,
) -> int:
    """Measure a server; returns the exit code, which is 1 too if it can't be reached."""
    make_items = setup.read()

    from engine.client import ServiceError

    try:
        # A client on the server's machine takes from its cores, so it has the quicker loop too.
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            measured = _measure_server(setup, make_items, address, server_pid, credentials)
            report = runner.run(measured)
    except ServiceError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    return _finish(report, setup.output)


async def _measure_server(
    setup: Setup,
    make_items: Callable[[int], tuple[Item, ...]],
    address: str,
    server_pid: int | None,
    credentials: Credentials | None,
) -> Report:
    from engine.bench.report import Subject
    from engine.bench.targets import Remote
    from engine.client import AsyncClient

    async with AsyncClient(address, credentials) as client:
        info = await client.model_info()
        subject = Subject(
            model=info.name,
            dtype=info.dtype,
            max_model_len=info.max_model_len,
            weights_fingerprint=info.weights_fingerprint,
            address=address,
            server_version=info.server_version,
        )
        items = make_items(info.architecture.vocab_size)
        return await _measure(setup, items, subject, Remote(client, server_pid))


async def _measure(setup: Setup, items: Sequence[Item], subject: Subject, target: Target) -> Report:
    from engine.bench import machine
    from engine.bench.figures import run_figures
    from engine.bench.report import Asked, Failure, make_report

    runs, failures, compiles = [], [], 0
    peaks = [target.peak_rss_bytes()]
    for number in range(0 if setup.warm_up else 1, setup.repeat + 1):
        driven, engine_figures, machine_figures = await target.run(items, setup.load)
        compiles += engine_figures.compiles or 0
        peaks.append(machine_figures.peak_rss_bytes)
        failures += [
            Failure(run=number, request=index, message=request.failure)
            for index, request in enumerate(driven.served)
            if request.failure is not None
        ]
        run = run_figures(driven.served, driven.wall, engine_figures, machine_figures)
        if number:
            runs.append(run)
        name = f"run {number} of {setup.repeat}" if number else "warm-up"
        print(
            f"{name}: {run.wall_seconds:.2f} s, {run.output_tokens_per_second:.1f} output tokens/s",
            file=sys.stderr,
        )
    asked = Asked(
        workload=str(setup.workload) if setup.workload else None,
        synthetic=(setup.synthetic or Synthetic()) if setup.workload is None else None,
        requests=len(items),
        load=setup.load,
        repeat=setup.repeat,
        warm_up=setup.warm_up,
    )
    return make_report(
        benchmark=setup.benchmark,
        subject=subject,
        asked=asked,
        hardware=machine.hardware(),
        compiles=compiles,
        peak_rss_bytes=max((peak for peak in peaks if peak is not None), default=None),
        runs=tuple(runs),
        failures=tuple(failures),
    )


def _finish(report: Report, output: Path | None) -> int:
    from rich.console import Console

    from engine.bench.report import encode, render

    Console().print(render(report))
    if output is not None:
        output.write_bytes(encode(report))
        print(f"wrote {output}", file=sys.stderr)
    return 1 if report.failures else 0
