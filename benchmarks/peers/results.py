"""From what the engines answered to figures, to whether they agree, and to tables."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from rich.table import Table

from benchmarks.peers.protocol import UNKNOWN, Answer, Request, Round
from engine.bench.figures import (
    Arrived,
    EngineFigures,
    MachineFigures,
    Run,
    Served,
    Spread,
    run_figures,
    summarise,
)
from engine.bench.report import BUSY_CORES

FIRST = 16  # tokens of an answer that rounding hardly ever changes
ENOUGH = 16  # answers from which a share of them says something
RATE = "output_tokens_per_second"
# Figures of which ours is divided by a peer's: name, label, unit's scale, decimals.
LATENCIES = (
    ("ttft_seconds.p50", "TTFT p50, ms", 1e3, 1),
    ("itl_seconds.p50", "ITL p50, ms", 1e3, 2),
)
Pair = tuple[Sequence[int], Sequence[int]]  # a request's tokens from ours and from another

_UNSEEN = EngineFigures(None, None, None, None, None, None, None)


@dataclasses.dataclass
class Measured:
    """What is known of an engine beside its rounds.

    Attributes:
      what: the engine in a few words.
      version: as its runner says.
      startup_seconds: from each start of its process to its first token.
      peak_rss_bytes: most resident memory of its processes together, start included.
    """

    what: str
    version: str = "?"
    startup_seconds: list[float] = dataclasses.field(default_factory=list)
    peak_rss_bytes: int | None = None


class Turn(NamedTuple):
    """One engine's round of a workload: its figures, and the tokens of each request."""

    run: Run
    token_ids: tuple[tuple[int, ...], ...]
    failures: tuple[str, ...]


class Agreement(NamedTuple):
    """How far two engines' greedy tokens are the same, over all requests and rounds.

    Attributes:
      requests: pairs of answers that were compared.
      first: share of them whose first `FIRST` tokens are equal.
      whole: share of them that are equal altogether.
      common_median: tokens that they have in common before the first other one.
    """

    requests: int
    first: float
    whole: float
    common_median: float


def turn(requests: Sequence[Request], answers: Round, machine: MachineFigures) -> Turn:
    """The figures of a round; an answer that is not what was asked for counts as failed."""
    if len(requests) != len(answers.answers):
        raise ValueError(f"{len(requests)} requests got {len(answers.answers)} answers")
    served = [_served(*pair) for pair in zip(requests, answers.answers, strict=True)]
    failures = [
        f"request {index}: {request.failure}"
        for index, request in enumerate(served)
        if request.failure is not None
    ]
    return Turn(
        run_figures(served, answers.wall, _UNSEEN, machine),
        tuple(tuple(answer.token_ids) for answer in answers.answers),
        tuple(failures),
    )


def _served(request: Request, answer: Answer) -> Served:
    return Served(
        arrival=0.0,
        arrived=tuple(Arrived(*delta) for delta in answer.arrived),
        end=answer.end,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        failure=answer.failure or shortcoming(request, answer),
    )


def shortcoming(request: Request, answer: Answer) -> str | None:
    """What an answer lacks of what was asked for, else None."""
    counted = sum(num_tokens for _, num_tokens in answer.arrived)
    for number, what in ((counted, "came"), (len(answer.token_ids), "were named")):
        if number != request.max_tokens:
            return f"{request.max_tokens} tokens were asked for, but {number} {what}"
    if answer.prompt_tokens != len(request.prompt_ids):
        return (
            f"the prompt has {len(request.prompt_ids)} tokens, but {answer.prompt_tokens} were read"
        )
    return None


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differ; a token that was not told differs from none."""
    for place, pair in enumerate(zip(one, other, strict=False)):
        if pair[0] != pair[1] and UNKNOWN not in pair:
            return place
    return min(len(one), len(other))


def agreement(pairs: Iterable[Pair]) -> Agreement | None:
    """How far two engines' answers to equal requests are the same; None if there are none."""
    found = []
    for one, other in pairs:
        longest = max(len(one), len(other))
        found.append((num_common(one, other), longest))
    if not found:
        return None
    return Agreement(
        requests=len(found),
        first=statistics.fmean(common >= min(FIRST, longest) for common, longest in found),
        whole=statistics.fmean(common == longest for common, longest in found),
        common_median=statistics.median(common for common, _ in found),
    )


def pairs(ours: Sequence[Turn], theirs: Sequence[Turn]) -> list[Pair]:
    """The answers to each request of each round, ours and theirs."""
    return [
        pair
        for one, other in zip(ours, theirs, strict=True)
        for pair in zip(one.token_ids, other.token_ids, strict=True)
    ]


