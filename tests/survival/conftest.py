"""One server for all attacks, which must be as it was after each."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from engine.client import AsyncClient, ServiceError
from engine.sampling import Constraint, SamplingParams
from tests.runtime import tiny
from tests.survival.process import Figures, ServerProcess, answers_golden, golden_tokens


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and the model that it names."""
    folder = tmp_path_factory.mktemp("survival")
    model = tiny.write_model(folder)
    tiny.write_config(
        folder / "config.yaml",
        model,
        **{
            "cache.num_blocks": 96,
            "cache.host_memory": 2**20,
            "cache.disk_path": str(folder / "disk"),
            "cache.disk_size": 8 * 2**20,
            "cache.swap": "always",
            "server.port": 0,
            "server.public_stats": True,
            "server.grace": 1.0,
            # Long enough that no honest request is ended where the machine is busy.
            "server.reader_timeout": 5.0,
            "server.step_timeout": 8.0,
            "server.max_message": 2**20,
        },
    )
    return folder


@pytest.fixture(scope="session")
def golden() -> tuple[int, ...]:
    """What the model says to `GOLDEN`."""
    return golden_tokens()


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[ServerProcess]:
    """The server that is attacked."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("what a process holds is read from /proc")
    with ServerProcess(folder) as server:
        yield server


@pytest.fixture(scope="session")
def baselines() -> list[Figures]:
    """The server's figures before the first attack, once they are known."""
    return []


@pytest.fixture
async def client(
    server: ServerProcess, golden: tuple[int, ...], baselines: list[Figures]
) -> AsyncIterator[AsyncClient]:
    """A client whose server must hold no more after the test than before the first one."""
    async with AsyncClient(server.address) as client:
        await answers_golden(client, golden)
        if not baselines:
            await use_everything(client)
            baselines.append(await server.figures(client))
        yield client
        await answers_golden(client, golden)
        gc.collect()  # calls that an exception still holds keep their channel's connection open
        await server.settled(client, baselines[0])


async def use_everything(client: AsyncClient) -> None:
    """What is allocated on first use is not what an attack leaves."""
    for sampling in (
        SamplingParams(max_tokens=100, n=5),
        SamplingParams(max_tokens=100, logprobs=5),
        SamplingParams(max_tokens=100, beam_width=4),
        SamplingParams(max_tokens=10, constraint=Constraint("regex", "[a-f]+")),
    ):
        async for _ in client.generate("Once", sampling):
            pass
    for _ in range(10):
        with contextlib.suppress(ServiceError):
            await anext(client.generate("a b " * 25_000))
    await asyncio.gather(*(client.tokenize("a b " * 1000) for _ in range(64)))  # its threads
