"""What two readings of a server's figures say of the time between them.

Readings are `GetStatsResponse` messages; nothing here asks for any.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from engine.observe.histogram import Buckets
from engine.rpc.octavo.v1 import generation_pb2 as pb

_QUANTILES = (0.5, 0.9, 0.99)


class Reading(NamedTuple):
    """What a server said, and when, in seconds of any clock."""

    stats: pb.GetStatsResponse
    time: float


@dataclasses.dataclass(frozen=True, slots=True)
class Latency:
    """A distribution of seconds in a few numbers; see `Buckets.quantile`."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, buckets: Buckets) -> Latency | None:
        """Those of some buckets; None if they are empty."""
        if not buckets.count:
            return None
        p50, p90, p99 = (buckets.quantile(share) or 0.0 for share in _QUANTILES)
        return cls(buckets.sum / buckets.count, p50, p90, p99)


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What a table shows. Rates and shares are of the time between the readings; those that follow
    from nothing are None.

    Attributes:
      seconds: between the readings; since the server's start if it started between them.
      running, waiting: sequences, now.
      free_blocks, cached_blocks, owned_blocks, total_blocks: of the pool, now.
      host_blocks, total_host_blocks: of the host tier, now.
      disk_bytes: of the disk tier's files, now.
      generated_tokens_per_second, prompt_tokens_per_second: the latter when answers end.
      answers_per_second: that ended.
      steps_per_second: done.
      hit_share: share of the prompt tokens that were found in the cache, of those looked up.
      padding_share: share of the computed positions that were padding.
      preemptions, swapped_out_blocks, swapped_in_blocks, copied_blocks, restored_blocks: a second.
      held: share of the steps after which requests waited, by what held the first of them back.
      finished: answers since the server's start, by how they ended.
      failed_steps, compiles_after_warmup: since the server's start.
      time_to_first_token, inter_token_latency, queue_time: seconds.
    """

    seconds: float
    uptime_seconds: float
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    owned_blocks: int
    total_blocks: int
    host_blocks: int
    total_host_blocks: int
    disk_bytes: int
    generated_tokens_per_second: float
    prompt_tokens_per_second: float
    answers_per_second: float
    steps_per_second: float
    hit_share: float | None
    padding_share: float | None
    preemptions: float
    swapped_out_blocks: float
    swapped_in_blocks: float
    copied_blocks: float
    restored_blocks: float
    held: dict[str, float]
    finished: dict[str, int]
    failed_steps: int
    compiles_after_warmup: int
    time_to_first_token: Latency | None
    inter_token_latency: Latency | None
    queue_time: Latency | None


def figures(now: Reading, before: Reading) -> Figures:
    """The figures between two readings; of all the server's time if it started between them."""
    stats = now.stats
    then = pb.GetStatsResponse()
    seconds = stats.uptime_seconds
    if before.stats.uptime_seconds <= stats.uptime_seconds:
        then, seconds = before.stats, now.time - before.time
    seconds = max(seconds, 1e-9)

    def grown(name: str) -> int:
        return getattr(stats, name) - getattr(then, name)

    def rate(name: str) -> float:
        return grown(name) / seconds

    def latency(name: str) -> Latency | None:
        buckets = _buckets(getattr(stats, name))
        earlier = _buckets(getattr(then, name))
        return Latency.of(buckets.since(earlier) if earlier.counts else buckets)

    finished = sum(stats.finished.values()) - sum(then.finished.values())
    steps = grown("steps")
    held = {reason: count - then.held_steps[reason] for reason, count in stats.held_steps.items()}
    return Figures(
        seconds=seconds,
        uptime_seconds=stats.uptime_seconds,
        running=stats.running,
        waiting=stats.waiting,
        free_blocks=stats.free_blocks,
        cached_blocks=stats.cached_blocks,
        owned_blocks=stats.owned_blocks,
        total_blocks=stats.total_blocks,
        host_blocks=stats.host_blocks,
        total_host_blocks=stats.total_host_blocks,
        disk_bytes=stats.disk_bytes,
        generated_tokens_per_second=rate("generated_tokens"),
        prompt_tokens_per_second=rate("prompt_tokens"),
        answers_per_second=finished / seconds,
        steps_per_second=steps / seconds,
        hit_share=_share(grown("prefix_cache_hits"), grown("prefix_cache_queries")),
        padding_share=_share(
            grown("padded_tokens") - grown("computed_tokens"), grown("padded_tokens")
        ),
        preemptions=rate("preemptions"),
        swapped_out_blocks=rate("swapped_out_blocks"),
        swapped_in_blocks=rate("swapped_in_blocks"),
        copied_blocks=rate("copied_blocks"),
        restored_blocks=rate("restored_blocks"),
        held={reason: count / steps for reason, count in held.items() if count and steps},
        finished=dict(stats.finished),
        failed_steps=stats.failed_steps,
        compiles_after_warmup=stats.compiles_after_warmup,
        time_to_first_token=latency("time_to_first_token"),
        inter_token_latency=latency("inter_token_latency"),
        queue_time=latency("queue_time"),
    )


def _buckets(message: pb.Histogram) -> Buckets:
    return Buckets(tuple(message.bounds), tuple(message.counts), message.sum)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
