"""When each request's tokens came: distributions for all of them, sums by tenant and by domain, a
record of each.

Times are taken where deltas are handed to their reader, on its event loop, so nothing of it runs on
the step loop's thread; a delta costs a lock and a bisection.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, NamedTuple

from engine.domain_usage import DomainUsage, UsageByDomain
from engine.observe.calls import Call, current_call
from engine.observe.histogram import Buckets, Histogram
from engine.types import Domain, FinishReason

if TYPE_CHECKING:
    from engine.streams import Delta

log = logging.getLogger(__name__)

MAX_TENANTS = 64
"""Tenants whose sums are kept apart; those that come later are one, called OTHER."""
OTHER = "(other)"  # which no tenant can be called

# Bounds in seconds: 1 ms is a small model's step on an accelerator, 10 minutes a queue that nobody
# waits for. Times of whole requests, of parts of them, and between tokens.
_WAITS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_WAITS += (10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_REQUESTS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0)
_REQUESTS += (50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.15)
_GAPS += (0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

BOUNDS: dict[str, tuple[float, ...]] = {
    "time_to_first_token": _WAITS,
    "inter_token_latency": _GAPS,
    "e2e_latency": _REQUESTS,
    "queue_time": _WAITS,
    "prefill_time": _WAITS,
    "decode_time": _REQUESTS,
    "prompt_tokens": _TOKENS,
    "generation_tokens": _TOKENS,
}
"""The distributions, as `RequestFigures.distributions` has them.

Each answer counts once, those of `n` one by one. Between tokens: the time between two deltas,
divided evenly over the tokens of the later one, which count one each. In the queue, over prompt and
output: up to the first token, from the first to the last. What was aborted or failed is in the
distributions of single tokens only.
"""


class Answer(NamedTuple):
    """How one answer went. Times are seconds after the request was received, None for never.

    Attributes:
      index: which of the request's samples.
      queued: how long it was in the queue, after preemptions too.
      queued_first: the same, before its first token.
    """

    index: int
    finish_reason: FinishReason
    completion_tokens: int
    first_token: float | None
    last_token: float | None
    queued: float | None
    queued_first: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class RequestRecord:
    """How a request went, without anything of what it said.

    Attributes:
      request_id: as its client knows it.
      response_id: what its client knows the answer by.
      operation: what was asked for; see `Call`.
      tenant: whose it is.
      trace: the caller's trace context, by header.
      received: when it came, in seconds since the epoch.
      submitted: seconds after that it went to the step loop; None if it was refused before.
      seconds: until it ended.
      prompt_tokens, cached_tokens: of the prompt; how many were found in the cache.
      answers: those that were under way.
      refusal: the class of the error that ended it, if one did.
    """

    request_id: str
    response_id: str
    operation: str
    tenant: str
    trace: Mapping[str, str]
    received: float
    submitted: float | None
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    answers: tuple[Answer, ...]
    refusal: str | None


class TenantFigures(NamedTuple):
    """What a tenant's requests came to, and how many of its calls its limits refused."""

    usage: DomainUsage
    throttled: int


class RequestFigures:
    """The figures of all requests. Thread-safe.

    Attributes:
      listeners: called with the record of each request that ended, on its event loop. They must
        be quick; what they raise is logged.
      on_tokens: called with a tenant and a number of tokens whenever some become known: a prompt's
        once it is read, an answer's when they are delivered. On the request's event loop.
    """

    def __init__(self, max_tenants: int = MAX_TENANTS):
        self.listeners: list[Callable[[RequestRecord], None]] = []
        self.on_tokens: Callable[[str, int], None] = lambda tenant, tokens: None
        self.lock = threading.Lock()
        self.histograms = {name: Histogram(bounds) for name, bounds in BOUNDS.items()}
        self._max_tenants = max_tenants
        self._tenants: dict[str, DomainUsage] = {}
        self._throttled: Counter[str] = Counter()
        self._domains = UsageByDomain()

    def start(self, request_id: str, domain: Domain, received: float) -> RequestTimer:
        """A request came, at that time of `time.monotonic`; close the timer when it has ended."""
        with self.lock:
            tenant = self._tenants.setdefault(self._label(domain.tenant), DomainUsage())
            usages = tenant, self._domains.asked(domain)
            for usage in usages:
                usage.in_progress += 1
        return RequestTimer(self, usages, request_id, domain.tenant, received)

    def throttled(self, tenant: str) -> None:
        """A call was refused, as its tenant had asked for all that it may for now."""
        with self.lock:
            label = self._label(tenant)
            self._tenants.setdefault(label, DomainUsage())
            self._throttled[label] += 1

    def keep_tenants(self, names: Set[str]) -> None:
        """Forget all tenants but these, and so make room for others."""
        with self.lock:
            self._domains.keep(names)
            for gone in self._tenants.keys() - names - {OTHER}:
                del self._tenants[gone]
                del self._throttled[gone]

    def usage(self, domain: Domain) -> DomainUsage:
        """What the requests of one domain came to."""
        with self.lock:
            return self._domains.of(domain)

    def distributions(self) -> dict[str, Buckets]:
        """The distributions so far, by the names in `BOUNDS`."""
        with self.lock:
            return {name: histogram.read() for name, histogram in self.histograms.items()}

    def tenants(self) -> dict[str, TenantFigures]:
        """What the requests of each tenant came to; at most one more than are kept apart."""
        with self.lock:
            return {
                name: TenantFigures(usage.copy(), self._throttled[name])
                for name, usage in self._tenants.items()
            }

    def tell(self, record: RequestRecord) -> None:
        """Pass a record to the listeners."""
        for listener in self.listeners:
            try:
                listener(record)
            except Exception:  # it must not end somebody's stream
                log.exception("what watches requests failed")

    def _label(self, tenant: str) -> str:
        """Under which name a tenant is counted; called with the lock."""
        if tenant in self._tenants:
            return tenant
        num_apart = len(self._tenants) - (OTHER in self._tenants)
        return tenant if num_apart < self._max_tenants else OTHER


