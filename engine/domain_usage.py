"""What each domain asked for and got: the figures that a caller may see of its own requests.

They follow from the domain's own requests and replies alone, so they tell nothing of others; what
the engine does for all of them together is the operator's to see (`frontend.EngineStats`).
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict

from engine.streams import Delta, Usage
from engine.types import Domain, FinishReason

MAX_DOMAINS = 1024  # of one tenant; a client may invent as many salts as it likes


@dataclasses.dataclass(slots=True)
class DomainUsage:
    """Counts since the engine started, or since the domain was forgotten for being idle longest.

    Attributes:
      in_progress: requests that have not ended.
      prompt_tokens, cached_prompt_tokens: of answers that ended; what was found in the cache.
      generated_tokens: those that were delivered.
      finished: answers that ended, by reason; samples of one prompt count one by one.
    """

    in_progress: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)


class UsageByDomain:
    """The usage of every domain that asked lately. Thread-safe; each operation is O(1).

    Of each tenant the domains that asked last are kept, so that one tenant's salts can't push out
    another tenant's figures. Nothing of it runs on the step loop's thread.
    """

    def __init__(self, max_domains: int = MAX_DOMAINS):
        self._max_domains = max_domains
        self._tenants: dict[str, OrderedDict[str, DomainUsage]] = {}
        self._lock = threading.Lock()

    def of(self, domain: Domain) -> DomainUsage:
        """A copy of a domain's usage; all zeros if it has not asked for anything."""
        with self._lock:
            found = self._tenants.get(domain.tenant, {}).get(domain.salt)
            if found is None:
                return DomainUsage()
            return dataclasses.replace(found, finished=found.finished.copy())

    def start(self, domain: Domain) -> Meter:
        """Count a request as in progress until its meter is closed."""
        with self._lock:
            domains = self._tenants.setdefault(domain.tenant, OrderedDict())
            usage = domains.setdefault(domain.salt, DomainUsage())
            domains.move_to_end(domain.salt)
            if len(domains) > self._max_domains:
                domains.popitem(last=False)
            usage.in_progress += 1
        return Meter(usage, self._lock)


class Meter:
    """Counts the answers to one request."""

    def __init__(self, usage: DomainUsage, lock: threading.Lock):
        self._usage = usage
        self._lock = lock
        self._unfinished: dict[int, Usage] = {}  # by sample, the latest

    def add(self, delta: Delta) -> None:
        """Take in a part of an answer, before the client sees it."""
        with self._lock:
            self._usage.generated_tokens += len(delta.token_ids)
            self._unfinished[delta.index] = delta.usage
            if delta.finish_reason is not None:
                self._end(delta.index, delta.finish_reason)

    def close(self) -> None:
        """The request has ended; answers that were left unfinished were aborted."""
        with self._lock:
            for index in tuple(self._unfinished):
                self._end(index, FinishReason.ABORT)
            self._usage.in_progress -= 1

    def _end(self, index: int, reason: FinishReason) -> None:
        last = self._unfinished.pop(index)
        finished = self._usage.finished
        finished[reason.value] = finished.get(reason.value, 0) + 1
        self._usage.prompt_tokens += last.prompt_tokens
        self._usage.cached_prompt_tokens += last.cached_tokens
