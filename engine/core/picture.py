"""What a scheduler state looks like at one moment: which block is whose, who runs and who waits.

It is for showing to an operator, so it holds counts, block ids and names, but no token and no text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import secrets
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engine.core.beams import gangs
from engine.core.core import Core, Holding
from engine.core.scheduler import SchedulerState
from engine.core.sequences import Sequence
from engine.types import Domain

MAX_WAITING = 32
"""Requests of the queue that a picture names; it counts them all."""
_KEY = secrets.token_bytes(16)  # of this process, so that nobody can try guesses of a salt
_FIRST_KEPT = 2**30  # numbers from here on are no arrivals; they fit an int32


class Running(NamedTuple):
    """A sequence that holds blocks.

    Attributes:
      number: of its arrival; no two sequences share one, and a colour can be made from it.
      domain: see `domain_tag`.
      num_prompt, num_known: tokens of the prompt, and with those generated so far.
      num_computed: positions whose keys and values are in the cache or planned to be. Blocks past
        them are reserved: they hold nothing yet.
      num_cached: prompt tokens that were found in the cache.
      num_preemptions: times it lost its blocks.
      block_ids: int32[P], its block table; read-only.
    """

    number: int
    request_id: str
    domain: str
    num_prompt: int
    num_known: int
    num_computed: int
    num_cached: int
    num_preemptions: int
    block_ids: np.ndarray


class Waiting(NamedTuple):
    """A request that holds no block: not started yet, or preempted. Fields as in `Running`."""

    number: int
    request_id: str
    domain: str
    num_prompt: int
    num_known: int
    num_preemptions: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One moment of a scheduler.

    A block in the table of some sequence that is `running`, or in one of `kept`, is owned, once for
    each of them; of the others, those in `cached` are cached, and all the rest are free.

    Attributes:
      num_blocks, block_size, num_host_slots, num_slots: sizes of the pool (blocks), of a block
        (tokens) and of the host tier (blocks), and the most sequences that can run.
      step: the number of the next plan.
      running: by rank.
      kept: blocks that are owned though no sequence has them in its table, as if it had: public
        prefixes, and what is kept for beams.
      waiting: the first of those that wait, by rank; `num_waiting` counts all.
      holding: why the first of them waited when the last step was planned.
      cached: int32[C], rising: blocks that nobody owns and that can still be matched.
      host: int32[H], rising: slots of the host tier that hold a block.
    """

    num_blocks: int
    block_size: int
    num_host_slots: int
    num_slots: int
    step: int
    running: tuple[Running, ...]
    kept: tuple[Running, ...]
    waiting: tuple[Waiting, ...]
    num_waiting: int
    holding: Holding | None
    cached: np.ndarray
    host: np.ndarray


class Frame(NamedTuple):
    """A picture with what a state can't know: when it was taken, and what was done by then.

    Attributes:
      time: seconds, or steps in the recording of an event log, which has no clock.
      num_generated, num_preemptions: since the start.
    """

    picture: Picture
    time: float
    num_generated: int
    num_preemptions: int


def take_picture(state: SchedulerState) -> Picture:
    """Look at a state without consuming it. It stays true whatever becomes of the state.

    Costs microseconds for each sequence, and about 20 ns for each cached block and free host slot.
    """
    core = state.core
    waiting = core.waiting.in_order()[:MAX_WAITING]
    return Picture(
        num_blocks=core.pool.num_blocks,
        block_size=core.block_size,
        num_host_slots=core.host.num_slots,
        num_slots=core.num_slots,
        step=core.step,
        running=tuple(map(_running, core.running)),
        kept=tuple(_kept(core)),
        waiting=tuple(map(_waiting, waiting)),
        num_waiting=state.num_waiting,
        holding=core.holding,
        cached=np.sort(core.pool.cached_blocks()),
        host=core.host.used_slots(),
    )


def domain_tag(domain: Domain) -> str:
    """The tenant, and a few digits that tell its salts apart without showing them."""
    if not domain.salt:
        return domain.tenant
    text = f"{domain.tenant}\0{domain.salt}".encode("utf-8", "surrogatepass")
    return f"{domain.tenant}/{hashlib.blake2b(text, digest_size=3, key=_KEY).hexdigest()}"


def _running(seq: Sequence) -> Running:
    return Running(
        number=seq.rank[1],
        request_id=seq.request.request_id,
        domain=domain_tag(seq.request.domain),
        num_prompt=seq.num_prompt,
        num_known=len(seq.token_ids),
        num_computed=seq.num_computed,
        num_cached=seq.num_cached_tokens,
        num_preemptions=seq.num_preemptions,
        block_ids=seq.table,  # entries never change: a view is enough
    )


def _kept(core: Core) -> Iterator[Running]:
    numbers = itertools.count(_FIRST_KEPT)
    for blocks in core.public.owned_blocks:
        tokens = len(blocks) * core.block_size
        table = np.array(blocks, np.int32)
        yield Running(
            next(numbers), "public prefix", "everyone", tokens, tokens, tokens, 0, 0, table
        )
    for group in gangs(core):
        if group.reserve:
            first = group.members[0].request
            name, domain = f"kept for {first.request_id}", domain_tag(first.domain)
            table = np.array(group.reserve, np.int32)
            yield Running(next(numbers), name, domain, 0, 0, 0, 0, 0, table)


def _waiting(seq: Sequence) -> Waiting:
    return Waiting(
        number=seq.rank[1],
        request_id=seq.request.request_id,
        domain=domain_tag(seq.request.domain),
        num_prompt=seq.num_prompt,
        num_known=len(seq.token_ids),
        num_preemptions=seq.num_preemptions,
    )
