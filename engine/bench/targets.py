"""What is measured: an engine in this process, or a server over gRPC.

Both run a workload once and give the same figures, as far as they can be seen from there.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from engine.bench import machine
from engine.bench.drive import Driven, Piece, drive
from engine.bench.figures import EngineFigures, MachineFigures, padding_waste, step_figures
from engine.bench.workload import Item, Load
from engine.types import Domain

if TYPE_CHECKING:
    from engine.client import AsyncClient
    from engine.frontend import Engine
    from engine.rpc.octavo.v1.generation_pb2 import GetStatsResponse
    from engine.runtime.figures import StepRecord

POLL_SECONDS = 0.25  # between looks at a server's cache
_SETTLE_POLLS = 10
_SETTLE_SECONDS = 0.01
_MAX_SETTLE_SECONDS = 10.0

Measured = tuple[Driven, EngineFigures, MachineFigures]


class Target(Protocol):
    """Runs a workload. Each run starts with a cache in which it finds nothing."""

    async def run(self, items: Sequence[Item], load: Load) -> Measured:
        """Run the workload once."""
        ...

    def peak_rss_bytes(self) -> int | None:
        """Most memory that the measured process has had, if it can be known."""
        ...


class InProcess:
    """An engine in this process, whose every step is seen."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._max_pending = engine.config.scheduler.max_waiting
        self._records: list[StepRecord] = []
        self._meter = machine.Meter()
        engine.watch_steps(lambda record: self._records.append(record))

    async def run(self, items: Sequence[Item], load: Load) -> Measured:
        """Run the workload once, under a domain of its own."""
        from engine.llm import as_prompt

        engine = self._engine
        domain = Domain(salt=_fresh_salt())

        async def send(item: Item) -> AsyncIterator[Piece]:
            prompt = as_prompt(item.prompt)
            async for delta in engine.generate(prompt, item.sampling, domain=domain):
                usage = delta.usage
                yield Piece(
                    len(delta.token_ids),
                    delta.finish_reason,
                    usage.prompt_tokens,
                    usage.cached_tokens,
                )

        before = engine.stats()
        self._records = records = []
        self._meter.start()
        driven = await drive(items, send, load, self._max_pending)
        machine_figures = self._meter.stop()
        await self._settle(before.steps)
        after = engine.stats()
        owned = [record.owned_blocks / after.total_blocks for record in records]
        figures = EngineFigures(
            steps=step_figures(records, driven.wall),
            padding_waste=padding_waste(
                sum(record.num_tokens for record in records),
                sum(record.padded_tokens for record in records),
            ),
            kv_utilisation_mean=statistics.fmean(owned) if owned else None,
            kv_utilisation_peak=max(owned, default=None),
            preemptions=after.preemptions - before.preemptions,
            compiles=after.compiles_after_warmup - before.compiles_after_warmup,
            block_size=after.block_size,
        )
        return driven, figures, machine_figures

    def peak_rss_bytes(self) -> int | None:
        """Most memory that this process has had."""
        return machine.peak_rss_bytes()

    async def _settle(self, steps_before: int) -> None:
        """Wait for the records of the last steps: they come just after the tokens, and a step
        that a stop token made void comes one step later."""
        quiet = 0
        for _ in range(int(_MAX_SETTLE_SECONDS / _SETTLE_SECONDS)):
            stats = self._engine.stats()
            is_idle = stats.running == stats.waiting == 0
            complete = len(self._records) == stats.steps - steps_before
            quiet = quiet + 1 if is_idle and complete else 0
            if quiet == _SETTLE_POLLS:
                return
            await asyncio.sleep(_SETTLE_SECONDS)


class Remote:
    """A server. Its counts include whatever other clients make it do.

    Args:
      client: connected.
      server_pid: the server's process if it is on this machine, for CPU and memory.
    """

    def __init__(self, client: AsyncClient, server_pid: int | None = None):
        self._client = client
        self._server_pid = server_pid
        self._was_refused = False
        self._meter = None if server_pid is None else machine.Meter(server_pid)

    async def run(self, items: Sequence[Item], load: Load) -> Measured:
        """Run the workload once, under a cache salt of its own."""
        client, salt = self._client, _fresh_salt()

        async def send(item: Item) -> AsyncIterator[Piece]:
            prompt: Any = item.prompt
            async for delta in client.generate(prompt, item.sampling, cache_salt=salt):
                yield Piece(
                    len(delta.token_ids),
                    delta.finish_reason,
                    delta.prompt_tokens,
                    delta.cached_tokens,
                )

        before = await self._stats()
        owned: list[float] = []
        poll = asyncio.create_task(self._poll(owned) if before else asyncio.sleep(0))
        if self._meter:
            self._meter.start()
        try:
            driven = await drive(items, send, load)
        finally:
            poll.cancel()
            await asyncio.gather(poll, return_exceptions=True)
        machine_figures = self._meter.stop() if self._meter else MachineFigures(None, None, None)
        after = await self._stats()
        if before is None or after is None:
            return driven, EngineFigures(None, None, None, None, None, None, None), machine_figures
        figures = EngineFigures(
            steps=None,
            padding_waste=padding_waste(
                after.computed_tokens - before.computed_tokens,
                after.padded_tokens - before.padded_tokens,
            ),
            kv_utilisation_mean=statistics.fmean(owned) if owned else None,
            kv_utilisation_peak=max(owned, default=None),
            preemptions=after.preemptions - before.preemptions,
            compiles=after.compiles_after_warmup - before.compiles_after_warmup,
            block_size=after.block_size,
        )
        return driven, figures, machine_figures

    def peak_rss_bytes(self) -> int | None:
        """Most memory that the server has had, if its process was named."""
        return None if self._server_pid is None else machine.peak_rss_bytes(self._server_pid)

    async def _stats(self) -> GetStatsResponse | None:
        """The server's figures; None if they are not for us."""
        from engine.client import ServiceError

        try:
            return await self._client.stats()
        except ServiceError as error:
            if error.code.name != "PERMISSION_DENIED":
                raise
        if not self._was_refused:
            self._was_refused = True
            print(
                "the server shows its own figures to operators only, so the report has none: "
                "neither the cache's use nor preemptions nor padding; to have them, use an "
                "operator's key, or start it with --set server.public_stats=true",
                file=sys.stderr,
            )
        return None

    async def _poll(self, owned: list[float]) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            stats = await self._client.stats()
            owned.append(stats.owned_blocks / stats.total_blocks)


def _fresh_salt() -> str:
    """A cache salt that no earlier run had: with it, a run finds no blocks but its own."""
    return f"bench-{secrets.token_hex(8)}"
