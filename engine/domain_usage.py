"""What requests asked for and got, summed: a domain's callers may see its sums.

A domain's follow from its own requests and replies alone, so they tell nothing of others; what
the engine does for all of them together is the operator's to see (`frontend.EngineStats`).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Set

from engine.types import Domain

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

    def end(self, reason: str, prompt_tokens: int, cached_tokens: int) -> None:
        """An answer ended."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.prompt_tokens += prompt_tokens
        self.cached_prompt_tokens += cached_tokens

    def copy(self) -> DomainUsage:
        """What it is now."""
        return dataclasses.replace(self, finished=self.finished.copy())


class UsageByDomain:
    """The usage of every domain that asked lately. Each operation is O(1), and its owner's lock is
    held.

    Of each tenant the domains that asked last are kept, so that one tenant's salts can't push out
    another tenant's figures.
    """

    def __init__(self, max_domains: int = MAX_DOMAINS):
        self._max_domains = max_domains
        self._tenants: dict[str, OrderedDict[str, DomainUsage]] = {}

    def of(self, domain: Domain) -> DomainUsage:
        """A copy of a domain's usage; all zeros if it has not asked for anything."""
        found = self._tenants.get(domain.tenant, {}).get(domain.salt)
        return DomainUsage() if found is None else found.copy()

    def asked(self, domain: Domain) -> DomainUsage:
        """The usage of a domain that asks for something now, to be counted in."""
        domains = self._tenants.setdefault(domain.tenant, OrderedDict())
        usage = domains.setdefault(domain.salt, DomainUsage())
        domains.move_to_end(domain.salt)
        if len(domains) > self._max_domains:
            domains.popitem(last=False)
        return usage

    def keep(self, tenants: Set[str]) -> None:
        """Forget all other tenants."""
        self._tenants = {name: of for name, of in self._tenants.items() if name in tenants}
