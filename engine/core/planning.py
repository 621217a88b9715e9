"""One step, decided: which sequences run in it, with which blocks.

The policy, in order. Every running sequence whose prompt is done gets one token (decodes
first, so a long prompt never stalls a stream); then running prompts get chunks; then waiting
requests are admitted, by priority and arrival, each with blocks for all its known tokens, so
that only decodes ever need a block on the way, and if what the running ones are expected to need
is left. A decode that finds no block preempts the lowest rank that was not preempted too often,
which later takes its blocks from the host tier, or is recomputed where that is quicker (`costs`).
Nothing overtakes the head of the queue, so nothing starves. A request's forks start when its
prompt is computed, on its blocks; whoever then writes to a shared block first gets a copy of it.
Beams advance together or not at all, in a plan that is made once the tokens they go on with are
known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from engine.core import beams
from engine.core.core import Core, Holding
from engine.core.costs import keeping_pays, restoring_pays
from engine.core.forecast import WorkingSet
from engine.core.limits import Limits
from engine.core.sequences import NO_SLOT, Sequence
from engine.types import BlockCopy, PlanRow, StepPlan, SwapIn

# Of a tuple of all its fields. There is one a sequence and step, and PlanRow's own constructor is a
# Python function, which would take twice as long.
_make_row: Callable[[tuple[object, ...]], PlanRow] = partial(tuple.__new__, PlanRow)


def plan_step(core: Core, limits: Limits) -> StepPlan:
    """Decide one step, and take what it needs from the core."""
    rows: list[PlanRow] = []
    copies: list[BlockCopy] = []
    preempted = _schedule_decodes(core, rows, copies)
    num_decodes = len(rows)
    budget = limits.max_step_tokens - num_decodes
    for seq in core.running:
        if seq.num_total - seq.num_computed > 1 and budget > 0:
            num_tokens = min(seq.num_uncomputed, budget)
            rows.append(_advance(seq, num_tokens, limits.block_size))
            budget -= num_tokens
    swap_ins: list[SwapIn] = []
    if preempted:  # who was just preempted must not come straight back
        core.holding = "preemption"
    else:
        core.holding = _admit_waiting(core, limits, rows, swap_ins, budget)
    if limits.prefix_reuse:
        for row in rows[num_decodes:]:
            name_full_blocks(core.sequences[row.request.request_id], core, limits)
    _part(core, rows)
    # A copy fills its block by itself, and comes first: what is erased may be what it copies.
    copied = {copy.destination for copy in copies}
    erased = [block for block in core.pool.retention.take_erased() if block not in copied]
    gone = core.pool.take_evicted()  # last: what goes out now comes in with a later plan
    plan = StepPlan(
        step=core.step,
        rows=tuple(rows),
        block_copies=tuple(copies),
        preempted=tuple(preempted),
        swap_outs=tuple(core.host.take_in(gone, core.step) if keeping_pays(limits) else ()),
        swap_ins=tuple(swap_ins),
        erased_blocks=tuple(erased),
        erased_slots=tuple(core.host.take_erased()),
    )
    if rows:
        core.in_flight.append(core.step)
    core.step += 1
    return plan


def name_full_blocks(seq: Sequence, core: Core, limits: Limits) -> None:
    """Let later plans match the blocks whose tokens are known and computed, or planned to be.

    A planned block may be matched before it is computed, because launches run in order. It
    is not matched within its own plan: kernels may not order writes and reads of one step.
    """
    full = min(seq.num_computed, len(seq.token_ids)) // limits.block_size
    if full > seq.num_blocks_named and not seq.leaves_nothing:
        seq.extend_keys(full, limits.block_size, limits.fingerprint, core.public.keys)
        for index in range(seq.num_blocks_named, full):
            core.pool.name(int(seq.block_ids[index]), seq.keys[index], seq.tag_of(index))
        core.pool.retention.journal.add_stored(seq, full, limits.block_size)
        seq.num_blocks_named = full


def _schedule_decodes(core: Core, rows: list[PlanRow], copies: list[BlockCopy]) -> list[str]:
    """One token for every running sequence that lacks just one. Returns who was preempted."""
    preempted: list[str] = []
    running, block_size = core.running, core.block_size
    index = 0
    while index < len(running):
        seq = running[index]
        index += 1
        if seq.num_total - seq.num_computed != 1 or seq.num_total >= seq.max_total:
            continue
        if seq.beams is not None and seq.num_pending:
            continue  # which beams go on is not known yet
        is_at_end = seq.num_computed == seq.num_blocks * block_size
        if is_at_end or seq.shares_tail or seq.beams is not None:
            preempted += _make_room(seq, core, copies)
            if seq.slot == NO_SLOT:
                index -= 1  # the next one has moved up
                continue
        rows.append(_advance(seq, 1, block_size))
    return preempted


def _make_room(seq: Sequence, core: Core, copies: list[BlockCopy]) -> list[str]:
    """See to it that a sequence, with its whole gang if it is a beam, can write its next position.

    Returns the ids of those that lost their blocks for it; it may be among them.
    """
    preempted: list[str] = []
    group = seq.beams
    while needed := (
        _needs_block(seq, core) if group is None else beams.num_needed(seq, core.block_size)
    ):
        if needed <= core.pool.num_available + (0 if group is None else len(group.reserve)):
            for one in (seq,) if group is None else group.members:
                if _needs_block(one, core):
                    _give_block(one, core, copies)
            break
        # The lowest rank that may be is given up. Those after this one have no row yet; and if
        # there are none, it goes itself: the higher ranks keep what they have.
        victim = next(
            low for low in reversed(core.running) if low is seq or not core.is_protected(low)
        )
        preempted += core.preempt(victim)
        if seq.slot == NO_SLOT:
            break
    return preempted


def _needs_block(seq: Sequence, core: Core) -> bool:
    """Whether the next position has no place yet, or one in a block that is another's too."""
    if seq.num_computed == seq.num_blocks * core.block_size:
        return True
    seq.shares_tail = seq.shares_tail and core.pool.is_shared(seq.tail(core.block_size))
    return seq.shares_tail


