"""`GET /metrics`: the engine's figures for Prometheus, shaped and named as vLLM's are.

Nothing is counted for it: a scrape reads sums and distributions that are there anyway, so it costs
the step loop nothing, and it is written out piece by piece, so that no stream waits for it.
No label holds what a client chose, nor anything of a request; tenants are bounded in number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest as text_format
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_format
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import __version__
from engine.observe.histogram import Buckets
from engine.observe.requests import TenantFigures
from engine.serve.calls import Calls
from engine.serve.errors import Refused
from engine.serve.failures import FAILED, Failure, Failures

if TYPE_CHECKING:
    from engine.frontend import Engine

PREFIX = "octavo:"
UNKNOWN = "(unknown)"
"""What a path that is not routed is counted as."""
_OPENMETRICS = "application/openmetrics-text"
_END = b"# EOF\n"  # of OpenMetrics, after the last family

_Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]

_GAUGES = {
    "num_requests_running": ("running", "Sequences that run in steps."),
    "num_requests_waiting": ("waiting", "Sequences that wait for their turn."),
    "kv_pinned_blocks": ("pinned_blocks", "Blocks that hold the operator's public prefixes."),
    "host_blocks": ("host_blocks", "Blocks that lie in the host tier."),
    "host_total_blocks": ("total_host_blocks", "Blocks that the host tier has room for."),
    "disk_bytes": ("disk_bytes", "Bytes of the disk tier's files."),
    "disk_queued_bytes": ("disk_queued_bytes", "Bytes that wait to be written to the disk tier."),
}
_COUNTERS = {
    "prefix_cache_queries": (
        "prefix_cache_queries",
        "Prompt tokens looked up in the cache.",
    ),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found there."),
    "prompt_tokens": ("prompt_tokens", "Tokens of the prompts of answers that ended."),
    "generation_tokens": ("generated_tokens", "Tokens that were generated."),
    "num_preemptions": ("preemptions", "Times a running sequence lost its blocks."),
    "block_copies": ("copied_blocks", "Blocks that were copied before a write (copy-on-write)."),
    "swapped_out_blocks": ("swapped_out_blocks", "Blocks that went from the pool to the host."),
    "swapped_in_blocks": ("swapped_in_blocks", "Blocks that came back from the host."),
    "disk_restored_blocks": ("restored_blocks", "Blocks that came from the disk tier."),
    "disk_read_bytes": ("disk_read_bytes", "Bytes read from the disk tier."),
    "disk_written_blocks": ("disk_written_blocks", "Blocks written to the disk tier."),
    "disk_written_bytes": ("disk_written_bytes", "Bytes written to the disk tier."),
    "disk_dropped_blocks": ("disk_dropped_blocks", "Blocks that were not written after all."),
    "engine_steps": ("steps", "Steps that were done."),
    "computed_tokens": ("computed_tokens", "Positions computed for requests."),
    "padded_tokens": ("padded_tokens", "Positions computed in all, padding included."),
    "compiles_after_warmup": ("compiles_after_warmup", "Programs compiled late; should stay 0."),
    "failed_steps": ("failed_steps", "Steps that failed, together with their requests."),
    "mask_seconds": ("mask_seconds", "Processor time that constraints took of steps."),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token", "From a request to its first token."),
    "inter_token_latency_seconds": ("inter_token_latency", "Between two tokens of an answer."),
    "e2e_request_latency_seconds": ("e2e_latency", "From a request to the end of an answer."),
    "request_queue_time_seconds": ("queue_time", "In the queue, after preemptions too."),
    "request_prefill_time_seconds": ("prefill_time", "From its start to the first token."),
    "request_decode_time_seconds": ("decode_time", "From the first token to the last."),
    "request_prompt_tokens": ("prompt_tokens", "Tokens of the prompt, by answer."),
    "request_generation_tokens": ("generation_tokens", "Tokens generated, by answer."),
}
_HELD_STEPS = "Steps after which requests still waited, by what held back the first of them."
_TENANTS: tuple[tuple[_Kind, str, str, Callable[[TenantFigures], int]], ...] = (
    (
        GaugeMetricFamily,
        "tenant_requests_in_progress",
        "Requests that have not ended.",
        lambda figures: figures.usage.in_progress,
    ),
    (
        CounterMetricFamily,
        "tenant_prompt_tokens",
        "Tokens of prompts, of answers that ended.",
        lambda figures: figures.usage.prompt_tokens,
    ),
    (
        CounterMetricFamily,
        "tenant_cached_prompt_tokens",
        "Those of them that were found in the cache.",
        lambda figures: figures.usage.cached_prompt_tokens,
    ),
    (
        CounterMetricFamily,
        "tenant_generation_tokens",
        "Tokens that were delivered.",
        lambda figures: figures.usage.generated_tokens,
    ),
    (
        CounterMetricFamily,
        "tenant_throttled_calls",
        "Calls that the tenant's limits refused.",
        lambda figures: figures.throttled,
    ),
)


class Metrics:
    """The route. Whom it answers is the doorkeeper's to say: operators.

    Args:
      calls: with the engine, once it is loaded.
    """

    def __init__(self, calls: Calls):
        self._calls = calls
        self._process = ProcessCollector(registry=None)

    @property
    def routes(self) -> list[BaseRoute]:
        """`/metrics`, in Prometheus' text format or OpenMetrics, as is asked for."""
        return [Route("/metrics", self._scrape)]

    def collect(self) -> Iterator[Metric]:
        """Every family. Before the engine is loaded, those of the server alone."""
        yield InfoMetricFamily(
            f"{PREFIX}build", "Which Octavo this is.", value={"version": __version__}
        )
        yield _gauge("calls_in_progress", "Calls in progress.", self._calls.num_in_progress)
        yield _family(
            CounterMetricFamily,
            "failed_calls",
            "Calls that ended with an error, of callers who are not let in too.",
            Failure._fields,
            sorted(self._calls.failures.items()),
        )
        try:
            engine = self._calls.engine(even_late=True)
        except Refused:  # it is not loaded yet
            return
        yield from _engine_families(engine)

    async def _scrape(self, request: Request) -> Response:
        is_open = _OPENMETRICS in request.headers.get("accept", "")
        encode = openmetrics_format if is_open else text_format
        pieces = []
        for family in [*self.collect(), *self._process.collect()]:
            # Names of ours need no escaping; other schemes than this one take their colon away.
            pieces.append(encode(_One(family), escaping=ALLOWUTF8).removesuffix(_END))
            await asyncio.sleep(0)  # streams go on
        if is_open:
            pieces.append(_END)
        kind = f"{_OPENMETRICS}; version=1.0.0" if is_open else "text/plain; version=0.0.4"
        return Response(b"".join(pieces), headers={"content-type": f"{kind}; charset=utf-8"})


