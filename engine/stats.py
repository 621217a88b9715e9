"""What an engine says of itself: which model it serves, and where it stands."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from engine.config import Architecture
from engine.observe.histogram import Buckets
from engine.observe.requests import RequestFigures

if TYPE_CHECKING:
    from engine.loading import LoadedEngine
    from engine.runtime.loop import EngineLoop


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model an engine serves, and by which kernels."""

    name: str
    architecture: Architecture
    attention: str
    products: str
    dtype: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weights_fingerprint: str


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """Where an engine stands. Counts since the start unless they are of the present.

    For the operator: they are of all requests together, so whoever sees them sees others' hits.
    """

    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    owned_blocks: int
    total_blocks: int
    block_size: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    cached_prompt_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    pinned_blocks: int
    preemptions: int
    copied_blocks: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    held_steps: dict[str, int]
    padded_tokens: int
    computed_tokens: int
    compiles_after_warmup: int
    finished: dict[str, int]
    failed_steps: int
    mask_seconds: float
    uptime_seconds: float
    restored_blocks: int
    disk_read_bytes: int
    disk_written_blocks: int
    disk_written_bytes: int
    disk_dropped_blocks: int
    disk_bytes: int
    disk_queued_bytes: int
    host_blocks: int
    total_host_blocks: int
    time_to_first_token: Buckets
    inter_token_latency: Buckets
    queue_time: Buckets


def read_stats(
    loop: EngineLoop, loaded: LoadedEngine, requests: RequestFigures, uptime: float
) -> EngineStats:
    """The figures of a running engine; none of it waits for the step loop.

    Args:
      loop, loaded, requests: the engine's own.
      uptime: seconds since it started.
    """
    totals = loop.totals
    disk = loaded.disk.counts() if loaded.disk else None
    times = requests.distributions()
    running, waiting, (free, cached, owned) = loop.gauges
    return EngineStats(
        running=running,
        waiting=waiting,
        free_blocks=free,
        cached_blocks=cached,
        owned_blocks=owned,
        total_blocks=free + cached + owned,
        block_size=loop.limits.block_size,
        steps=totals.steps,
        prompt_tokens=totals.prompt_tokens,
        generated_tokens=totals.generated_tokens,
        cached_prompt_tokens=totals.cached_prompt_tokens,
        prefix_cache_queries=totals.prefix_cache_queries,
        prefix_cache_hits=totals.prefix_cache_hits,
        pinned_blocks=loop.num_pinned_blocks,
        preemptions=totals.preemptions,
        copied_blocks=totals.copied_blocks,
        swapped_out_blocks=totals.swapped_out_blocks,
        swapped_in_blocks=totals.swapped_in_blocks,
        held_steps=dict(totals.held_steps),
        padded_tokens=totals.padded_tokens,
        computed_tokens=totals.computed_tokens,
        compiles_after_warmup=loaded.compiles_after_warmup(),
        finished=dict(totals.finished),
        failed_steps=totals.failed_steps,
        mask_seconds=totals.mask_seconds,
        uptime_seconds=uptime,
        restored_blocks=loop.tiers.num_restored,
        disk_read_bytes=disk.bytes_read if disk else 0,
        disk_written_blocks=disk.written if disk else 0,
        disk_written_bytes=disk.bytes_written if disk else 0,
        disk_dropped_blocks=disk.dropped if disk else 0,
        disk_bytes=disk.num_bytes if disk else 0,
        disk_queued_bytes=disk.queued_bytes if disk else 0,
        host_blocks=loop.num_host_blocks,
        total_host_blocks=loop.limits.host_blocks,
        time_to_first_token=times["time_to_first_token"],
        inter_token_latency=times["inter_token_latency"],
        queue_time=times["queue_time"],
    )
