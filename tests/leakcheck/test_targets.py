"""What servers say is bounded and checked; errors name the way out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from engine.leakcheck import http_target
from engine.leakcheck.addresses import LeakcheckError, resolve
from engine.leakcheck.http_target import HttpTarget, parse_metrics
from engine.leakcheck.targets import GrpcTarget, Reply, Tenant, numbers_in
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.types import Domain
from tests.leakcheck.servers import grpc_server, http_server
from tests.leakcheck.simulation import Simulation
from tests.serve.fake_engine import FakeEngine

NOBODY = Tenant()
FOREVER = 600.0  # seconds


@contextlib.asynccontextmanager
async def _raw_server(answer: bytes, *, seen: list[bytes] | None = None) -> AsyncIterator[str]:
    """Answers every request with the same bytes, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        # What is left unread would reset the connection, and the answer with it.
        length = re.search(rb"content-length: (\d+)", head.lower())
        await reader.readexactly(int(length[1]) if length else 0)
        if seen is not None:
            seen.append(head)
        with contextlib.suppress(ConnectionError):
            writer.write(answer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def _ok(body: str) -> bytes:
    return b"HTTP/1.1 200 OK\r\n\r\n" + body.encode()


def _event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


TOKEN = _event(choices=[{"delta": {"content": "a"}}])


async def _ask(answer: bytes, timeout: float = 5.0) -> Reply:
    async with (
        _raw_server(answer) as address,
        HttpTarget(resolve(address), timeout, model="fake") as target,
    ):
        return await target.send("hello", NOBODY)


async def test_the_real_service_answers_as_the_target_expects() -> None:
    engine = FakeEngine()
    server = Server(ServerConfig(port=0, grace=0.05))
    await server.start()
    await server.set_engine(engine)
    try:
        async with GrpcTarget(resolve(server.address), FOREVER) as target:
            assert "echo" in await target.describe(NOBODY, 32)
            prompt = target.fresh_prompt()
            reply = await target.send(prompt, Tenant(salt="mine"))
            assert reply.seconds > 0
            assert (reply.cached_tokens, reply.prompt_tokens) == (16, 32)
            metrics = await target.metrics(Tenant(salt="mine"))
    finally:
        await server.stop()
    (call,) = engine.calls
    assert call.domain is not None
    assert call.domain.salt == "mine"
    assert tuple(call.prompt) == prompt
    assert call.sampling.max_tokens == 1
    usage = engine.usage(Domain(salt="mine"))
    assert metrics == {
        "GetUsage.in_progress": usage.in_progress,
        "GetUsage.prompt_tokens": usage.prompt_tokens,
        "GetUsage.cached_prompt_tokens": usage.cached_prompt_tokens,
        "GetUsage.generated_tokens": usage.generated_tokens,
        "GetUsage.finished[stop]": usage.finished["stop"],
    }


def test_every_number_of_an_answer_is_watched_but_the_time() -> None:
    """Whatever a later version adds to the figures."""
    everything = pb.GetStatsResponse()
    expected = {}
    for number, field in enumerate(pb.GetStatsResponse.DESCRIPTOR.fields, 1):
        if field.name in ("finished", "held_steps"):
            getattr(everything, field.name)["some"] = number
            expected[f"{field.name}[some]"] = float(number)
        elif field.message_type is not None:
            histogram = pb.Histogram(bounds=[0.5], counts=[number, 0], sum=number)
            getattr(everything, field.name).CopyFrom(histogram)
            parts = {"bounds[0]": 0.5, "counts[0]": number, "counts[1]": 0, "sum": number}
            expected |= {f"{field.name}.{part}": float(value) for part, value in parts.items()}
        else:
            setattr(everything, field.name, number)
            expected[field.name] = float(number)
    del expected["uptime_seconds"]
    assert numbers_in(everything) == expected


async def test_prompts_are_as_long_as_asked_and_never_the_same() -> None:
    for serve, kind in ((grpc_server, GrpcTarget), (http_server, HttpTarget)):
        async with serve(Simulation()) as address, kind(resolve(address), FOREVER) as target:
            await target.describe(NOBODY, 64)
            prompts = [target.fresh_prompt() for _ in range(50)]
            words = [each.split() if isinstance(each, str) else each for each in prompts]
            assert {len(each) for each in words} == {64}
            assert len({tuple(each[:16]) for each in words}) == 50


async def test_a_prompt_longer_than_the_model_takes_is_refused() -> None:
    async with (
        grpc_server(Simulation()) as address,
        GrpcTarget(resolve(address), FOREVER) as target,
    ):
        await target.describe(NOBODY, 255)
        with pytest.raises(LeakcheckError, match="at most 255 tokens; ask for fewer"):
            await target.describe(NOBODY, 256)


async def test_a_server_that_is_not_there_is_an_error() -> None:
    async with _raw_server(b"") as address:
        pass
    http = resolve(address)
    async with HttpTarget(http, FOREVER) as target:
        with pytest.raises(LeakcheckError, match="is a server running there"):
            await target.describe(NOBODY, 32)
    async with GrpcTarget(resolve(http.netloc), FOREVER) as target:
        with pytest.raises(LeakcheckError, match="no server is ready"):
            await target.describe(NOBODY, 32)


async def test_a_server_that_never_answers_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        netloc = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with HttpTarget(resolve(f"http://{netloc}"), 0.05) as target:
            with pytest.raises(LeakcheckError, match=r"took over 0\.05 s"):
                await target.describe(NOBODY, 32)


async def test_a_server_that_drips_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b": wait\n")
                await writer.drain()
                await asyncio.sleep(0.005)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with HttpTarget(resolve(address), 0.1, model="fake") as target:
            with pytest.raises(LeakcheckError, match=r"took over 0\.1 s"):
                await target.send("hello", NOBODY)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, "is not an Octavo server"),
        (grpc.StatusCode.UNAUTHENTICATED, "--victim-key and --attacker-key"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "--timeout"),
        (grpc.StatusCode.INTERNAL, r"words \(INTERNAL\)"),
    ],
)
async def test_a_refusal_names_the_way_out(status: grpc.StatusCode, message: str) -> None:
    async def refuse(request: bytes, context: Any) -> None:
        await context.abort(status, "words")

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.aio.server(handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with GrpcTarget(resolve(f"127.0.0.1:{port}"), FOREVER) as target:
            with pytest.raises(LeakcheckError, match=message):
                await target.describe(NOBODY, 32)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\n\r\n", "--victim-key and --attacker-key"),
        (b"HTTP/1.1 500 Oops\r\n\r\nout of cheese", r"answers 500 \(out of cheese\)"),
        (b"SSH-2.0-OpenSSH\r\n", "can't be reached or broke off"),
        (b"", "can't be reached or broke off"),
        (_ok("data: {nonsense\n\n"), "does not answer as an OpenAI-compatible server"),
        (_ok("data: " + "[" * 60_000 + "\n\n"), "does not answer as an OpenAI-compatible server"),
        (_ok(_event(error={"message": "overloaded"})), "overloaded"),
        (b"HTTP/1.1 400 Bad\r\n\r\n\x1b[2J\x07bad\nrequest", r"\(\[2J bad request\)"),
        (_ok("data: [DONE]\n\n"), "without a token"),
        (_ok(_event(choices="none")), "without a token"),
        (_ok(": " + "x" * 2**20 + "\n") + b"y" * 4 * 2**20, "no answer of one token needs"),
    ],
)
async def test_an_answer_that_is_none_is_an_error(answer: bytes, message: str) -> None:
    with pytest.raises(LeakcheckError, match=message):
        await _ask(answer)