class CountFailures:
    """Counts HTTP requests that end with an error.

    Args:
      app: answers.
      routes: its own.
      failures: they are counted here.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], failures: Failures):
        self._app = app
        self._routes = tuple(routes)
        self._failures = failures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            status = scope.get(FAILED, status)
            if status >= 400:
                self._failures.add("http", self._method(scope), str(status))

    def _method(self, scope: Scope) -> str:
        for route in self._routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return route.path
        return UNKNOWN


class _One(CollectorRegistry):
    """A registry of one family, as encoders take registries."""

    def __init__(self, family: Metric):
        self._family = family

    def collect(self) -> Iterator[Metric]:
        """The family."""
        yield self._family


def _engine_families(engine: Engine) -> Iterator[Metric]:
    stats, requests, info = engine.stats(), engine.requests, engine.model_info()
    model = {"model_name": info.name}
    yield InfoMetricFamily(
        f"{PREFIX}cache_config",
        "The pool.",
        value={
            **model,
            "block_size": str(stats.block_size),
            "num_blocks": str(stats.total_blocks),
            "max_model_len": str(info.max_model_len),
            "dtype": info.dtype,
            "attention": info.attention.partition(",")[0],
            "products": info.products.partition(",")[0],
        },
    )
    usage = stats.owned_blocks / max(1, stats.total_blocks)
    yield _gauge("kv_cache_usage_perc", "Share of the pool that requests hold.", usage, model)
    for name, (field, text) in _GAUGES.items():
        yield _gauge(name, text, getattr(stats, field), model)
    blocks = [((each,), getattr(stats, f"{each}_blocks")) for each in ("free", "cached", "owned")]
    yield _family(GaugeMetricFamily, "kv_blocks", "Blocks by state.", ("state",), blocks, model)
    for name, (field, text) in _COUNTERS.items():
        yield _family(CounterMetricFamily, name, text, (), [((), getattr(stats, field))], model)
    for name, label, text, counts in (
        ("request_success", "finished_reason", "Answers that ended, by how.", stats.finished),
        ("held_steps", "reason", _HELD_STEPS, stats.held_steps),
    ):
        values = [((key,), count) for key, count in counts.items()]
        yield _family(CounterMetricFamily, name, text, (label,), values, model)
    distributions = requests.distributions()
    for name, (field, text) in _HISTOGRAMS.items():
        yield _histogram(name, text, distributions[field], model)
    yield from _tenant_families(requests.tenants(), model)


def _tenant_families(
    tenants: Mapping[str, TenantFigures], model: Mapping[str, str]
) -> Iterator[Metric]:
    for kind, metric, text, read in _TENANTS:
        values = [((name,), read(figures)) for name, figures in tenants.items()]
        yield _family(kind, metric, text, ("tenant",), values, model)
    labels = ("tenant", "finished_reason")
    finished = [
        ((name, reason), count)
        for name, figures in tenants.items()
        for reason, count in figures.usage.finished.items()
    ]
    text = "Answers that ended, by how."
    yield _family(CounterMetricFamily, "tenant_answers", text, labels, finished, model)


def _gauge(
    name: str, text: str, value: float, common: Mapping[str, str] = MappingProxyType({})
) -> Metric:
    return _family(GaugeMetricFamily, name, text, (), [((), value)], common)


def _family(
    kind: _Kind,
    name: str,
    text: str,
    labels: Sequence[str],
    values: Iterable[tuple[Sequence[str], float]],
    common: Mapping[str, str] = MappingProxyType({}),
) -> Metric:
    """Values by their labels, beside those that all of them have."""
    family = kind(PREFIX + name, text, labels=[*common, *labels])
    for key, value in values:
        family.add_metric([*common.values(), *key], value)
    return family


def _histogram(
    name: str, text: str, buckets: Buckets, labels: Mapping[str, str]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + name, text, labels=list(labels))
    bounds: Iterable[str] = (*map(str, buckets.bounds), "+Inf")
    upto = list(zip(bounds, accumulate(buckets.counts), strict=True))
    family.add_metric(list(labels.values()), upto, buckets.sum)
    return family
