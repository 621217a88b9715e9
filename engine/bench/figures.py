"""The arithmetic of a benchmark: from timestamps and step records to the figures of a run.

Times are seconds. Nothing here measures anything; every function is one of its arguments.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from engine.runtime.figures import StepRecord

PHASES = ("schedule", "build", "launch", "wait", "commit")  # of the step loop, one by one


class Arrived(NamedTuple):
    """A delta that carried tokens: when it reached the reader, and how many it had."""

    time: float
    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """What happened to one request. Times are seconds since the start of the run.

    Attributes:
      arrival: when it was due: at the start if all come at once, when its turn came in a
        closed loop, and when the Poisson process said so in an open one (not when the client
        got round to it, which would hide a stall).
      arrived: the deltas that carried tokens.
      end: when the stream ended.
      prompt_tokens, cached_tokens: of the prompt, and how many of them came from the cache.
      failure: what went wrong, else None.
    """

    arrival: float
    arrived: tuple[Arrived, ...]
    end: float
    prompt_tokens: int
    cached_tokens: int
    failure: str | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens that reached the reader."""
        return sum(delta.num_tokens for delta in self.arrived)


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """Samples in a few numbers. Percentiles interpolate linearly between order statistics."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Distribution | None:
        """The distribution of some samples; None if there are none."""
        if not samples:
            return None
        p50, p90, p99 = np.percentile(samples, (50, 90, 99)).tolist()
        return cls(statistics.fmean(samples), p50, p90, p99, max(samples))


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """One phase of the steps: seconds, and its share of the run's wall time."""

    median: float
    p99: float
    share: float


@dataclasses.dataclass(frozen=True, slots=True)
class Steps:
    """Where the step loop's time went.

    Attributes:
      schedule, build, commit: the host's own work.
      launch: whatever the backend does before it returns.
      wait: what the host waited for the device.
      device: from the end of the step before (or the launch, if later) to the tokens: an upper
        bound of the device's time, which overlaps with the next step's host work.
      outside: share of the wall time in no phase but `device`: taking requests in, idling.
    """

    count: int
    tokens_mean: float
    rows_mean: float
    schedule: Phase
    build: Phase
    launch: Phase
    wait: Phase
    commit: Phase
    device: Phase
    outside: float


