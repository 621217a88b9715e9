"""Streams: what arrives, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import subprocess
import sys
import threading

import grpc
import pytest

from engine import frontend
from engine.client import AsyncClient, Delta, ServiceError, _delta
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.sampling import SamplingParams
from engine.serve import convert
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.types import FinishReason, Held, TokenLogprobs, Waited
from tests.conftest import ROOT
from tests.serve.fake_engine import FakeEngine, collect, until


async def test_an_answer_streams_and_its_last_part_says_why_it_ended(client: AsyncClient) -> None:
    deltas = [delta async for delta in client.generate("hello")]
    assert "".join(delta.text for delta in deltas) == "hello"
    assert [token for delta in deltas for token in delta.token_ids] == list(b"hello")
    assert len(deltas) == 5
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * 4
    last = deltas[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert (last.prompt_tokens, last.cached_tokens, last.completion_tokens) == (5, 2, 5)


def test_the_last_message_says_how_long_the_answer_waited_and_for_what() -> None:
    """And not for how many steps: that would count what other clients ask for."""
    held = {"blocks": Held(17, 0.1), "slots": Held(1234, 0.02)}
    delta = frontend.Delta(
        index=0,
        text="text",
        token_ids=(1,),
        logprobs=(),
        prompt_logprobs=(),
        finish_reason=None,
        stop_reason=None,
        usage=frontend.Usage(1, 0, 1),
        waited=Waited(0.1234567, held),
    )
    [part] = convert.responses_from_delta("name", delta)
    assert (_delta(part).waited_seconds, _delta(part).waited_for) == (None, ())
    delta = dataclasses.replace(delta, finish_reason=FinishReason.LENGTH)
    [part] = convert.responses_from_delta("name", delta)
    assert (_delta(part).waited_seconds, _delta(part).waited_for) == (0.123, ("blocks", "slots"))
    assert "17" not in str(part)
    assert "1234" not in str(part)
    [part] = convert.responses_from_delta("name", dataclasses.replace(delta, waited=None))
    assert _delta(part).waited_seconds is None


async def test_token_ids_and_messages_are_prompts_too(client: AsyncClient) -> None:
    assert "".join([d.text async for d in client.generate(list(b"ids"))]) == "ids"
    chat = [{"role": "user", "content": "hi"}]
    assert "".join([d.text async for d in client.generate(chat)]) == "user:hi\n"


async def test_log_probabilities_arrive_with_their_tokens(client: AsyncClient) -> None:
    deltas = [d async for d in client.generate("abc", logprobs=2, prompt_logprobs=2)]
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert entries == [TokenLogprobs(t, -0.5, ((t, -0.5), (t + 1, -1.5))) for t in b"abc"]
    assert [entry.token_id for entry in deltas[0].prompt_logprobs] == list(b"bc")
    assert all(not delta.prompt_logprobs for delta in deltas[1:])


@pytest.mark.parametrize("stop", ["a text", 7])
async def test_what_ended_an_answer_is_told(
    stop: str | int, client: AsyncClient, fake: FakeEngine
) -> None:
    fake.ending = FinishReason.STOP
    fake.stop_reason = stop
    deltas = [delta async for delta in client.generate("hello")]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == stop


async def test_streams_run_side_by_side_and_keep_their_names(
    client: AsyncClient, fake: FakeEngine
) -> None:
    async def answer(name: str) -> set[str]:
        deltas = [delta async for delta in client.generate("hello", request_id=name)]
        assert "".join(delta.text for delta in deltas) == "hello"
        return {delta.request_id for delta in deltas}

    names = [f"request-{number}" for number in range(20)]
    assert await asyncio.gather(*map(answer, names)) == [{name} for name in names]
    assert not fake.running


async def test_a_request_without_a_name_gets_one(client: AsyncClient, fake: FakeEngine) -> None:
    names = {d.request_id for _ in range(2) async for d in client.generate("hello")}
    assert names == {call.request_id for call in fake.calls}
    assert len(names) == 2


def test_large_log_probabilities_are_spread_over_messages_that_clients_accept() -> None:
    """20 entries a position over a long prompt would exceed gRPC's 4 MiB in one message."""
    positions = 20_000
    top = tuple((200_000 + i, -1.25 * i) for i in range(20))
    entries = tuple(TokenLogprobs(100_000 + i, -0.5, top) for i in range(positions))
    delta = frontend.Delta(
        index=0,
        text="text",
        token_ids=tuple(range(positions)),
        logprobs=entries,
        prompt_logprobs=entries,
        finish_reason=FinishReason.STOP,
        stop_reason=None,
        usage=frontend.Usage(positions + 1, 0, positions),
    )
    parts = list(convert.responses_from_delta("name", delta))
    assert max(part.ByteSize() for part in parts) < 2**20
    assert sum(part.ByteSize() for part in parts) > 4 * 2**20
    assert "".join(part.text for part in parts) == "text"
    assert [t for part in parts for t in part.token_ids] == list(range(positions))
    assert all(len(part.token_ids) == len(part.logprobs) for part in parts)
    for name in ("logprobs", "prompt_logprobs"):
        joined = [convert.logprobs_from_proto(e) for part in parts for e in getattr(part, name)]
        assert tuple(joined) == entries
    reasons = [convert.finish_reason_from_proto(part) for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [FinishReason.STOP]
    positions_of_prompt = [i for i, part in enumerate(parts) if part.prompt_logprobs]
    assert positions_of_prompt == list(range(len(positions_of_prompt)))


async def test_leaving_a_stream_early_closes_the_engines_stream(
    client: AsyncClient, fake: FakeEngine
) -> None:
    async with contextlib.aclosing(client.generate("forever")) as stream:
        async for delta in stream:
            if delta.completion_tokens >= 3:
                break
    await until(lambda: not fake.running)
    assert fake.finished == {"closed": 1}


async def test_cancelling_the_consumer_closes_the_engines_stream(
    client: AsyncClient, fake: FakeEngine
) -> None:
    task = asyncio.create_task(collect(client.generate("forever")))
    await until(lambda: fake.running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not fake.running)
    assert fake.finished == {"closed": 1}


async def test_a_client_that_stops_reading_and_then_goes_releases_its_stream(
    server: Server, fake: FakeEngine
) -> None:
    """The server waits in a write then, not in the engine."""
    fake.padding = "x" * 2**16
    async with grpc.aio.insecure_channel(server.address) as channel:
        request = pb.GenerateRequest(text="forever")
        call = channel.unary_stream("/octavo.v1.Generation/Generate")(request.SerializeToString())
        await call.read()
        count = -1
        while count != (count := fake.yielded):  # until the window is full
            await asyncio.sleep(0.1)
        assert fake.running
        call.cancel()
        await until(lambda: not fake.running)
    assert fake.finished == {"closed": 1}


async def test_the_deadline_of_a_call_ends_it_and_closes_the_engines_stream(
    client: AsyncClient, server: Server, fake: FakeEngine
) -> None:
    seconds = 0.1
    while not fake.calls:  # on a busy machine, until there is time for it to begin
        with pytest.raises(ServiceError) as raised:
            await collect(client.generate("forever", timeout=seconds))
        assert "allow more of it or ask for fewer tokens" in raised.value.details
        assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not server._calls.num_in_progress)
        seconds *= 2
    await until(lambda: not fake.running)
    assert set(fake.finished) == {"closed"}


