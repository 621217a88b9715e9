"""Which block files there are, by last use, and their sizes: what a disk tier evicts from.

It is what memory knows of the folder. A survey learns it anew from the folder itself, while files
go on being written and removed; what happened meanwhile is newer than what the survey saw.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator


class FileIndex:
    """Sizes by name, least recently used first. Mutable; whoever shares it has a lock.

    Args:
      files: names, and sizes as far as they are known, in any order.

    Attributes:
      num_bytes: of all files together.
    """

    def __init__(self, files: Iterable[tuple[str, int]]):
        self._sizes = OrderedDict(files)
        self._changes: dict[str, int | None] | None = None  # sizes, while a survey runs
        self.num_bytes = sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def __iter__(self) -> Iterator[str]:
        """Names, least recently used first."""
        return iter(self._sizes)

    def note_use(self, name: str) -> None:
        """A file that is here was just used."""
        self.note(name, self._sizes[name])

    def note(self, name: str, size: int | None) -> None:
        """A file of that size was just used, or is gone."""
        self.num_bytes -= self._sizes.pop(name, 0)
        if size is not None:
            self._sizes[name] = size
            self.num_bytes += size
        if self._changes is not None:
            self._changes.pop(name, None)
            self._changes[name] = size

    def begin_survey(self, going: Iterable[str]) -> list[str]:
        """From here on, the folder is looked through, while those files are being removed.

        Returns the order as of now, for `end_survey`.
        """
        self._changes = dict.fromkeys(going)
        return list(self._sizes)

    def end_survey(self, found: FileIndex, writing: Iterable[str]) -> None:
        """Take `found` over, but for what changed since, and what is being written: who writes it
        notes it."""
        assert self._changes is not None
        for name in writing:
            found.note(name, None)
        for name, size in self._changes.items():
            found.note(name, size)
        self._changes = None
        self._sizes, self.num_bytes = found._sizes, found.num_bytes
