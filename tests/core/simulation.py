"""The scheduler with a fake device and an oracle: every operation is followed by every check.

The device knows the truth about the cache: for each position of each physical block, which
domain and which token history its contents were computed from. The oracle knows what every
request generates alone, as the next token is a function of the history. So chunked, cached,
preempted, pipelined and batched runs are all held to the same tokens, and a read of a block
that holds anything else than this sequence's own history is an error at once.

Hypothesis and a seeded random driver both use `Simulation`; see `test_stateful`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TYPE_CHECKING

from engine.core import reloading, restoring, scheduler, upkeep
from engine.core.block_pool import BlockPool
from engine.core.journal import BlockRemoved, BlockStored, Change, Journal, PoolCleared
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState, StaleState
from engine.sampling import InvalidRequest
from engine.types import (
    Domain,
    FinishReason,
    QueueFull,
    Request,
    StepOutput,
    StepPlan,
    TokenLogprobs,
)
from tests.core.fake_device import FakeDevice, InFlight
from tests.core.oracle import TIMES_TO_LIVE, Gang, History, Record, logprob_at, plain
from tests.core.plan_checks import check_plan

if TYPE_CHECKING:
    from engine.runtime.recorder import Recorder


class Simulation(FakeDevice):
    """A scheduler, its fake device, and everything that must hold between them.

    `counts` says what happened, so that a test can show that its cases came up.
    """

    def __init__(self, limits: Limits, max_in_flight: int = 2, recorder: Recorder | None = None):
        super().__init__(limits)
        self.max_in_flight = max_in_flight
        self.recorder = recorder
        self.state = SchedulerState.initial(limits)
        self.in_flight: deque[InFlight] = deque()
        self.transcripts: deque[tuple[int, ...]] = deque(maxlen=6)  # of those that finished
        self.aborted: deque[Request] = deque(maxlen=1)
        self._roots: dict[Domain, History] = {}
        self._num_arrivals = 0
        self._held: list[list[int]] = []  # the running sequences' blocks after the last operation
        self._cached: set[int] = set()
        self._unlaunched: StepPlan | None = None
        self.now = 0  # milliseconds
        self._pinned: Request | None = None  # that computed the public text
        self._left_at: dict[int, int] = {}  # when the last owner of a cached block left it
        self._named: set[int] = set()
        self.is_closed = False  # to those that have not begun
        self._mirror: dict[bytes, BlockStored] = {}  # what the journal makes of the pool
        self._watch()

    def _watch(self) -> None:
        """Have the pool's changes noted."""
        self._changes: list[Change] = []
        journal = Journal(self._changes.extend, with_tokens=True)
        self.state.core.pool.retention.journal = journal

    # Operations.

    def close_queue(self) -> None:
        """The weights are to be exchanged: from now on, only what has begun runs."""
        old = self.state
        self.state = reloading.close_queue(self.state)
        if self.recorder:
            self.recorder.drain()
        self._assert_consumed(old)
        self.is_closed = True
        self._after("close queue")

    @property
    def has_drained(self) -> bool:
        """Whether the weights may be exchanged."""
        return self.is_closed and reloading.has_drained(self.state)

    def exchange(self, fingerprint: str) -> None:
        """Go on with other weights: nothing that was computed may be found again."""
        old = self.state
        self.state = reloading.reload(self.state, fingerprint)
        if self.recorder:
            self.recorder.reload(fingerprint)
        self._assert_consumed(old)
        self.limits = dataclasses.replace(self.limits, fingerprint=fingerprint)
        self.is_closed = False
        if self._pinned is None and "public" not in self.records:
            self.public = ()  # it was aborted, so nobody computes it again
        self._computed_anew()
        assert not len(self.state.core.host), "a slot of the old weights can be found"
        self._after("exchange")

    def _computed_anew(self) -> None:
        """The device's memory is lost, and public prefixes with it."""
        if self._pinned is not None:  # it is computed once more
            self._record(self._pinned)
            self._pinned = None
        self.wipe()
        self._named = set()
        assert self.state.pool.free == self.limits.num_blocks, "a name outlived its contents"
        self._left_at.clear()

    def tick(self, milliseconds: int) -> None:
        """Let time pass."""
        self.now += milliseconds
        old = self.state
        self.state = upkeep.tick(self.state, self.now)
        if self.recorder:
            self.recorder.tick(self.now)
        self._assert_consumed(old)
        self._after("tick")

    def flush(self, domain: Domain | None) -> None:
        """Forget what a domain left, or all. Nobody finds it any more, wherever it lies."""
        old = self.state
        self.state = upkeep.flush(self.state, domain)
        for key, (_, _, owner) in list(self.disk.items()):  # as `Tiers` does
            if owner is not None and domain in (None, owner):
                del self.disk[key]
        for name, record in self.records.items():
            if not record.request.is_public and domain in (None, record.request.domain):
                record.leaves_nothing = True
                self.condemn(self._tables().get(name, []))
        if self.recorder:
            self.recorder.flush(domain)
        self._assert_consumed(old)
        core = self.state.core
        assert isinstance(core.pool, BlockPool)
        tags = [*core.pool.retention._tags.values(), *(e.tag for e in core.host._entries.values())]
        assert all(tag.domain is None or domain not in (None, tag.domain) for tag in tags)
        self._after("flush")

    def admit(self, request: Request) -> None:
        """Queue a request, which may be refused for the reasons that a record can tell."""
        limits = self.limits
        num_prompt = len(request.prompt_ids)
        longest = min(num_prompt + request.max_tokens, limits.max_model_len) - 1
        waiting = sum(not record.has_slot for record in self.records.values())
        names = request.names
        if request.is_public:
            self.public = request.prompt_ids
        shared = 0 if request.is_public else len(self.public) // limits.block_size
        num_blocks = limits.num_blocks - shared
        if (
            len(set(names) - self.records.keys()) < len(names)
            or len(names) > limits.max_num_seqs
            or num_prompt + 1 > limits.max_model_len
            or -(-longest // limits.block_size) > num_blocks
            or self._most_of_beams(request, longest) > num_blocks
        ):
            expected: type[Exception] | None = InvalidRequest
        else:
            expected = QueueFull if waiting + len(names) > limits.max_waiting else None
        before, old = self.state.snapshot(), self.state
        try:
            self.state = scheduler.admit(self.state, limits, request)
        except (InvalidRequest, QueueFull) as error:
            if type(error) is not expected or self.state.snapshot() != before:
                raise
            self.counts["refused"] += 1
        else:
            assert expected is None, f"{request} was admitted, expected {expected}"
            if self.recorder:
                self.recorder.admit(request)
            self._record(request)
            self._assert_consumed(old)
        self._after("admit")

    def _record(self, request: Request) -> None:
        root = self._roots.setdefault(request.domain, History(request.domain, None, -1))
        first = Record(request, root, self.limits, self._num_arrivals)
        self.records[request.request_id] = first
        for number, fork in enumerate(request.forks, 1):
            self.records[fork.request_id] = Record(
                request.fork(fork), root, self.limits, self._num_arrivals + number, first
            )
        if request.sampling.beam_width > 1:
            Gang([self.records[name] for name in request.names], root)
            self.counts["beam searches"] += 1
        self._num_arrivals += len(request.names)

    def restore(self, request_id: str, most: int) -> None:
        """Bring up to so many blocks of a waiting request from below into the host tier.

        What was under way to those slots is older, and gives way to it, as in `HostPool`.
        """
        record = self.records.get(request_id)
        if record is None:
            return
        limits = self.limits
        size = limits.block_size
        before = self.state.snapshot()
        first, keys, num_public = restoring.missing_blocks(self.state, limits, record.request)
        assert self.state.snapshot() == before
        full = (record.num_prompt - 1) // size if limits.prefix_reuse else 0
        if record.request.sampling.prompt_logprobs is not None or record.request.is_private:
            full = 0
        ends = range((first + 1) * size, (full + 1) * size, size)
        assert list(keys) == [self.key_of(record.history(end)) for end in ends]
        assert num_public == sum(self.is_public(record.history(end)) for end in ends)
        found: list[list[History | None]] = []
        for index, key in enumerate(keys[:most]):
            contents, expires, owner = self.disk.get(key, ([], 0, None))
            if not contents or 0 < expires <= self.now:
                break
            assert owner == (None if index < num_public else record.request.domain)
            found.append(contents)
        if self.recorder:
            self.recorder.restore(request_id, first, len(found))
        old = self.state
        self.state, erased, slots = restoring.restore(
            self.state, limits, request_id, first, len(found)
        )
        for slot in erased:
            self.host[slot] = [None] * size
        self._assert_consumed(old)
        for slot, contents in zip(slots, found, strict=True):
            if slot is not None:
                self.host[slot] = list(contents)
                self.counts["restored"] += 1
        self._after("restore")

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request from outside, be it there or not."""
        old = self.state
        self.state, outputs = scheduler.abort(self.state, request_id, reason)
        if request_id not in self.records:
            assert outputs == ()
        else:
            if self.recorder:
                self.recorder.abort(request_id, reason)
            record = self._remove(request_id)
            if (gang := record.gang) is None:
                assert outputs == (self._output(record, (), reason),)
            else:
                record = gang.first
                assert outputs == tuple(gang.outputs(reason))
            if not record.request.is_public:  # which come first, or not at all
                self.aborted.append(record.request)
            self.counts["aborted"] += 1
        self._assert_consumed(old)
        self._after("abort")

    def schedule(self, *, launch: bool = True) -> StepPlan:
        """Plan a step, check it, and launch it on the fake device.

        Without `launch` the next operation must be `fail`, as in a loop whose launch failed.
        """
        assert len(self.in_flight) < self.max_in_flight
        before, old = self.state.snapshot(), self.state
        self.state, plan = scheduler.schedule(self.state, self.limits)
        self._assert_consumed(old)
        if self.recorder:
            self.recorder.schedule(plan)
        check_plan(self, plan, before)
        if not launch:
            self._unlaunched = plan
            return plan
        if plan.rows:
            self.in_flight.append(self.launch(plan))
        else:
            self.move(plan)
            moves = plan.erased_blocks or plan.erased_slots
            can_wait = self.in_flight or self.is_closed
            assert can_wait or not self.records or moves, "nothing can run"
            self.counts["empty plans"] += 1
        self._after("schedule")
        self._check_erased()
        return plan

    def commit(self) -> tuple[StepOutput, ...]:
        """Take the oldest step in and compare its news with the oracle."""
        step = self.in_flight.popleft()
        assert plain(step.plan) == step.as_planned, "a plan changed after it was made"
        expected = []
        for index, (row, record) in enumerate(zip(step.plan.rows, step.records, strict=True)):
            if not step.counts_for(index):
                self.counts["rows dropped" if not record.is_live else "beams dropped"] += 1
            elif record.gang is not None:
                if row.samples and record is record.gang.first and record.gang.commit():
                    expected += record.gang.outputs()
            elif row.samples:
                expected.append(self._expected_output(record, step.tokens.token_ids[index]))
        if self.recorder:
            self.recorder.commit(step.plan, step.tokens)
        old, tables = self.state, self._tables()
        self.state, outputs = scheduler.commit(self.state, step.plan, step.tokens, self.limits)
        self._assert_consumed(old)
        self.counts["merged"] += sum(
            old != new
            for name, blocks in self._tables().items()
            if name in tables and self.records[name].gang is None  # beams move, too
            for old, new in zip(tables[name], blocks, strict=True)
        )
        assert outputs == tuple(expected)
        for output in outputs:
            if output.beam is not None:
                if output.request_id in self.records:
                    record = self._remove(output.request_id)
                    self.transcripts.append(record.request.prompt_ids + output.token_ids)
                self.counts[f"beams finished: {output.finish_reason}"] += 1
            elif output.finish_reason is not None:
                record = self._remove(output.request_id)
                length = record.num_prompt + record.num_committed
                self.transcripts.append(record.tokens(0, length))
                if record.request.is_public:
                    self._pinned = record.request
                self.counts[f"finished: {output.finish_reason}"] += 1
        self._after("commit")
        return outputs

    def fail(self) -> None:
        """Every step that isn't committed fails, and the device memory with it."""
        plans = [step.plan for step in self.in_flight]
        if self._unlaunched is not None:
            plans.append(self._unlaunched)
        affected: dict[str, Record] = {}
        for step in self.in_flight:
            for index, record in enumerate(step.records):
                if step.counts_for(index):
                    affected[_whole(record).request.request_id] = _whole(record)
        if self._unlaunched is not None:
            for row in self._unlaunched.rows:
                record = _whole(self.records[row.request.request_id])
                affected.setdefault(record.request.request_id, record)
        if self.recorder:
            self.recorder.fail(tuple(plans))
        for plan in plans:  # what was on its way to host memory may have arrived, or not
            for swap in plan.swap_outs:
                contents = self.host.get(swap.slot)
                if contents and contents[-1] and self.key_of(contents[-1]) == swap.key:
                    self.host[swap.slot] = [None] * self.limits.block_size
        if (public := affected.get("public")) is not None:  # it is tried again
            del affected["public"]
            public.num_preempted += 1
            public.num_sampled = 0
        self.state, outputs = scheduler.fail(self.state, tuple(plans))
        ended: list[StepOutput] = []
        for record in affected.values():
            if record.gang is None:
                ended.append(self._output(record, (), FinishReason.ERROR))
            else:
                ended += record.gang.outputs(FinishReason.ERROR)
        assert list(outputs) == ended
        for request_id in affected:
            self._remove(request_id)
        for record in self.records.values():
            if record.gang is None:  # no fault of its own, so it counts for nothing
                record.lose_slot()
            elif record is record.gang.first and record.has_slot:
                record.gang.restart(counts=False)
        self.in_flight.clear()
        self._unlaunched = None
        self._computed_anew()
        self.counts["failed requests"] += len(ended)
        self._after("fail")

    def copy_and_compare(self, *, adopt: bool) -> None:
        """A copy is untouched by what happens to the state, and then does the same itself.

        What happens is a step that is planned, for which there must be room, and a commit if
        one is due. With `adopt` the simulation goes on with the copy.
        """
        twin = self.state.copy()
        before = twin.snapshot()
        plan = self.schedule()
        step = self.in_flight[0] if self.in_flight else None
        outputs = () if step is None else self.commit()
        twin.check()
        assert twin.snapshot() == before, "a copy changed along with its original"
        twin, twin_plan = scheduler.schedule(twin, self.limits)
        assert plain(twin_plan) == plain(plan)
        if step is not None:
            twin, twin_outputs = scheduler.commit(twin, step.plan, step.tokens, self.limits)
            assert twin_outputs == outputs
        assert twin.snapshot() == self.state.snapshot()
        if adopt:
            self.state = twin
            self._watch()
        self._after("copy")

    def drain(self) -> int:
        """With nothing new, everything ends within a bounded number of steps, which it returns.

        The bound: in every step the best-ranked running sequence computes a position, and it is
        never preempted. So after at most max_total steps, and those in flight, it has ended or
        a better one has started in its place; each of the n sequences does either only once.
        """
        longest = max((record.max_total for record in self.records.values()), default=0)
        bound = 2 * (len(self.records) + 1) * (longest + 2 * self.max_in_flight)
        if any(record.gang for record in self.records.values()):
            # Beams stand still while a step is on its way, and may begin anew.
            bound *= self.max_in_flight * (1 + self.limits.max_preemptions)
        steps = 0
        while self.records or self.in_flight or not self.state.is_idle:
            if self.has_drained:
                self.exchange("others at the end")
            if len(self.in_flight) < self.max_in_flight and not self.state.is_idle:
                self.schedule()
                steps += 1
            if len(self.in_flight) == self.max_in_flight or (
                self.in_flight and not (self.records and steps % 3)
            ):
                self.commit()
            assert steps <= bound, f"{len(self.records)} requests are left after {steps} steps"
        assert self.state.is_idle
        assert self.state.pool.owned == self.state.core.public.num_blocks, (
            "an idle scheduler holds blocks"
        )
        return steps

    def _remove(self, request_id: str) -> Record:
        """It ended. The first of those that waited for its prompt does so for itself now."""
        record = self.records.pop(request_id)
        record.is_live = False
        if record.gang is not None:
            if self.recorder:
                self.recorder.forget(record.gang.first.request)
            for other in record.gang.members:
                other.is_live = False
                self.records.pop(other.request.request_id, None)
            return record
        heirs = [r for r in self.records.values() if r.parent is record and not r.waits_alone]
        for heir in heirs:
            heir.parent = None if heir is heirs[0] else heirs[0]
            self.counts["inherited"] += 1
        return record

    # Checks.

    def _after(self, operation: str) -> None:
        """What must hold after every operation."""
        self.counts["operations"] += 1
        self.counts[f"operation: {operation}"] += 1
        state = self.state
        state.check()
        assert sum(state.pool) == self.limits.num_blocks
        to_erase = state.core.pool.retention.has_erased or state.core.host.has_erased
        assert state.is_idle == (not self.records and not to_erase)
        assert state.num_running == sum(record.has_slot for record in self.records.values())
        assert state.num_waiting == len(self.records) - state.num_running
        if state.num_running == 0:
            assert state.pool.owned == self.state.core.public.num_blocks
        begun = [r for r in self.records.values() if r.has_slot or (r.has_begun and r.waits_alone)]
        if self.is_closed:
            assert reloading.has_drained(state) == (not begun and not state.core.in_flight)
        self._check_names()
        self._check_journal()
        self._check_eviction_order()

    def _check_erased(self) -> None:
        """What must not stay is nowhere: neither in the pool nor in the host tier."""
        core = self.state.core
        pool = core.pool
        assert isinstance(pool, BlockPool)
        running = {
            block: seq.request.domain for seq in core.running for block in seq.owned_blocks()
        }
        for block, contents in enumerate(self.kv):
            limited = {TIMES_TO_LIVE.get(h.domain, 0) and h.domain for h in contents if h} - {0}
            if not limited or any(h and self.is_public(h) for h in contents):
                continue
            if block in pool._cached:
                (domain,) = limited
                assert isinstance(domain, Domain)
                assert self._left_at[block] + TIMES_TO_LIVE[domain] > self.now, "kept too long"
            else:
                assert limited == {running.get(block)}, "a block of nobody's was not erased"
        for block in {block for block, _ in self.condemned}:
            assert block in running, "a private or flushed request left something"
            assert block not in pool._key_of, "it can be found what a private or flushed one holds"
        entries = {entry.slot: entry for entry in core.host._entries.values()}
        for slot, contents in self.host.items():
            for history in contents:
                if history and TIMES_TO_LIVE.get(history.domain) and not self.is_public(history):
                    assert entries[slot].expires > self.now, "kept too long in host memory"

    def _tables(self) -> dict[str, list[int]]:
        """The blocks of each running sequence."""
        running = self.state.core.running
        return {seq.request.request_id: seq.owned_blocks() for seq in running}

    def _check_names(self) -> None:
        """Every name is true: the block holds what its key says, on the device, now."""
        pool = self.state.core.pool
        assert isinstance(pool, BlockPool)
        block_size = self.limits.block_size
        for block, key in pool._key_of.items():
            contents = self.kv[block]
            last = contents[-1]
            assert last is not None, "a block was named before it was written"
            assert contents == last.block(block_size), "a named block's contents are torn"
            assert key == self.key_of(last), "a block's name is not true"
        for key, entry in self.state.core.host._entries.items():
            contents = self.host[entry.slot]
            assert (last := contents[-1]) is not None, "a slot was named, but nothing is in it"
            assert contents == last.block(block_size), "a slot's contents are torn"
            assert key == self.key_of(last), "a slot's name is not true"
        self.counts["evicted"] += len(self._named - pool._key_of.keys())
        self._named = set(pool._key_of)

    def _check_journal(self) -> None:
        """Who applies the journal's changes knows what can be found, and what it is."""
        pool = self.state.core.pool
        assert isinstance(pool, BlockPool)
        pool.retention.journal.publish()
        changes, self._changes[:] = self._changes.copy(), []
        stored = []
        for change in changes:
            match change:
                case BlockStored(key=key):
                    assert key not in self._mirror, "a block was stored twice"
                    self._mirror[key] = change
                    stored.append(change)
                case BlockRemoved(key=key):
                    assert self._mirror.pop(key, None), "what was removed was never stored"
                case PoolCleared():
                    self._mirror.clear()
        assert self._mirror.keys() == pool._block_of.keys(), "the journal has another pool"
        for block in stored:
            if block is not self._mirror.get(block.key):
                continue  # gone already
            contents = self.kv[pool._block_of[block.key]]
            first, last = contents[0], contents[-1]
            assert first is not None
            assert last is not None
            before = first.parent
            assert before is not None
            assert block.parent == (None if before.parent is None else self.key_of(before))
            assert block.index == len(before.tokens) // self.limits.block_size
            assert block.domain == (None if self.is_public(last) else last.domain)
            assert block.token_ids == tuple(h.token for h in contents if h)
            self.counts["journaled"] += 1

    def _check_eviction_order(self) -> None:
        """Of the blocks that one sequence released, the last goes first."""
        core = self.state.core
        assert isinstance(core.pool, BlockPool)
        released = [block for block in core.pool._cached if block not in self._cached]
        self._left_at |= dict.fromkeys(released, self.now)
        if len(released) > 1:
            for blocks in self._held:
                order = [blocks.index(block) for block in released if block in blocks]
                assert order == sorted(order, reverse=True), "a parent is evicted before its child"
        self._cached = set(core.pool._cached)
        self._held = [seq.owned_blocks() for seq in core.running]

    def _expected_output(self, record: Record, token: int) -> StepOutput:
        """What the oracle says comes next for this request."""
        request = record.request
        position = record.num_prompt + record.num_committed
        assert token == record.tokens(position, position + 1)[0]
        record.num_committed += 1
        if token in request.stop_ids:
            reason = FinishReason.STOP
        elif position + 1 == record.max_total:
            reason = FinishReason.LENGTH
        else:
            reason = None
        output = self._output(record, (token,), reason)
        if request.sampling.logprobs is not None:
            entry = TokenLogprobs(token, -float(position - record.num_prompt), ())
            output = output._replace(logprobs=(entry,))
        if request.sampling.prompt_logprobs is not None and record.num_committed == 1:
            every = tuple(logprob_at(record, target) for target in range(1, record.num_prompt))
            output = output._replace(prompt_logprobs=every)
        return output

    def _output(
        self, record: Record, token_ids: tuple[int, ...], reason: FinishReason | None
    ) -> StepOutput:
        return StepOutput(
            record.request.request_id, token_ids, reason, record.num_prompt, record.num_cached or 0
        )

    def _most_of_beams(self, request: Request, longest: int) -> int:
        """Blocks its beams may come to hold: each what it would alone, less what they share."""
        block_size = self.limits.block_size
        each = -(-longest // block_size)
        width = request.sampling.beam_width
        return width * each - (width - 1) * (len(request.prompt_ids) // block_size)

    def _assert_consumed(self, old: SchedulerState) -> None:
        try:
            old.snapshot()
        except StaleState:
            return
        raise AssertionError("a state can be used after it was consumed")


def _whole(record: Record) -> Record:
    """The record that stands for all that end with it."""
    return record if record.gang is None else record.gang.first
