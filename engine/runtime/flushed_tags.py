"""Which tags a disk tier was asked to flush, who waits for that, and what is a miss meanwhile.

All tags that wait are flushed in one pass, which looks through the folder once. So whoever asks
ever so often piles up nothing but what must be remembered of each tag.
"""

from __future__ import annotations

import collections
from collections.abc import KeysView
from concurrent.futures import Future

from engine.runtime.block_file import PUBLIC_TAG


class FlushedTags:
    """Tags, of which None stands for all but the public one. Mutable; whoever shares it has a lock.

    Attributes:
      hidden: tags whose blocks are misses: their flush waits, is at work, or failed. Of one that
        failed until a later one succeeds, as its blocks may be there.
    """

    def __init__(self) -> None:
        self.hidden: set[bytes | None] = set()
        self._waiting: dict[bytes | None, Future[None]] = {}
        self._at_work: dict[bytes | None, Future[None]] = {}

    @property
    def are_waiting(self) -> bool:
        """Whether the next pass has something to do."""
        return bool(self._waiting)

    @property
    def are_answered(self) -> bool:
        """Whether nobody waits for anything."""
        return not (self._waiting or self._at_work)

    def add(self, tag: bytes | None) -> Future[None]:
        """Have a tag flushed by the next pass. All who ask for it share the future, so it can't be
        cancelled."""
        if tag not in self._waiting:
            self._waiting[tag] = Future()
            self._waiting[tag].set_running_or_notify_cancel()
        self.hidden.add(tag)
        return self._waiting[tag]

    def begin(self) -> KeysView[bytes | None]:
        """Begin a pass, for all tags that wait."""
        self._at_work, self._waiting = self._waiting, {}
        return self._at_work.keys()

    def end(
        self, left: collections.Counter[bytes], error: Exception | None
    ) -> list[tuple[Future[None], Exception | None]]:
        """End the pass.

        Args:
          left: how many files of each tag can't be removed.
          error: why there may be more.

        Returns:
          What to tell to whom, without the lock.
        """
        num_left = {None: left.total() - left[PUBLIC_TAG], **left}
        outcomes = []
        for tag, future in self._at_work.items():
            failure = error
            if failure is None and (count := num_left.get(tag)):
                failure = OSError(f"{count} blocks that were flushed can't be removed from disk")
            outcomes.append((future, failure))
            if failure is None:  # with all, those are gone too whose own flush failed
                done = {tag} if tag is not None else self.hidden - {PUBLIC_TAG}
                self.hidden -= done - self._waiting.keys()
        self._at_work = {}
        return outcomes
