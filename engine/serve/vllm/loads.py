"""How busy the engine is, in the numbers that gateways route by: for GetLoads, and pushed beside KV
events."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from engine import __version__

if TYPE_CHECKING:
    from engine.frontend import Engine, EngineStats

_WINDOW_SECONDS = 10.0  # over which throughput is measured
_SAMPLE_SECONDS = 0.5
_FRESH_SECONDS = 0.05  # for which figures are as good as new ones, which take a millisecond to read


class Load(NamedTuple):
    """Where an engine stands. Tokens are those that the blocks in use hold, or could.

    Attributes:
      waiting_tokens: of prompts that gateways sent and that have no answer yet, if requests wait.
        At most so many are to be computed: what the cache has of them is known when they begin.
      usage: the share of the cache that requests hold; what is merely kept counts as free.
      throughput: tokens generated in a second, lately.
      hit_rate: the share of all prompt tokens so far that came from the cache.
    """

    running: int
    waiting: int
    waiting_tokens: int
    used_tokens: int
    total_tokens: int
    usage: float
    throughput: float
    hit_rate: float
    max_running: int

    @property
    def core(self) -> tuple[float, ...]:
        """What a gateway routes by, but for the throughput, which never stands still."""
        return (self.running, self.waiting, self.usage)


class Loads:
    """Reads the load of an engine, not more often than it can matter: subscribers are told it with
    each batch. Throughput comes from what earlier reads saw."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._pending_tokens = 0
        self._stats: EngineStats | None = None
        self._read_at = 0.0

    def stats(self, engine: Engine) -> EngineStats:
        """The engine's figures, of now or a moment ago."""
        now = time.monotonic()
        if self._stats is None or now - self._read_at >= _FRESH_SECONDS:
            self._stats, self._read_at = engine.stats(), now
        return self._stats

    @contextlib.contextmanager
    def pending(self, num_prompt: int) -> Iterator[Callable[[], None]]:
        """Count a prompt's tokens as not begun, until what this gives is called, or to the end."""
        counted = num_prompt
        self._pending_tokens += counted

        def has_begun() -> None:
            nonlocal counted
            self._pending_tokens -= counted
            counted = 0

        try:
            yield has_begun
        finally:
            has_begun()

    def read(self, engine: Engine) -> Load:
        """Where it stands now."""
        stats = self.stats(engine)
        used = stats.owned_blocks * stats.block_size
        return Load(
            running=stats.running,
            waiting=stats.waiting,
            waiting_tokens=self._pending_tokens if stats.waiting else 0,
            used_tokens=used,
            total_tokens=stats.total_blocks * stats.block_size,
            usage=stats.owned_blocks / max(1, stats.total_blocks),
            throughput=self._throughput(time.monotonic(), stats.generated_tokens),
            hit_rate=stats.prefix_cache_hits / max(1, stats.prefix_cache_queries),
            max_running=engine.config.scheduler.max_num_seqs,
        )

    def _throughput(self, now: float, generated: int) -> float:
        samples = self._samples
        while samples and now - samples[0][0] > _WINDOW_SECONDS:
            samples.popleft()
        rate = 0.0
        if samples and now > samples[0][0]:
            rate = (generated - samples[0][1]) / (now - samples[0][0])
        if not samples or now - samples[-1][0] >= _SAMPLE_SECONDS:
            samples.append((now, generated))
        return rate


def loads_to_proto(load: Load) -> pb.GetLoadsResponse:
    """The answer of GetLoads: one rank, number 0."""
    rank = pb.SchedulerLoad(
        num_running_reqs=load.running,
        num_waiting_reqs=load.waiting,
        num_total_reqs=load.running + load.waiting,
        num_used_tokens=load.used_tokens,
        max_total_num_tokens=load.total_tokens,
        token_usage=load.usage,
        gen_throughput=load.throughput,
        cache_hit_rate=load.hit_rate,
        utilization=load.running / max(1, load.max_running),
        max_running_requests=load.max_running,
        num_waiting_uncached_tokens=load.waiting_tokens,
    )
    return pb.GetLoadsResponse(
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(),
        version=__version__,
        dp_rank_count=1,
        loads=[rank],
    )


def load_record(load: Load, sample: int, *, is_full: bool) -> common_pb2.EngineLoad:
    """The record that goes with a batch of events, or alone.

    Args:
      load: what it tells.
      sample: its number in its stream.
      is_full: with what nobody routes by, which the first record of a stream has, and those that go
        alone.
    """
    record = common_pb2.EngineLoad(
        running_requests=load.running,
        waiting_requests=load.waiting,
        waiting_uncached_tokens=load.waiting_tokens,
        token_usage=load.usage,
        active_token_usage=load.usage,
        gen_throughput=load.throughput,
        max_running_requests=load.max_running,
        sample=sample,
    )
    if is_full:
        record.cache_hit_rate = load.hit_rate
        record.num_used_tokens = load.used_tokens
        record.max_total_num_tokens = load.total_tokens
    return record
