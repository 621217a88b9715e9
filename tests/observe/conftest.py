"""A served engine without a device, and a client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from engine.client import AsyncClient
from engine.frontend import Engine
from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.observe.served import Letters, make_engine


@pytest.fixture
def runner() -> Letters:
    return Letters()


@pytest.fixture
def engine(tmp_path: Path, runner: Letters) -> Iterator[Engine]:
    engine = make_engine(tmp_path, runner)
    yield engine
    runner.gate.set()
    engine.close()


@pytest.fixture
async def server(engine: Engine) -> AsyncIterator[Server]:
    config = ServerConfig(port=0, public_stats=True, grace=0.05, http="127.0.0.1:0")
    server = Server(config)
    await server.start()
    await server.set_engine(engine)
    yield server
    await server.stop()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as client:
        yield client
