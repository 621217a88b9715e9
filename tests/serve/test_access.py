"""Who may do what over the wire: keys that are right, wrong, missing or expired; what is between
tenants; operators; and servers that don't begin."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.client import AsyncClient, ServiceError
from engine.config_error import ConfigError
from engine.new_key import make_key
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.rpc.octavo.v1 import generation_pb2_grpc
from engine.serve import files
from engine.serve.access import Access, Caller
from engine.serve.authentication import AccessInterceptor
from engine.serve.errors import Refused
from engine.serve.failures import Failures
from engine.serve.server import Server, join
from engine.serve.tenants import TenantRules
from engine.server_config import ServerConfig
from engine.types import Domain
from tests.serve.access_file import ALICE, BOB, OPS, client, entry, serving, tenants, write
from tests.serve.fake_engine import FakeEngine, collect

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_SECONDS", 0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "access.yaml", tenants())


@pytest.fixture
async def server(path: Path, fake: FakeEngine) -> AsyncIterator[Server]:
    async with serving(path, fake) as server:
        yield server


@contextlib.asynccontextmanager
async def raw(server: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield generation_pb2_grpc.GenerationStub(cast("Any", channel))


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises((ServiceError, grpc.aio.AioRpcError)) as raised:
        await call
    error = raised.value
    return error.code if isinstance(error, ServiceError) else error.code()


async def say(client: AsyncClient, prompt: str = "hello", **given: Any) -> str:
    return "".join([delta.text for delta in await collect(client.generate(prompt, **given))])


async def test_a_key_lets_its_tenant_in(server: Server, fake: FakeEngine) -> None:
    async with client(server, ALICE) as alice, client(server, BOB) as bob:
        assert await say(alice) == await say(bob) == "hello"
        await say(alice, cache_salt="salt")
    domains = [call.domain for call in fake.calls]
    assert domains == [Domain("alice"), Domain("bob"), Domain("alice", "salt")]


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", f"Bearer {ALICE}"),),
        (("authorization", f"bearer   {ALICE} "),),
        (("x-api-key", ALICE),),
        (("authorization", f"Bearer {ALICE}"), ("x-api-key", ALICE)),
    ],
)
async def test_a_key_may_come_in_either_place(server: Server, metadata: Any) -> None:
    async with raw(server) as stub:
        assert (await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)).name == "echo"


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", ALICE),),
        (("authorization", f"Basic {ALICE}"),),
        (("authorization", f"Bearer {ALICE[:-1]}"),),
        (("authorization", "Bearer " + "x" * 5000),),
        (("x-api-key", f"Bearer {ALICE}"),),
        (("x-api-key", ""),),
        (("x-api-key", BOB), ("authorization", f"Bearer {ALICE}")),
        (("authorization", f"Bearer {BOB}"), ("authorization", f"Bearer {ALICE}")),
        (("authorization-bin", f"Bearer {ALICE}".encode()),),
    ],
)
async def test_whoever_has_no_valid_key_gets_nothing(
    server: Server, fake: FakeEngine, metadata: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw(server) as stub:
        calls = [
            stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata),
            stub.Tokenize(pb.TokenizeRequest(text="x"), metadata=metadata),
            stub.Abort(pb.AbortRequest(), metadata=metadata),  # not even what is wrong with it
            stub.FlushCache(pb.FlushCacheRequest(), metadata=metadata),
            stub.GetStats(pb.GetStatsRequest(), metadata=metadata),
            stub.GetUsage(pb.GetUsageRequest(), metadata=metadata),
            collect(stub.Generate(pb.GenerateRequest(text="x"), metadata=metadata)),
        ]
        assert [await code_of(call) for call in calls] == [UNAUTHENTICATED] * len(calls)
    assert fake.calls == []
    assert fake.flushed == []
    assert ALICE[:12] not in caplog.text


async def test_what_is_said_of_a_key_does_not_tell_whether_it_ever_was_one(
    path: Path, fake: FakeEngine
) -> None:
    yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
    write(path, tenants(alice={"keys": [entry(ALICE, expires=yesterday)]}))
    answers = set()
    async with serving(path, fake) as server:
        for key in (ALICE, make_key(), "x"):
            async with client(server, key) as caller:
                with pytest.raises(ServiceError) as raised:
                    await caller.model_info()
                answers.add((raised.value.code, raised.value.details))
    assert answers == {(UNAUTHENTICATED, "the key is not valid here")}


async def test_health_is_open_and_reflection_is_not(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(cast("Any", channel))
        reply = await health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        watched = health.Watch(health_pb2.HealthCheckRequest())
        assert (await anext(aiter(watched))).status == reply.status
        watched.cancel()
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))
        ask = (reflection_pb2.ServerReflectionRequest(list_services=""),)
        assert await code_of(collect(stub.ServerReflectionInfo(iter(ask)))) is UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {ALICE}"),)
        (listed,) = await collect(stub.ServerReflectionInfo(iter(ask), metadata=metadata))
        assert listed.list_services_response.service


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
@pytest.mark.parametrize("yields", [True, False], ids=["yields", "writes"])
async def test_a_service_that_knows_nothing_of_keys_is_closed_too(kind: str, yields: bool) -> None:
    reply = empty_pb2.Empty()

    class RefusesAll(Access):
        def caller(self, context: grpc.aio.ServicerContext) -> Caller:
            if dict(context.invocation_metadata() or ()).get("x-api-key") != "good":
                raise Refused(UNAUTHENTICATED, "no")
            return Caller()

    async def answers(request: Any, context: Any) -> Any:
        if kind.endswith("unary"):
            return reply
        await context.write(reply)
        return None

    async def streams(request: Any, context: Any) -> Any:
        yield reply

    method = streams if yields and kind.endswith("stream") else answers
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    handler = make(method, None, empty_pb2.Empty.SerializeToString)
    failures = Failures()
    server = grpc.aio.server(interceptors=[AccessInterceptor(RefusesAll(), failures)])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("new.S", {"M": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def ask(key: str) -> Any:
        request = iter((b"",)) if kind.startswith("stream") else b""
        call = getattr(channel, kind)("/new.S/M")(request, metadata=(("x-api-key", key),))
        return await (call if kind.endswith("unary") else collect(call))

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await code_of(ask("bad")) is UNAUTHENTICATED
        assert await ask("good") == (b"" if kind.endswith("unary") else [b""])
    assert failures == {("grpc", "/new.S/M", "UNAUTHENTICATED"): 1}
    await server.stop(None)


# Between tenants.


async def test_a_tenant_can_not_touch_another_ones_request_whose_name_it_guessed(
    server: Server, fake: FakeEngine
) -> None:
    async with client(server, ALICE) as alice, client(server, BOB) as bob:
        mine = alice.generate("forever", request_id="r1")
        await anext(mine)
        assert not await bob.abort("r1")
        for guess in ("alice/r1", "../alice/r1", "r1#0"):
            assert not await bob.abort(guess)
        his = bob.generate("forever", request_id="r1")  # is no one else's name
        await anext(his)
        assert fake.running.keys() == {"alice/r1", "bob/r1"}
        assert await bob.abort("r1")
        assert (await collect(his))[-1].finish_reason == "abort"
        await anext(mine)  # goes on
        with pytest.raises(ServiceError, match="a request named r1 is running") as raised:
            await anext(alice.generate("x", request_id="r1"))
        assert raised.value.code is grpc.StatusCode.ALREADY_EXISTS
        assert await alice.abort("r1")
        await collect(mine)


async def test_usage_and_flushes_are_the_tenants_own(
    server: Server, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Domain] = []
    usage = FakeEngine.usage
    monkeypatch.setattr(fake, "usage", lambda domain: asked.append(domain) or usage(fake, domain))
    async with client(server, ALICE) as alice:
        await alice.usage(cache_salt="salt")
        await alice.flush("salt")
    assert asked == fake.flushed == [Domain("alice", "salt")]


async def test_stats_are_for_operators(server: Server) -> None:
    async with client(server, ALICE) as alice, client(server, OPS) as ops:
        assert (await ops.stats()).running == 1
        assert await code_of(alice.stats()) is DENIED


async def test_operations_are_for_operators(server: Server, fake: FakeEngine) -> None:
    async with (
        client(server, ALICE) as alice,
        client(server, OPS) as ops,
        client(server, None) as x,
    ):
        for name in ("pause", "resume", "reload"):
            assert await code_of(getattr(alice, name)()) is DENIED
            assert await code_of(getattr(x, name)()) is UNAUTHENTICATED
        await ops.pause()
        await ops.resume()


async def test_where_nobody_is_authenticated_nobody_is_the_operator_of_stats(
    fake: FakeEngine,
) -> None:
    server = Server(ServerConfig(port=0, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    async with client(server, None) as caller:
        assert await code_of(caller.stats()) is DENIED
    await server.stop()


def test_who_sees_no_figures_of_all_is_told_what_there_is_to_do_here() -> None:
    without, tenant = Caller(is_operator=True), Caller("a", rules=TenantRules())
    assert "operators with a key, of which it has none; to show" in without.who_sees_all
    assert "tenants with operator: true; to show it to all" in tenant.who_sees_all
    for caller in (without, tenant):
        assert caller.who_sees_all.endswith("--set server.public_stats=true")


def test_who_is_an_operator() -> None:
    Caller(is_operator=True).check_operator("a profile")
    for caller in (Caller(), Caller("a", rules=TenantRules())):
        with pytest.raises(Refused, match="a profile is for operators") as raised:
            caller.check_operator("a profile")
        assert raised.value.code is DENIED
    anybody: Any = None
    assert Access(is_local=True).caller(anybody).is_operator
    assert not Access(is_local=False).caller(anybody).is_operator
    assert not Access(is_local=True, is_http_local=False).http_caller(anybody).is_operator


# What a server refuses to begin with.


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_a_server_that_others_reach_is_not_open_by_accident(host: str, path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.host is .*there is no authentication"):
        Server(ServerConfig(host=host, port=0))
    with pytest.raises(ConfigError, match=r"without TLS the API keys can be read"):
        Server(ServerConfig(host=host, port=0, access=str(path)))
    if host:  # without one, HTTP is on this machine alone
        with pytest.raises(ConfigError, match=r"--http is .*there is no authentication"):
            Server(ServerConfig(port=0, http=join(host, 0)))
        with pytest.raises(ConfigError, match=r"--http is .*without TLS"):
            Server(ServerConfig(port=0, access=str(path), http=join(host, 0)))
    Server(ServerConfig(host=host, port=0, allow_anonymous=True))
    Server(ServerConfig(host=host, port=0, access=str(path), allow_plaintext=True))


async def test_who_says_that_the_network_is_safe_is_warned(
    path: Path, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(path, fake, host="0.0.0.0", allow_plaintext=True) as server:
        assert "has no TLS: API keys and prompts can be read" in caplog.text
        assert "no authentication" not in caplog.text
        async with client(server, ALICE) as alice:
            await alice.model_info()


def test_a_server_does_not_start_with_a_wrong_access_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read the access file"):
        Server(ServerConfig(port=0, access=str(tmp_path / "none.yaml")))
