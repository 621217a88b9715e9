"""Threads that tenants share: each has its turn, and none has them all.

What has not begun ends with whoever waits for it, so nobody piles up work by asking and leaving.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from engine.runtime.inbox import STOPPED, EngineStopped
from engine.types import QueueFull


class FairThreads:
    """Does work of one kind.

    Args:
      what: the work is, in words for who is refused.
      num_threads: of which one tenant has all but one at most.
      most: pieces of work of one tenant, waiting and at work, those included whose asker left when
        they had begun.
    """

    def __init__(self, what: str, num_threads: int, most: int):
        self._what = what
        self._most = most
        self._share = max(1, num_threads - 1)
        self._lock = threading.Lock()
        # By tenant, whose turn is next first; of each, in order of arrival.
        self._waiting: dict[str, dict[Future[Any], _Piece]] = {}
        self._at_work: Counter[str] = Counter()
        self._shared: dict[Hashable, Future[Any]] = {}  # waiting and at work, by tenant and key
        self._askers: Counter[Future[Any]] = Counter()
        self._is_closed = False
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="octavo-read")

    async def do[T](self, tenant: str, work: Callable[[], T], key: Hashable = None) -> T:
        """Have work done. What has begun goes on, and counts, if nobody waits for it any more.

        Args:
          tenant: whose it is.
          work: runs in a thread.
          key: work of the tenant under the same key, if there is some, is waited for instead.
            None is the same as no other.

        Raises:
          QueueFull: the tenant has as much here as it may.
          EngineStopped: this was closed before it was done.
        """
        with self._lock:
            if self._is_closed:
                raise EngineStopped(STOPPED)
            name = None if key is None else (tenant, key)
            done: Future[T] | None = self._shared.get(name)
            if done is None:
                done = self._add(tenant, _Piece(work, name))
            self._askers[done] += 1
        try:
            # Shielded, as others may wait for it when this one leaves.
            return await asyncio.shield(asyncio.wrap_future(done))
        finally:
            with self._lock:
                self._askers[done] -= 1
                if not self._askers[done]:
                    del self._askers[done]
                    self._take(tenant, done)

    def close(self) -> None:
        """Begin nothing any more."""
        with self._lock:
            self._is_closed = True
            left = [done for own in self._waiting.values() for done in own]
            self._waiting.clear()
            self._shared.clear()
        for done in left:
            if done.set_running_or_notify_cancel():
                done.set_exception(EngineStopped(STOPPED))
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        """In a thread: whatever may be done now. Called once for each piece of work: who finds
        nothing leaves it to the threads that work for its tenant already."""
        while (found := self._next()) is not None:
            tenant, done, piece = found
            result = error = None
            if waits := done.set_running_or_notify_cancel():
                try:
                    result = piece.work()
                except BaseException as caught:
                    error = caught
            with self._lock:  # before anybody hears of it, who may come with more
                self._at_work[tenant] -= 1
                self._shared.pop(piece.name, None)
            if waits:
                done.set_result(result) if error is None else done.set_exception(error)
            del found, done, piece, result, error  # nothing of a request outlives it here

    def _next(self) -> tuple[str, Future[Any], _Piece] | None:
        with self._lock:
            self._at_work += Counter()  # leaves out those who have nothing
            for tenant, own in self._waiting.items():
                if self._at_work[tenant] < self._share:
                    done, piece = next(iter(own.items()))
                    del own[done]
                    del self._waiting[tenant]
                    if own:  # it goes to the end of the line
                        self._waiting[tenant] = own
                    self._at_work[tenant] += 1
                    return tenant, done, piece
        return None

    def _add(self, tenant: str, piece: _Piece) -> Future[Any]:
        """Under the lock: have work wait for its turn."""
        own = self._waiting.get(tenant, {})
        if len(own) + self._at_work[tenant] >= self._most:
            raise QueueFull(f"{self._most} {self._what} are being read already; try again later")
        done: Future[Any] = Future()
        own[done] = piece
        self._waiting[tenant] = own
        if piece.name is not None:
            self._shared[piece.name] = done
        self._threads.submit(self._work)
        return done

    def _take(self, tenant: str, done: Future[Any]) -> None:
        """Under the lock: drop work that has not begun; nobody waits for it."""
        own = self._waiting.get(tenant, {})
        piece = own.pop(done, None)
        if piece is not None:
            self._shared.pop(piece.name, None)
            if not own:
                del self._waiting[tenant]


class _Piece(NamedTuple):
    """Work, and the tenant and key that others may wait for it by; None: it is one asker's own."""

    work: Callable[[], Any]
    name: tuple[str, Hashable] | None
