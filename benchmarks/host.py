"""What the host does in a step, and whether the device ever waits for it.

Requests go through the whole engine and are read as its Python users read them. Some rounds are
timed by the threads' own CPU clocks; one more is traced by jax's profiler, which says when each of
the step's programs ran, and when it was handed over. On a CPU both are work of the same cores: what
the host takes is taken from the device even where that does not wait.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.engine import WORKLOADS
from engine import config_file
from engine.bench import machine
from engine.bench.figures import PHASES
from engine.bench.workload import Item, read_workload
from engine.event_loop import new_event_loop

if TYPE_CHECKING:
    from engine.frontend import Engine
    from engine.runtime.figures import StepRecord

FORWARD = "jit__compute_logits"  # a step's first program, as XLA names it in a trace
DISPATCH = "PjitFunction(jit(_compute_logits))"  # its hand-over, on the step loop's thread


class Round(NamedTuple):
    """One round: its steps, seconds of wall time, and CPU seconds of threads in it.

    Attributes:
      loop: of the step loop: schedule, build, launch, commit, publish.
      reader: of the event loop: detokenise, stream, and the reading of it.
      process: of all threads, so with XLA's.
    """

    steps: list[StepRecord]
    wall: float
    loop: float
    reader: float
    process: float


class Run(NamedTuple):
    """A program that the device ran: its name, and when, in seconds."""

    program: str
    start: float
    end: float


class Idle(NamedTuple):
    """What a trace says of the device, from the first step's start to the last one's end.

    Attributes:
      seconds: in all.
      between: seconds in which none of the step's programs ran, added up.
      late: forward passes that were handed over when the program before had ended: for those, the
        device waited for the host.
      lead: median of the seconds from a hand-over to the end of the program before.
      forwards: how many forward passes there were.
    """

    seconds: float
    between: float
    late: int
    lead: float
    forwards: int


def run(config: Path, overrides: Sequence[str], workload: str, *, rounds: int, folder: Path) -> int:
    """Measure; print tables and write `host.json`.

    Args:
      config, overrides: as `octavo bench throughput` takes them.
      workload: of a file in `WORKLOADS`.
      rounds: timed ones, after one that doesn't count; another is traced.
      folder: where the report goes.
    """
    from engine.frontend import Engine

    items = read_workload(WORKLOADS / f"{workload}.jsonl")
    engine = Engine.from_config(config_file.load(config, overrides))
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_read_all(engine, items))
            measured = [_timed(engine, items, runner) for _ in range(rounds)]
            idle = _traced(engine, items, runner)
    finally:
        engine.close()
    figures = [_figures(each) for each in measured]
    report = {
        **machine.provenance("host", machine.jax_device()),
        "workload": workload,
        "rounds": figures,
        "trace": idle._asdict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "host.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    console = Console()
    console.print(_table(workload, figures))
    console.print(_describe(idle))
    console.print(f"wrote {path}")
    return 0


async def _read_all(engine: Engine, items: Sequence[Item]) -> None:
    from engine.llm import as_prompt
    from engine.types import Domain

    domain = Domain(salt=f"host-{secrets.token_hex(8)}")

    async def read(item: Item) -> None:
        prompt = as_prompt(item.prompt)
        async for _ in engine.generate(prompt, item.sampling, domain=domain):
            pass

    await asyncio.gather(*map(read, items))


def _timed(engine: Engine, items: Sequence[Item], runner: asyncio.Runner) -> Round:
    steps: list[StepRecord] = []
    [loop] = [each for each in threading.enumerate() if each.name == "octavo-loop"]
    clocks = [
        time.pthread_getcpuclockid(each.ident or 0) for each in (loop, threading.current_thread())
    ]
    engine.watch_steps(steps.append)

    def now() -> list[float]:
        threads = map(time.clock_gettime, clocks)
        return [time.perf_counter(), *threads, time.process_time()]

    begin = now()
    runner.run(_read_all(engine, items))
    end = now()
    engine.watch_steps(None)
    return Round(steps, *(after - before for before, after in zip(begin, end, strict=True)))


def _traced(engine: Engine, items: Sequence[Item], runner: asyncio.Runner) -> Idle:
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it slows the host down, which is what is measured
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            runner.run(_read_all(engine, items))
        [trace] = Path(folder).rglob("*.trace.json.gz")
        events = msgspec.json.decode(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return idle_in(runs_of(events), hand_overs(events))


def runs_of(events: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The programs that ran, in order, from a trace's events: each has a number, as have its ops.

    Events are those of a trace viewer's file: `ts` and `dur` in microseconds, and where an op ran,
    `args` with `hlo_module` and `run_id`.
    """
    found: dict[str, Run] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("ph") != "X" or "hlo_module" not in args:
            continue
        start, number = event["ts"] / 1e6, args["run_id"]
        end = start + event.get("dur", 0) / 1e6
        before = found.get(number, Run(args["hlo_module"], start, end))
        found[number] = Run(before.program, min(before.start, start), max(before.end, end))
    return sorted(found.values(), key=lambda each: each.start)


