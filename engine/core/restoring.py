"""Blocks that come into the host tier from below it: what is missing, and the event that they came.

Where they come from, and how long that takes, is the step loop's to know. The event names a request
and which of its blocks, never a key, so it replays from the request itself.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from engine.core.block_pool import BlockPool
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.core.sequences import Sequence
from engine.types import Domain, Request


class Missing(NamedTuple):
    """The blocks of a prompt after those that are at hand: number `first` and on, by key.

    The first `num_public` of them are a public prefix's, the others the request's domain's.
    """

    first: int
    keys: tuple[bytes, ...]
    num_public: int = 0


class Restored(NamedTuple):
    """The next state, and what must be done before the next plan.

    Attributes:
      erased: host slots to be erased first.
      slots: where each block must be written; None if it is there already, or there are not so
        many slots.
    """

    state: SchedulerState
    erased: tuple[int, ...]
    slots: tuple[int | None, ...]


class KeptBlock(NamedTuple):
    """A block that can be matched."""

    key: bytes
    place: int  # block of the pool, or slot of the host tier
    domain: Domain | None  # whose it is; None if it is public
    expires: int  # milliseconds on the scheduler's clock; 0: never


class Kept(NamedTuple):
    """What can be matched, in the pool and in the host tier, most worth keeping first."""

    blocks: tuple[KeptBlock, ...]
    slots: tuple[KeptBlock, ...]


def missing_blocks(state: SchedulerState, limits: Limits, request: Request) -> Missing:
    """The blocks of a request that neither the pool nor the host tier holds. Changes nothing.

    Blocks behind a missing one count as missing too, as they can't be matched. A request that
    has to compute its whole prompt misses none.
    """
    core = state.core
    seq = Sequence(request, (0, 0), len(request.prompt_ids) + 1, core.step)
    most = (seq.num_prompt - 1) // limits.block_size  # the last token is always computed
    if not limits.prefix_reuse or seq.looks_nothing_up or most < 1:
        return Missing(0, ())
    seq.extend_keys(most, limits.block_size, limits.fingerprint, core.public.keys)
    first = len(core.pool.match(seq.keys))
    first += sum(1 for _ in itertools.takewhile(core.host.__contains__, seq.keys[first:]))
    return Missing(first, tuple(seq.keys[first:]), max(0, seq.num_public - first))


def restore(
    state: SchedulerState, limits: Limits, request_id: str, first: int, count: int
) -> Restored:
    """Give `count` blocks of a waiting request's prompt, from number `first` on, a place in the
    host tier: their contents were found below it.

    What lay in those slots is forgotten. They are written before the next plan, and so after
    whatever earlier plans do with them: see `runtime/host_pool.py`.

    Raises:
      ValueError: no such request waits, or its prompt has no such blocks. The state is still good.
    """
    seq = state.core.sequences.get(request_id)
    if seq is None:
        raise ValueError(f"blocks for {request_id!r} came, but there is no such request")
    full = seq.num_prompt // limits.block_size
    if min(first, count) < 0 or first + count > full:
        raise ValueError(
            f"{count} blocks from number {first} on came for {request_id!r}, which has {full}"
        )
    core = state._take()
    seq.extend_keys(first + count, limits.block_size, limits.fingerprint, core.public.keys)
    core.host.match(seq.keys[:first])  # what is there of it must not give way to the rest
    keys = seq.keys[first : first + count][: core.host.num_slots]  # more would push out each other
    expiry = core.pool.retention.expiry
    tags = [seq.tag_of(index) for index in range(first, first + len(keys))]
    slots = [
        core.host.restore(key, tag, expiry(tag), core.step)
        for key, tag in zip(reversed(keys), reversed(tags), strict=True)
    ]
    slots = (*reversed(slots), *[None] * (count - len(keys)))
    erased = tuple(core.host.take_erased())  # or the next plan would erase what is written now
    return Restored(SchedulerState(core), erased, slots)


def kept_blocks(state: SchedulerState) -> Kept:
    """All that can be matched, when no request is left."""
    core = state.core
    assert isinstance(core.pool, BlockPool)  # the contiguous one keeps nothing
    blocks = (
        KeptBlock(key, block, tag.domain, expires)
        for block, key, tag, expires in core.pool.cached()
    )
    slots = (
        KeptBlock(key, slot, tag.domain, expires) for key, slot, tag, expires in core.host.entries()
    )
    return Kept(tuple(blocks), tuple(slots))