async def test_the_engine_is_told_how_much_time_a_call_has(
    client: AsyncClient, fake: FakeEngine
) -> None:
    _ = [delta async for delta in client.generate("hello", timeout=1000.0)]
    _ = [delta async for delta in client.generate("hello")]
    with_deadline, without = (call.timeout for call in fake.calls)
    # Wide, for gRPC measures by a clock that may be set in between.
    assert with_deadline == pytest.approx(1000, rel=0.5)
    assert without is None


async def test_an_answer_that_the_engine_ends_at_the_deadline_is_not_ok(
    client: AsyncClient, fake: FakeEngine
) -> None:
    """The engine's clock may be a little ahead of gRPC's; the status must not depend on it."""
    fake.ending = FinishReason.DEADLINE
    deltas: list[Delta] = []
    with pytest.raises(ServiceError, match="allow more time or ask for fewer tokens") as raised:
        await collect(client.generate("hello"), deltas)
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert deltas[-1].finish_reason is FinishReason.DEADLINE


async def test_abort_ends_the_stream_and_may_be_repeated(
    client: AsyncClient, fake: FakeEngine
) -> None:
    last = None
    async for delta in client.generate("forever", request_id="mine"):
        if delta.completion_tokens == 1:
            assert await client.abort("mine")
        last = delta
    assert last is not None
    assert last.finish_reason is FinishReason.ABORT
    assert not await client.abort("mine")
    assert not await client.abort("mine")
    assert not await client.abort("never was")
    assert not fake.running


