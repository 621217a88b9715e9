"""The disk tier of the KV cache: blocks by key in a folder of bounded size, warm after a restart.

It is a cache below others, so everything may fail but the truth: what can't be written is dropped,
what can't be read whole is a miss, and nothing a disk does is raised into the engine.

A block's contents are as good as the text it was computed from. Files are for their owner only,
but they are neither encrypted nor, when they are removed, overwritten. Their checksums find torn
writes and rot; they don't find a forgery by somebody who may write to the folder, see
``block_file``.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.runtime.block_file import NEVER, Block, BlockLayout, Miss, as_array
from engine.runtime.block_folder import BlockFolder
from engine.runtime.figures import TierCounts
from engine.runtime.file_index import FileIndex
from engine.runtime.flushed_tags import FlushedTags
from engine.runtime.prefix_fetch import PrefixFetch

log = logging.getLogger(__name__)

# How much of `max_bytes` may be written before the folder is looked through again. It bounds what
# two processes that share it write unknown to each other.
_SURVEYS_PER_FILL = 8
_MAX_TOUCHED = 4096  # a bound in case the disk hangs; more uses are remembered in memory only


class _Queued(NamedTuple):
    """A block on its way to the disk. Without an array it was forgotten on the way."""

    array: Block | None
    expires: float


_FORGOTTEN = _Queued(None, NEVER)


class DiskTier:
    """Blocks of one layout, in a folder that other layouts and other processes may share.

    `max_bytes` bounds the files of all layouts together, headers included: else the blocks of a
    model that is no longer served would stay for ever. Whatever was used least recently goes
    first, by the files' times, so the order outlives a restart. Processes that share a folder see
    each other's files, and may together exceed the bound by an eighth each for a while.

    Every method may be called from any thread. Only `put` and `in` are meant for a thread that
    mustn't wait for a disk.

    Args:
      folder: made if it doesn't exist, for this user alone.
      max_bytes: most bytes of files; at least one block's.
      layout: shape, dtype and weights of the blocks.
      queue_bytes: most bytes of blocks in memory that wait to be written; what exceeds it is
        dropped.
      num_writers: threads that write.
      num_readers: threads that `fetch`.

    Raises:
      FolderRefused: others may read or write the folder, or it can't be opened.
      ValueError: a limit below one block or one thread.
    """

    def __init__(
        self,
        folder: Path | str,
        max_bytes: int,
        layout: BlockLayout,
        *,
        queue_bytes: int = 2**28,
        num_writers: int = 2,
        num_readers: int = 4,
    ):
        for name, value, least in (
            ("max_bytes", max_bytes, layout.file_bytes),
            ("queue_bytes", queue_bytes, layout.num_bytes),
            ("num_writers", num_writers, 1),
            ("num_readers", num_readers, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least} for this layout")
        self.layout = layout
        self.max_bytes = max_bytes
        self._queue_bytes = queue_bytes
        self._num_readers = num_readers
        self._folder = BlockFolder(folder, layout)
        self._lock = threading.Lock()  # for all below; never held while the disk is waited for
        self._idle = threading.Condition(self._lock)
        self._open = True
        self._writable = True
        self._queued: dict[str, _Queued] = {}
        self._num_queued_bytes = 0
        # Files by name, least recently used first, with their sizes. Until the survey they are in
        # no order and those of other layouts have no size; nothing is evicted before it.
        own, other = layout.file_bytes, 0
        self._files = FileIndex(
            (name, own if self._folder.is_of_layout(name) else other)
            for name in self._folder.names()
        )
        self._reserved: set[str] = set()  # files that are being written
        self._bytes_to_survey = 0
        self._counts = collections.Counter[str]()
        self._misses = collections.Counter[Miss]()
        self._touched: set[str] = set()  # files whose last use is about to be written down
        self._going: set[str] = set()  # files that are being removed
        self._unremovable: set[str] = set()
        self._flushed = FlushedTags()
        self._survey_lock = threading.Lock()
        self._writers = ThreadPoolExecutor(num_writers, "disk-tier-write")
        self._readers = ThreadPoolExecutor(num_readers, "disk-tier-read")
        self._remover = ThreadPoolExecutor(1, "disk-tier-forget")  # it waits for writers
        self._writers.submit(self._tidy)

    def __contains__(self, key: bytes) -> bool:
        """Whether `get` is likely to have the block. Looks into memory only."""
        name = self._folder.name_of(key)
        with self._lock:
            if self._is_hidden(name):
                return False
            queued = self._queued.get(name)
            return queued.array is not None if queued else name in self._files

    def put(self, key: bytes, array: Block, expires: float = NEVER) -> bool:
        """Take a block over, to be written soon. Can be read at once.

        Nothing is copied on the caller's thread, so nobody may write to the array any more; what
        it takes to read it as NumPy is left to the thread that writes.

        Args:
          key: 40 bytes that name the contents and whose they are, see `block_file`.
          array: the block, in the layout's shape and dtype.
          expires: from when on the block is a miss, in seconds since 1970. A block that is there
            already keeps the time it has.

        Returns:
          False if it was dropped: too much is waiting already, writing is off, or its tag is being
          flushed, or a flush of that failed.

        Raises:
          ValueError: the key or the array isn't of this layout.
        """
        if tuple(array.shape) != self.layout.shape or array.dtype.name != self.layout.dtype:
            raise ValueError(
                f"a block of this tier is {self.layout.dtype}{list(self.layout.shape)}, "
                f"not {array.dtype.name}{list(array.shape)}"
            )
        name = self._folder.name_of(key)
        with self._lock:
            is_hidden = self._is_hidden(name)
            if name in self._files and not is_hidden:  # the same key is the same contents
                self._files.note_use(name)
                if len(self._touched) < _MAX_TOUCHED and name not in self._touched:
                    self._touched.add(name)
                    self._writers.submit(self._touch, name)
                return True
            queued = self._queued.get(name)
            if queued and queued.array is not None and not is_hidden:
                return True
            # Until an old file of that name is out of the way, a new one might go with it.
            is_going = queued is not None or name in self._going
            room = self._num_queued_bytes + array.nbytes <= self._queue_bytes
            if is_going or is_hidden or not room or not self._writable:
                self._counts["dropped"] += 1
                return False
            self._num_queued_bytes += array.nbytes
            self._queued[name] = _Queued(array, expires)
            self._writers.submit(self._write, key, name)
        return True

    def get(self, key: bytes) -> np.ndarray | None:
        """The block of a key, read-only, or None. Waits for the disk.

        It looks for the file even if it isn't known yet: another process may have written it.
        """
        name = self._folder.name_of(key)
        with self._lock:
            queued = self._queued.get(name)
            known = name in self._files
            readable = not self._is_hidden(name)
        if not readable or (queued and queued.array is None):
            outcome = Miss.ABSENT
        elif queued and queued.array is not None:
            outcome = Miss.EXPIRED
            if time.time() < queued.expires:
                outcome = as_array(queued.array)
        else:
            outcome = self._folder.read(key)
        with self._lock:
            if isinstance(outcome, Miss):
                self._misses[outcome] += 1
                # Unknown: it may have been written since. Unreadable: it may still be there.
                if known and outcome is not Miss.UNREADABLE:
                    self._files.note(name, None)
                return None
            self._counts["hits"] += 1
            if not queued:
                self._counts["bytes_read"] += outcome.nbytes
                # Else it was evicted meanwhile, or its writer notes it.
                if name in self._files if known else name not in self._queued:
                    self._files.note(name, self.layout.file_bytes)
            return outcome

    def fetch(self, keys: Sequence[bytes]) -> Future[list[np.ndarray]]:
        """Read the blocks of consecutive keys, several at once, up to the first miss.

        A block is read as of some moment before the future is done: whoever calls `forget_tagged`
        meanwhile has to drop what a fetch still brings.

        Returns:
          A future of the blocks found, one for each of the first keys. It can be cancelled as
          long as it isn't done. After `close` it finds nothing.
        """
        fetch = PrefixFetch(self.get, keys)
        with self._lock:  # so that `close` doesn't come in between
            fetch.start(self._readers, self._num_readers if self._open else 0)
        return fetch.future

    def forget_tagged(self, tag: bytes | None) -> Future[None]:
        """Forget all blocks with a tag, or with None all but the public ones; also those of other
        layouts, and those that other processes wrote, now or in earlier lives.

        They are misses from now on, and what is put under such a key is dropped until the future
        is done. Then nothing of them is in the folder, so a restart or a kill brings nothing back.
        If that fails, they stay misses, and nothing is written with that tag, until a later call
        succeeds; but a restart may find them. The files are removed on a thread of their own, which
        looks through the folder once for all tags that wait; nobody waits for it here.

        Returns:
          A future that has an OSError if a block is still there, or may be. Whoever asks for the
          same tag before it is looked for has the same one, so it can't be cancelled.

        Raises:
          RuntimeError: the tier is closed.
        """
        with self._lock:
            if not self._flushed.are_waiting:
                self._remover.submit(self._remove_flushed)
            return self._flushed.add(tag)

    @property
    def writable(self) -> bool:
        """False after `close`, and once writing failed: the disk was full, read-only or broken."""
        return self._writable

    def counts(self) -> TierCounts:
        """Counters and sizes, as of one moment."""
        with self._lock:
            return TierCounts(
                hits=self._counts["hits"],
                misses=dict(self._misses),
                written=self._counts["written"],
                dropped=self._counts["dropped"],
                evicted=self._counts["evicted"],
                bytes_read=self._counts["bytes_read"],
                bytes_written=self._counts["bytes_written"],
                num_files=len(self._files),
                num_bytes=self._files.num_bytes,
                queued_bytes=self._num_queued_bytes,
            )

    def flush(self, timeout: float) -> bool:
        """Wait for all to be written, dropped or removed; False if `timeout` seconds pass."""
        with self._idle:
            return self._idle.wait_for(
                lambda: not (self._queued or self._going) and self._flushed.are_answered, timeout
            )

    def close(self, timeout: float = 10.0) -> bool:
        """Write what waits, for at most `timeout` seconds, and drop the rest.

        Returns:
          Whether nothing was left to drop.
        """
        with self._lock:
            self._open = False
        flushed = self.flush(timeout)
        self._writable = False
        # Nothing is cancelled: what waits is dropped, and fetches end, once they get a thread.
        self._writers.shutdown(wait=False)
        self._readers.shutdown(wait=False)
        self._remover.shutdown(wait=False)
        return flushed

    def _write(self, key: bytes, name: str) -> None:
        """In a writer's thread: turn a queued block into a file."""
        wrote = False
        try:
            with self._lock:
                queued = self._queued[name]
            if queued.array is not None and self._writable:
                wrote = self._write_file(key, name, queued)
        finally:
            with self._lock:
                forgotten = self._queued[name].array is None
                if not forgotten:
                    self._settle(name, wrote)
            if forgotten:  # until the file is gone, `get` sees that it was forgotten
                self._remove(name)
                with self._lock:
                    self._settle(name, False)

    def _touch(self, name: str) -> None:
        self._folder.touch(name)
        with self._lock:
            self._touched.discard(name)

    def _write_file(self, key: bytes, name: str, queued: _Queued) -> bool:
        assert queued.array is not None
        try:
            self._survey_if_due()
            if not self._make_room(name):
                return False
            array = as_array(queued.array)
            return not isinstance(array, Miss) and self._folder.write(key, array, queued.expires)
        except OSError as error:
            self._stop_writing(error)
            return False

    def _settle(self, name: str, wrote: bool) -> None:
        """Under the lock: a queued block is a file now, or nothing."""
        del self._queued[name]
        self._reserved.discard(name)
        self._num_queued_bytes -= self.layout.num_bytes
        if wrote:
            self._counts["written"] += 1
            self._counts["bytes_written"] += self.layout.num_bytes
            self._bytes_to_survey -= self.layout.file_bytes
            self._files.note(name, self.layout.file_bytes)
        else:
            self._counts["dropped"] += 1
        self._idle.notify_all()

    def _make_room(self, name: str | None) -> bool:
        """Evict until a file of that name fits too, or none; False if other writers need it all."""
        size = self.layout.file_bytes
        victims = []
        with self._lock:
            writing = size * len(self._reserved | ({name} if name else set()))
            if writing > self.max_bytes:
                return False
            while self._files.num_bytes + writing > self.max_bytes:
                victims.append(victim := next(iter(self._files)))
                self._files.note(victim, None)
                self._going.add(victim)
            if name:
                self._reserved.add(name)
        removed = sum(map(self._remove, victims))
        with self._lock:
            self._counts["evicted"] += removed
        return True

    def _tidy(self) -> None:
        """What a start leaves to a thread: the survey, and eviction if the limit was lowered."""
        self._survey_if_due()
        self._make_room(None)

    def _survey_if_due(self) -> None:
        with self._survey_lock:
            if self._bytes_to_survey <= 0:
                self._survey()

    def _survey(self) -> None:
        """Learn files, sizes and the order of use from the folder itself."""
        with self._lock:
            known = self._files.begin_survey(self._going)
        # A file system's clock ticks every few milliseconds; within a tick memory knows the order.
        order = {name: number for number, name in enumerate(known)}
        found = self._folder.survey()
        found.sort(key=lambda file: order.get(file.name, -1))
        found.sort(key=lambda file: file.used_ns)
        files = FileIndex((file.name, file.num_bytes) for file in found)
        with self._lock:
            self._files.end_survey(files, self._queued)
            self._bytes_to_survey = self.max_bytes // _SURVEYS_PER_FILL

    def _remove_flushed(self) -> None:
        """In the remover's thread: what `forget_tagged` promised to all who have asked by now."""
        with self._lock:
            tags = self._flushed.begin()
            known = [*self._queued, *self._files, *self._unremovable]

        def is_flushed(name: str) -> bool:
            return self._folder.has_tag(name, tags)

        error: Exception | None = None
        try:
            self._forget(filter(is_flushed, known))  # also if the folder can't be listed
            self._forget(filter(is_flushed, self._folder.names(strict=True)))
        except Exception as caught:  # whoever waits has to hear of it, but may have left
            error = caught
            log.warning("a flush failed; a restart may find what it was to remove: %s", error)
        with self._idle:  # what is half written goes when it is whole
            self._idle.wait_for(lambda: not any(map(is_flushed, self._queued)))
            left = collections.Counter(filter(None, map(self._folder.tag_of, self._unremovable)))
            outcomes = self._flushed.end(left, error)
            self._idle.notify_all()
        for future, failure in outcomes:
            future.set_exception(failure) if failure else future.set_result(None)

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            with self._lock:
                if name in self._queued:
                    self._queued[name] = _FORGOTTEN
                self._files.note(name, None)
                self._going.add(name)
            self._remove(name)

    def _is_hidden(self, name: str) -> bool:
        """Under the lock: it is a miss, whatever is there; closed, flushed, or not removable."""
        is_flushed = self._folder.has_tag(name, self._flushed.hidden)
        return is_flushed or not self._open or name in self._unremovable

    def _remove(self, name: str) -> bool:
        """Remove a file; one that can't be removed is a miss from now on."""
        try:
            removed = self._folder.remove(name)
            with self._lock:
                self._unremovable.discard(name)  # an earlier try may have failed
            return removed
        except OSError as error:
            with self._lock:
                self._unremovable.add(name)
            self._stop_writing(error)
            return False
        finally:
            with self._lock:
                self._going.discard(name)
                self._idle.notify_all()

    def _stop_writing(self, error: OSError) -> None:
        with self._lock:
            warned, self._writable = not self._writable, False
        if not warned:
            log.warning(
                "the disk tier writes no more blocks until a restart: %s; it still reads", error
            )
