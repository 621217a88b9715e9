"""A server whose engine is in trouble, paused or reloaded, and how signals end it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from engine.client import AsyncClient, Credentials, ServiceError
from engine.config import ConfigError
from engine.serve import server as server_module
from engine.serve.access import Caller
from engine.serve.run import _ready_line, background_loop
from engine.serve.server import SERVICES, Server
from engine.server_config import ServerConfig, TlsConfig
from engine.types import FinishReason
from tests.command_line import CommandLine
from tests.conftest import ROOT
from tests.serve.access_file import OPS, serving, tenants, write
from tests.serve.fake_engine import FakeEngine, FakeLife, collect, until
from tests.serve.test_server import NOT_SERVING, SERVING, health_of


@pytest.fixture
def life(fake: FakeEngine) -> FakeLife:
    assert isinstance(fake.life, FakeLife)
    return fake.life


async def until_health(address: str, wanted: int) -> None:
    while await health_of(address) != wanted:
        await asyncio.sleep(0.02)


async def test_an_engine_in_trouble_is_not_serving_and_takes_no_calls(
    client: AsyncClient, server: Server, life: FakeLife
) -> None:
    life.trouble = "a step hangs"
    with pytest.raises(ServiceError, match="a step hangs") as refused:
        await collect(client.generate("hello"))
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    assert refused.value.retry_after == 1.0
    await client.stats()  # operators may look
    await until_health(server.address, NOT_SERVING)
    for service in SERVICES:
        assert await health_of(server.address, service) == NOT_SERVING
    life.trouble = None
    await until_health(server.address, SERVING)
    assert await collect(client.generate("hello"))


async def test_the_request_of_a_step_that_hangs_is_told_so_and_not_that_it_failed(
    client: AsyncClient, fake: FakeEngine, life: FakeLife
) -> None:
    fake.ending = FinishReason.ERROR
    stream = client.generate("hello")
    await anext(stream)
    life.trouble = "a step hangs"
    with pytest.raises(ServiceError, match="a step hangs") as ended:
        await collect(stream)
    assert ended.value.code is grpc.StatusCode.UNAVAILABLE


async def test_the_watchdog_gets_the_config_s_limits(fake: FakeEngine, life: FakeLife) -> None:
    config = ServerConfig(
        port=0, grace=0.0, step_timeout=7.0, recovery_timeout=8.0, max_failed_steps=9
    )
    server = Server(config)
    await server.start()
    assert not life.limits
    await server.set_engine(fake)
    await server.stop()
    assert life.limits == {"step_timeout": 7.0, "recovery_timeout": 8.0, "max_failed_steps": 9}


async def test_a_paused_server_is_not_serving_but_takes_calls(
    client: AsyncClient, server: Server, life: FakeLife
) -> None:
    await client.pause()
    assert life.is_paused
    await until_health(server.address, NOT_SERVING)
    assert await collect(client.generate("hello"))  # the real engine queues it
    await client.resume()
    await client.resume()
    assert not life.is_paused
    await until_health(server.address, SERVING)


async def test_operations_are_for_operators(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, server: Server, life: FakeLife
) -> None:
    monkeypatch.setattr(server._access, "caller", lambda context: Caller(is_operator=False))
    for call in (client.pause, client.resume, client.reload):
        with pytest.raises(ServiceError, match="operators") as refused:
            await call()
        assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert not life.is_paused


async def test_a_reload_tells_what_is_served(client: AsyncClient, fake: FakeEngine) -> None:
    answer = await client.reload()
    assert answer.changed
    assert answer.weights_fingerprint == fake.model_info().weights_fingerprint
    fake.reloading = False
    assert not (await client.reload()).changed
    fake.reloading = ConfigError("the new weights' vocab_size is 3, but 258 is what was compiled")
    with pytest.raises(ServiceError, match=r"served as before: .* vocab_size is 3") as refused:
        await client.reload()
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("outcome", [True, ConfigError("they don't fit beside the old ones")])
async def test_a_reload_whose_caller_has_left_is_logged_all_the_same(
    fake: FakeEngine,
    tmp_path: Path,
    outcome: bool | ConfigError,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake.reloading = outcome
    fake.exchanging.clear()
    async with serving(write(tmp_path / "access.yaml", tenants()), fake) as server:
        async with AsyncClient(server.address, Credentials(api_key=OPS)) as ops:
            call = asyncio.create_task(ops.reload())
            await until(lambda: server._calls.num_in_progress)
            call.cancel()
            await until(lambda: not server._calls.num_in_progress)
        fake.exchanging.set()
        expected = (
            "weights reloaded by tenant ops: 00ff"
            if outcome is True
            else f"the weights were not reloaded for tenant ops: {outcome}"
        )
        await until(lambda: expected in caplog.text)


async def test_a_server_that_is_to_end_waits_for_no_reload_and_tells_its_caller(
    fake: FakeEngine,
) -> None:
    fake.exchanging.clear()  # a request that began with the old weights goes on
    server = Server(ServerConfig(port=0, grace=3600.0))
    await server.start()
    await server.set_engine(fake)
    async with AsyncClient(server.address) as client:
        call = asyncio.create_task(client.reload())
        await until(lambda: server._calls.num_in_progress)
        stop = asyncio.create_task(server.stop())
        with pytest.raises(ServiceError, match=r"shutting down, .* its next start reads") as ended:
            await call
        assert ended.value.code is grpc.StatusCode.UNAVAILABLE
        await stop
    fake.exchanging.set()


SERVE = """
import sys, time
from engine.server_config import ServerConfig, TlsConfig
from engine.serve.run import serve

