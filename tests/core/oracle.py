"""What a request generates when it runs alone, and what each position of its cache must hold.

Nothing here is shared with the engine: keys are computed a second time, and the "model" is a
hash of the tokens before.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

from engine.core.limits import Limits
from engine.types import (
    BeamScore,
    Domain,
    FinishReason,
    Request,
    StepOutput,
    StepPlan,
    TokenLogprobs,
)
from tests.core.beam_oracle import Search

VOCABULARY = 5
# Milliseconds for which what some domains leave may stay.
TIMES_TO_LIVE = {Domain("alice", "salt"): 40, Domain("bob"): 200}


class History:
    """A domain and a list of tokens, as a node of a trie: equal histories are one object."""

    __slots__ = ("_block", "_key", "children", "digest", "domain", "parent", "token")

    def __init__(self, domain: Domain, parent: History | None, token: int):
        self.domain = domain
        self.parent = parent
        self.token = token
        self.children: dict[int, History] = {}
        # The "model": a hash of the tokens, the domain left out, as weights don't know it.
        self.digest = 17 if parent is None else (parent.digest * 1_000_003 + token + 1) % (1 << 61)
        self._block: list[History] | None = None
        self._key: tuple[str, bytes] | None = None  # and for which weights

    def then(self, token: int) -> History:
        """This history with one more token."""
        child = self.children.get(token)
        if child is None:
            child = self.children[token] = History(self.domain, self, token)
        return child

    def next_token(self, seed: int) -> int:
        """What the model says after this history, and a draw of that seed makes of it."""
        return (self.digest * (2 * seed + 1) >> 20) % VOCABULARY

    def logprobs(self) -> list[float]:
        """What a beam goes by: log-probabilities of the tokens after this history."""
        weights = [1 + (self.digest * (2 * token + 1) >> 20) % 97 for token in range(VOCABULARY)]
        return [math.log(weight / sum(weights)) for weight in weights]

    def path(self) -> list[History]:
        """The histories from one token on to this one."""
        nodes: list[History] = []
        node: History = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def block(self, block_size: int) -> list[History]:
        """What the block that ends here holds, position by position."""
        if self._block is None:
            node: History = self
            nodes = [node]
            while len(nodes) < block_size:
                assert node.parent is not None
                node = node.parent
                nodes.append(node)
            self._block = nodes[::-1]
        return self._block

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of them, the first one first."""
        node, tokens = self, []
        while node.parent is not None:
            tokens.append(node.token)
            node = node.parent
        return tuple(tokens[::-1])

    def key(self, block_size: int, fingerprint: str, public: tuple[int, ...]) -> bytes:
        """The key that the block which ends here must have; written down a second time.

        `public` is the text whose full blocks every domain shares.
        """
        if self._key is None or self._key[0] != fingerprint:
            tokens = self.tokens
            shared = 0  # blocks
            while tokens[: (shared + 1) * block_size] == public[: (shared + 1) * block_size] and (
                (shared + 1) * block_size <= min(len(public), len(tokens))
            ):
                shared += 1
            own = _hash_of(b"octavo.block.v1", self.domain.tenant, self.domain.salt, fingerprint)
            key = _hash_of(b"octavo.public.v1", fingerprint) if shared else own
            for start in range(0, len(tokens), block_size):
                if shared and start == shared * block_size:
                    key = hashlib.sha256(b"octavo.joined.v1" + own + key).digest()
                block = tokens[start : start + block_size]
                packed = b"".join(struct.pack("<i", token) for token in block)
                key = hashlib.sha256(key + packed).digest()
            self._key = fingerprint, key
        return self._key[1]


def _hash_of(version: bytes, *parts: str) -> bytes:
    for part in parts:
        version += len(part.encode()).to_bytes(8, "little") + part.encode()
    return hashlib.sha256(version).digest()


