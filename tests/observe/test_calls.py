"""Request ids: from metadata or the message into replies, errors, trailing metadata and HTTP."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc
import pytest

from engine.observe.calls import Call, call_of_headers, current_call, in_call, in_request
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.rpc.octavo.v1 import generation_pb2_grpc
from engine.sampling import InvalidRequest
from engine.serve.server import Server
from tests.observe.http import get
from tests.observe.served import Letters

SHORT = pb.SamplingParams(max_tokens=2)


async def generate(
    server: Server, request: pb.GenerateRequest, *metadata: tuple[str, str]
) -> tuple[list[str], str | bytes | None, grpc.aio.AioRpcError | None]:
    """The names in the responses, the one in the trailing metadata, and the error if it failed."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)
        call = stub.Generate(request, metadata=metadata)
        names, error = [], None
        try:
            async for response in call:
                names.append(response.request_id)
        except grpc.aio.AioRpcError as raised:
            error = raised
        trailing = dict(await call.trailing_metadata())
        return names, trailing.get("x-request-id"), error


async def test_a_request_is_named_by_its_field_or_its_metadata_or_the_server(
    server: Server,
) -> None:
    named = pb.GenerateRequest(text="hello", request_id="mine", sampling=SHORT)
    unnamed = pb.GenerateRequest(text="hello", sampling=SHORT)
    header = ("x-request-id", "from-a-proxy")
    for request, metadata, expected in (
        (named, (), "mine"),
        (named, (header,), "mine"),
        (unnamed, (header,), "from-a-proxy"),
        (unnamed, (), "[0-9a-f]{32}"),
    ):
        names, trailing, error = await generate(server, request, *metadata)
        assert error is None
        (name,) = set(names)
        assert re.fullmatch(expected, name)
        assert trailing == name


async def test_a_proxy_that_tries_again_under_one_name_is_served_twice(
    server: Server, runner: Letters
) -> None:
    runner.gate.clear()
    request = pb.GenerateRequest(text="hello", sampling=SHORT)
    both = [
        asyncio.create_task(generate(server, request, ("x-request-id", "same"))) for _ in range(2)
    ]
    while len(server._calls._streams) < 2:
        await asyncio.sleep(0.001)
    runner.gate.set()
    first, second = sorted([names[0] for names, _, _ in await asyncio.gather(*both)], key=len)
    assert first == "same"
    assert re.fullmatch("same-[0-9a-f]{8}", second)


async def test_errors_say_which_call_they_are_of(server: Server) -> None:
    empty = pb.GenerateRequest(text="")
    for request, name in (
        (empty, "from-a-proxy"),
        (pb.GenerateRequest(text="hello", request_id="mine", sampling=SHORT), "mine"),
    ):
        if name == "mine":
            request.token_ids.ids.append(10**6)
        _, trailing, error = await generate(server, request, ("x-request-id", "from-a-proxy"))
        assert error is not None
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert trailing == name
        assert "grpc-status-details-bin" in dict(error.trailing_metadata() or ())


async def test_a_name_that_could_forge_a_log_line_is_refused(server: Server) -> None:
    request = pb.GenerateRequest(text="hello", sampling=SHORT)
    for name in ("with space", "x" * 129):
        _, _, error = await generate(server, request, ("x-request-id", name))
        assert error is not None
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "x-request-id: " in str(error.details())
    status, _, body = await get(server, "/metrics", {"x-request-id": "with space"})
    assert status == 400
    assert b"x-request-id" in body


async def test_an_http_call_is_answered_under_its_name(server: Server) -> None:
    _, headers, _ = await get(server, "/metrics", {"x-request-id": "from-a-proxy"})
    assert headers["x-request-id"] == "from-a-proxy"
    _, headers, _ = await get(server, "/metrics")
    assert "x-request-id" not in headers


def test_every_request_of_a_call_has_its_own_name_and_the_call_that_of_the_first() -> None:
    call = call_of_headers([("x-request-id", "call"), ("traceparent", b"00-1-2-01"), ("a", "b")])
    assert (call.request_id, call.trace) == ("call", {"traceparent": "00-1-2-01"})
    with in_call(call):
        for name in ("first", "second"):
            with in_request(name, "acme"):
                inner = current_call.get()
                assert inner is not None
                assert (inner.request_id, inner.tenant, inner.trace) == (name, "acme", call.trace)
            assert current_call.get() is call
    assert (call.request_id, call.tenant) == ("first", "acme")
    assert current_call.get() is None


def test_an_endless_trace_context_is_left_out() -> None:
    assert call_of_headers([("tracestate", "x" * 513)]).trace == {}
    with pytest.raises(InvalidRequest):
        call_of_headers([("x-request-id", "")])
    assert Call().trace == {}
