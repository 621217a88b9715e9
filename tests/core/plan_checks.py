"""What the simulation demands of every plan: who is in it, in which order, with what."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from engine.types import PlanRow, StepPlan

if TYPE_CHECKING:
    from tests.core.simulation import Simulation


def check_plan(sim: Simulation, plan: StepPlan, before: dict) -> None:
    """The policy: who is in the plan, in which order, with what. Advances the records."""
    limits, rows = sim.limits, plan.rows
    assert plan.step == before["step"]
    assert before["in_flight"] == [step.plan.step for step in sim.in_flight]
    assert len(rows) <= limits.max_num_seqs
    assert sum(row.num_tokens for row in rows) == plan.num_tokens <= limits.max_step_tokens
    assert len({row.request.request_id for row in rows}) == len(rows)
    assert len({row.slot for row in rows}) == len(rows)
    running = [entry["request_id"] for entry in before["running"]]
    waiting = [entry["request_id"] for entry in before["waiting"]]
    most = limits.max_preemptions
    victims = [name for name in running[::-1] if sim.records[name].num_preempted < most]
    count = len(plan.preempted)
    assert list(plan.preempted) == victims[:count], "not the lowest ranks were preempted"
    kept = [name for name in running if name not in plan.preempted]
    for request_id in plan.preempted:
        record = sim.records[request_id]
        sim.counts["preempted"] += 1
        if record.gang is None:
            record.lose_slot()
            record.num_preempted += 1
        elif record is record.gang.first:
            record.gang.restart()
            sim.counts["gangs preempted"] += 1
            assert not any(other.request.request_id in kept for other in record.gang.members)
    must_decode = [name for name in kept if sim.records[name].may_decode]
    assert [row.request.request_id for row in rows[: len(must_decode)]] == must_decode, (
        "the decodes are not first, in order and complete"
    )
    unfinished = [
        name
        for name in kept
        if not (sim.records[name].is_at_its_end or sim.records[name].awaits_choice)
    ]
    continued = [row.request.request_id for row in rows if row.history is None]
    assert sorted(continued) == sorted(unfinished), "a running sequence stands still"

    parted = [row for row in rows if row.logits_of is not None]
    assert list(rows[len(rows) - len(parted) :]) == parted
    computing = rows[: len(rows) - len(parted)]
    started = [row.request.request_id for row in computing if row.history is not None]
    queue = [name for name in waiting if sim.records[name].waits_alone]
    if sim.is_closed:
        queue = [name for name in queue if sim.records[name].has_begun]
    assert started == queue[: len(started)], "a request overtook the head of the queue"
    assert not (started and plan.preempted), "a request started in a step that preempted"
    for index, row in enumerate(computing):
        _check_row(sim, row, is_last=index == len(computing) - 1)
    _check_parting(sim, computing, parted)

    entries = sim.state.snapshot()["running"]
    assert isinstance(entries, list)
    named = {row.request.request_id for row in parted}  # these share what is being written
    owners = Counter(
        block for entry in entries if entry["request_id"] not in named for block in entry["blocks"]
    )
    sim.counts["copies"] += len(plan.block_copies)
    for copy in plan.block_copies:
        assert owners[copy.destination] == 1, "a copy lies on a block that is another's"
    for row in computing:
        for index in range(row.start // limits.block_size, row.block_ids.size):
            assert owners[int(row.block_ids[index])] == 1, "a shared block is written"


def _check_parting(sim: Simulation, computing: tuple[PlanRow, ...], parted: list[PlanRow]) -> None:
    """All that wait for a prompt start where it ends, and compute nothing for it."""
    by_record = {id(sim.records[row.request.request_id]): row for row in computing}
    expected = [
        name
        for name, record in sim.records.items()
        if not record.waits_alone
        and record.gang is None
        and (source := by_record.get(id(record.parent))) is not None
        and source.samples
    ]
    assert sorted(row.request.request_id for row in parted) == sorted(expected)
    for row in parted:
        record = sim.records[row.request.request_id]
        assert record.parent is not None
        assert row.logits_of is not None
        source = computing[row.logits_of]
        assert source.request.request_id == record.parent.request.request_id
        assert row.request == record.request
        assert not record.has_slot
        assert (row.history, row.samples) == ((), True)
        assert (row.start, row.num_tokens) == (record.num_prompt, 0)
        record.part()
        sim.counts["parted"] += 1


def _check_row(sim: Simulation, row: PlanRow, *, is_last: bool) -> None:
    record = sim.records[row.request.request_id]
    assert row.request == record.request
    assert 0 <= row.slot < sim.limits.max_num_seqs
    assert not row.block_ids.flags.writeable
    total = record.num_prompt + record.num_sampled
    stop = row.start + row.num_tokens
    if row.history is not None:
        assert not record.has_slot, "a slot that is set was set again"
        record.has_slot = True
        generated = record.tokens(record.num_prompt, record.num_prompt + record.num_committed)
        assert row.history == generated
        assert record.num_committed == record.num_sampled, "it restarts without all tokens"
        assert row.start % sim.limits.block_size == 0
        record.computed = row.start
        if sim.limits.merge_blocks:
            assert row.start == 0, "a cached prefix can be observed"
        if record.num_cached is None:
            record.num_cached = row.start
            if record.request.sampling.prompt_logprobs is not None:
                assert row.start == 0, "prompt positions without log-probabilities"
        sim.counts["hits" if row.start else "misses"] += 1
        sim.counts["resumed"] += record.num_sampled > 0
    assert record.has_slot
    assert row.start == record.computed
    assert row.num_tokens >= 1
    assert stop <= total < record.max_total
    assert row.samples == (stop == total)
    assert row.samples or is_last, "a chunk was cut although the step had room"
    sim.counts["chunks"] += not row.samples
    sim.counts["unknown tokens"] += not row.token_ids
    record.computed = stop
