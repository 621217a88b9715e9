"""Health checks: anybody may watch, and nobody who watches is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from engine.serve import health
from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.serve.fake_engine import FakeEngine, FakeLife
from tests.survival import h2

SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING
GENERATION = "octavo.v1.Generation"


@pytest.fixture
async def starting() -> AsyncIterator[Server]:
    """A server without an engine yet."""
    server = Server(ServerConfig(port=0, grace=0.05))
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def stub(starting: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(starting.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def test_every_service_is_ready_when_the_engine_is(starting: Server, stub: Any) -> None:
    for expected in (NOT_SERVING, SERVING):
        for service in ("", GENERATION, "octavo.v1.Operations", "vllm.grpc.engine.VllmEngine"):
            reply = await stub.Check(pb.HealthCheckRequest(service=service))
            assert reply.status == expected
        await starting.set_engine(FakeEngine())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Check(pb.HealthCheckRequest(service="nobody's"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_who_watches_hears_of_every_change_when_another_has_left(
    starting: Server, stub: Any
) -> None:
    request = pb.HealthCheckRequest(service=GENERATION)
    leaves, stays = stub.Watch(request), stub.Watch(request)
    assert [(await call.read()).status for call in (leaves, stays)] == [NOT_SERVING, NOT_SERVING]
    leaves.cancel()
    await starting.set_engine(FakeEngine())
    assert (await stays.read()).status == SERVING
    stopping = asyncio.create_task(starting.stop())
    assert (await stays.read()).status == NOT_SERVING
    await stopping


async def test_an_engine_that_can_t_be_asked_is_not_well(starting: Server, stub: Any) -> None:
    class Broken(FakeLife):
        @property
        def unready(self) -> str | None:
            raise RuntimeError("secret")

    fake = FakeEngine()
    await starting.set_engine(fake)
    call = stub.Watch(pb.HealthCheckRequest())
    assert (await call.read()).status == SERVING
    fake.life = Broken()
    assert (await call.read()).status == NOT_SERVING
    fake.life = FakeLife()
    assert (await call.read()).status == SERVING
    call.cancel()


async def test_a_service_that_is_not_there_is_unknown_to_who_watches(stub: Any) -> None:
    call = stub.Watch(pb.HealthCheckRequest(service="nobody's"))
    assert (await call.read()).status == pb.HealthCheckResponse.SERVICE_UNKNOWN
    call.cancel()


async def test_who_watches_and_reads_nothing_holds_nobody_up(
    starting: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting._calls, "_reader_timeout", 0.2)

    def attack() -> h2.Connection:
        connection = h2.Connection(starting.address, window=0).__enter__()
        connection.send(h2.call("/grpc.health.v1.Health/Watch", b""))
        return connection

    connection = await asyncio.to_thread(attack)
    try:
        while not starting._health._num_watchers:
            await asyncio.sleep(0.01)
        await starting.set_engine(FakeEngine())
        async with grpc.aio.insecure_channel(starting.address) as channel:
            checking: Any = health_pb2_grpc.HealthStub(channel)
            reply = await checking.Check(pb.HealthCheckRequest())
        assert reply.status == SERVING
        while starting._health._num_watchers:  # it is let go
            await asyncio.sleep(0.01)
        await starting.stop()
    finally:
        connection.__exit__()


async def test_so_many_may_watch_and_no_more(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHERS", 2)
    calls = [stub.Watch(pb.HealthCheckRequest()) for _ in range(2)]
    for call in calls:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Watch(pb.HealthCheckRequest()).read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in calls:
        call.cancel()