def hand_overs(events: Iterable[Mapping[str, Any]]) -> list[float]:
    """When the host had handed over each forward pass, in seconds; nested events count once."""
    spans = sorted(
        (event["ts"], event["ts"] + event.get("dur", 0))
        for event in events
        if event.get("ph") == "X" and event.get("name") == DISPATCH
    )
    ends: list[float] = []
    for start, end in spans:
        if not ends or start >= ends[-1]:
            ends.append(end)
    return [end / 1e6 for end in ends]


def idle_in(runs: Sequence[Run], handed_over: Sequence[float]) -> Idle:
    """When the device had nothing to do.

    Args:
      runs: in order; the first and the last are of the step's programs.
      handed_over: of each forward pass among them, when the host had handed it over.

    Raises:
      ValueError: there are not as many, or fewer than two.
    """
    forwards = [index for index, each in enumerate(runs) if each.program == FORWARD]
    if len(forwards) != len(handed_over) or len(forwards) < 2:
        raise ValueError(
            f"the trace has {len(forwards)} forward passes and {len(handed_over)} hand-overs"
        )
    leads = [
        runs[index - 1].end - time
        for index, time in zip(forwards[1:], handed_over[1:], strict=True)
    ]
    gaps = (max(b.start - a.end, 0.0) for a, b in itertools.pairwise(runs))
    return Idle(
        seconds=runs[-1].end - runs[0].start,
        between=sum(gaps),
        late=sum(lead < 0 for lead in leads),
        lead=statistics.median(leads),
        forwards=len(forwards),
    )


def _figures(measured: Round) -> dict[str, Any]:
    """Seconds a step, and shares of the steps' time."""
    steps = len(measured.steps)
    phases = {
        phase: statistics.median(getattr(step, phase) for step in measured.steps)
        for phase in PHASES
    }
    return {
        "steps": steps,
        "step": measured.wall / steps,
        "phases": phases,
        "loop_cpu": measured.loop / steps,
        "reader_cpu": measured.reader / steps,
        "process_cpu": measured.process / steps,
        "host_share": (measured.loop + measured.reader) / measured.wall,
        "host_share_of_cpu": (measured.loop + measured.reader) / measured.process,
    }


def _table(workload: str, rounds: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title=f"{workload}: a step, medians of {len(rounds)} rounds", title_justify="left"
    )
    table.add_column("what")
    table.add_column("ms", justify="right")
    table.add_column("of the step", justify="right")
    step = statistics.median(each["step"] for each in rounds)

    def add(what: str, values: Iterable[float]) -> None:
        value = statistics.median(values)
        table.add_row(what, f"{value * 1e3:.2f}", f"{value / step:.1%}")

    add("step, from one to the next", (each["step"] for each in rounds))
    for phase in PHASES:
        add(f"  {phase}", (each["phases"][phase] for each in rounds))
    add("CPU time of the step loop", (each["loop_cpu"] for each in rounds))
    add("CPU time of text and streams", (each["reader_cpu"] for each in rounds))
    add("both", (each["host_share"] * each["step"] for each in rounds))
    asked = ("schedule", "build", "commit")
    sums = (sum(map(each["phases"].get, asked)) + each["reader_cpu"] for each in rounds)
    add("schedule, build, commit, text and streams", sums)
    add("CPU time of the process", (each["process_cpu"] for each in rounds))
    return table


def _describe(idle: Idle) -> str:
    return (
        f"trace: of {idle.forwards} forward passes, {idle.late} were handed over too late. The "
        f"host is {idle.lead * 1e3:.1f} ms ahead (median), and none of the step's programs ran in "
        f"{idle.between / idle.seconds:.1%} of the time, all of it between a program's end and the "
        "next one's start"
    )
