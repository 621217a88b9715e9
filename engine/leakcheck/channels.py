"""The published attacks, as experiments: what a tenant sees when a prompt is cached, and when not.

Each experiment has two arms that differ in one thing, whether the probe's prompt was sent before.
Every prompt is fresh and probed once, so that no probe warms the cache for a later one.

Sources, by the names that the channels' descriptions use:

- PROMPTPEEK: Wu et al., "I Know What You Asked: Prompt Leakage via KV-Cache Sharing in Multi-Tenant
  LLM Serving", NDSS 2025. Order under longest-prefix-match scheduling, and time to first token.
- Early Bird: Song et al., "The Early Bird Catches the Leak: Unveiling Timing Side Channels in LLM
  Serving Systems", arXiv:2409.20002. Time to first token.
- Audit: Gu et al., "Auditing Prompt Caching in Language Model APIs", ICML 2025. Time to first token
  with a negative control, told apart by a two-sample Kolmogorov-Smirnov test.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from engine.leakcheck.targets import Prompt, Reply, Target, Tenant

type Figures = Mapping[str, float]


class Channel(enum.StrEnum):
    """A way in which a cached prefix may show."""

    TTFT = "ttft"
    CACHED_TOKENS = "cached_tokens"
    QUEUE_ORDER = "queue_order"
    OCCUPANCY = "occupancy"
    WATCH = "watch"


DESCRIPTIONS = {
    Channel.TTFT: "a cached prompt's first token comes sooner (PROMPTPEEK, Early Bird, Audit)",
    Channel.CACHED_TOKENS: "the reply's usage counts cached tokens",
    Channel.QUEUE_ORDER: "a cached prompt overtakes others in the queue (PROMPTPEEK)",
    Channel.OCCUPANCY: "figures that one may read change otherwise by a probe of a cached prompt",
    Channel.WATCH: "figures that one may read tell whether somebody else's prompt was cached",
}


class Observation(NamedTuple):
    """What one probe showed.

    Attributes:
      figures: by channel, the numbers that the attacker saw; None if the server shows none.
      orderliness: of a burst, the fraction of pairs of fillers that ended in the order in which
        they were sent: 1 if there was a queue and it is served in order, 0.5 for chance.
    """

    figures: dict[Channel, Figures | None]
    orderliness: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Who attacks whom, and how.

    Attributes:
      burst: fillers that are sent before the probe, for the queue's order.
      gap: seconds between the requests of a burst, so that they arrive in order.
      channels: those to observe; what none of them needs is not done.
    """

    target: Target
    victim: Tenant
    attacker: Tenant
    burst: int
    gap: float
    channels: frozenset[Channel]


async def probe(scene: Scene, positive: bool) -> Observation:
    """The victim sends a prompt; the attacker probes that prompt, or one that nobody sent.

    The victim sends something in both arms, so that what comes just before the probe is the same.
    """
    target = scene.target
    wants_metrics = Channel.OCCUPANCY in scene.channels
    prompt = await _victims_prompt(scene, positive)
    before = await target.metrics(scene.attacker) if wants_metrics else None
    reply = await target.send(prompt, scene.attacker)
    after = await target.metrics(scene.attacker) if before is not None else None
    cached = reply.cached_tokens
    return Observation(
        {
            Channel.TTFT: {"seconds to first token": reply.seconds},
            Channel.CACHED_TOKENS: None if cached is None else {"cached tokens": float(cached)},
            Channel.OCCUPANCY: _changes(before, after),
        }
    )


async def burst(scene: Scene, positive: bool) -> Observation:
    """The probe is sent last in a burst of fresh fillers; how many does it overtake?

    A scheduler that prefers long cached prefixes serves a cached probe first of those that wait.
    """
    prompt = await _victims_prompt(scene, positive)
    prompts = [*(scene.target.fresh_prompt() for _ in range(scene.burst)), prompt]
    finished: list[int] = []

    async def send(place: int, prompt: Prompt) -> Reply:
        reply = await scene.target.send(prompt, scene.attacker)
        finished.append(place)
        return reply

    tasks: list[asyncio.Task[Reply]] = []
    try:
        for place, each in enumerate(prompts):
            tasks.append(asyncio.create_task(send(place, each)))
            await asyncio.sleep(scene.gap)
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    overtaken = scene.burst - finished.index(scene.burst)
    fillers = [place for place in finished if place != scene.burst]
    return Observation(
        {Channel.QUEUE_ORDER: {"fillers overtaken": float(overtaken)}}, orderliness(fillers)
    )


async def watch(scene: Scene, positive: bool) -> Observation:
    """The victim sends a prompt again, or a fresh one, while the attacker only reads metrics."""
    target = scene.target
    prompt = await _victims_prompt(scene, positive)
    before = await target.metrics(scene.attacker)
    await target.send(prompt, scene.victim)
    after = await target.metrics(scene.attacker) if before is not None else None
    return Observation({Channel.WATCH: _changes(before, after)})


EXPERIMENTS: Mapping[Callable[[Scene, bool], Awaitable[Observation]], frozenset[Channel]] = {
    probe: frozenset({Channel.TTFT, Channel.CACHED_TOKENS, Channel.OCCUPANCY}),
    burst: frozenset({Channel.QUEUE_ORDER}),
    watch: frozenset({Channel.WATCH}),
}


def orderliness(places: Sequence[int]) -> float:
    """The fraction of pairs that are in ascending order; 0.5 if there are none."""
    pairs = [a < b for index, a in enumerate(places) for b in places[index + 1 :]]
    return sum(pairs) / len(pairs) if pairs else 0.5


async def _victims_prompt(scene: Scene, positive: bool) -> Prompt:
    """Let the victim send a prompt; that prompt, or a fresh one that nobody sent."""
    secret, fresh = scene.target.fresh_prompt(), scene.target.fresh_prompt()
    await scene.target.send(secret, scene.victim)
    return secret if positive else fresh


def _changes(before: Figures | None, after: Figures | None) -> Figures | None:
    """By how much each figure changed; those that came or went meanwhile changed from or to 0."""
    if before is None or after is None:
        return None
    names = before.keys() | after.keys()
    return {name: after.get(name, 0.0) - before.get(name, 0.0) for name in sorted(names)}