@pytest.mark.parametrize(
    ("usage", "cached"),
    [
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}, 8),
        ({"prompt_tokens": 9, "prompt_tokens_details": None}, None),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": "many"}}, None),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": True}}, None),
        ({"prompt_tokens": 9}, None),
    ],
)
async def test_the_count_is_read_from_the_usage(usage: Any, cached: int | None) -> None:
    reply = await _ask(_ok(TOKEN + _event(choices=[], usage=usage) + "data: [DONE]\n\n"))
    assert (reply.cached_tokens, reply.prompt_tokens) == (cached, 9)


async def test_the_first_token_ends_the_time_and_not_the_last() -> None:
    ticks = iter([10.0, 11.0, 99.0])
    answer = _ok(_event(choices=[{"delta": {"role": "assistant", "content": ""}}]) + TOKEN * 2)
    async with (
        _raw_server(answer) as address,
        HttpTarget(resolve(address), FOREVER, model="fake", clock=lambda: next(ticks)) as target,
    ):
        assert (await target.send("hello", NOBODY)).seconds == 1.0


async def test_a_message_without_a_token_does_not_end_the_time() -> None:
    delay = 0.03  # real seconds between that message and the token, at the least
    async with (
        grpc_server(Simulation(delay=delay)) as address,
        GrpcTarget(resolve(address), FOREVER) as target,
    ):
        assert (await target.send((1, 2, 3), NOBODY)).seconds >= delay


