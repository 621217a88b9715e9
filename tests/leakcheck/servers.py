"""A simulation as a server of ours, and as an OpenAI-compatible one, on a free loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from engine.rpc.octavo.v1 import generation_pb2 as pb
from tests.leakcheck.simulation import Simulation


class _Servicer:
    """The tenant is the bearer token, narrowed by the salt. Only what leakcheck calls is there."""

    def __init__(self, simulation: Simulation):
        self._simulation = simulation

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        assert request.sampling.max_tokens == 1
        prompt = " ".join(map(str, request.token_ids.ids))
        tenant = f"{_key(context)}/{request.cache_salt}"
        yield pb.GenerateResponse()  # a message without a token is not the first token
        async with self._simulation.served(prompt, tenant) as cached:
            usage = pb.Usage(prompt_tokens=len(request.token_ids.ids), cached_tokens=cached)
            yield pb.GenerateResponse(token_ids=[7], usage=usage)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        architecture = pb.Architecture(vocab_size=1000)
        return pb.GetModelInfoResponse(
            name="fake", max_model_len=256, server_version="0", architecture=architecture
        )

    async def GetUsage(self, request: Any, context: Any) -> Any:
        if not self._simulation.shows:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "an older server")
        counts = self._simulation.metrics(f"{_key(context)}/{request.cache_salt}")
        return pb.GetUsageResponse(
            prompt_tokens=counts.get("prompt_tokens", 0),
            cached_prompt_tokens=counts.get("cached_prompt_tokens", 0),
        )

    async def GetStats(self, request: Any, context: Any) -> Any:
        if not self._simulation.shows_all:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "for operators")
        response = pb.GetStatsResponse()
        for name, count in self._simulation.totals().items():
            setattr(response, name, count)
        return response


def _key(context: Any) -> str:
    return dict(context.invocation_metadata()).get("authorization", "")


@contextlib.asynccontextmanager
async def grpc_server(simulation: Simulation) -> AsyncIterator[str]:
    """Its address."""
    server = grpc.aio.server()
    methods = {
        "Generate": grpc.unary_stream_rpc_method_handler,
        "GetModelInfo": grpc.unary_unary_rpc_method_handler,
        "GetUsage": grpc.unary_unary_rpc_method_handler,
        "GetStats": grpc.unary_unary_rpc_method_handler,
    }
    servicer = _Servicer(simulation)
    handlers = {
        name: kind(
            getattr(servicer, name),
            request_deserializer=getattr(pb, f"{name}Request").FromString,
            response_serializer=getattr(pb, f"{name}Response").SerializeToString,
        )
        for name, kind in methods.items()
    }
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("octavo.v1.Generation", handlers)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def http_server(simulation: Simulation) -> AsyncIterator[str]:
    """Its address: of the API's root."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        request, *lines = head.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        key = headers.get("authorization", "")
        match request.split()[:2]:
            case ["GET", "/v1/models"]:
                _answer(writer, json.dumps({"data": [{"id": "fake"}]}))
            case ["GET", "/metrics"] if simulation.shows:
                counts = simulation.metrics(f"{key}/").items()
                samples = "".join(f'fake:{name}{{engine="0"}} {n}.0\n' for name, n in counts)
                _answer(writer, f"# HELP fake\n{samples}fake:none NaN\n")
            case ["POST", "/v1/chat/completions"]:
                await _complete(json.loads(body), key, writer)
            case _:
                _answer(writer, "no such page", "404 Not Found")
        await writer.drain()
        writer.close()

    async def _complete(asked: dict[str, Any], key: str, writer: asyncio.StreamWriter) -> None:
        assert asked["model"] == "fake"
        assert asked["max_tokens"] == 1
        prompt = asked["messages"][0]["content"]
        tenant = f"{key}/{asked.get('cache_salt', '')}"
        async with simulation.served(prompt, tenant) as cached:
            usage: dict[str, Any] = {"prompt_tokens": len(prompt.split())}
            if simulation.shows and cached:  # as vLLM does, which leaves zeros out
                usage["prompt_tokens_details"] = {"cached_tokens": cached}
            role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
            token = {"choices": [{"delta": {"content": "a"}, "finish_reason": "length"}]}
            events = [role, token, {"choices": [], "usage": usage}]
            parts = [f"data: {json.dumps(event)}\n\n" for event in events]
            _answer(writer, ": a comment\n\n" + "".join(parts) + "data: [DONE]\n\n")
            await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def _answer(writer: asyncio.StreamWriter, text: str, status: str = "200 OK") -> None:
    body = text.encode()
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
