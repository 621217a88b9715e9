"""Reads the blocks of consecutive keys with several threads, up to the first that is missing.

Each thread takes the next key. While one of them finds that its block is missing, the others may
read a few of those behind it in vain.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np


class PrefixFetch:
    """One fetch, for one use. `future` gets the blocks found, one for each of the first keys."""

    def __init__(self, get: Callable[[bytes], np.ndarray | None], keys: Sequence[bytes]):
        self.future: Future[list[np.ndarray]] = Future()
        self._get = get
        self._keys = keys
        self._blocks: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._next = 0
        self._end = len(keys)  # no block from here on is wanted
        self._num_threads = 0
        self._error: Exception | None = None

    def start(self, threads: ThreadPoolExecutor, num_threads: int) -> None:
        """Read with at most so many threads; without any, nothing is found. Returns at once."""
        num_threads = min(num_threads, len(self._keys))
        if num_threads == 0:
            self.future.set_result([])
        self._num_threads = num_threads
        for _ in range(num_threads):
            threads.submit(self._run)

    def _run(self) -> None:
        try:
            while (index := self._take()) is not None:
                block = self._get(self._keys[index])
                with self._lock:
                    if block is None:
                        self._end = min(self._end, index)
                    else:
                        self._blocks[index] = block
        except Exception as error:  # whoever waits for the future has to hear of it
            self._error = error
        with self._lock:
            self._num_threads -= 1
            is_last = self._num_threads == 0
        if is_last and self.future.set_running_or_notify_cancel():
            if self._error:
                self.future.set_exception(self._error)
            else:
                self.future.set_result([self._blocks[index] for index in range(self._end)])

    def _take(self) -> int | None:
        with self._lock:
            index = self._next
            if index >= self._end or self._error or self.future.cancelled():
                return None
            self._next += 1
            return index