class Record:
    """What the test knows about one admitted request."""

    def __init__(
        self,
        request: Request,
        root: History,
        limits: Limits,
        arrival: int,
        parent: Record | None = None,
    ):
        self.request = request
        self.parent = parent  # whose prompt it waits for, if it was a fork
        self.rank = (request.priority, arrival)
        self.num_prompt = len(request.prompt_ids)
        self.max_total = min(self.num_prompt + request.max_tokens, limits.max_model_len)
        self.chain = [root]  # chain[n]: the history of the first n tokens; grows on demand
        for token in request.prompt_ids:
            self.chain.append(self.chain[-1].then(token))
        self.num_sampled = 0  # on the device
        self.num_committed = 0  # on the host
        self.computed = 0
        self.num_cached: int | None = None
        self.num_preempted = 0
        self.has_slot = False
        self.is_live = True
        self.leaves_nothing = request.is_private
        self.gang: Gang | None = None

    def history(self, count: int) -> History:
        """The first `count` tokens of prompt and output, had it run alone."""
        while len(self.chain) <= count:
            token = self.chain[-1].next_token(self.request.seed)
            self.chain.append(self.chain[-1].then(token))
        return self.chain[count]

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens of prompt and output, had it run alone."""
        self.history(stop)
        return tuple(node.token for node in self.chain[start + 1 : stop + 1])

    @property
    def has_begun(self) -> bool:
        """Whether it has ever run."""
        return self.num_cached is not None

    @property
    def may_decode(self) -> bool:
        """Whether the next step must carry it: its prompt is done and it isn't at its end."""
        prompt_done = self.computed == self.num_prompt + self.num_sampled - 1
        stands_still = self.is_at_its_end or self.awaits_choice
        return self.has_slot and prompt_done and not stands_still

    @property
    def awaits_choice(self) -> bool:
        """Whether it is a beam with a step on its way, which may be its last."""
        return self.gang is not None and self.gang.is_pending

    @property
    def is_at_its_end(self) -> bool:
        """Whether all its tokens are sampled, though the host may not know them yet."""
        return self.num_prompt + self.num_sampled >= self.max_total

    @property
    def waits_alone(self) -> bool:
        """Whether it has a place of its own in the queue: it is no fork, has parted, or the
        record whose prompt it waited for has ended."""
        return self.parent is None or self.num_sampled > 0 or self.has_slot

    def part(self) -> None:
        """Its prompt is computed, by the record that it waited for."""
        assert self.parent is not None
        self.computed, self.num_cached = self.num_prompt, self.parent.num_cached
        self.has_slot = True

    def lose_slot(self) -> None:
        """It was preempted, or the device memory is gone."""
        self.has_slot = False
        self.computed = 0


class Gang:
    """What the test knows about a beam search: its outcome, its course, and how far it is."""

    def __init__(self, members: list[Record], root: History):
        first = self.first = members[0]
        self.members = members
        self.request = first.request
        prompt = first.chain[first.num_prompt]

        def model(output: tuple[int, ...]) -> list[float]:
            node = prompt
            for token in output:
                node = node.then(token)
            return node.logprobs()

        sampling = self.request.sampling
        self.found, self.trace = Search(
            sampling.beam_width,
            first.max_total - first.num_prompt,
            self.request.stop_ids,
            sampling.length_penalty,
            sampling.early_stopping,
        ).run(model)
        self.attempt = 0  # a step of an earlier one counts for nothing
        for record in members:
            record.gang = self

    @property
    def is_pending(self) -> bool:
        """Whether a step is on its way that decides how it goes on."""
        return self.first.num_sampled > self.first.num_committed

    def commit(self) -> bool:
        """The step on its way is taken in. Returns whether it was the last."""
        num_chosen = self.first.num_committed + 1
        for record in self.members:
            record.num_sampled = record.num_committed = num_chosen
            record.computed = record.num_prompt + num_chosen - 1
            record.has_slot = True
        return num_chosen > len(self.trace)

    def restart(self, *, counts: bool = True) -> None:
        """It lost its blocks."""
        self.attempt += 1
        for record in self.members:
            record.num_sampled = record.num_committed = 0
            record.num_preempted += counts
            record.lose_slot()

    def outputs(self, reason: FinishReason | None = None) -> list[StepOutput]:
        """News of all that was asked for: what is found, or that it ended for another reason."""
        first, outputs = self.first, []
        for name, found in zip(self.request.replies, self.found, strict=False):
            news = StepOutput(name, (), reason, first.num_prompt, first.num_cached or 0)
            if reason is None:
                stopped = found.token_ids[-1] in self.request.stop_ids
                news = news._replace(
                    token_ids=found.token_ids,
                    finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
                    beam=BeamScore(found.logprob, found.score),
                )
            outputs.append(news)
        return outputs


def logprob_at(record: Record, target: int) -> TokenLogprobs:
    """The log-probabilities of a prompt token: a value that names its position and history."""
    digest = record.chain[target].digest % 1009
    return TokenLogprobs(record.request.prompt_ids[target], -float(target) - digest, ())


def plain(plan: StepPlan) -> Sequence[object]:
    """A plan as values that compare with ==, arrays included."""
    rows = [(*row[:5], row.block_ids.tolist(), *row[6:]) for row in plan.rows]
    moves = (plan.block_copies, plan.swap_outs, plan.swap_ins)
    return plan.step, rows, moves, plan.preempted, plan.erased_blocks, plan.erased_slots
