"""What was freed goes back to the system, though something is still held beside it."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import pytest

from engine.trimming import find_trim, trimming

NUM_CHUNKS = 4096
CHUNK = 16 * 2**10  # glibc maps no such small piece by itself

pytestmark = pytest.mark.skipif(find_trim() is None, reason="glibc alone has malloc_trim")


def resident() -> int:
    """Bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_what_a_flood_of_messages_held_goes_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    chunks = [libc.malloc(CHUNK) for _ in range(NUM_CHUNKS)]
    held = libc.malloc(CHUNK)  # after them, so that the end of the arena is in use
    for chunk in chunks:
        ctypes.memset(chunk, 1, CHUNK)
    for chunk in chunks:
        libc.free(chunk)
    full = resident()
    with trimming(0.01):
        while resident() > full - NUM_CHUNKS * CHUNK // 2:  # or the test's time is over
            threading.Event().wait(0.01)
    libc.free(held)


def test_the_thread_ends_with_it() -> None:
    with trimming():
        assert "octavo-trim" in {thread.name for thread in threading.enumerate()}
    assert "octavo-trim" not in {thread.name for thread in threading.enumerate()}
