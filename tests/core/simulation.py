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
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.core import restoring, scheduler
from engine.core.block_pool import BlockPool
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState, StaleState
from engine.sampling import InvalidRequest
from engine.types import (
    Domain,
    FinishReason,
    PlanRow,
    QueueFull,
    Request,
    StepOutput,
    StepPlan,
    StepTokens,
    TokenLogprobs,
)
from tests.core.oracle import History, Record, logprob_at, plain

if TYPE_CHECKING:
    from engine.runtime.event_log import Recorder


@dataclasses.dataclass
class Slot:
    """A row of the device's per-sequence state."""

    last_token: int
    output: list[int]


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A step that was launched and not committed yet."""

    plan: StepPlan
    tokens: StepTokens
    records: tuple[Record, ...]
    as_planned: Sequence[object]


class Simulation:
    """A scheduler, its fake device, and everything that must hold between them.

    `counts` says what happened, so that a test can show that its cases came up.
    """

    def __init__(self, limits: Limits, max_in_flight: int = 2, recorder: Recorder | None = None):
        self.limits = limits
        self.max_in_flight = max_in_flight
        self.recorder = recorder
        self.state = SchedulerState.initial(limits)
        self.records: dict[str, Record] = {}  # those that have not ended
        self.in_flight: deque[InFlight] = deque()
        self.counts: Counter[str] = Counter()
        self.transcripts: deque[tuple[int, ...]] = deque(maxlen=6)  # of those that finished
        self.aborted: deque[Request] = deque(maxlen=1)
        self._roots: dict[Domain, History] = {}
        self._num_arrivals = 0
        self.disk: dict[bytes, list[History | None]] = {}  # all that ever went to the host tier
        self._held: list[list[int]] = []  # the running sequences' blocks after the last operation
        self._cached: set[int] = set()
        self._unlaunched: StepPlan | None = None
        self._wipe()

    # Operations.

    def admit(self, request: Request) -> None:
        """Queue a request, which may be refused for the reasons that a record can tell."""
        limits = self.limits
        num_prompt = len(request.prompt_ids)
        longest = min(num_prompt + request.max_tokens, limits.max_model_len) - 1
        waiting = sum(not record.has_slot for record in self.records.values())
        names = request.names
        if (
            len(set(names) - self.records.keys()) < len(names)
            or len(names) > limits.max_num_seqs
            or num_prompt + 1 > limits.max_model_len
            or -(-longest // limits.block_size) > limits.num_blocks
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
            root = self._roots.setdefault(request.domain, History(request.domain, None, -1))
            first = Record(request, root, limits, self._num_arrivals)
            self.records[request.request_id] = first
            for number, fork in enumerate(request.forks, 1):
                self.records[fork.request_id] = Record(
                    request.fork(fork), root, limits, self._num_arrivals + number, first
                )
            self._num_arrivals += len(names)
            self._assert_consumed(old)
        self._after("admit")

    def restore(self, request_id: str, most: int) -> None:
        """Bring up to so many blocks of a waiting request from below into the host tier.

        What was under way to those slots is older, and gives way to it, as in `HostPool`.
        """
        record = self.records.get(request_id)
        if record is None:
            return
        limits = self.limits
        size, fingerprint = limits.block_size, limits.fingerprint
        before = self.state.snapshot()
        first, keys = restoring.missing_blocks(self.state, limits, record.request)
        assert self.state.snapshot() == before
        full = (record.num_prompt - 1) // size if limits.prefix_reuse else 0
        if record.request.sampling.prompt_logprobs is not None:
            full = 0
        ends = range((first + 1) * size, (full + 1) * size, size)
        assert list(keys) == [record.history(end).key(size, fingerprint) for end in ends]
        found: list[list[History | None]] = []
        for key in keys[:most]:
            if key not in self.disk:
                break
            found.append(self.disk[key])
        if self.recorder:
            self.recorder.restore(request_id, first, len(found))
        old = self.state
        self.state, slots = restoring.restore(self.state, limits, request_id, first, len(found))
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
            record = self._remove(request_id)
            assert outputs == (self._output(record, (), reason),)
            if self.recorder:
                self.recorder.abort(request_id, reason)
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
        self._check_plan(plan, before)
        if not launch:
            self._unlaunched = plan
            return plan
        if plan.rows:
            self.in_flight.append(self._launch(plan))
        else:
            assert self.in_flight or not self.records, "nothing is in flight, and nothing can run"
            self.counts["empty plans"] += 1
        self._after("schedule")
        return plan

    def commit(self) -> tuple[StepOutput, ...]:
        """Take the oldest step in and compare its news with the oracle."""
        step = self.in_flight.popleft()
        assert plain(step.plan) == step.as_planned, "a plan changed after it was made"
        expected = []
        for index, (row, record) in enumerate(zip(step.plan.rows, step.records, strict=True)):
            if not record.is_live:
                self.counts["rows dropped"] += 1
            elif row.samples:
                expected.append(self._expected_output(record, step.tokens.token_ids[index]))
        if self.recorder:
            self.recorder.commit(step.plan, step.tokens)
        old = self.state
        self.state, outputs = scheduler.commit(self.state, step.plan, step.tokens, self.limits)
        self._assert_consumed(old)
        assert outputs == tuple(expected)
        for output in outputs:
            if output.finish_reason is not None:
                record = self._remove(output.request_id)
                length = record.num_prompt + record.num_committed
                self.transcripts.append(record.tokens(0, length))
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
            for record in step.records:
                if record.is_live:
                    affected[record.request.request_id] = record
        if self._unlaunched is not None:
            for row in self._unlaunched.rows:
                request_id = row.request.request_id
                affected.setdefault(request_id, self.records[request_id])
        if self.recorder:
            self.recorder.fail(tuple(plans))
        self.state, outputs = scheduler.fail(self.state, tuple(plans))
        ended = [self._output(record, (), FinishReason.ERROR) for record in affected.values()]
        assert list(outputs) == ended
        for request_id in affected:
            self._remove(request_id)
        for record in self.records.values():
            record.num_preempted += record.has_slot
            record.lose_slot()
        self.in_flight.clear()
        self._unlaunched = None
        self._wipe()
        assert self.state.pool.free == self.limits.num_blocks, "a name outlived its contents"
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
        self._after("copy")

    def drain(self) -> int:
        """With nothing new, everything ends within a bounded number of steps, which it returns.

        The bound: in every step the best-ranked running sequence computes a position, and it is
        never preempted. So after at most max_total steps, and those in flight, it has ended or
        a better one has started in its place; each of the n sequences does either only once.
        """
        longest = max((record.max_total for record in self.records.values()), default=0)
        bound = 2 * (len(self.records) + 1) * (longest + 2 * self.max_in_flight)
        steps = 0
        while self.records or self.in_flight:
            if len(self.in_flight) < self.max_in_flight and self.records:
                self.schedule()
                steps += 1
            if len(self.in_flight) == self.max_in_flight or (
                self.in_flight and not (self.records and steps % 3)
            ):
                self.commit()
            assert steps <= bound, f"{len(self.records)} requests are left after {steps} steps"
        assert self.state.is_idle
        assert self.state.pool.owned == 0, "an idle scheduler holds blocks"
        return steps

    def _remove(self, request_id: str) -> Record:
        """It ended. The first of those that waited for its prompt does so for itself now."""
        record = self.records.pop(request_id)
        record.is_live = False
        heirs = [r for r in self.records.values() if r.parent is record and not r.waits_alone]
        for heir in heirs:
            heir.parent = None if heir is heirs[0] else heirs[0]
            self.counts["inherited"] += 1
        return record

    # The device.

    def _wipe(self) -> None:
        shape = (self.limits.num_blocks, self.limits.block_size)
        self.kv: list[list[History | None]] = [[None] * shape[1] for _ in range(shape[0])]
        self.slots: dict[int, Slot] = {}
        self.host: dict[int, list[History | None]] = getattr(self, "host", {})  # outlives it
        self._named: set[int] = set()

    def _launch(self, plan: StepPlan) -> InFlight:
        """Run the plan: all reads see the state before the step, then all writes happen."""
        records = tuple(self.records[row.request.request_id] for row in plan.rows)
        self._move(plan)
        writes: dict[tuple[int, int], History] = {}
        sampled: list[int] = []
        lasts: list[History] = []
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        for index, (row, record) in enumerate(zip(plan.rows, records, strict=True)):
            last = self._run_row(row, record, writes, lasts)
            lasts.append(last)
            sampling = row.request.sampling
            if sampling.prompt_logprobs is not None:
                stop = row.start + row.num_tokens
                targets = range(row.start + 1, min(stop + 1, record.num_prompt))
                prompt_logprobs[index] = tuple(logprob_at(record, target) for target in targets)
            token = last.next_token(row.request.seed) if row.samples else -99
            if row.samples and sampling.logprobs is not None:
                logprobs[index] = TokenLogprobs(token, -float(record.num_sampled), ())
            sampled.append(token)
        for (block, offset), history in writes.items():
            self.kv[block][offset] = history
        for row, record, token in zip(plan.rows, records, sampled, strict=True):
            if row.samples:
                slot = self.slots[row.slot]
                slot.last_token = token
                slot.output.append(token)
                record.num_sampled += 1
        tokens = StepTokens(tuple(sampled), logprobs, prompt_logprobs)
        return InFlight(plan, tokens, records, plain(plan))

    def _move(self, plan: StepPlan) -> None:
        """Copies and swaps: all that is read is read before anything is written."""
        copied = {copy.destination: list(self.kv[copy.source]) for copy in plan.block_copies}
        copied |= {swap.block: list(self.host[swap.slot]) for swap in plan.swap_ins}
        for block, slot, key in plan.swap_outs:
            last = self.kv[block][-1]
            assert last is not None, "an unwritten block is swapped out"
            assert key == last.key(self.limits.block_size, self.limits.fingerprint)
            self.host[slot] = self.disk[key] = list(self.kv[block])
            self.counts["swapped out"] += 1
        for block, contents in copied.items():
            self.kv[block] = contents
        self.counts["swapped in"] += len(plan.swap_ins)

    def _run_row(
        self,
        row: PlanRow,
        record: Record,
        writes: dict[tuple[int, int], History],
        lasts: list[History],
    ) -> History:
        """Check what the row reads, and say what it writes. Returns its last position, or, of
        the positions that earlier rows returned, the one that it samples after."""
        block_size = self.limits.block_size
        start, stop = row.start, row.start + row.num_tokens
        blocks = row.block_ids.tolist()
        assert len(blocks) == -(-stop // block_size), "the block table doesn't cover the context"
        record.history(stop)
        own = record.chain[1 : stop + 1]
        is_parting = row.logits_of is not None
        for position in range(0, 0 if is_parting else start, block_size):
            here = self.kv[blocks[position // block_size]][: min(block_size, start - position)]
            if here != own[position : position + len(here)]:
                raise AssertionError(f"a block holds something else than {record.request}")
        if row.history is not None:
            self.slots[row.slot] = Slot(-1, list(row.history))
        slot = self.slots[row.slot]
        tokens = row.token_ids or (slot.last_token,) * row.num_tokens
        assert len(tokens) == row.num_tokens
        history = record.chain[0] if row.logits_of is None else lasts[row.logits_of]
        if start and not is_parting:  # as attention would: what is there, not what ought to be
            found = self.kv[blocks[(start - 1) // block_size]][(start - 1) % block_size]
            assert found is not None
            history = found
        for position, token in enumerate(tokens, start):
            history = history.then(token)
            place = blocks[position // block_size], position % block_size
            assert place not in writes, "two rows write the same place"
            writes[place] = history
        assert history is own[-1], "the row's tokens aren't those of its sequence"
        if row.samples:
            output = list(record.tokens(record.num_prompt, stop))
            assert row.output_position == len(output) == record.num_sampled
            assert slot.output == output, "the slot's state is another's, or misses tokens"
        return history

    # Checks.

    def _check_plan(self, plan: StepPlan, before: dict) -> None:
        """The policy: who is in the plan, in which order, with what. Advances the records."""
        limits, rows = self.limits, plan.rows
        assert plan.step == before["step"]
        assert before["in_flight"] == [step.plan.step for step in self.in_flight]
        assert len(rows) <= limits.max_num_seqs
        assert sum(row.num_tokens for row in rows) == plan.num_tokens <= limits.max_step_tokens
        assert len({row.request.request_id for row in rows}) == len(rows)
        assert len({row.slot for row in rows}) == len(rows)
        running = [entry["request_id"] for entry in before["running"]]
        waiting = [entry["request_id"] for entry in before["waiting"]]
        most = limits.max_preemptions
        victims = [name for name in running[::-1] if self.records[name].num_preempted < most]
        count = len(plan.preempted)
        assert list(plan.preempted) == victims[:count], "not the lowest ranks were preempted"
        kept = [name for name in running if name not in plan.preempted]
        for request_id in plan.preempted:
            self.records[request_id].lose_slot()
            self.records[request_id].num_preempted += 1
            self.counts["preempted"] += 1
        must_decode = [name for name in kept if self.records[name].may_decode]
        assert [row.request.request_id for row in rows[: len(must_decode)]] == must_decode, (
            "the decodes are not first, in order and complete"
        )
        unfinished = [name for name in kept if not self.records[name].is_at_its_end]
        continued = [row.request.request_id for row in rows if row.history is None]
        assert sorted(continued) == sorted(unfinished), "a running sequence stands still"

        parted = [row for row in rows if row.logits_of is not None]
        assert list(rows[len(rows) - len(parted) :]) == parted
        computing = rows[: len(rows) - len(parted)]
        started = [row.request.request_id for row in computing if row.history is not None]
        queue = [name for name in waiting if self.records[name].waits_alone]
        assert started == queue[: len(started)], "a request overtook the head of the queue"
        assert not (started and plan.preempted), "a request started in a step that preempted"
        for index, row in enumerate(computing):
            self._check_row(row, is_last=index == len(computing) - 1)
        self._check_parting(computing, parted)

        entries = self.state.snapshot()["running"]
        assert isinstance(entries, list)
        named = {row.request.request_id for row in parted}  # these share what is being written
        owners = Counter(
            block
            for entry in entries
            if entry["request_id"] not in named
            for block in entry["blocks"]
        )
        self.counts["copies"] += len(plan.block_copies)
        for copy in plan.block_copies:
            assert owners[copy.destination] == 1, "a copy lies on a block that is another's"
        for row in computing:
            for index in range(row.start // limits.block_size, row.block_ids.size):
                assert owners[int(row.block_ids[index])] == 1, "a shared block is written"

    def _check_parting(self, computing: tuple[PlanRow, ...], parted: list[PlanRow]) -> None:
        """All that wait for a prompt start where it ends, and compute nothing for it."""
        by_record = {id(self.records[row.request.request_id]): row for row in computing}
        expected = [
            name
            for name, record in self.records.items()
            if not record.waits_alone
            and (source := by_record.get(id(record.parent))) is not None
            and source.samples
        ]
        assert sorted(row.request.request_id for row in parted) == sorted(expected)
        for row in parted:
            record = self.records[row.request.request_id]
            assert record.parent is not None
            assert row.logits_of is not None
            source = computing[row.logits_of]
            assert source.request.request_id == record.parent.request.request_id
            assert row.request == record.request
            assert not record.has_slot
            assert (row.history, row.samples) == ((), True)
            assert (row.start, row.num_tokens) == (record.num_prompt, 0)
            record.part()
            self.counts["parted"] += 1

    def _check_row(self, row: PlanRow, *, is_last: bool) -> None:
        record = self.records[row.request.request_id]
        assert row.request == record.request
        assert 0 <= row.slot < self.limits.max_num_seqs
        assert not row.block_ids.flags.writeable
        total = record.num_prompt + record.num_sampled
        stop = row.start + row.num_tokens
        if row.history is not None:
            assert not record.has_slot, "a slot that is set was set again"
            record.has_slot = True
            generated = record.tokens(record.num_prompt, record.num_prompt + record.num_committed)
            assert row.history == generated
            assert record.num_committed == record.num_sampled, "it restarts without all tokens"
            assert row.start % self.limits.block_size == 0
            record.computed = row.start
            if record.num_cached is None:
                record.num_cached = row.start
                if record.request.sampling.prompt_logprobs is not None:
                    assert row.start == 0, "prompt positions without log-probabilities"
            self.counts["hits" if row.start else "misses"] += 1
            self.counts["resumed"] += record.num_sampled > 0
        assert record.has_slot
        assert row.start == record.computed
        assert row.num_tokens >= 1
        assert stop <= total < record.max_total
        assert row.samples == (stop == total)
        assert row.samples or is_last, "a chunk was cut although the step had room"
        self.counts["chunks"] += not row.samples
        self.counts["unknown tokens"] += not row.token_ids
        record.computed = stop

    def _after(self, operation: str) -> None:
        """What must hold after every operation."""
        self.counts["operations"] += 1
        self.counts[f"operation: {operation}"] += 1
        state = self.state
        state.check()
        assert sum(state.pool) == self.limits.num_blocks
        assert state.is_idle == (not self.records)
        assert state.num_running == sum(record.has_slot for record in self.records.values())
        assert state.num_waiting == len(self.records) - state.num_running
        if state.num_running == 0:
            assert state.pool.owned == 0
        self._check_names()
        self._check_eviction_order()

    def _check_names(self) -> None:
        """Every name is true: the block holds what its key says, on the device, now."""
        pool = self.state._peek().pool
        assert isinstance(pool, BlockPool)
        block_size, fingerprint = self.limits.block_size, self.limits.fingerprint
        for block, key in pool._key_of.items():
            contents = self.kv[block]
            last = contents[-1]
            assert last is not None, "a block was named before it was written"
            assert contents == last.block(block_size), "a named block's contents are torn"
            assert key == last.key(block_size, fingerprint), "a block's name is not true"
        self.counts["evicted"] += len(self._named - pool._key_of.keys())
        self._named = set(pool._key_of)

    def _check_eviction_order(self) -> None:
        """Of the blocks that one sequence released, the last goes first."""
        core = self.state._peek()
        assert isinstance(core.pool, BlockPool)
        released = [block for block in core.pool._cached if block not in self._cached]
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

    def _assert_consumed(self, old: SchedulerState) -> None:
        try:
            old.snapshot()
        except StaleState:
            return
        raise AssertionError("a state can be used after it was consumed")