async def test_a_redirect_is_not_followed() -> None:
    seen: list[bytes] = []
    async with _raw_server(_ok(TOKEN), seen=seen) as elsewhere:
        answer = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {elsewhere}\r\n\r\n".encode()
        with pytest.raises(LeakcheckError, match="answers 307"):
            await _ask(answer)
    assert seen == []


async def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    async with _raw_server(b"", seen=seen) as proxy, http_server(Simulation()) as address:
        for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.removesuffix("/v1"))
        async with HttpTarget(resolve(address), FOREVER) as target:
            await target.describe(NOBODY, 32)
        async with grpc_server(Simulation()) as ours, GrpcTarget(resolve(ours), FOREVER) as target:
            await target.describe(NOBODY, 32)
    assert seen == []


async def test_tenants_are_told_apart_by_key_and_salt() -> None:
    seen: list[bytes] = []
    async with (
        _raw_server(_ok(TOKEN), seen=seen) as address,
        HttpTarget(resolve(address), FOREVER, model="fake") as target,
    ):
        await target.send("hello", Tenant(key="secret"))
        await target.send("hello", NOBODY)
    assert [b"Authorization: Bearer secret\r\n" in head for head in seen] == [True, False]
    simulation = Simulation()
    async with http_server(simulation) as address, HttpTarget(resolve(address), FOREVER) as target:
        await target.describe(NOBODY, 32)
        await target.send("hello", Tenant(salt="mine"))
        await target.send("hello", NOBODY)
    assert [tenant for _, tenant in simulation.prompts] == ["/mine", "/"]


def test_a_key_is_never_shown() -> None:
    assert "secret" not in repr(Tenant(key="secret"))


def test_metrics_are_read_as_prometheus_writes_them() -> None:
    text = (
        "# HELP hits Blocks that were found.\n# TYPE hits counter\n"
        'hits_total{model="a b",engine="0"} 12 1395066363000\n'
        "free 3.5e2\nbroken\nalso broken 1 2 3\nnone NaN\nmost +Inf\n bad{ 1\n"
    )
    assert parse_metrics(text) == {'hits_total{model="a b",engine="0"}': 12.0, "free": 350.0}


def test_metrics_are_limited_in_number_and_in_the_length_of_names() -> None:
    text = "x" * 1000 + " 1\n" + "".join(f"n{i} {i}\n" for i in range(3 * http_target.MAX_METRICS))
    samples = parse_metrics(text)
    assert len(samples) == http_target.MAX_METRICS
    assert max(map(len, samples)) < 10
