"""The server's life: ports, health, reflection, information, and shutting down."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import socket
import subprocess
import sys
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine import __version__
from engine.client import AsyncClient, Delta, ServiceError
from engine.config import ConfigError
from engine.config_file import from_tree
from engine.domain_usage import DomainUsage
from engine.frontend import EngineStats
from engine.observe.histogram import Buckets
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.serve.run import run_server, serve
from engine.serve.server import AddressUnavailable, Server
from engine.server_config import ServerConfig
from engine.types import Domain, FinishReason, QueueFull
from tests.conftest import ROOT
from tests.serve.fake_engine import FakeEngine, collect, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(address: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_a_server_without_its_engine_is_there_but_not_ready(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0))
    await server.start()
    async with AsyncClient(server.address) as client:
        assert await health_of(server.address) == NOT_SERVING
        assert await health_of(server.address, "octavo.v1.Generation") == NOT_SERVING
        assert not await client.is_ready()
        with pytest.raises(ServiceError, match="still loading its model") as raised:
            await anext(client.generate("hello"))
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE
        await server.set_engine(fake)
        assert await health_of(server.address) == SERVING
        assert await health_of(server.address, "octavo.v1.Generation") == SERVING
        assert await client.is_ready()
    await server.stop()


async def test_reflection_lists_the_services_and_describes_ours(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))
        requests = (
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="octavo.v1.Generation"),
        )
        listed, described = [r async for r in stub.ServerReflectionInfo(iter(requests))]
    assert {service.name for service in listed.list_services_response.service} == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "octavo.v1.Generation",
        "octavo.v1.Operations",
        "vllm.grpc.engine.VllmEngine",
    }
    files = described.file_descriptor_response.file_descriptor_proto
    assert pb.DESCRIPTOR.serialized_pb in files


async def test_the_model_is_described(client: AsyncClient, fake: FakeEngine) -> None:
    info, expected = await client.model_info(), fake.model_info()
    assert info.server_version == __version__
    for name in ("name", "dtype", "max_model_len", "weights_fingerprint"):
        assert getattr(info, name) == getattr(expected, name)
    assert tuple(info.eos_token_ids) == expected.eos_token_ids
    for field in pb.Architecture.DESCRIPTOR.fields:
        given = getattr(info.architecture, field.name)
        assert given
        assert given == getattr(expected.architecture, field.name)


def _buckets(message: pb.Histogram) -> Buckets:
    return Buckets(tuple(message.bounds), tuple(message.counts), message.sum)


async def test_every_figure_of_the_engine_is_in_the_stats(
    client: AsyncClient, fake: FakeEngine
) -> None:
    _ = [delta async for delta in client.generate("hello")]
    stats, expected = await client.stats(), fake.stats()
    names = {field.name for field in dataclasses.fields(EngineStats)}
    assert {field.name for field in pb.GetStatsResponse.DESCRIPTOR.fields} == names
    for name in names - {"finished"}:
        given, value = getattr(stats, name), getattr(expected, name)
        assert (given if not isinstance(value, Buckets) else _buckets(given)) == value
    assert dict(stats.finished) == {"length": 1}


async def test_stats_of_all_callers_are_for_the_operator(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    try:
        async with AsyncClient(server.address) as client:
            with pytest.raises(ServiceError, match=r"server\.public_stats=true") as refused:
                await client.stats()
            await client.usage()
    finally:
        await server.stop()
    assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED


async def test_usage_is_that_of_the_caller_s_own_salt(client: AsyncClient) -> None:
    usage = await client.usage(cache_salt="abc")
    names = {field.name for field in dataclasses.fields(DomainUsage)}
    assert {field.name for field in pb.GetUsageResponse.DESCRIPTOR.fields} == names
    assert (usage.prompt_tokens, usage.cached_prompt_tokens, usage.generated_tokens) == (3, 4, 5)
    assert dict(usage.finished) == {"stop": 6}
    assert (await client.usage()).prompt_tokens == 0
    with pytest.raises(ServiceError, match="cache_salt"):
        await client.usage(cache_salt="a" * 257)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.invalid"])
def test_a_server_without_isolation_is_for_loopback_only(host: str) -> None:
    config = from_tree(
        {
            "model": {"source": "nowhere"},
            "cache": {"num_blocks": 1, "isolation": "none"},
            "server": {"host": host},
        }
    )
    with pytest.raises(ConfigError, match=r"server\.host to 127\.0\.0\.1"):
        run_server(config)


def test_a_server_refuses_what_is_said_of_tenants_that_nobody_can_be() -> None:
    cache = {"num_blocks": 1, "tenant_time_to_live": {"default": 5, "clinic": 60}}
    config = from_tree({"model": {"source": "nowhere"}, "cache": cache})
    with pytest.raises(ConfigError, match=r"names 'clinic', .*or set cache\.time_to_live"):
        run_server(config)


def test_a_server_without_isolation_says_so_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.serve.run.serve", lambda *given: 0)
    for isolation, is_told in (("domain", False), ("none", True)):
        cache = {"num_blocks": 1, "isolation": isolation}
        config = from_tree({"model": {"source": "nowhere"}, "cache": cache})
        assert run_server(config) == 0
        assert ("ISOLATION IS OFF" in caplog.text) == is_told


async def test_a_busy_port_is_named_with_the_way_out(server: Server) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(AddressUnavailable, match=f"127.0.0.1:{port}: Address already in use"):
        await Server(ServerConfig(port=port)).start()


def test_a_busy_port_ends_the_command_before_it_loads_a_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve(ServerConfig(port=port), lambda: pytest.fail("was loaded")) == 1
    captured = capsys.readouterr()
    assert f"octavo: can't listen on 127.0.0.1:{port}: Address already in use" in captured.err
    assert "--set server.port=PORT" in captured.err
    assert not captured.out


async def test_a_host_that_is_not_there_is_named() -> None:
    with pytest.raises(AddressUnavailable, match=r"no-such-host.invalid' can't be resolved"):
        await Server(
            ServerConfig(host="no-such-host.invalid", port=0, allow_anonymous=True)
        ).start()
    with pytest.raises(AddressUnavailable, match=r"192.0.2.1:0: Cannot assign"):  # RFC 5737
        await Server(ServerConfig(host="192.0.2.1", port=0, allow_anonymous=True)).start()


def test_an_engine_that_fails_to_load_ends_the_command_with_its_error() -> None:
    def load() -> Any:
        raise FileNotFoundError("no such model")

    with pytest.raises(FileNotFoundError, match="no such model"):
        serve(ServerConfig(port=0), load)


async def test_stopping_lets_streams_end_by_themselves(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0, grace=60.0))
    await server.start()
    await server.set_engine(fake)
    async with AsyncClient(server.address) as client:
        stream = client.generate("hello", max_tokens=20)
        parts = [await anext(stream)]
        stop = asyncio.create_task(server.stop())
        parts += [part async for part in stream]
        await stop
    assert "".join(part.text for part in parts) == "hello" * 4
    assert parts[-1].finish_reason is FinishReason.LENGTH


async def test_stopping_aborts_streams_after_the_grace_and_refuses_new_ones(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(ServerConfig(port=0, grace=0.1))
    await server.start()
    await server.set_engine(fake)
    wait_idle, may_begin = server._calls.wait_idle, asyncio.Event()

    async def wait_when_it_may(seconds: float) -> bool:
        await may_begin.wait()  # or a slow test would come when all is over
        return await wait_idle(seconds)

    monkeypatch.setattr(server._calls, "wait_idle", wait_when_it_may)
    async with AsyncClient(server.address) as client:
        stream = client.generate("forever")
        parts: list[Delta] = [await anext(stream)]
        stop = asyncio.create_task(server.stop())
        with pytest.raises(ServiceError, match="is shutting down") as refused:
            await anext(client.generate("hello"))
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        assert await health_of(server.address) == NOT_SERVING
        may_begin.set()
        with pytest.raises(ServiceError, match="shut down before the answer was") as ended:
            await collect(stream, parts)
        await stop
    assert ended.value.code is grpc.StatusCode.UNAVAILABLE
    assert parts[-1].finish_reason is FinishReason.ABORT
    assert fake.finished == {"abort": 1}


SERVE_ECHO = """
import sys
from engine.server_config import ServerConfig
from engine.serve.run import serve
from tests.conftest import ROOT
from tests.serve.fake_engine import FakeEngine

