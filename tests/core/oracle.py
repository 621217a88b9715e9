"""What a request generates when it runs alone, and what each position of its cache must hold.

Nothing here is shared with the engine: keys are computed a second time, and the "model" is a
hash of the tokens before.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from engine.core.limits import Limits
from engine.types import Domain, Request, StepPlan, TokenLogprobs

VOCABULARY = 5


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
        self._key: bytes | None = None

    def then(self, token: int) -> History:
        """This history with one more token."""
        child = self.children.get(token)
        if child is None:
            child = self.children[token] = History(self.domain, self, token)
        return child

    def next_token(self, seed: int) -> int:
        """What the model says after this history, and a draw of that seed makes of it."""
        return (self.digest * (2 * seed + 1) >> 20) % VOCABULARY

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

    def key(self, block_size: int, fingerprint: str) -> bytes:
        """The key that the block which ends here must have; written down a second time."""
        if self._key is None:
            nodes = self.block(block_size)
            before = nodes[0].parent
            assert before is not None
            if before.parent is None:
                parts = (self.domain.tenant, self.domain.salt, fingerprint)
                data = b"octavo.block.v1"
                for part in parts:
                    data += len(part.encode()).to_bytes(8, "little") + part.encode()
                parent = hashlib.sha256(data).digest()
            else:
                parent = before.key(block_size, fingerprint)
            tokens = b"".join(struct.pack("<i", node.token) for node in nodes)
            self._key = hashlib.sha256(parent + tokens).digest()
        return self._key


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
    def may_decode(self) -> bool:
        """Whether the next step must carry it: its prompt is done and it isn't at its end."""
        prompt_done = self.computed == self.num_prompt + self.num_sampled - 1
        return self.has_slot and prompt_done and not self.is_at_its_end

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


def logprob_at(record: Record, target: int) -> TokenLogprobs:
    """The log-probabilities of a prompt token: a value that names its position and history."""
    digest = record.chain[target].digest % 1009
    return TokenLogprobs(record.request.prompt_ids[target], -float(target) - digest, ())


def plain(plan: StepPlan) -> Sequence[object]:
    """A plan as values that compare with ==, arrays included."""
    rows = [(*row[:5], row.block_ids.tolist(), *row[6:]) for row in plan.rows]
    swaps = plan.swap_outs, plan.swap_ins
    return plan.step, rows, plan.block_copies, plan.preempted, swaps
