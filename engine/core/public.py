"""Prefixes that an operator declares public: every domain matches them, and they are never evicted.

They are computed as requests like others; when one ends, its full blocks stay owned here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from engine.core.limits import Limits
from engine.sampling import InvalidRequest
from engine.types import Request

if TYPE_CHECKING:
    from engine.core.core import Core
    from engine.core.sequences import Sequence


class _Pinned(NamedTuple):
    request: Request
    blocks: list[int]


class PublicPrefixes:
    """Their keys, and the blocks of those that are computed. Mutable, owned by one core.

    Attributes:
      keys: of every full block of every prefix, computed or not.
    """

    __slots__ = ("_pinned", "keys")

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self._pinned: list[_Pinned] = []

    @property
    def owned_blocks(self) -> list[list[int]]:
        """The blocks that each computed prefix holds."""
        return [pinned.blocks for pinned in self._pinned]

    @property
    def num_blocks(self) -> int:
        """Blocks of those that are computed, shared ones once; they are always owned."""
        return len({block for blocks in self.owned_blocks for block in blocks})

    def check_admission(self, request: Request, limits: Limits, others: Iterable[Request]) -> None:
        """Raise InvalidRequest if a prefix can't be kept beside what is there.

        What is pinned is lost to all others: nobody may be counting on it, and most must be left.
        """
        if not limits.prefix_reuse:
            raise InvalidRequest("is_public", "needs a cache that is reused; turn prefix_reuse on")
        if request.forks:
            raise InvalidRequest("n", "a public prefix is computed once; ask for one sample")
        if not all(other.is_public for other in others):
            raise InvalidRequest("is_public", "public prefixes come before all other requests")
        pinned = len(self.keys) + len(request.prompt_ids) // limits.block_size
        if pinned > limits.num_blocks // 2:
            raise InvalidRequest(
                "prompt",
                f"with it, public prefixes take {pinned} blocks, but at most half of the cache's "
                f"{limits.num_blocks} may be kept for them; shorten them or enlarge the cache",
            )

    def pin(self, core: Core, seq: Sequence) -> None:
        """A prefix is computed: its sequence ends, and what others find under its keys stays."""
        blocks = core.pool.match(seq.keys[: seq.num_prompt // core.block_size])
        core.pool.share(blocks)
        self._pinned.append(_Pinned(seq.request, blocks))
        core.remove(seq)

    def unpin(self, core: Core) -> None:
        """The contents of all blocks are lost: give them up, and queue the prefixes again."""
        pinned, self._pinned = self._pinned, []
        for request, blocks in pinned:
            core.pool.release(blocks)
            core.add(request, len(request.prompt_ids) + request.max_tokens)

    def try_again(self, core: Core, seq: Sequence) -> bool:
        """Have a prefix whose step failed computed once more; False after some attempts, and then
        its blocks are nobody's any more."""
        if core.is_protected(seq):
            self.keys.difference_update(seq.keys)
            return False
        seq.num_preemptions += 1
        seq.num_total, seq.first_step = seq.num_prompt, core.step
        return True

    def copy(self) -> PublicPrefixes:
        """Independent ones in the same state."""
        other = PublicPrefixes()
        other.keys = self.keys.copy()
        other._pinned = self._pinned.copy()
        return other