def _give_block(seq: Sequence, core: Core, copies: list[BlockCopy]) -> None:
    """A block for the next position; a copy of the last one if that is where it belongs."""
    reserve = None if seq.beams is None else seq.beams.reserve
    block = reserve.pop() if reserve else core.pool.allocate(1)[0]
    if seq.num_computed == seq.num_blocks * core.block_size:
        seq.append_blocks([block])
    else:
        shared = seq.replace_tail(block, core.block_size)
        core.pool.release([shared])
        copies.append(BlockCopy(shared, block))


def _admit_waiting(
    core: Core, limits: Limits, rows: list[PlanRow], swap_ins: list[SwapIn], budget: int
) -> Holding | None:
    """Start waiting requests, strictly in order. Returns what holds the next one back."""
    block_size = limits.block_size
    expected: WorkingSet | None = None
    num_free = core.num_unclaimed_slots if core.waiting.first() else 0
    while (seq := core.waiting.first()) is not None:
        if seq.num_pending:
            return "token"  # preempted with one on the way, which the recomputation needs
        if budget <= 0:
            return "budget"
        unclaimed = num_free - len(seq.forks)
        if unclaimed <= 0:
            return "slots"
        num_known = len(seq.token_ids)
        hits: list[int] = []
        slots: list[int] = []
        if limits.prefix_reuse and not seq.looks_nothing_up:
            # The last known token is always computed: its logits choose the next one.
            most = (num_known - 1) // block_size
            seq.extend_keys(most, block_size, limits.fingerprint, core.public.keys)
            hits = core.pool.match(seq.keys[:most])
            slots = core.host.match(seq.keys[len(hits) : most])
            if not restoring_pays(limits, len(hits), len(slots)):
                slots = []
        num_shared = len(hits) - core.pool.num_cached(hits)
        needed = core.blocks_to_start(seq) - num_shared
        # One block of growth for each running sequence, so that an admission doesn't make
        # the very next steps preempt.
        growth = core.num_slots - unclaimed
        if core.running and not core.pool.has_room(needed, growth):
            return "blocks"
        expected = expected or WorkingSet(core)
        if core.running and not expected.has_room_for(seq):
            return "forecast"
        expected.add(seq, num_shared)
        restored = core.start(seq, hits, len(slots))
        num_free = unclaimed - 1
        swap_ins += map(SwapIn, slots, restored)
        if restored:  # they are there before the step, so even this plan may match them
            name_full_blocks(seq, core, limits)
        num_tokens = min(seq.num_uncomputed, budget)
        rows.append(_advance(seq, num_tokens, block_size))
        budget -= num_tokens
    return None


def _part(core: Core, rows: list[PlanRow]) -> None:
    """Let the forks of each prompt that this step ends sample from its last logits too."""
    for seq in [seq for seq in core.running if seq.forks and seq.num_total > seq.num_prompt]:
        if seq.beams is not None:
            continue  # they part at a commit, when it is known with which tokens
        source = next(index for index, row in enumerate(rows) if row.request is seq.request)
        for fork in core.part(seq):
            rows.append(_advance(fork, 0, core.block_size)._replace(logits_of=source))


def _advance(seq: Sequence, num_tokens: int, block_size: int) -> PlanRow:
    """Plan the next `num_tokens` positions of a sequence that has the blocks for them.

    It samples if no known token is left; one that has just parted has none to begin with.
    """
    start = seq.num_computed
    stop = start + num_tokens
    total = seq.num_total
    samples = stop == total
    num_blocks = -(-stop // block_size)
    known = seq.token_ids
    fields = (
        seq.request,
        seq.slot,
        start,
        num_tokens,
        tuple(known[start:stop]) if start < len(known) else (),
        seq.table if num_blocks == seq.num_blocks else seq.block_ids[:num_blocks],
        samples,
        total - seq.num_prompt,
        None if seq.has_state else seq.take_history(),
        None,
    )
    seq.num_computed = stop
    if samples:
        seq.num_total = total + 1
    return _make_row(fields)
