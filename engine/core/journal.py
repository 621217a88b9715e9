"""Which keys the pool can find from now on, and which not any more: for whoever mirrors the cache.

It only notes what the pool does and decides nothing, so plans are the same with it and without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from engine.types import Domain

if TYPE_CHECKING:
    from engine.core.sequences import Sequence


class BlockStored(NamedTuple):
    """A block that can be found from now on.

    Attributes:
      key: names its contents.
      parent: the key of the block before it; None if it is the first of a prompt.
      index: how many blocks come before it.
      domain: who can find it; None if everybody can.
      token_ids: its tokens, unless the journal keeps none.
    """

    key: bytes
    parent: bytes | None
    index: int
    domain: Domain | None
    token_ids: tuple[int, ...]


class BlockRemoved(NamedTuple):
    """A block that can't be found any more."""

    key: bytes


class PoolCleared(NamedTuple):
    """No block can be found any more."""


Change = BlockStored | BlockRemoved | PoolCleared


class Journal:
    """Notes changes, and tells a listener of them now and then. O(1) each.

    Args:
      listener: given the changes since the last time, oldest first. None: nothing is noted.
      with_tokens: whether a stored block's token ids are noted.
    """

    __slots__ = ("_changes", "_listener", "_named", "_with_tokens")

    def __init__(
        self, listener: Callable[[list[Change]], None] | None = None, *, with_tokens: bool = False
    ):
        self._listener = listener
        self._with_tokens = with_tokens
        self._named: set[bytes] = set()  # by the pool, but not told of by the sequence yet
        self._changes: list[Change] = []

    def name(self, key: bytes) -> None:
        """The pool can find a key now; `add_stored` tells the rest of it."""
        if self._listener is not None:
            self._named.add(key)

    def add_stored(self, seq: Sequence, stop: int, block_size: int) -> None:
        """A sequence had its blocks up to that index named. Those that had a name are skipped."""
        if not self._named:
            return
        for index in range(seq.num_blocks_named, stop):
            key = seq.keys[index]
            if key in self._named:
                tokens = seq.token_ids[index * block_size : (index + 1) * block_size]
                self._changes.append(
                    BlockStored(
                        key,
                        seq.keys[index - 1] if index else None,
                        index,
                        seq.tag_of(index).domain,
                        tuple(tokens) if self._with_tokens else (),
                    )
                )
        self._named.clear()

    def remove(self, key: bytes) -> None:
        """The pool can't find a key any more."""
        if self._listener is not None:
            self._changes.append(BlockRemoved(key))

    def clear(self) -> None:
        """The pool can't find anything any more."""
        if self._listener is not None:
            self._changes = [PoolCleared()]

    def publish(self) -> None:
        """Tell the listener what has changed since the last time, if anything has."""
        if self._changes and self._listener is not None:
            changes, self._changes = self._changes, []
            self._listener(changes)
