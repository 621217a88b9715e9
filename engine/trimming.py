"""Memory that was freed goes back to the system: once a model is loaded, and while a server runs.

glibc keeps what a thread frees in that thread's arena, and gives back no more than the end of it.
Loading has several threads and gRPC dozens, so that a server that was busy once, or was sent a
flood of half messages, would hold hundreds of MiB that nothing uses, in a container that may have
a limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator

INTERVAL_S = 10.0
"""Seconds from one time to the next. Each takes some milliseconds, without the interpreter's lock,
and holds one arena at a time."""


@contextlib.contextmanager
def trimming(interval_s: float = INTERVAL_S) -> Iterator[None]:
    """Give back what is free from time to time, in a thread; nothing but on Linux with glibc."""
    trim = find_trim()
    if trim is None:
        yield
        return
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(interval_s):
            trim(0)

    thread = threading.Thread(target=run, name="octavo-trim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def find_trim() -> Callable[[int], int] | None:
    """malloc_trim(3) of the C library; None where it has none, such as musl's or macOS's."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
