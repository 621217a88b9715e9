"""A server's cache without a server: prompts, tenants, a clock that nobody waits for.

It knows every channel twice, as one that leaks across tenants and as one that does not, so that
a test can open them one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import numpy as np

from engine.leakcheck.channels import Channel

SECONDS_A_MISS = 0.5
SECONDS_A_HIT = 0.05
JITTER = 0.1  # relative standard deviation of a time


class Simulation:
    """A server that takes one request after the other.

    Args:
      leaks: channels on which a tenant's request meets what others have cached.
      caches: whether anything is cached at all.
      prefers_hits: whether cached prompts are served first of those that wait.
      shows: whether usage and metrics are there at all.
      burst: of so many fillers, where requests come as the experiment with bursts sends them, and
        through `in_order`: one for the victim, the fillers, the probe. A burst is served when all
        of it is there.
      delay: real seconds before a request is served.
    """

    def __init__(
        self,
        *leaks: Channel,
        caches: bool = True,
        prefers_hits: bool = True,
        shows: bool = True,
        burst: int = 0,
        delay: float = 0.0,
    ):
        self.leaks = frozenset(leaks)
        self.caches = caches
        self.prefers_hits = prefers_hits
        self.shows = shows
        self.shows_all = Channel.WATCH in self.leaks
        self.burst = burst
        self.delay = delay
        self.seconds = 0.0
        self.prompts: list[tuple[str, str]] = []
        self._cached: defaultdict[str, set[str]] = defaultdict(set)
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._waiting: list[tuple[str, str]] = []
        self._coming = asyncio.Lock()
        self._num_served = self._num_read = 0
        self._turn = asyncio.Condition()
        self._is_busy = False
        self._rng = np.random.default_rng(0)

    def now(self) -> float:
        """The simulated time, in seconds."""
        return self.seconds

    @contextlib.asynccontextmanager
    async def served(self, prompt: str, tenant: str) -> AsyncIterator[int]:
        """Serve a request: wait for its turn, take its time, and yield its cached tokens."""
        me = (prompt, tenant)
        self._waiting.append(me)
        self.prompts.append(me)
        turn, place = divmod(len(self.prompts) - 1, self.burst + 2)
        await asyncio.sleep(self.delay)
        while self.burst and place and len(self.prompts) < (turn + 1) * (self.burst + 2):
            await asyncio.sleep(0.001)
        async with self._turn:
            await self._turn.wait_for(lambda: not self._is_busy and self._next() == me)
            self._is_busy = True
            self._waiting.remove(me)
        while self.burst and self._num_read < self._num_served:  # the answer before this one
            await asyncio.sleep(0.001)
        self._num_served += 1
        is_hit = self._is_hit(Channel.TTFT, prompt, tenant)
        noise = max(0.1, 1 + JITTER * self._rng.standard_normal())
        self.seconds += noise * (SECONDS_A_HIT if is_hit else SECONDS_A_MISS)
        tokens = len(prompt.split())
        cached = tokens * self._is_hit(Channel.CACHED_TOKENS, prompt, tenant)
        counts = self._counts[tenant]
        counts["prompt_tokens"] += tokens
        counts["cached_prompt_tokens"] += tokens * self._is_hit(Channel.OCCUPANCY, prompt, tenant)
        counts["computed_tokens"] += tokens
        if self.caches:
            self._cached[tenant].add(prompt)
        try:
            yield cached
        finally:
            async with self._turn:
                self._is_busy = False
                self._turn.notify_all()

    async def in_order[T](self, sending: Coroutine[Any, Any, T]) -> T:
        """Send a request when the one before it has come, and say when its answer is read."""
        async with self._coming:
            number = len(self.prompts)
            task = asyncio.ensure_future(sending)
            while len(self.prompts) == number and not task.done():
                await asyncio.sleep(0.001)
        try:
            return await task
        finally:
            self._num_read += 1

    def metrics(self, tenant: str) -> dict[str, int]:
        """The counts that a tenant may read: its own, or everybody's if `watch` leaks."""
        return self.totals() if self.shows_all else dict(self._counts[tenant])

    def totals(self) -> dict[str, int]:
        """The counts of all tenants together."""
        return dict(sum(self._counts.values(), Counter()))

    def _next(self) -> tuple[str, str]:
        if not self.prefers_hits:
            return self._waiting[0]
        return max(self._waiting, key=lambda each: self._is_hit(Channel.QUEUE_ORDER, *each))

    def _is_hit(self, channel: Channel, prompt: str, tenant: str) -> bool:
        """Whether a request finds its prompt, as far as this channel shows."""
        caches = self._cached.values() if channel in self.leaks else [self._cached[tenant]]
        return any(prompt in cache for cache in caches)