class _Progress:
    """What is known of an answer that is under way."""

    __slots__ = ("first", "last", "queued", "queued_first", "tokens")

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = 0.0
        self.tokens = 0
        self.queued: float | None = None
        self.queued_first: float | None = None


class RequestTimer:
    """Times the answers to one request, and counts them for whose it is.

    Args:
      figures: the distributions.
      usages: the sums that it counts in.
      request_id, tenant, received: as `RequestFigures.start` has them.
    """

    def __init__(
        self,
        figures: RequestFigures,
        usages: tuple[DomainUsage, ...],
        request_id: str,
        tenant: str,
        received: float,
    ):
        self._figures = figures
        self._usages = usages
        self._name = request_id, tenant
        self._received = received
        self._submitted: float | None = None
        self._prompt = (0, 0)  # tokens, and those of them that were cached
        self._progress: dict[int, _Progress] = {}
        self._answers: list[Answer] = []
        self._refusal: str | None = None

    def submitted(self, prompt_tokens: int) -> None:
        """It is handed to the step loop, with so many tokens."""
        self._submitted = time.monotonic()
        self._figures.on_tokens(self._name[1], prompt_tokens)

    def refused(self, error: Exception) -> None:
        """It ends with an error, whose message may quote it and is left out."""
        self._refusal = type(error).__name__

    def add(self, delta: Delta, now: float) -> None:
        """Take in a part of an answer, at a time of `time.monotonic`, before the client sees it."""
        figures, num_tokens = self._figures, len(delta.token_ids)
        figures.on_tokens(self._name[1], num_tokens)
        answer = self._progress.get(delta.index)
        if answer is None:
            answer = self._progress[delta.index] = _Progress()
        if delta.waited is not None:
            answer.queued = delta.waited.seconds
        with figures.lock:
            if num_tokens:
                histograms = figures.histograms
                if answer.first is None:
                    answer.first, answer.queued_first = now, answer.queued
                    histograms["time_to_first_token"].observe(now - self._received)
                else:
                    gap = (now - answer.last) / num_tokens
                    histograms["inter_token_latency"].observe(gap, num_tokens)
                answer.last = now
                answer.tokens += num_tokens
                for usage in self._usages:
                    usage.generated_tokens += num_tokens
            self._prompt = delta.usage.prompt_tokens, delta.usage.cached_tokens
            if delta.finish_reason is not None:
                self._end(delta.index, delta.finish_reason, now)

    def close(self, unfinished: Iterable[int]) -> None:
        """The request has ended; these answers were under way, and are aborted. Others that had
        begun, and whose end was not told, failed with the request."""
        now = time.monotonic()
        with self._figures.lock:
            for usage in self._usages:
                usage.in_progress -= 1
            for index in unfinished:
                self._end(index, FinishReason.ABORT, now)
            for index in tuple(self._progress):
                self._end(index, FinishReason.ERROR, now)
        if self._figures.listeners:
            self._figures.tell(self._record(now))

    def _end(self, index: int, reason: FinishReason, now: float) -> None:
        """An answer ended; called with the lock."""
        answer = self._progress.pop(index, None) or _Progress()
        prompt_tokens, cached_tokens = self._prompt
        for usage in self._usages:
            usage.end(reason.value, prompt_tokens, cached_tokens)
        if reason not in (FinishReason.ABORT, FinishReason.ERROR):
            histograms = self._figures.histograms
            histograms["e2e_latency"].observe(now - self._received)
            histograms["prompt_tokens"].observe(prompt_tokens)
            histograms["generation_tokens"].observe(answer.tokens)
            if answer.queued is not None:
                histograms["queue_time"].observe(answer.queued)
            if answer.first is not None and self._submitted is not None:
                prefill = answer.first - self._submitted - (answer.queued_first or 0.0)
                histograms["prefill_time"].observe(max(0.0, prefill))
                histograms["decode_time"].observe(answer.last - answer.first)
        started = answer.first is not None
        self._answers.append(
            Answer(
                index,
                reason,
                answer.tokens,
                answer.first - self._received if answer.first is not None else None,
                answer.last - self._received if started else None,
                answer.queued,
                answer.queued_first,
            )
        )

    def _record(self, now: float) -> RequestRecord:
        call = current_call.get() or Call()
        name, tenant = self._name
        request_id = call.request_id or name  # the engine's name has the tenant in it
        seconds = now - self._received
        prompt_tokens, cached_tokens = self._prompt
        return RequestRecord(
            request_id=request_id,
            response_id=call.response_id or request_id,
            operation=call.operation,
            tenant=tenant,
            trace=call.trace,
            received=time.time() - seconds,
            submitted=None if self._submitted is None else self._submitted - self._received,
            seconds=seconds,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            answers=tuple(self._answers),
            refusal=self._refusal,
        )
