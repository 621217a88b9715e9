"""Messages that begin and don't end: who sends them holds little, not for long, and nobody up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.client import AsyncClient, ServiceError
from engine.serve import authentication, errors
from engine.serve import server as server_module
from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.serve.access_file import ALICE, client, serving, tenants, write
from tests.serve.fake_engine import FakeEngine, until
from tests.survival import h2

TOKENIZE = "/octavo.v1.Generation/Tokenize"
GENERATE = "/octavo.v1.Generation/Generate"
CHECK = "/grpc.health.v1.Health/Check"


@pytest.fixture
async def server(tmp_path: Path, fake: FakeEngine) -> AsyncIterator[Server]:
    """A server that takes calls with keys only."""
    async with serving(write(tmp_path / "access.yaml", tenants()), fake) as server:
        yield server


@contextlib.contextmanager
def half_sent(server: Server, *paths: str, key: str | None = None) -> Iterator[h2.Connection]:
    """A connection on which a call to each path has begun."""
    extra = () if key is None else (("authorization", f"Bearer {key}"),)
    with h2.Connection(server.address) as connection:
        for number, path in enumerate(paths):
            connection.send(h2.half_a_call(path, stream=2 * number + 1, extra=extra))
        yield connection


def until_ended(connection: h2.Connection, count: int = 1) -> list[h2.Frame]:
    """The frames that come until so many calls have ended."""
    seen: list[h2.Frame] = []
    for frame in connection.frames(30):
        seen.append(frame)
        count -= frame.kind == h2.HEADERS and bool(frame.flags & h2.END_STREAM)
        if not count:
            return seen
    raise AssertionError(f"{count} calls have not ended; there came {seen}")


async def test_of_a_message_without_a_key_nothing_is_read(server: Server) -> None:
    with half_sent(server, TOKENIZE, GENERATE) as connection:
        frames = await asyncio.to_thread(until_ended, connection, 2)
    assert {failure.code for failure in server._calls.failures} == {"UNAUTHENTICATED"}
    assert not [frame for frame in frames if frame.kind == h2.WINDOW_UPDATE and frame.stream]


@pytest.mark.parametrize(
    ("path", "key"),
    [(TOKENIZE, ALICE), (GENERATE, ALICE), (CHECK, None)],
    ids=["unary", "stream", "open"],
)
async def test_half_a_message_is_waited_for_so_long_and_no_longer(
    path: str, key: str | None, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "MESSAGE_SECONDS", 0.05)
    with half_sent(server, path, key=key) as connection:
        await asyncio.to_thread(until_ended, connection)
    assert server._calls.failures == {("grpc", path, "DEADLINE_EXCEEDED"): 1}
    async with client(server, ALICE) as alice:
        monkeypatch.setattr(errors, "MESSAGE_SECONDS", 30.0)
        assert await alice.tokenize("a")


async def test_a_call_without_a_message_says_so(server: Server) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_unary(TOKENIZE)(
            nothing(), metadata=(("authorization", f"Bearer {ALICE}"),)
        )
        with pytest.raises(grpc.aio.AioRpcError, match="request: is missing") as refused:
            await call
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_is_asked_by_so_many_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "MAX_OPEN_CALLS", 2)
    async with grpc.aio.insecure_channel(server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        with half_sent(server, CHECK, CHECK):
            await until(lambda: _num_open(server) == 2)
            with pytest.raises(grpc.aio.AioRpcError, match="2 calls of grpc") as refused:
                await health.Check(health_pb2.HealthCheckRequest())
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await until(lambda: _num_open(server) == 0)
        await health.Check(health_pb2.HealthCheckRequest())


def _num_open(server: Server) -> int:
    return server._guard._num_open


async def test_calls_count_from_their_headers_on(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "OTHER_CALLS", 1)
    server = Server(ServerConfig(port=0, max_concurrent=1, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    try:
        async with AsyncClient(server.address) as anybody:
            with half_sent(server, TOKENIZE, TOKENIZE, TOKENIZE) as connection:
                await asyncio.to_thread(until_ended, connection)  # the third
            while not await _works(anybody):
                await asyncio.sleep(0.01)
    finally:
        await server.stop()


async def _works(anybody: AsyncClient) -> bool:
    with contextlib.suppress(ServiceError):
        return bool(await anybody.tokenize("a"))
    return False
