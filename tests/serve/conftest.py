"""A server with a fake engine on a free port, and a client for it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from engine.client import AsyncClient
from engine.serve import server as server_module
from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.serve.fake_engine import FakeEngine


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that are aborted can say goodbye on a machine that is slow."""
    monkeypatch.setattr(server_module, "ABORT_SECONDS", 100.0)


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def server(fake: FakeEngine) -> AsyncIterator[Server]:
    server = Server(ServerConfig(port=0, public_stats=True, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    yield server
    await server.stop()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as client:
        yield client
