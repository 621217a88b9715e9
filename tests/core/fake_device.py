"""A device for the scheduler's simulation that knows what each of its places was computed from.

It checks what a plan reads, and hands back tokens as a device would.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

from engine.core.limits import Limits
from engine.types import Domain, PlanRow, StepPlan, StepTokens, TokenLogprobs
from tests.core.oracle import Gang, History, Record, logprob_at, plain


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
    attempts: tuple[int, ...]  # of each row's beam search
    as_planned: Sequence[object]

    def counts_for(self, index: int) -> bool:
        """Whether a row is of a request that is there, and has not started over as beams do."""
        record = self.records[index]
        return record.is_live and (
            record.gang is None or record.gang.attempt == self.attempts[index]
        )


class FakeDevice:
    """Pool, slots, host memory and disk: of each position the history that it was computed from.

    `counts` says what happened.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.counts: Counter[str] = Counter()
        self.records: dict[str, Record] = {}  # requests that have not ended
        self.public: tuple[int, ...] = ()  # the text that every domain shares
        self.host: dict[int, list[History | None]] = {}
        # All that ever went to the host tier, until when it may stay (0: without limit), and whose
        # it is.
        self.disk: dict[bytes, tuple[list[History | None], int, Domain | None]] = {}
        self.wipe()

    def condemn(self, blocks: list[int]) -> None:
        """What these hold must be gone when nobody uses it any more, unless it is public."""
        for block in blocks:
            for offset, history in enumerate(self.kv[block]):
                if history is not None and not self.is_public(history):
                    self.condemned.add((block, offset))

    def wipe(self) -> None:
        """Lose what the pool and the slots hold; host memory and the disk outlive it."""
        shape = (self.limits.num_blocks, self.limits.block_size)
        self.kv: list[list[History | None]] = [[None] * shape[1] for _ in range(shape[0])]
        self.slots: dict[int, Slot] = {}
        # Places in the pool of which nothing may stay, as their request was private or flushed.
        self.condemned: set[tuple[int, int]] = set()

    def launch(self, plan: StepPlan) -> InFlight:
        """Run the plan: all reads see the state before the step, then all writes happen."""
        records = tuple(self.records[row.request.request_id] for row in plan.rows)
        self.move(plan)
        writes: dict[tuple[int, int], History] = {}
        sampled: list[int] = []
        lasts: list[History] = []
        condemned: set[tuple[int, int]] = set()
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        for index, (row, record) in enumerate(zip(plan.rows, records, strict=True)):
            known = len(writes)
            last = self._run_row(row, record, writes, lasts)
            lasts.append(last)
            if record.leaves_nothing:
                condemned.update(
                    place
                    for place, history in itertools.islice(writes.items(), known, None)
                    if record.request.is_private or not self.is_public(history)
                )
            sampling = row.request.sampling
            if sampling.prompt_logprobs is not None:
                stop = row.start + row.num_tokens
                targets = range(row.start + 1, min(stop + 1, record.num_prompt))
                prompt_logprobs[index] = tuple(logprob_at(record, target) for target in targets)
            token = last.next_token(row.request.seed) if row.samples else -99
            if row.samples and record.gang is not None:
                top = sorted(enumerate(last.logprobs()), key=lambda entry: -entry[1])
                top = top[: row.request.num_logprobs]
                logprobs[index] = TokenLogprobs(token, top[0][1], tuple(top))
            elif row.samples and sampling.logprobs is not None:
                logprobs[index] = TokenLogprobs(token, -float(record.num_sampled), ())
            sampled.append(token)
        for (block, offset), history in writes.items():
            self.kv[block][offset] = history
        self.condemned -= writes.keys()
        self.condemned |= condemned
        for row, record, token in zip(plan.rows, records, sampled, strict=True):
            if row.samples and record.gang is not None:
                record.num_sampled += 1
            elif row.samples:
                slot = self.slots[row.slot]
                slot.last_token = token
                slot.output.append(token)
                record.num_sampled += 1
        tokens = StepTokens(tuple(sampled), logprobs, prompt_logprobs)
        attempts = tuple(record.gang.attempt if record.gang else 0 for record in records)
        self._check_beams(records, lasts)
        return InFlight(plan, tokens, records, attempts, plain(plan))

    def _check_beams(self, records: tuple[Record, ...], lasts: list[History]) -> None:
        """The beams of a step are those of the search that runs alone."""
        outputs: dict[int, list[tuple[int, ...]]] = {}
        gangs: dict[int, Gang] = {}
        for record, last in zip(records, lasts, strict=True):
            if record.gang is not None and record.gang.first.num_committed:
                gangs[id(record.gang)] = record.gang
                tokens = tuple(node.token for node in last.path())[record.num_prompt :]
                outputs.setdefault(id(record.gang), []).append(tokens)
        for key, gang in gangs.items():
            expected = gang.trace[gang.first.num_committed - 1]
            assert sorted(outputs[key]) == sorted(expected), "the beams are not the likeliest ones"
            self.counts["beam steps"] += 1

    def move(self, plan: StepPlan) -> None:
        """Copies, erasures and swaps: all that is read is read before anything is written."""
        copied = {copy.destination: list(self.kv[copy.source]) for copy in plan.block_copies}
        incoming = {swap.block: list(self.host[swap.slot]) for swap in plan.swap_ins}
        outgoing: dict[int, list[History | None]] = {}
        for block, slot, key, expires, domain in plan.swap_outs:
            last = self.kv[block][-1]
            assert last is not None, "an unwritten block is swapped out"
            assert key == self.key_of(last)
            outgoing[slot] = list(self.kv[block])
            assert domain == (None if self.is_public(last) else last.domain)
            self.disk[key] = list(self.kv[block]), expires, domain
        nothing: list[History | None] = [None] * self.limits.block_size
        for slot in plan.erased_slots:
            self.host[slot] = nothing.copy()
        self.host |= outgoing
        erased = {block: nothing.copy() for block in plan.erased_blocks}
        assert len(erased) == len(plan.erased_blocks)
        condemned = {
            (copy.destination, offset)
            for copy in plan.block_copies
            for offset in range(self.limits.block_size)
            if (copy.source, offset) in self.condemned
        }
        for block, contents in [*copied.items(), *erased.items(), *incoming.items()]:
            self.kv[block] = contents
            self.condemned -= {(block, offset) for offset in range(self.limits.block_size)}
        self.condemned |= condemned
        self.counts["swapped in"] += len(incoming)
        self.counts["swapped out"] += len(outgoing)
        self.counts["erased blocks"] += len(erased)
        self.counts["erased slots"] += len(plan.erased_slots)

    def key_of(self, last: History) -> bytes:
        """The key of the full block that ends with it."""
        return last.key(self.limits.block_size, self.limits.fingerprint, self.public)

    def _is_same(self, here: History | None, own: History, full: History) -> bool:
        """Whether a place holds what a sequence would have put there, be it by another domain
        where the block that ends with `full` is public."""
        if here is own:
            return True
        tokens = full.tokens
        if here is None or tokens != self.public[: len(tokens)]:
            return False
        self.counts["public positions read"] += here.domain != own.domain
        return here.tokens == own.tokens

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
        if record.gang is not None and start >= record.num_prompt:
            (token,) = row.token_ids
            before = self.kv[blocks[(start - 1) // block_size]][(start - 1) % block_size]
            assert before is not None
            own = before.then(token).path()
        else:
            record.history(stop)
            own = record.chain[1 : stop + 1]
        is_parting = row.logits_of is not None
        for position in range(0, 0 if is_parting else start, block_size):
            here = self.kv[blocks[position // block_size]][: min(block_size, start - position)]
            ours = own[position : position + len(here)]
            if not all(self._is_same(*pair, ours[-1]) for pair in zip(here, ours, strict=True)):
                raise AssertionError(f"a block holds something else than {record.request}")
        if row.history is not None:
            self.slots[row.slot] = Slot(-1, list(row.history))
        tokens = row.token_ids or (self.slots[row.slot].last_token,) * row.num_tokens
        assert len(tokens) == row.num_tokens
        history = record.chain[0] if row.logits_of is None else lasts[row.logits_of]
        if start and not is_parting:  # as attention would: what is there, not what ought to be
            found = self.kv[blocks[(start - 1) // block_size]][(start - 1) % block_size]
            assert found is not None
            history = found if found.tokens != own[start - 1].tokens else own[start - 1]
        for position, token in enumerate(tokens, start):
            history = history.then(token)
            place = blocks[position // block_size], position % block_size
            assert place not in writes, "two rows write the same place"
            writes[place] = history
        assert history is own[-1], "the row's tokens aren't those of its sequence"
        if row.samples and record.gang is not None:
            assert row.output_position == record.num_sampled == stop - record.num_prompt
        elif row.samples:
            output = list(record.tokens(record.num_prompt, stop))
            assert row.output_position == len(output) == record.num_sampled
            assert self.slots[row.slot].output == output, (
                "the slot's state is another's, or misses tokens"
            )
        return history

    def is_public(self, history: History) -> bool:
        """Whether the block that holds it is a public prefix's."""
        tokens = history.tokens
        full = -(-len(tokens) // self.limits.block_size) * self.limits.block_size
        return full <= len(self.public) and tokens == self.public[: len(tokens)]
