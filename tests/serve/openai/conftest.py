"""The API over a fake engine: called directly, or over sockets where these are what it is about."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest

from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.serve.fake_engine import FakeEngine


@pytest.fixture
async def http(fake: FakeEngine) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that calls the application itself."""
    server = Server(ServerConfig(port=0, http="127.0.0.1:0"))
    await server.set_engine(fake)
    assert server._http is not None
    transport = httpx2.ASGITransport(server._http._app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
async def server(fake: FakeEngine) -> AsyncIterator[Server]:
    """A server that listens."""
    server = Server(ServerConfig(port=0, grace=0.05, http="127.0.0.1:0"))
    await server.start()
    await server.set_engine(fake)
    yield server
    await server.stop()


@pytest.fixture
async def wire(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of that server."""
    assert server.page is not None
    async with httpx2.AsyncClient(base_url=server.page, timeout=60) as client:
        yield client
