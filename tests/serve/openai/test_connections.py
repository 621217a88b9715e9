"""Clients that leave, that are slow, or that send too much.

Those that send nothing are in `tests/serve/test_http_connections.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from engine.serve.openai import exchange, memory
from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.serve.fake_engine import FakeEngine, until
from tests.serve.openai.calls import complete, error_of, post

PATH = "/v1/completions"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connection(server: Server, limit: int = 2**16) -> AsyncIterator[Connection]:
    """A plain connection, on which tests say every byte."""
    assert server.page is not None
    port = int(server.page.rsplit(":", 1)[1].strip("/"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the connection is closed or reset."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(2**20):
            data += part
    return data


async def reply_on(reader: asyncio.StreamReader) -> bytes:
    """One whole answer, with its head."""
    start = await reader.readuntil(b"\r\n\r\n")
    return start + await body_after(start, reader)


async def body_after(start: bytes, reader: asyncio.StreamReader) -> bytes:
    length = start.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
    return await reader.readexactly(int(length))


def head(length: int | None, *lines: str) -> bytes:
    body = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    kind = "content-type: application/json"
    all_lines = (f"POST {PATH} HTTP/1.1", "host: 127.0.0.1", kind, body, *lines, "", "")
    return "\r\n".join(all_lines).encode()


def message(**body: Any) -> bytes:
    data = json.dumps(body).encode()
    return head(len(data)) + data


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_gives_everything_back(
    stream: bool, server: Server, fake: FakeEngine
) -> None:
    async with connection(server) as (_, writer):
        writer.write(message(prompt=["forever"] * 3, max_tokens=9999, stream=stream))
        await until(lambda: len(fake.running) == 3)
    await until(lambda: not fake.running)
    assert fake.finished == {"closed": 3}
    await until(lambda: server._calls.num_in_progress == 0)


async def test_clients_that_leave_in_every_phase_leave_nothing(
    server: Server, fake: FakeEngine, wire: httpx2.AsyncClient
) -> None:
    """Before the head is complete, within it, within the body, before the answer, and within it."""
    assert await complete(wire, prompt="a", max_tokens=1)
    assert server._http is not None
    assert server._http._server is not None
    state = server._http._server.server_state
    before = len(asyncio.all_tasks())
    whole = message(prompt="forever", max_tokens=9999, stream=True)
    waits = (0.0, 0.002, 0.02)

    async def leave(number: int) -> None:
        async with connection(server) as (_, writer):
            writer.write(whole[: len(whole) * (number % 8 + 1) // 8])
            await asyncio.sleep(waits[number % 3])
            if number % 2:
                writer.transport.abort()

    for start in range(0, 240, 24):
        await asyncio.gather(*map(leave, range(start, start + 24)))
    await until(lambda: not fake.running)
    await until(lambda: server._calls.num_in_progress == 0)
    await until(lambda: len(state.connections) <= 1)
    await until(lambda: len(asyncio.all_tasks()) <= before)
    assert await complete(wire, prompt="ab", max_tokens=2)


async def test_a_client_that_leaves_within_its_body_is_forgotten(
    server: Server, fake: FakeEngine, wire: httpx2.AsyncClient
) -> None:
    async with connection(server) as (_, writer):
        writer.write(message(prompt="forever")[:-5])
        await writer.drain()
    assert await complete(wire, prompt="a")
    assert len(fake.calls) == 1


async def test_a_slow_reader_holds_up_its_own_stream_and_no_other(
    server: Server, fake: FakeEngine, wire: httpx2.AsyncClient
) -> None:
    fake.padding = "x" * 100_000
    async with connection(server, limit=2**20) as (reader, writer):
        writer.write(message(prompt="forever", max_tokens=200, stream=True))
        await reader.readuntil(b"\r\n\r\n")
        seen = -1
        while seen != fake.yielded:  # until the buffers between are full
            seen = fake.yielded
            await asyncio.sleep(0.1)
        assert seen < 150
        assert await complete(wire, prompt="ab", max_tokens=2)
        data = b""
        while not data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            data = data[-100:] + await reader.read(2**20)
    assert fake.finished["length"] == 2


async def test_a_reader_that_takes_nothing_is_let_go(
    server: Server, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server._calls, "_reader_timeout", 0.2)
    fake.padding = "x" * 100_000
    async with connection(server) as (reader, writer):
        writer.write(message(prompt="forever", max_tokens=9999, stream=True))
        await until(lambda: fake.running)
        await until(lambda: not fake.running)
        assert fake.finished == {"closed": 1}
        assert not (await rest(reader)).endswith(b"0\r\n\r\n")


async def test_a_whole_answer_is_in_progress_until_it_is_taken(
    server: Server, fake: FakeEngine
) -> None:
    fake.padding = "x" * 1_000_000
    async with connection(server) as (reader, writer):
        writer.write(message(prompt="forever", max_tokens=30))
        start = await reader.readuntil(b"\r\n\r\n")
        assert not fake.running
        assert server._calls.num_in_progress == 1
        assert b"x" * 1000 in await body_after(start, reader)
        await until(lambda: server._calls.num_in_progress == 0)
        fake.padding = ""
        writer.write(message(prompt="a", max_tokens=1))
        assert b'"text":"a"' in await reply_on(reader)


@pytest.mark.parametrize("bytes_at_once", [0, 100])
async def test_a_reader_that_takes_too_little_of_a_whole_answer_is_let_go(
    bytes_at_once: int, server: Server, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server._calls, "_reader_timeout", 0.2)
    fake.padding = "x" * 1_000_000
    async with connection(server) as (reader, writer):
        writer.write(message(prompt="forever", max_tokens=30))
        await reader.readuntil(b"\r\n\r\n")
        while server._calls.num_in_progress:
            await reader.read(bytes_at_once)
            await asyncio.sleep(0.01)
        assert len(await rest(reader)) < 20_000_000
    assert fake.finished == {"length": 1}


async def test_answers_that_are_not_read_keep_only_so_many_log_probabilities(
    server: Server, fake: FakeEngine, wire: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MAX_TENANT_ENTRIES", 100)
    fake.padding = "x" * 1_000_000
    scored: dict[str, Any] = {"prompt": "forever", "max_tokens": 30, "logprobs": 1}
    async with connection(server) as (reader, writer):
        writer.write(message(**scored))
        start = await reader.readuntil(b"\r\n\r\n")
        fake.padding = ""
        error = await error_of(wire, status=429, **scored)
        assert "102 log-probabilities would wait to be read" in error["message"]
        assert await complete(wire, prompt="a")
        assert not fake.running
        await body_after(start, reader)
        await until(lambda: server._calls.num_in_progress == 0)
        assert await complete(wire, **scored)


async def test_what_a_tokenizer_says_is_in_progress_until_it_is_taken(server: Server) -> None:
    data = json.dumps({"prompt": "a" * 4_000_000}).encode()
    async with connection(server) as (reader, writer):
        writer.write(head(len(data)).replace(PATH.encode(), b"/tokenize") + data)
        start = await reader.readuntil(b"\r\n\r\n")
        assert server._calls.num_in_progress == 1
        assert json.loads(await body_after(start, reader))["count"] == 4_000_001
        await until(lambda: server._calls.num_in_progress == 0)


async def test_a_body_that_trickles_in_is_not_waited_for(
    server: Server, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.2)
    async with connection(server) as (reader, writer):
        writer.write(head(1000))

        async def trickle() -> None:
            while True:
                writer.write(b" ")
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        reply = await reply_on(reader)
        trickling.cancel()
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in reply
    assert not fake.calls


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(
    wire: httpx2.AsyncClient, server: Server, fake: FakeEngine
) -> None:
    limit = server._config.max_message
    async with connection(server) as (reader, writer):
        writer.write(head(limit + 1))
        reply = await reply_on(reader)
        assert reply.startswith(b"HTTP/1.1 413 ")
        assert b"server.max_message" in reply
    reply = await wire.post(
        PATH, content=b" " * (limit + 1), headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert not fake.calls


async def test_a_body_in_chunks_is_counted_too(server: Server, fake: FakeEngine) -> None:
    limit = server._config.max_message
    async with connection(server) as (reader, writer):
        writer.write(head(None))
        for _ in range(limit // 2**16 + 2):
            writer.write(b"10000\r\n" + b" " * 2**16 + b"\r\n")
            await writer.drain()
        assert (await reply_on(reader)).startswith(b"HTTP/1.1 413 ")
    assert not fake.calls


async def test_calls_over_http_count_with_those_over_grpc(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0, max_concurrent=2, grace=0.05, http="127.0.0.1:0"))
    await server.start()
    await server.set_engine(fake)
    assert server.page is not None
    async with httpx2.AsyncClient(base_url=server.page) as wire:
        task = asyncio.create_task(post(wire, PATH, prompt="forever", max_tokens=9999))
        await until(lambda: fake.running)
        error = await error_of(wire, status=429, prompt=["a", "b"])
        assert "server.max_concurrent" in error["message"]
        assert await complete(wire, prompt="a")
        await server.stop()  # which ends the other
        assert (await task).status_code == 503
    assert not fake.running


async def test_a_stream_that_a_shutdown_ends_says_so(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0, grace=0.05, http="127.0.0.1:0"))
    await server.start()
    await server.set_engine(fake)
    assert server.page is not None
    async with httpx2.AsyncClient(base_url=server.page) as wire:
        body = {"prompt": "forever", "max_tokens": 9999, "stream": True}
        async with wire.stream("POST", PATH, json=body) as reply:
            await until(lambda: fake.running)
            await server.stop()
            data = await reply.aread()
    *_, last = data.strip().split(b"\n\n")
    assert "shut down" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