def figures(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The runs as plain data."""
    return [msgspec.to_builtins(turn.run) for turn in turns]


def ratios(ours: Sequence[Turn], theirs: Sequence[Turn], name: str) -> Spread | None:
    """Ours over theirs, round by round: median, least and greatest of one figure's ratio."""
    summaries = ([summarise([run]) for run in figures(turns)] for turns in (ours, theirs))
    found = [
        one[name].median / other[name].median
        for one, other in zip(*summaries, strict=True)
        if name in one and name in other and other[name].median
    ]
    return Spread(statistics.median(found), min(found), max(found)) if found else None


def workload_report(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """One workload for the JSON: each engine's runs, and ours (the first) over it."""
    ours = next(iter(turns.values()))
    names = (RATE, *(name for name, *_ in LATENCIES))
    report = {}
    for engine, rows in turns.items():
        agreed = agreement(pairs(ours, rows))
        report[engine] = {
            "summary": summarise(figures(rows)),
            "ours_over_it": {name: ratios(ours, rows, name) for name in names},
            "agreement": None if agreed is None else agreed._asdict(),
            "failures": [failure for row in rows for failure in row.failures],
            "runs": figures(rows),
        }
    return report


def workload_table(title: str, turns: Mapping[str, Sequence[Turn]], ours: str) -> Table:
    """One workload: a row for each engine, with ours over theirs beneath the medians."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("median [min-max]", no_wrap=True)
    columns = ((RATE, "output tokens/s", 1.0, 1), *LATENCIES)
    for _, label, _, _ in columns:
        table.add_column(label, justify="right", no_wrap=True)
        table.add_column("ours ÷", justify="right", no_wrap=True)
    for label in ("cached", "RSS, MiB", "foreign, cores"):
        table.add_column(label, justify="right", no_wrap=True)
    for name, rows in turns.items():
        summary = summarise(figures(rows))
        cells = []
        for figure, _, scale, decimals in columns:
            cells.append(_spread(summary.get(figure), scale, decimals))
            ratio = None if name == ours else ratios(turns[ours], rows, figure)
            cells.append("" if ratio is None else _spread(ratio, 1.0, 2))
        cached = summary.get("prefix_cache_hit_share")
        rss = summary.get("machine.peak_rss_bytes")
        foreign = summary.get("machine.foreign_cores")
        table.add_row(
            name,
            *cells,
            "-" if cached is None else f"{cached.median:.0%}",
            "-" if rss is None else f"{rss.max / 2**20:,.0f}",
            "-" if foreign is None else _busy(foreign.max),
        )
    return table


def engines_table(
    engines: Mapping[str, Measured], agreements: Mapping[str, Agreement | None]
) -> Table:
    """A row for each engine: what it is, what it takes to start, and whether it agrees."""
    table = Table(box=None, pad_edge=False)
    for label in ("engine", "version", ""):
        table.add_column(label, no_wrap=label != "version")
    for label in (
        "start to first token, s",
        "peak RSS since start, MiB",
        f"first {FIRST} equal",
        "all equal",
        "tokens in common",
    ):
        table.add_column(label, justify="right")
    for name, engine in engines.items():
        starts, peak = engine.startup_seconds, engine.peak_rss_bytes
        agreed = agreements.get(name)
        table.add_row(
            name,
            engine.version,
            engine.what,
            _spread(Spread(statistics.median(starts), min(starts), max(starts)), 1.0, 1),
            "-" if peak is None else f"{peak / 2**20:,.0f}",
            *(
                ("", "", "")
                if agreed is None
                else (f"{agreed.first:.0%}", f"{agreed.whole:.0%}", f"{agreed.common_median:,.0f}")
            ),
        )
    return table


def complaints(
    turns: Mapping[str, Mapping[str, Sequence[Turn]]],
    agreements: Mapping[str, Agreement | None],
    least: float,
    most_shown: int = 5,
) -> list[str]:
    """Why a comparison does not count: answers that are not what was asked for, or differ."""
    failures = [
        f"{workload}, {engine}, round {number}: {failure}"
        for workload, engines in turns.items()
        for engine, rows in engines.items()
        for number, row in enumerate(rows, 1)
        for failure in row.failures
    ]
    found = failures[:most_shown]
    if len(failures) > most_shown:
        found.append(f"{len(failures)} answers in all are not what was asked for")
    for engine, agreed in agreements.items():
        if agreed is not None and agreed.requests >= ENOUGH and agreed.first < least:
            found.append(
                f"{engine}: only {agreed.first:.0%} of {agreed.requests} answers begin with our "
                f"{FIRST} tokens, less than --min-agreement {least:g}: it does not compute the same"
            )
    return found


def warnings(turns: Mapping[str, Mapping[str, Sequence[Turn]]]) -> list[str]:
    """What is to be known of figures that do count."""
    rows = itertools.chain(*(rows for engines in turns.values() for rows in engines.values()))
    busiest = max((row.run.machine.foreign_cores or 0.0 for row in rows), default=0.0)
    if busiest <= BUSY_CORES:
        return []
    return [f"others kept up to {busiest:.2f} cores busy: don't put these figures down"]


def _busy(cores: float) -> str:
    style = "bold red" if cores > BUSY_CORES else "default"
    return f"[{style}]{cores:.3f}[/]"


def _spread(spread: Spread | None, scale: float, decimals: int) -> str:
    if spread is None or not math.isfinite(spread.median):
        return "-"
    median, low, high = (
        f"{value * scale:,.{decimals}f}" for value in (spread.median, spread.min, spread.max)
    )
    return median if low == high else f"{median} [{low}-{high}]".replace("[", r"\[")