class Engine(FakeEngine):
    def close(self):
        print("closed", dict(self.finished), "running", len(self.running), flush=True)

sys.exit(serve(ServerConfig(port=0, grace=0.05), Engine))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_cleanly_with_a_stream_in_flight(
    number: signal.Signals,
) -> None:
    command = [sys.executable, "-c", SERVE_ECHO]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(
                "Octavo is ready: echo (attention: xla; products: xla) on 127.0.0.1:"
            )
            address = line.split(" on ")[1].split(". ")[0]
            assert f'chat --address {address} -m "Hello"' in line
            async with AsyncClient(address) as client:
                stream = client.generate("forever")
                await anext(stream)
                process.send_signal(number)
                with pytest.raises(ServiceError) as raised:
                    await collect(stream)
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
            rest, _ = process.communicate()
        finally:
            process.kill()
    assert rest == "closed {'abort': 1} running 0\n"
    assert process.returncode == 0


SERVE_DYING = SERVE_ECHO.replace(
    "class Engine(FakeEngine):",
    "class Engine(FakeEngine):\n    is_alive = property(lambda self: not self.finished)\n",
)


async def test_a_server_whose_engine_stopped_says_so_and_ends_with_an_error() -> None:
    """This engine dies after its first answer."""
    command = [sys.executable, "-c", SERVE_DYING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split(" on ")[1].split(". ")[0]
            async with AsyncClient(address) as client, grpc.aio.insecure_channel(address) as raw:
                stub: Any = health_pb2_grpc.HealthStub(cast("Any", raw))
                watch = stub.Watch(health_pb2.HealthCheckRequest())
                assert (await watch.read()).status == SERVING
                await collect(client.generate("hello"))
                assert (await watch.read()).status == NOT_SERVING
            out, err = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 1
    assert "the engine stopped by itself" in err
    assert out == "closed {'length': 1} running 0\n"


@pytest.mark.parametrize(
    ("host", "address", "is_public"),
    [("0.0.0.0", "127.0.0.1:", True), ("localhost", "localhost:", False)],
)
async def test_clients_are_told_a_reachable_address_and_a_public_one_is_worth_a_warning(
    host: str,
    address: str,
    is_public: bool,
    fake: FakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server(ServerConfig(host=host, port=0, allow_anonymous=True, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    assert ("has no authentication" in caplog.text) == is_public
    assert server.address.startswith(address)
    async with AsyncClient(server.address) as client:
        assert await client.is_ready()
    await server.stop()


async def test_a_flush_is_of_the_callers_own_domain(client: AsyncClient, fake: FakeEngine) -> None:
    assert await client.flush("salt") == 7
    assert await client.flush() == 7
    assert fake.flushed == [Domain("default", "salt"), Domain("default", "")]
    with pytest.raises(ServiceError, match="cache_salt"):
        await client.flush("x" * 257)


async def test_flushes_that_were_cancelled_count_until_they_are_done(fake: FakeEngine) -> None:
    """Files that are being removed can't be left there: who calls and cancels piles up no work."""
    fake.flushing.clear()
    server = Server(ServerConfig(port=0, max_concurrent=2, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    try:
        async with AsyncClient(server.address) as client:
            for number in range(2):
                task = asyncio.create_task(client.flush(str(number)))
                await until(lambda most=number: len(fake.flushed) > most)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.sleep(0.1)  # for the server to hear of it
            with pytest.raises(ServiceError, match="2 calls are in progress") as refused:
                await client.flush("one too many")
            assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(fake.flushed) == 2
            fake.flushing.set()
            await until(lambda: server._calls.num_in_progress == 0)
            assert await client.flush() == 7
    finally:
        fake.flushing.set()
        await server.stop()


async def test_a_flush_that_is_one_too_many_is_told_to_come_again(
    client: AsyncClient, fake: FakeEngine
) -> None:
    fake.error = QueueFull("128 flushes are in progress already; try again later", retry_after=2.5)
    with pytest.raises(ServiceError, match="128 flushes are in progress") as refused:
        await client.flush()
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.retry_after == 2.5
