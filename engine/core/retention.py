"""How long the contents of blocks may stay: whose they are, when they expire, which to erase.

The pool asks it at the few places where a block's contents begin or cease to matter. A block that
must not keep what it holds is named for the next plan, which fills it with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from engine.core.expiries import Expiries
from engine.core.journal import Journal
from engine.types import Domain


class Tag(NamedTuple):
    """Whose a block's contents are.

    Attributes:
      domain: None if they are public.
      time_to_live: milliseconds they may stay when nobody uses them; 0: no limit.
    """

    domain: Domain | None = None
    time_to_live: int = 0


PUBLIC = Tag()


class Retention:
    """Tags of the blocks that have a key, and what of them is to be erased. O(log blocks) each.

    Attributes:
      now: milliseconds; whoever has a clock moves it.
      journal: what can be found from now on, and what can't be any more; off unless replaced.
    """

    __slots__ = ("_by_domain", "_erased", "_expiries", "_tags", "journal", "now")

    def __init__(self) -> None:
        self.now = 0
        self.journal = Journal()
        self._tags: dict[int, Tag] = {}
        self._expiries: Expiries[int] = Expiries()
        self._by_domain: dict[Domain, set[int]] = {}  # the same blocks, but for public ones
        self._erased: list[int] = []

    def keep(self, block: int, key: bytes, tag: Tag) -> None:
        """A block can be found by its key from now on."""
        self.journal.name(key)
        self._tags[block] = tag
        if tag.domain is not None:
            self._by_domain.setdefault(tag.domain, set()).add(block)

    def forget(self, block: int, key: bytes) -> Tag:
        """It can't be found any more."""
        self.journal.remove(key)
        tag = self._tags.pop(block)
        if tag.domain is not None:
            blocks = self._by_domain[tag.domain]
            blocks.remove(block)
            if not blocks:
                del self._by_domain[tag.domain]
        return tag

    def tag_of(self, block: int) -> Tag:
        """Whose the contents of a block are that can be found."""
        return self._tags[block]

    def expiry(self, tag: Tag) -> int:
        """When something expires that nobody uses from now on; 0 for never."""
        return self.now + tag.time_to_live if tag.time_to_live else 0

    def leave(self, block: int) -> int:
        """Its last owner left it, and it can be found. Returns when it expires, 0 for never."""
        expires = self.expiry(self._tags[block])
        if expires:
            self._expiries.add(expires, block)
        return expires

    def free(self, block: int, *, erase: bool) -> None:
        """It is nobody's, and holds nothing that can be found."""
        if erase:
            self._erased.append(block)

    def compact(self, expiries: Mapping[int, int]) -> None:
        """Drop times past caring, if most are: `expiries` are those of all cached blocks."""
        self._expiries.tidy(
            len(expiries),
            lambda: ((expires, block) for block, expires in expiries.items() if expires),
        )

    def of(self, domain: Domain | None) -> list[int]:
        """The blocks that a domain left or holds, or with None all but the public ones."""
        if domain is not None:
            return sorted(self._by_domain.get(domain, ()))
        return sorted(block for blocks in self._by_domain.values() for block in blocks)

    @property
    def next_expiry(self) -> int | None:
        """When there may be something in `due`, or None."""
        return self._expiries.next

    def due(self) -> list[tuple[int, int]]:
        """(when it was to expire, block) of what may have expired since the last call."""
        return self._expiries.due(self.now)

    @property
    def has_erased(self) -> bool:
        """Whether blocks wait to be erased."""
        return bool(self._erased)

    def take_erased(self) -> list[int]:
        """Blocks whose contents must not stay, since the last call; they may be owned again."""
        erased, self._erased = self._erased, []
        return list(dict.fromkeys(erased))

    def clear(self) -> None:
        """Everything that the blocks held is lost."""
        self.journal.clear()
        self._tags.clear()
        self._expiries.clear()
        self._by_domain.clear()
        self._erased.clear()

    def copy(self) -> Retention:
        """An independent one in the same state."""
        other = Retention()
        other.now = self.now
        other._tags = self._tags.copy()
        other._expiries = self._expiries.copy()
        other._by_domain = {domain: set(blocks) for domain, blocks in self._by_domain.items()}
        other._erased = self._erased.copy()
        return other

    def check(self, named: set[int]) -> None:
        """Assert what must hold beside the pool's own invariants. For tests."""
        assert self._tags.keys() == named, "a name without a tag, or the reverse"
        tagged = [(tag.domain, block) for block, tag in self._tags.items() if tag.domain]
        pairs = [(domain, block) for domain, some in self._by_domain.items() for block in some]
        assert sorted(tagged, key=repr) == sorted(pairs, key=repr), "a block is lost to its domain"