@dataclasses.dataclass(frozen=True, slots=True)
class EngineFigures:
    """What the engine says of a run; None where this kind of benchmark can't see it.

    Attributes:
      steps: the step times.
      padding_waste: share of the computed positions that filled up static shapes.
      kv_utilisation_mean, kv_utilisation_peak: share of the pool's blocks that requests own,
        over the steps (or over polls, for a server).
      preemptions: times a running request lost its blocks.
      compiles: programs compiled in the run, which should be 0.
      block_size: tokens.
    """

    steps: Steps | None
    padding_waste: float | None
    kv_utilisation_mean: float | None
    kv_utilisation_peak: float | None
    preemptions: int | None
    compiles: int | None
    block_size: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class MachineFigures:
    """CPU and memory of a run; None where the platform doesn't tell, or the run is too short.

    Attributes:
      own_cores: CPU seconds a second of the process measured (for a server, with the client's).
      foreign_cores: the same of everything else on the machine, stolen time included. Above a
        few hundredths, the run says little.
      peak_rss_bytes: most resident memory of the process during the run.
    """

    own_cores: float | None
    foreign_cores: float | None
    peak_rss_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The figures of one run. Rates count requests that were served as asked, and only those.

    Attributes:
      wall_seconds: from the first arrival to the end of the last stream.
      ttft_seconds: from a request's arrival to its first token.
      itl_seconds: between tokens of a stream, see `inter_token_latencies`.
      e2e_seconds: from a request's arrival to the end of its stream.
      prefix_cache_hit_share: share of the prompt tokens that came from the cache.
      internal_fragmentation: see `internal_fragmentation`.
    """

    wall_seconds: float
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    total_tokens_per_second: float
    requests_per_second: float
    ttft_seconds: Distribution | None
    itl_seconds: Distribution | None
    e2e_seconds: Distribution | None
    prefix_cache_hit_share: float | None
    internal_fragmentation: float | None
    engine: EngineFigures
    machine: MachineFigures


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """One figure over several runs."""

    median: float
    min: float
    max: float


def inter_token_latencies(arrived: Sequence[Arrived]) -> list[float]:
    """The time that each token of a stream took after the one before it.

    The gap between two deltas that carry tokens is divided evenly over the tokens of the later
    one, which count one sample each; so the samples add up to the time from the first delta to
    the last. Tokens of the first delta have no sample: their time is the time to first token.
    """
    samples: list[float] = []
    for before, delta in itertools.pairwise(arrived):
        samples += [(delta.time - before.time) / delta.num_tokens] * delta.num_tokens
    return samples


def internal_fragmentation(lengths: Iterable[tuple[int, int]], block_size: int) -> float | None:
    """Share of the slots in sequences' blocks that hold no token yet, from lengths alone.

    Averaged over every generated token: a sequence that is about to get its k-th token has
    prompt + k - 1 tokens in the cache, in the fewest blocks that hold them.

    Args:
      lengths: (prompt tokens, output tokens) of each request.
      block_size: tokens in one block.

    Returns:
      0 for none; None if nothing was generated.
    """
    tokens = slots = 0
    for num_prompt, num_output in lengths:
        held = np.arange(num_prompt, num_prompt + num_output)
        tokens += int(held.sum())
        slots += int((-(-held // block_size) * block_size).sum())
    return 1 - tokens / slots if slots else None


def step_figures(records: Sequence[StepRecord], wall: float) -> Steps | None:
    """Where the time of the steps went; None if there were none."""
    if not records:
        return None
    phases = {}
    for name in (*PHASES, "device"):
        seconds = [getattr(record, name) for record in records]
        p99 = float(np.percentile(seconds, 99))
        phases[name] = Phase(statistics.median(seconds), p99, sum(seconds) / wall)
    return Steps(
        count=len(records),
        tokens_mean=statistics.fmean(record.num_tokens for record in records),
        rows_mean=statistics.fmean(record.num_rows for record in records),
        **phases,
        outside=max(0.0, 1 - sum(phases[name].share for name in PHASES)),
    )


def padding_waste(computed: int, padded: int) -> float | None:
    """Share of `padded` positions that were not asked for; None if there were none."""
    return (padded - computed) / padded if padded else None


def run_figures(
    served: Sequence[Served], wall: float, engine: EngineFigures, machine: MachineFigures
) -> Run:
    """Put the figures of a run together."""
    good = [request for request in served if request.failure is None]
    prompt_tokens = sum(request.prompt_tokens for request in good)
    cached_tokens = sum(request.cached_tokens for request in good)
    output_tokens = sum(request.output_tokens for request in good)
    started = [request for request in good if request.arrived]
    lengths = [(request.prompt_tokens, request.output_tokens) for request in good]
    return Run(
        wall_seconds=wall,
        requests=len(served),
        failed=len(served) - len(good),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        output_tokens_per_second=output_tokens / wall,
        total_tokens_per_second=(prompt_tokens + output_tokens) / wall,
        requests_per_second=len(good) / wall,
        ttft_seconds=Distribution.of([r.arrived[0].time - r.arrival for r in started]),
        itl_seconds=Distribution.of([t for r in good for t in inter_token_latencies(r.arrived)]),
        e2e_seconds=Distribution.of([r.end - r.arrival for r in good]),
        prefix_cache_hit_share=cached_tokens / prompt_tokens if prompt_tokens else None,
        internal_fragmentation=(
            None
            if engine.block_size is None
            else internal_fragmentation(lengths, engine.block_size)
        ),
        engine=engine,
        machine=machine,
    )


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """Median, least and greatest of each figure over runs of plain data.

    Nested figures have dotted names, such as `ttft_seconds.p50`. A figure that a run lacks is
    left out altogether.
    """
    columns = [dict(_numbers(run)) for run in runs]
    names = [name for name in columns[0] if all(name in column for column in columns)]
    values = {name: [column[name] for column in columns] for name in names}
    return {
        name: Spread(statistics.median(column), min(column), max(column))
        for name, column in values.items()
    }


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}{key}", value
