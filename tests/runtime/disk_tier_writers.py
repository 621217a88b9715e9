"""Processes that write to a disk tier until they are killed; run as a script by the kill test.

For each line ``SEED SECONDS MOMENT`` on stdin two processes are forked, which put, get and forget
blocks of one folder. They are killed that long after both have written one; if the moment is
``writing``, then as soon as a half-written file is seen. A line says how they ended.
"""

from __future__ import annotations

import functools
import glob
import os
import random
import signal
import sys
import time

import numpy as np

from engine.runtime.block_file import BlockLayout
from engine.runtime.disk_tier import DiskTier

LAYOUT = BlockLayout((4, 4, 16, 1024), "float32", "tests")  # 1 MiB
KEYS = [bytes([number]) * 40 for number in range(24)]
MAX_BYTES = 14 * LAYOUT.file_bytes  # too little for all keys: blocks are evicted too
WRONG_ANSWER = 3


@functools.cache
def contents(key: bytes) -> np.ndarray:
    """The one right block of a key: random bits, as a function of the key."""
    bits = np.random.default_rng(list(key)).integers(2**32, size=LAYOUT.shape, dtype=np.uint32)
    return bits.view(np.float32)


def is_right(key: bytes, block: np.ndarray) -> bool:
    """Whether a block is bit for bit that of its key."""
    return np.array_equal(block.view(np.uint32), contents(key).view(np.uint32))


def write_for_ever(folder: str, seed: int, ready: int) -> None:
    """Put, get and forget random blocks; end only at a wrong one."""
    rng = random.Random(seed)
    tier = DiskTier(folder, MAX_BYTES, LAYOUT)
    while True:
        for key in rng.sample(KEYS, 8):
            tier.put(key, contents(key))
        for key in rng.sample(KEYS, 2):
            tier.forget_tagged(key[32:])  # no other key has that tag
        tier.flush(1)
        for key in rng.sample(KEYS, 2):
            block = tier.get(key)
            if block is not None and not is_right(key, block):
                os._exit(WRONG_ANSWER)
        if ready >= 0 and tier.counts().written:
            os.write(ready, b".")
            ready = -1


def main() -> None:
    """Fork, wait, kill, report; for each line of stdin."""
    folder = sys.argv[1]
    for key in KEYS:
        contents(key)  # once for all that will be forked
    for line in sys.stdin:
        seed, seconds, moment = line.split()
        started, ready = os.pipe()
        children = []
        for number in range(2):
            child = os.fork()
            if child == 0:
                write_for_ever(folder, int(seed) + number, ready)
            children.append(child)
        for _ in children:
            os.read(started, 1)
        time.sleep(float(seconds))
        deadline = time.monotonic() + (1 if moment == "writing" else 0)
        while time.monotonic() < deadline and not any(glob.iglob(f"{folder}/??/*.tmp")):
            pass
        for child in children:
            os.kill(child, signal.SIGKILL)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.close(started)
        os.close(ready)
        print(*ends, flush=True)


if __name__ == "__main__":
    assert "jax" not in sys.modules
    main()
