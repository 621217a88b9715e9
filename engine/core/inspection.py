"""A scheduler state as others see it: as plain data for crash reports and replays, and what must
hold between its parts, for tests."""

from __future__ import annotations

from engine.core.core import Core
from engine.core.sequences import NO_SLOT, Sequence


def check(core: Core) -> None:
    """Assert the invariants of pool, sequences and slots. O(pool); for tests."""
    owned = [seq.owned_blocks() for seq in core.running]
    core.pool.check(owned + core.public.owned_blocks)
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
