"""What a server takes no more of, and what its clients are told: docs/limits.md has the list."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from engine import sampling
from engine.client import AsyncClient, ServiceError
from engine.config import SchedulerConfig
from engine.frontend import ReaderTooSlow
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.sampling import SamplingParams
from engine.serve import authentication, errors, health
from engine.serve import server as grpc_server
from engine.serve.server import Server
from engine.serve.vllm import convert, kv_events, service
from engine.server_config import ServerConfig, check_server
from engine.streams import Stream
from engine.text import Tokenizer
from engine.types import Request, StepOutput, TokenLogprobs
from tests.conftest import ROOT
from tests.runtime import tiny
from tests.serve.fake_engine import FakeEngine, collect
from tests.survival import h2

LIMITS = ROOT / "docs" / "limits.md"
_EOF: Any = vars(grpc.aio)["EOF"]  # which its type stubs lack


@pytest.fixture
async def small(fake: FakeEngine) -> AsyncIterator[Server]:
    """A server with small limits."""
    config = ServerConfig(
        port=0,
        grace=0.05,
        max_connections=3,
        max_connection_streams=2,
        max_metadata=4096,
    )
    server = Server(config)
    await server.start()
    await server.set_engine(fake)
    yield server
    await server.stop()


async def test_metadata_beyond_the_limit_is_refused(small: Server) -> None:
    async with grpc.aio.insecure_channel(small.address) as channel:
        call = channel.unary_unary("/octavo.v1.Generation/GetModelInfo")
        await call(b"", metadata=(("x", "a" * 2000),))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"", metadata=(("x", "a" * 6000),))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await call(b"")


async def test_connections_beyond_the_limit_are_closed(small: Server) -> None:
    host, port = small.address.rsplit(":", 1)
    taken = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
    for reader, _ in taken:
        assert await reader.read(1)  # the server's settings
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await reader.read() == b""
    for _, other in (*taken, (reader, writer)):
        other.close()


async def test_calls_of_one_connection_beyond_the_limit_wait_in_the_client(
    small: Server, fake: FakeEngine
) -> None:
    def told() -> dict[int, int]:
        with h2.Connection(small.address) as connection:
            payload = next(
                each.payload for each in connection.frames(30) if each.kind == h2.SETTINGS
            )
        return dict(struct.iter_unpack(">HI", payload))

    assert (await asyncio.to_thread(told))[h2.MAX_CONCURRENT_STREAMS] == 2
    async with AsyncClient(small.address) as client:
        streams = [client.generate("forever") for _ in range(3)]
        await anext(streams[0])
        await anext(streams[1])
        third = asyncio.ensure_future(anext(streams[2]))
        await streams[0].aclose()
        await third
        for stream in streams:
            await stream.aclose()


async def test_a_client_that_takes_nothing_is_ended_and_its_request_closed(
    small: Server, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small._calls, "_reader_timeout", 0.2)
    fake.padding = "x" * 50_000  # more than the connection's buffers hold
    async with grpc.aio.insecure_channel(small.address) as channel:
        call = channel.unary_stream("/octavo.v1.Generation/Generate")(
            pb.GenerateRequest(text="forever").SerializeToString()
        )
        await call.read()
        while not fake.finished["closed"]:
            await asyncio.sleep(0.02)
        assert not fake.running
        with pytest.raises(grpc.aio.AioRpcError, match="taken nothing") as ended:
            await read_on(call)
        assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def read_on(call: Any) -> None:
    while (await call.read()) is not _EOF:
        pass


@pytest.fixture
async def stream(tmp_path: Path) -> Stream:
    """One that keeps ten tokens."""
    stream = Stream("mine", 1, 10)
    request = Request("mine#1", (1, 2), SamplingParams(n=1), max_tokens=100)
    stream.start(request, Tokenizer.from_folder(tiny.write_model(tmp_path)))
    return stream


async def test_what_is_unread_is_bounded_and_what_is_read_is_not(stream: Stream) -> None:
    for _ in range(5):
        for _ in range(10):
            assert stream.put(0, StepOutput("mine#1", (5,), None, 2, 0))
        assert sum(len(delta.token_ids) for delta in stream.take()) == 10
    for _ in range(10):
        assert stream.put(0, StepOutput("mine#1", (5,), None, 2, 0))
    assert not stream.put(0, StepOutput("mine#1", (5,), None, 2, 0))
    assert stream.put(0, StepOutput("mine#1", (5,), None, 2, 0))  # it is told once
    with pytest.raises(ReaderTooSlow, match=r"11 tokens .* no more than 10 .*max_unread_tokens"):
        stream.take()


async def test_likeliest_tokens_count_as_unread_too(stream: Stream) -> None:
    logprobs = TokenLogprobs(5, -1.0, tuple((token, -1.0) for token in range(6)))
    assert stream.put(0, StepOutput("mine#1", (5,), None, 2, 0, (logprobs,)))
    assert not stream.put(0, StepOutput("mine#1", (5,), None, 2, 0, (logprobs,)))


async def test_a_reader_that_fell_too_far_behind_is_told(
    client: AsyncClient, fake: FakeEngine
) -> None:
    fake.error = ReaderTooSlow("70000 tokens of the answer were not read")
    with pytest.raises(ServiceError, match="70000 tokens") as refused:
        await collect(client.generate("hello"))
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.retry_after is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_metadata", 0, r"server\.max_metadata is 0; it must be at least 1"),
        ("max_failed_steps", 0, r"server\.max_failed_steps is 0"),
        ("reader_timeout", 0.0, r"server\.reader_timeout is 0\.0; .* above 0"),
        ("step_timeout", float("inf"), r"server\.step_timeout is inf"),
        ("recovery_timeout", float("nan"), r"server\.recovery_timeout is nan"),
        ("grace", -1.0, r"server\.grace is -1\.0; .* from 0 on"),
    ],
)
def test_limits_that_make_no_sense_are_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_server(ServerConfig(**{name: value}))  # type: ignore[bad-argument-type]
    check_server(ServerConfig(grace=0.0))


def test_the_page_of_limits_has_every_one_with_its_default() -> None:
    """Rows of the table start with a name in the config, and then its default."""
    rows = _rows(LIMITS)
    server, scheduler = ServerConfig(), SchedulerConfig()
    for section, config in (("server", server), ("scheduler", scheduler)):
        for name in config.__slots__:
            if name.startswith("max_") or "timeout" in name or name == "grace":
                shown = rows[f"{section}.{name}"].split()[0].replace(",", "")
                assert float(shown) == getattr(config, name), f"{section}.{name}"


def test_the_page_of_limits_has_what_is_fixed_too() -> None:
    lines = [line.split("|")[1:3] for line in LIMITS.read_text().splitlines() if line[:1] == "|"]
    said = {what.strip().replace("`", ""): limit for what, limit in lines}
    for what, numbers in {
        "gRPC calls of all kinds at once": [grpc_server.OTHER_CALLS],
        "the message of a gRPC call": [errors.MESSAGE_SECONDS],
        "calls of gRPC's health service at once": [
            authentication.MAX_OPEN_CALLS,
            health.MAX_WATCHERS,
        ],
        "subscribers to KV events at once": [kv_events.MAX_SUBSCRIBERS],
        "VllmEngine's request_ids of one Abort": [service.MAX_ABORTS],
        "VllmEngine's timeout_s of FlushCache": [service.MAX_FLUSH_SECONDS],
        "VllmEngine's log-probabilities without stream": [convert.MAX_LOGPROBS_PER_MESSAGE],
        "sampling.n": [sampling.MAX_SAMPLES],
        "sampling.stop": [sampling.MAX_STOP_STRINGS],
        "sampling.stop_token_ids": [sampling.MAX_STOP_TOKENS],
        "sampling.bad_words": [sampling.MAX_BAD_WORDS],
        "sampling.logit_bias": [sampling.MAX_LOGIT_BIAS],
    }.items():
        for number in numbers:
            assert re.search(rf"\b{number:,.0f}\b", said[what]), what


def _rows(page: Path) -> dict[str, str]:
    lines = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    return {cells[1].strip().strip("`"): cells[2].strip() for cells in lines}