VANISHING_CLIENT = """
import asyncio, sys
from engine.client import AsyncClient

async def main():
    async with AsyncClient(sys.argv[1]) as client:
        async for delta in client.generate("forever"):
            pass

asyncio.run(main())
"""


async def test_a_client_killed_in_mid_stream_releases_its_stream_and_others_go_on(
    client: AsyncClient, server: Server, fake: FakeEngine
) -> None:
    command = [sys.executable, "-c", VANISHING_CLIENT, server.address]
    with subprocess.Popen(command, cwd=ROOT) as victim:
        try:
            await until(lambda: fake.running)
        finally:
            victim.kill()
    await until(lambda: not fake.running)
    assert fake.finished == {"closed": 1}
    assert "".join([delta.text async for delta in client.generate("hello")]) == "hello"


async def test_one_stream_too_many_is_refused_with_a_hint_when_to_retry(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0, max_concurrent=1, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    async with AsyncClient(server.address) as client:
        first = client.generate("forever")
        await anext(first)
        with pytest.raises(ServiceError, match="1 calls are in progress") as raised:
            await anext(client.generate("hello"))
        with pytest.raises(ServiceError, match="calls are in progress"):
            await client.tokenize("hello")
        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.retry_after == 1.0
        assert await client.is_ready()
        await first.aclose()
        await until(lambda: not fake.running)
        assert "".join([delta.text async for delta in client.generate("hello")]) == "hello"
    await server.stop()


async def test_a_call_above_the_limit_is_refused_before_it_is_read(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0, max_concurrent=1, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    async with AsyncClient(server.address) as client:
        first = client.generate("forever")
        await anext(first)
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = channel.unary_stream("/octavo.v1.Generation/Generate")(b"")  # no prompt
            with pytest.raises(grpc.aio.AioRpcError, match="1 calls are in progress"):
                await call.read()
        await first.aclose()
    await server.stop()


class SlowTokenizer:
    """Works until it is released, and counts what began."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.num_begun = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.num_begun += 1
        self.release.wait()
        return [1]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.encode("")
        return "text"


async def test_calls_that_were_cancelled_count_until_their_threads_are_done(
    fake: FakeEngine,
) -> None:
    fake.tokenizer = slow = SlowTokenizer()
    server = Server(ServerConfig(port=0, max_concurrent=2, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    try:
        async with AsyncClient(server.address) as client:
            for number in range(6):
                call = client.detokenize([1]) if number % 2 else client.tokenize("x")
                task = asyncio.create_task(call)
                await until(lambda task=task, most=number: task.done() or slow.num_begun > most)
                assert task.done() == (number >= 2)
                if task.done():
                    with pytest.raises(ServiceError, match="2 calls are in progress"):
                        await task
                else:
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                    await asyncio.sleep(0.1)  # for the server to hear of it
            assert slow.num_begun == 2
            slow.release.set()
            await until(lambda: server._calls.num_in_progress == 0)
            assert await client.tokenize("x") == (1,)
            assert await client.detokenize([1]) == "text"
    finally:
        slow.release.set()
        await server.stop()


def test_a_delta_of_the_client_has_what_a_response_has() -> None:
    fields = {field.name for field in pb.GenerateResponse.DESCRIPTOR.fields}
    fields -= {"stop_text", "stop_token_id", "usage"}
    fields |= {"stop_reason", *(field.name for field in pb.Usage.DESCRIPTOR.fields)}
    assert set(Delta.__slots__) == fields


def test_every_finish_reason_has_a_number_of_its_own() -> None:
    numbers = {pb.FinishReason.Value(f"FINISH_REASON_{r.name}"): r for r in FinishReason}
    for number, reason in numbers.items():
        response = pb.GenerateResponse(finish_reason=number)  # type: ignore[bad-argument-type]
        assert convert.finish_reason_from_proto(response) is reason
    assert len(numbers) == len(FinishReason) == len(pb.FinishReason.values()) - 1


def test_sampling_and_its_fields_together_are_a_mistake() -> None:
    client = AsyncClient()
    stream = client.generate("hello", SamplingParams(), max_tokens=3)
    with pytest.raises(TypeError, match="but not both"):
        asyncio.run(anext(stream))  # type: ignore[bad-argument-type]
