"""What a simulation showed: figures of each allocator, a table of them, and a line that sums up.

Figures follow from an `Outcome` alone, so the same seed gives the same report.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from engine.simulate.run import Outcome
from engine.simulate.samples import Sample

MAX_TIMELINE = 256
"""Moments that a report keeps."""


class Percentiles(NamedTuple):
    """Of durations, in seconds; None if there were none."""

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: np.ndarray) -> Percentiles:
        """Of those that are a number."""
        known = seconds[~np.isnan(seconds)]
        return cls(*np.percentile(known, (50, 90, 99)).tolist()) if len(known) else cls(*[None] * 3)


class Shares(NamedTuple):
    """Parts of some places, by what is in them (`Sample`); means over simulated time."""

    held: float
    coming: float
    reserved: float
    never_used: float
    cached: float = 0.0
    unusable: float = 0.0
    free: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One allocator's run. Times are simulated; means are over simulated time.

    Attributes:
      finished, rejected: requests; rejected ones fit neither the model's context nor the pool.
      duration_s: until the last request ended.
      output_tokens, output_tokens_per_s: generated, and per second of `duration_s`.
      running, running_peak, waiting: sequences that hold blocks, requests that hold none.
      owned: parts of the places that sequences own; `held` is the utilisation.
      pool: parts of the whole pool while requests wait; None if none ever did.
      widest_gap: most places that one sequence owned without a token for them.
      preemptions: times that a sequence lost its blocks.
      recomputed_tokens: positions computed again after that.
      cached_tokens: prompt tokens that were found in the cache.
      hit_rate: the share of those in all prompt tokens of requests that finished.
      swapped_out, swapped_in: blocks, between pool and host tier.
      ttft_s, latency_s: from arrival to the first and to the last token.
      steps: of the device.
      timeline: samples, thinned evenly.
    """

    allocator: str
    finished: int
    rejected: int
    duration_s: float
    output_tokens: int
    output_tokens_per_s: float
    running: float
    running_peak: int
    waiting: float
    owned: Shares
    pool: Shares | None
    widest_gap: int
    preemptions: int
    recomputed_tokens: int
    cached_tokens: int
    hit_rate: float
    swapped_out: int
    swapped_in: int
    ttft_s: Percentiles
    latency_s: Percentiles
    steps: int
    timeline: tuple[Sample, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["timeline"] = [sample._asdict() for sample in self.timeline]
        for name in ("owned", "pool", "ttft_s", "latency_s"):
            plain[name] = plain[name] and plain[name]._asdict()
        return plain


def figures(outcome: Outcome, prompt_tokens: np.ndarray) -> Figures:
    """Work out an allocator's figures.

    Args:
      prompt_tokens: int64[N], of the stream that ran.
    """
    samples = np.array(outcome.samples or [(0,) * len(Sample._fields)], np.float64)
    column = {name: samples[:, index] for index, name in enumerate(Sample._fields)}
    lasted = np.diff(column["time_s"], append=outcome.end_s)  # each stands until the next

    def integral(name: str, where: np.ndarray | None = None) -> float:
        return float((column[name] * (lasted if where is None else lasted * where)).sum())

    owned = {name: integral(name) for name in ("held", "coming", "reserved", "never_used")}
    some_wait = column["waiting"] > 0
    of_pool = {name: integral(name, some_wait) for name in Shares._fields}
    is_finished = ~np.isnan(outcome.finish_s)
    generated = int(outcome.num_generated.sum())
    # The last token of a request is never fed back, so it has no position in the cache.
    needed = (prompt_tokens + outcome.num_generated - 1 - outcome.num_cached)[is_finished]
    return Figures(
        allocator=outcome.limits.allocator,
        finished=int(is_finished.sum()),
        rejected=int((~is_finished).sum()),
        duration_s=outcome.end_s,
        output_tokens=generated,
        output_tokens_per_s=_ratio(generated, outcome.end_s),
        running=_ratio(integral("running"), outcome.end_s),
        running_peak=int(column["running"].max()),
        waiting=_ratio(integral("waiting"), outcome.end_s),
        owned=Shares(**_parts(owned)),
        pool=Shares(**_parts(of_pool)) if some_wait.any() else None,
        widest_gap=int(column["widest_gap"].max()),
        preemptions=outcome.num_preemptions,
        recomputed_tokens=outcome.num_computed - int(needed.sum()),
        cached_tokens=int(outcome.num_cached.sum()),
        hit_rate=_ratio(int(outcome.num_cached.sum()), int(prompt_tokens[is_finished].sum())),
        swapped_out=outcome.num_swapped_out,
        swapped_in=outcome.num_swapped_in,
        ttft_s=Percentiles.of(outcome.first_token_s - outcome.arrival_s),
        latency_s=Percentiles.of(outcome.finish_s - outcome.arrival_s),
        steps=outcome.num_steps,
        timeline=outcome.samples[:: max(1, math.ceil(len(outcome.samples) / MAX_TIMELINE))],
    )


def render(title: str, reports: list[Figures], block_size: int) -> Group:
    """The table, one column an allocator, and the line that sums up."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for report in reports:
        table.add_column(report.allocator, justify="right")

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    def section(name: str) -> None:
        table.add_row(Text(f"\n{name}", style="italic"))

    row("requests finished", [f"{r.finished:,}" for r in reports])
    row("rejected (too long)", [f"{r.rejected:,}" for r in reports])
    row("simulated time", [f"{r.duration_s:,.1f} s" for r in reports])
    row("output tokens/s", [f"{r.output_tokens_per_s:,.0f}" for r in reports])
    row("sequences at once", [f"{r.running:,.1f}" for r in reports])
    row("  at most", [f"{r.running_peak:,}" for r in reports])
    row("waiting", [f"{r.waiting:,.1f}" for r in reports])
    row("preemptions", [f"{r.preemptions:,}" for r in reports])
    row("  positions computed again", [f"{r.recomputed_tokens:,}" for r in reports])
    row("prompt tokens from the cache", [f"{r.cached_tokens:,}" for r in reports])
    row("  of all (hit rate)", [f"{r.hit_rate:.1%}" for r in reports])
    if any(r.swapped_out for r in reports):
        row(
            "blocks to / from host memory",
            [f"{r.swapped_out:,} / {r.swapped_in:,}" for r in reports],
        )
    row("TTFT p50 / p90 / p99", [_times(r.ttft_s) for r in reports])
    row("latency p50 / p90 / p99", [_times(r.latency_s) for r in reports])
    section("places that sequences own")
    row("hold tokens (utilisation)", [f"{r.owned.held:.1%}" for r in reports])
    row("prompt, in a later step", [f"{r.owned.coming:.1%}" for r in reports])
    row("kept for tokens to come", [f"{r.owned.reserved:.1%}" for r in reports])
    row("never used", [f"{r.owned.never_used:.1%}" for r in reports])
    row("most of one, without tokens", [f"{r.widest_gap:,}" for r in reports])
    section("the pool while requests wait")
    for name, label in _POOL_ROWS.items():
        row(label, ["-" if r.pool is None else f"{getattr(r.pool, name):.1%}" for r in reports])
    last = Text(f"\n{summary(reports, block_size)}", style="bold")
    return Group(Text(f"{title}\n", style="bold"), table, last)


_POOL_ROWS = {
    "held": "holds tokens",
    "coming": "prompt, in a later step",
    "reserved": "kept for tokens to come",
    "never_used": "never used (internal)",
    "unusable": "free, but in too short runs (external)",
    "cached": "cached",
    "free": "free",
}


def summary(reports: list[Figures], block_size: int) -> str:
    """One line: how much of what each allocator hands out is of use, and what that is worth."""
    parts = []
    for report in reports:
        wasted = report.owned.reserved + report.owned.never_used
        useful = report.owned.held + report.owned.coming
        text = f"{report.allocator} {useful:.1%} useful"
        if report.widest_gap < block_size:
            text += f", waste only in last blocks ({wasted:.1%})"
        parts.append(text)
    by_name = {report.allocator: report for report in reports}
    paged, naive = by_name.get("paged"), by_name.get("contiguous")
    if paged and naive and naive.finished and paged.finished:
        parts.append(
            f"{paged.running / naive.running:.1f}x the sequences at once, "
            f"{paged.output_tokens_per_s / naive.output_tokens_per_s:.1f}x the tokens/s"
        )
    return "; ".join(parts)


def _parts(amounts: dict[str, float]) -> dict[str, float]:
    total = sum(amounts.values())
    return {name: _ratio(amount, total) for name, amount in amounts.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _times(times: Percentiles) -> str:
    return " / ".join("-" if value is None else f"{value:,.2f}" for value in times) + " s"
