"""A scheduler state as others see it: a copy to keep, plain data for crash reports and replays, and
what must hold between its parts, for tests."""

from __future__ import annotations

from engine.core.beams import gangs
from engine.core.core import Core
from engine.core.sequences import NO_SLOT, Sequence


def copy(core: Core) -> Core:
    """An independent state, equal to this one. O(pool)."""
    other = object.__new__(Core)
    other.block_size = core.block_size
    other.fingerprint = core.fingerprint
    other.max_preemptions = core.max_preemptions
    other.forecast = core.forecast.copy()
    other.holding = core.holding
    other.pool = core.pool.copy()
    other.host = core.host.copy()
    other.public = core.public.copy()
    other.sequences = {key: seq.copy() for key, seq in core.sequences.items()}
    for seq in other.sequences.values():
        seq.forks = [other.sequences[fork.request.request_id] for fork in seq.forks]
        if seq.parent is not None:
            seq.parent = other.sequences[seq.parent.request.request_id]
    for group in gangs(core):
        group.copy(other.sequences)
    other.running = [other.sequences[seq.request.request_id] for seq in core.running]
    other.waiting = type(core.waiting)(  # it may be closed, see `reloading`
        other.sequences[seq.request.request_id] for seq in core.waiting.in_order()
    )
    other.num_slots = core.num_slots
    other.free_slots = core.free_slots.copy()
    other.step = core.step
    other.in_flight = core.in_flight.copy()
    other.arrivals = core.arrivals
    return other


def check(core: Core) -> None:
    """Assert the invariants of pool, sequences and slots. O(pool); for tests."""
    owned = [seq.owned_blocks() for seq in core.running]
    reserves = [group.reserve for group in gangs(core)]
    core.pool.check(owned + reserves + core.public.owned_blocks)
    for group in gangs(core):
        group.check(core)
    core.host.check()
    waiting = core.waiting.in_order()
    parents = (*core.running, *waiting)
    forks = [fork for seq in parents for fork in seq.forks]
    assert len(parents) + len(forks) == len(core.sequences), "a sequence is lost"
    assert all(fork.parent is seq for seq in parents for fork in seq.forks)
    assert all(seq.parent is None for seq in parents)
    assert [seq.rank for seq in core.running] == sorted(seq.rank for seq in core.running)
    slots = [seq.slot for seq in core.running]
    assert sorted(slots + core.free_slots) == list(range(core.num_slots)), "slots differ"
    assert core.num_unclaimed_slots >= 0, "a slot is kept for two"
    assert core.waiting.num_tokens == sum(seq.num_prompt for seq in waiting)
    for seq in (*waiting, *forks):
        assert seq.slot == NO_SLOT
        assert seq.num_blocks == seq.num_computed == 0
    for seq in core.running:
        assert seq.slot != NO_SLOT
        assert seq.num_pending >= 0
        assert seq.num_total <= seq.max_total
        assert seq.num_blocks_named <= seq.num_blocks
        first = seq.num_computed // core.block_size  # the next step writes from here on
        for block in seq.owned_blocks()[first + seq.shares_tail :]:
            assert not core.pool.is_shared(block), "a block that will be written is shared"


def describe(core: Core) -> dict[str, object]:
    """The state as plain data, without token ids."""
    return {
        "step": core.step,
        "in_flight": core.in_flight.copy(),
        "pool": core.pool.counts._asdict(),
        "host": len(core.host),
        "holding": core.holding,
        "running": [_describe(seq) for seq in core.running],
        "waiting": [_describe(seq) for seq in core.waiting.in_order()],
    }


def _describe(seq: Sequence) -> dict[str, object]:
    return {
        "request_id": seq.request.request_id,
        "rank": list(seq.rank),
        "slot": seq.slot,
        "num_prompt": seq.num_prompt,
        "num_known": len(seq.token_ids),
        "num_total": seq.num_total,
        "num_computed": seq.num_computed,
        "num_preemptions": seq.num_preemptions,
        "forks": [fork.request.request_id for fork in seq.forks],
        "blocks": seq.owned_blocks(),
    }
