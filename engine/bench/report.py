"""What a benchmark found: one value, as JSON for comparing and as tables for reading."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.bench import machine
from engine.bench.figures import PHASES, Run, Spread, summarise
from engine.bench.workload import Load, Synthetic
from engine.config import Config

SCHEMA = 1  # of the JSON; goes up when a field changes its meaning or goes away
BUSY_CORES = 0.05  # foreign load from which on a figure is not worth writing down
_MAX_FAILURES_SHOWN = 5
_STEP_LABELS = {"wait": "wait for the device", "device": "device, overlapping"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What was measured. `config` and `device` are None for a server, `address` in process."""

    model: str
    dtype: str
    max_model_len: int
    weights_fingerprint: str
    config: Config | None = None
    overrides: tuple[str, ...] = ()
    device: dict[str, Any] | None = None
    address: str | None = None
    server_version: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked of it: the requests of a file or synthetic ones, when, and how often."""

    workload: str | None
    synthetic: Synthetic | None
    requests: int
    load: Load
    repeat: int
    warm_up: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A request that was not served as asked. Run 0 is the warm-up."""

    run: int
    request: int
    message: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a figure in a document needs beside it.

    Attributes:
      date: UTC, ISO 8601.
      git: commit and whether tracked files differ, if this runs from a checkout.
      compiles_after_warmup: programs compiled in all runs, that of the benchmark's own warm-up
        included: the engine has compiled every bucket before.
      peak_rss_bytes: of the process, loading the model included.
      runs: those that count.
      summary: median, least and greatest of each figure over the runs.
    """

    schema: int
    benchmark: str
    date: str
    command: str
    versions: dict[str, str]
    git: dict[str, Any] | None
    hardware: dict[str, Any]
    subject: Subject
    asked: Asked
    compiles_after_warmup: int
    peak_rss_bytes: int | None
    runs: tuple[Run, ...]
    summary: dict[str, Spread]
    failures: tuple[Failure, ...]


def make_report(
    *,
    benchmark: str,
    subject: Subject,
    asked: Asked,
    hardware: dict[str, Any],
    compiles: int,
    peak_rss_bytes: int | None,
    runs: tuple[Run, ...],
    failures: tuple[Failure, ...],
) -> Report:
    """Add where, when and with what it was measured, and sum the runs up."""
    now = datetime.datetime.now(datetime.UTC)
    return Report(
        schema=SCHEMA,
        benchmark=benchmark,
        date=now.isoformat(timespec="seconds"),
        command=machine.command_line(),
        versions=machine.versions(),
        git=machine.git_state(),
        hardware=hardware,
        subject=subject,
        asked=asked,
        compiles_after_warmup=compiles,
        peak_rss_bytes=peak_rss_bytes,
        runs=runs,
        summary=summarise([msgspec.to_builtins(run) for run in runs]),
        failures=failures,
    )


def encode(report: Report) -> bytes:
    """The report as JSON."""
    return msgspec.json.format(msgspec.json.encode(report)) + b"\n"


def render(report: Report) -> Group:
    """The report as rich tables."""
    parts: list[RenderableType] = [_title(report), "", _rates(report), "", _latencies(report)]
    if "engine.steps.count" in report.summary:
        parts += ["", _steps(report)]
    return Group(*parts, *_warnings(report))


def _title(report: Report) -> Text:
    subject, asked = report.subject, report.asked
    if (drawn := asked.synthetic) is not None:
        shared = f", {drawn.shared_prefix} shared" if drawn.shared_prefix else ""
        what = f"{drawn.input_len}{shared} + {drawn.output_len} tokens, seed {drawn.seed}"
    else:
        what = asked.workload or ""
    where = subject.address or (subject.device or {}).get("kind", "")
    runs = f", {asked.repeat} runs" if asked.repeat > 1 else ""
    return Text(
        f"octavo bench {report.benchmark}: {subject.model} in {subject.dtype} on {where}\n"
        f"{asked.requests} requests ({what}), {asked.load}{runs}",
        style="bold",
    )


def _rates(report: Report) -> Table:
    """One figure a row."""
    several = len(report.runs) > 1
    table = _table("", *(["median", "min", "max"] if several else [""]))
    table.show_header = several

    def row(label: str, name: str, form: str, scale: float = 1.0) -> None:
        if (spread := report.summary.get(name)) is not None:
            values = (spread.median, spread.min, spread.max) if several else (spread.median,)
            table.add_row(label, *(f"{value * scale:{form}}" for value in values))

    row("output tokens/s", "output_tokens_per_second", ",.1f")
    row("total tokens/s", "total_tokens_per_second", ",.1f")
    row("requests/s", "requests_per_second", ",.2f")
    row("wall time, s", "wall_seconds", ",.2f")
    row("prompt tokens", "prompt_tokens", ",.0f")
    row("output tokens", "output_tokens", ",.0f")
    row("prompt tokens from the cache", "prefix_cache_hit_share", ".1%")
    row("padding waste", "engine.padding_waste", ".1%")
    row("KV utilisation, mean", "engine.kv_utilisation_mean", ".1%")
    row("KV utilisation, peak", "engine.kv_utilisation_peak", ".1%")
    row("internal fragmentation", "internal_fragmentation", ".1%")
    row("preemptions", "engine.preemptions", ",.0f")
    row("compiles", "engine.compiles", ",.0f")
    row("peak RSS in a run, MiB", "machine.peak_rss_bytes", ",.0f", 2**-20)
    row("own CPU load, cores", "machine.own_cores", ".2f")
    row("foreign CPU load, cores", "machine.foreign_cores", ".3f")
    return table


def _latencies(report: Report) -> Table:
    table = _table("ms", "mean", "p50", "p90", "p99", "max")
    for label, name in (
        ("time to first token", "ttft_seconds"),
        ("between tokens", "itl_seconds"),
        ("end to end", "e2e_seconds"),
    ):
        if f"{name}.mean" in report.summary:
            columns = ("mean", "p50", "p90", "p99", "max")
            values = [report.summary[f"{name}.{column}"].median for column in columns]
            table.add_row(label, *(f"{1e3 * value:,.2f}" for value in values))
    return table


def _steps(report: Report) -> Table:
    summary = report.summary
    table = _table("step time", "median, ms", "p99, ms", "share of wall")
    for phase in (*PHASES, "device"):
        name = f"engine.steps.{phase}"
        table.add_row(
            _STEP_LABELS.get(phase, phase),
            f"{1e3 * summary[f'{name}.median'].median:,.3f}",
            f"{1e3 * summary[f'{name}.p99'].median:,.3f}",
            f"{summary[f'{name}.share'].median:.1%}",
        )
    table.add_row("outside of phases", "", "", f"{summary['engine.steps.outside'].median:.1%}")
    steps, tokens, rows = (
        summary[f"engine.steps.{name}"].median for name in ("count", "tokens_mean", "rows_mean")
    )
    table.caption = f"{steps:,.0f} steps of {tokens:.1f} tokens in {rows:.1f} rows on average"
    return table


def _warnings(report: Report) -> list[Text]:
    lines = []
    if report.compiles_after_warmup:
        lines.append(
            f"{report.compiles_after_warmup} programs were compiled after the engine's warm-up: "
            "a bucket is missing"
        )
    foreign = report.summary.get("machine.foreign_cores")
    if foreign is not None and foreign.max > BUSY_CORES:
        lines.append(
            f"others kept up to {foreign.max:.2f} cores busy during the runs: don't compare "
            "these figures with others"
        )
    for failure in report.failures[:_MAX_FAILURES_SHOWN]:
        run = f"run {failure.run}" if failure.run else "warm-up"
        lines.append(f"{run}, request {failure.request}: {failure.message}")
    if len(report.failures) > _MAX_FAILURES_SHOWN:
        lines.append(f"{len(report.failures)} requests failed in all")
    return [Text(line, style="bold red") for line in lines]


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, caption_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
