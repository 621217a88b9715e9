"""A server with the tiny model in a process of its own, and what of the machine it takes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from engine.client import AsyncClient
from tests.conftest import ROOT
from tests.model.numpy_llama import forward
from tests.runtime import tiny

FULL = bool(os.environ.get("OCTAVO_SURVIVAL"))
"""Whether every case is run as often as the issue asks; CI has fewer of each (`make survival`)."""

GOLDEN = "The server has survived"
NUM_GOLDEN = 24
# What pools and the allocator keep: it must not grow with the number of attacks. A pool starts a
# thread when those it has are busy: seven of the disk tier, six of asyncio, and gRPC's own.
SPARE_THREADS = 24
SPARE_BYTES = 64 * 2**20
SETTLE_SECONDS = 60.0 if FULL else 20.0


def golden_tokens() -> tuple[int, ...]:
    """What the model says to GOLDEN, by a NumPy implementation that shares nothing with it."""
    ids = list(GOLDEN.encode())
    for _ in range(NUM_GOLDEN):
        logits = forward(tiny.ARCH, tiny.weights(), np.array(ids))
        ids.append(int(np.argmax(logits[-1])))
    return tuple(ids[-NUM_GOLDEN:])


class Figures(NamedTuple):
    """What a server holds: cache blocks and sequences, threads, file descriptors, bytes."""

    blocks: int
    sequences: int
    threads: int
    descriptors: int
    bytes: int

    def exceeds(self, other: Figures) -> bool:
        """Whether it is more than others were, beyond what a pool may keep."""
        return (
            self.blocks > other.blocks
            or self.sequences > other.sequences
            or self.descriptors > other.descriptors
            or self.threads > other.threads + SPARE_THREADS
            or self.bytes > other.bytes + SPARE_BYTES
        )


class ServerProcess:
    """A faulty server (`faulty_server`) on a free port.

    Attributes:
      address: of gRPC.
      http: of the page and what else is on that port.
    """

    def __init__(self, folder: Path, *overrides: str):
        config = folder / "config.yaml"
        command = [sys.executable, "-m", "tests.survival.faulty_server", str(config), *overrides]
        self.log = folder / f"server-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        said = ""
        while "Its cache is shown" not in said:
            if not (line := self.process.stdout.readline()):
                self.__exit__()
                raise AssertionError(self.log.read_text())
            said += line
        self.address = re.findall(r"Octavo is ready: .* on (\S+)\. ", said)[0]
        self.http = re.findall(r"shown on (\S+)", said)[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def fail_a_step(self) -> None:
        """The next step that is waited for fails."""
        self.process.send_signal(signal.SIGUSR1)

    def hang_or_go_on(self) -> None:
        """The device hangs, or comes back."""
        self.process.send_signal(signal.SIGUSR2)

    async def figures(self, client: AsyncClient) -> Figures:
        """What it holds now."""
        stats = await client.stats()
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return Figures(
            stats.owned_blocks,
            stats.running + stats.waiting,
            len(list((proc / "task").iterdir())),
            len(list((proc / "fd").iterdir())),
            pages * os.sysconf("SC_PAGE_SIZE"),
        )

    async def settled(self, client: AsyncClient, before: Figures) -> Figures:
        """Wait until it holds no more than before. Fails with what it holds if it never does."""
        end = time.monotonic() + SETTLE_SECONDS
        while (now := await self.figures(client)).exceeds(before):
            assert time.monotonic() < end, f"before: {before}, now: {now}"
            await asyncio.sleep(0.1)
        return now


async def answers_golden(client: AsyncClient, expected: tuple[int, ...]) -> None:
    """Assert that a server still answers, and rightly."""
    while not await client.is_ready():
        await asyncio.sleep(0.05)
    deltas = [
        delta
        async for delta in client.generate(
            GOLDEN, temperature=0.0, max_tokens=NUM_GOLDEN, ignore_eos=True, timeout=30.0
        )
    ]
    assert tuple(token for delta in deltas for token in delta.token_ids) == expected
