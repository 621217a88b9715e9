"""How a server ends: killed, by a signal under load, and given up."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc
import pytest

from engine.client import AsyncClient, ServiceError
from tests.survival.process import ServerProcess, answers_golden
from tests.survival.test_attacks import begin, read, started


async def load(client: AsyncClient) -> list[asyncio.Task[None]]:
    """Running and waiting requests, under way."""
    await client.pause()  # all are there before the first answer can have ended
    tasks = [begin(client, f"Once {number}") for number in range(12)]
    await started(client, 0, 12)
    await client.resume()
    await started(client, 8, 1)
    return tasks


def kinds(ended: list[BaseException | None]) -> set[type]:
    """How calls have ended: with a status, all but those whose answers came whole just before."""
    found = {type(error) for error in ended}
    assert found <= {ServiceError, type(None)}
    return found


async def test_killed_servers_start_again_and_end_under_load_with_a_status_for_everybody(
    folder: Path, golden: tuple[int, ...]
) -> None:
    with ServerProcess(folder) as server:
        async with AsyncClient(server.address) as client:
            tasks = await load(client)
            server.process.kill()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert ServiceError in kinds(ended)
    with ServerProcess(folder, "server.grace=0.2") as server:
        async with AsyncClient(server.address) as client:
            await answers_golden(client, golden)
            tasks = await load(client)
            server.process.send_signal(signal.SIGTERM)
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        codes = {error.code for error in ended if isinstance(error, ServiceError)}
        assert codes == {grpc.StatusCode.UNAVAILABLE}
        assert ServiceError in kinds(ended)
        assert await asyncio.to_thread(server.process.wait) == 0


async def test_a_device_that_never_comes_back_ends_the_process_with_a_report(folder: Path) -> None:
    with ServerProcess(folder, "server.recovery_timeout=0.5") as server:
        async with AsyncClient(server.address) as client:
            tasks = await load(client)
            server.hang_or_go_on()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert ServiceError in kinds(ended)
            codes = {error.code for error in ended if isinstance(error, ServiceError)}
            assert codes == {grpc.StatusCode.UNAVAILABLE}
            with pytest.raises(ServiceError):
                await read(client.generate("Once", max_tokens=1))
        assert await asyncio.to_thread(server.process.wait) == 1
    report = server.log.read_text()
    assert "thread octavo-loop:" in report
    assert "rows" in report
    assert "Once" not in report