def load():
    if "slowly" in sys.argv:
        print("loading", flush=True)
        time.sleep(60)
    from tests.serve.fake_engine import FakeEngine
    return FakeEngine()

sys.exit(serve(ServerConfig(port=0, grace=60.0), load))
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVE, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_a_signal_while_the_model_is_loaded_ends_the_process_with_zero() -> None:
    with start("slowly") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


def test_the_ready_line_of_a_server_with_tls_says_all_that_its_command_takes(
    fake: FakeEngine,
) -> None:
    tls = TlsConfig(certificate="server.pem", key="server.key")
    line = _ready_line(fake.model_info(), "127.0.0.1:50051", ServerConfig(tls=tls))
    assert line.endswith('chat --tls --ca FILE -m "Hello"')


async def test_a_second_signal_ends_the_process_at_once() -> None:
    with start() as process:
        assert process.stdout is not None
        address = process.stdout.readline().split(" on ")[1].split(". ")[0]
        async with AsyncClient(address) as client:
            stream = client.generate("forever")
            await anext(stream)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            said = await asyncio.to_thread(process.stderr.readline)
            assert "ending; 1 request has 60 s to end, and a second signal ends" in said
            await until_health(address, NOT_SERVING)
            with pytest.raises(ServiceError, match="is shutting down"):
                await anext(client.generate("hello"))
            assert (await anext(stream)).text  # what runs goes on in the grace
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ServiceError):
                await collect(stream)
        assert await asyncio.to_thread(process.wait) == 128 + signal.SIGTERM


async def test_streams_are_ended_even_if_the_engine_does_not_abort_them(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "ABORT_SECONDS", 0.5)
    abandoned: list[bool] = []
    stuck = fake.abort

    def abandon() -> None:
        abandoned.append(True)
        for name in tuple(fake.running):
            stuck(name)

    fake.abort = lambda request_id: True  # type: ignore[method-assign]
    fake.abandon = abandon  # type: ignore[method-assign]
    server = Server(ServerConfig(port=0, grace=0.0))
    await server.start()
    await server.set_engine(fake)
    async with AsyncClient(server.address) as client:
        stream = client.generate("forever")
        await anext(stream)
        stop = asyncio.create_task(server.stop())
        with pytest.raises(ServiceError, match="shut down before"):
            await collect(stream)
        await stop
    assert abandoned


async def test_a_request_in_progress_is_waited_for_before_http_is_closed(
    fake: FakeEngine,
) -> None:
    """HTTP answers come from the same calls: they must not lose their connection before gRPC's."""
    server = Server(ServerConfig(port=0, grace=60.0, http="127.0.0.1:0"))
    await server.start()
    await server.set_engine(fake)
    assert server._http is not None
    async with AsyncClient(server.address) as client:
        stream = client.generate("forever")
        await anext(stream)
        stop = asyncio.create_task(server.stop())
        await until(lambda: server._calls.unready)
        host, port = (server.page or "").removeprefix("http://").rstrip("/").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()
        server._calls.abort_streams()
        with pytest.raises(ServiceError):
            await collect(stream)
        await stop


async def test_a_paused_server_ends_at_once(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0, grace=3600.0))
    await server.start()
    await server.set_engine(fake)
    async with AsyncClient(server.address) as client:
        stream = client.generate("forever")
        await anext(stream)
        await client.pause()
        stop = asyncio.create_task(server.stop())
        with pytest.raises(ServiceError, match="shut down before"):
            await collect(stream)
        await stop


def test_operators_have_commands(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    octavo = CommandLine(monkeypatch, capsys)
    with background_loop() as run:
        server = Server(ServerConfig(port=0, grace=0.0))
        run(server.start())
        run(server.set_engine(fake))
        try:
            assert octavo("pause", "--address", server.address).out.startswith("Paused")
            assert fake.life.is_paused
            assert octavo("resume", "--address", server.address).out == "Resumed\n"
            assert not fake.life.is_paused
            ended = octavo("reload", "--address", server.address)
            assert (ended.code, ended.out) == (0, "Reloaded. Weights: 00ff\n")
            fake.reloading = False
            assert "Nothing to reload" in octavo("reload", "--address", server.address).out
            fake.reloading = ConfigError("they don't fit beside the old ones")
            ended = octavo("reload", "--address", server.address)
            assert ended.code == 1
            assert "octavo: the weights are served as before: they don't fit" in ended.err
        finally:
            run(server.stop())
