"""Bad input: each a status that says what was given, the limit and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from engine.client import AsyncClient, ServiceError
from engine.frontend import EngineStopped
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.rpc.octavo.v1 import generation_pb2_grpc
from engine.sampling import InvalidRequest
from engine.serve import bounds, convert, errors
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.types import FinishReason, QueueFull
from tests.serve.fake_engine import VOCAB_SIZE, FakeEngine, until

INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def refuse(server: Server, request: pb.GenerateRequest) -> str:
    """Send a request that must be refused as invalid; gives the server's message."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(request).read()
    assert raised.value.code() is INVALID
    return str(raised.value.details())


def sampled(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(**fields))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.GenerateRequest(), "prompt: is missing; give text, token_ids or messages"),
        (pb.GenerateRequest(text=""), "text: is empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids: is empty"),
        (pb.GenerateRequest(messages=pb.ChatMessages()), "messages: is empty"),
        (
            pb.GenerateRequest(messages=pb.ChatMessages(messages=[pb.ChatMessage(content="x")])),
            "messages.messages[0].role: is empty",
        ),
        (pb.GenerateRequest(text="hello", request_id=""), "request_id: '' must be 1 to 128"),
        (pb.GenerateRequest(text="hello", request_id="a\nb"), r"request_id: 'a\nb' must be"),
        (pb.GenerateRequest(text="hello", request_id="x" * 129), "request_id: 'xxx"),
        (pb.GenerateRequest(text="hello", cache_salt="x" * 257), "cache_salt: has 257 characters"),
        (sampled(temperature=float("nan")), "temperature: nan is not a number in [0, 100]"),
        (sampled(top_p=0), "top_p: 0.0 is not a number in (0, 1]"),
        (sampled(max_tokens=0), "max_tokens: 0 is not a whole number in [1, 2147483647]"),
        (sampled(logprobs=21), "logprobs: 21 is not a whole number in [0, 20]"),
        (sampled(stop=[""]), "stop: '' must be a text of 1 to 256 characters"),
        (sampled(stop=["x"] * 17), "stop: has 17 entries, but at most 16 are taken"),
        (sampled(allowed_token_ids=pb.TokenIds()), "allowed_token_ids: is empty"),
        (sampled(logit_bias=[pb.LogitBias(token_id=1)] * 2), "logit_bias: names a token twice"),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 256)),
            "token_ids: has 256 tokens, but with one token of output the model takes at most 255;",
        ),
        (
            pb.GenerateRequest(
                messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user")] * 256)
            ),
            "messages: has 256 messages, but with one token of output the model takes at most 255",
        ),
        (
            sampled(allowed_token_ids=pb.TokenIds(ids=[1] * (VOCAB_SIZE + 1))),
            "allowed_token_ids: has 259 entries, but the model has 258 tokens; give each once",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_value_is_named(
    request_: pb.GenerateRequest, message: str, server: Server, fake: FakeEngine
) -> None:
    given = await refuse(server, request_)
    path = "sampling." if request_.HasField("sampling") else ""
    assert given.startswith(path + message)
    assert not fake.calls


async def test_lists_of_the_largest_size_are_served(server: Server, fake: FakeEngine) -> None:
    allowed = pb.TokenIds(ids=range(VOCAB_SIZE))
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1] * 255),
        sampling=pb.SamplingParams(max_tokens=1, allowed_token_ids=allowed),
    )
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)
        assert len([response async for response in stub.Generate(request)]) == 1
    assert fake.calls[-1].sampling.allowed_token_ids == tuple(range(VOCAB_SIZE))


@pytest.mark.parametrize(
    ("name", "entry", "most"),
    [
        ("stop", "x", 16),
        ("stop_token_ids", 1, 16),
        ("bad_words", "x", 64),
        ("logit_bias", pb.LogitBias(token_id=1), 1024),
    ],
)
def test_a_list_is_counted_before_it_is_copied(
    name: str, entry: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(convert._READ, name, lambda _: pytest.fail("was copied"))
    message = pb.SamplingParams()
    getattr(message, name).extend([entry] * (most + 1))
    with pytest.raises(InvalidRequest, match=f"has {most + 1} entries, but at most {most}"):
        convert.sampling_from_proto(message, VOCAB_SIZE)


def test_every_list_of_the_sampling_parameters_has_a_limit() -> None:
    fields = pb.SamplingParams.DESCRIPTOR.fields
    assert {field.name for field in fields if field.is_repeated} == bounds.MAX_ENTRIES.keys()


async def test_field_violations_carry_the_path_in_the_message(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        request = sampled(top_p=7.0)
        call = channel.unary_stream("/octavo.v1.Generation/Generate")(request.SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    packed: Any = dict(raised.value.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(packed)
    assert status.code == 3  # INVALID_ARGUMENT, from google/rpc/code.proto
    assert status.message == raised.value.details()
    (detail,) = status.details
    assert detail.type_url == "type.googleapis.com/google.rpc.BadRequest"
    bad_request = error_details_pb2.BadRequest.FromString(detail.value)
    assert [(v.field, v.description) for v in bad_request.field_violations] == [
        ("sampling.top_p", "7.0 is not a number in (0, 1]")
    ]


async def test_what_the_engine_refuses_reaches_the_client_with_its_field(
    client: AsyncClient, fake: FakeEngine
) -> None:
    fake.error = InvalidRequest("prompt", "has 900 tokens, but the model takes at most 255")
    with pytest.raises(ServiceError, match="takes at most 255") as raised:
        await anext(client.generate("hello"))
    assert raised.value.code is INVALID
    assert raised.value.violations == (("text", "has 900 tokens, but the model takes at most 255"),)


@pytest.mark.parametrize("text", ["a", "%", "é", "字", "\U0001f600"])
async def test_a_long_message_is_cut_to_what_clients_take(
    text: str, client: AsyncClient, fake: FakeEngine
) -> None:
    fake.error = InvalidRequest("constraint", text * 2000)
    with pytest.raises(ServiceError, match=f"constraint: {text}") as raised:
        await anext(client.generate("hello"))
    assert raised.value.code is INVALID
    assert raised.value.violations[0][1].startswith(text * 200)  # as many of any text


async def test_what_a_client_was_not_told_is_not_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf:
        def trailing_metadata(self) -> None: ...

        async def abort(self, *_: Any, **given: Any) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(errors, "_GOODBYE_SECONDS", 0.01)
    context: Any = Deaf()
    with pytest.raises(grpc.aio.AbortError):
        await errors.abort_with(context, InvalidRequest("messages", "say the secret"))
    assert "was not told that its call is INVALID_ARGUMENT" in caplog.text
    assert "secret" not in caplog.text


async def test_token_ids_are_called_what_the_message_calls_them(
    client: AsyncClient, fake: FakeEngine
) -> None:
    fake.error = InvalidRequest("prompt_ids", "999 is not a token id")
    with pytest.raises(ServiceError, match=r"^token_ids: 999 is not a token id"):
        await anext(client.generate([999]))


async def test_a_full_queue_says_when_to_come_back(client: AsyncClient, fake: FakeEngine) -> None:
    fake.error = QueueFull("1024 requests wait already", retry_after=2.5)
    with pytest.raises(ServiceError, match="1024 requests wait already") as raised:
        await anext(client.generate("hello"))
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.retry_after == 2.5


async def test_a_name_in_use_is_refused_and_the_first_request_goes_on(
    client: AsyncClient, fake: FakeEngine
) -> None:
    first = client.generate("forever", request_id="mine")
    await anext(first)
    with pytest.raises(ServiceError, match="a request named mine is running") as raised:
        await anext(client.generate("hello", request_id="mine"))
    assert raised.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert (await anext(first)).finish_reason is None
    await first.aclose()
    await until(lambda: not fake.running)
    deltas = [delta async for delta in client.generate("hello", request_id="mine")]
    assert deltas[-1].finish_reason is FinishReason.LENGTH


async def test_a_failed_step_is_internal_and_the_server_goes_on(
    client: AsyncClient, fake: FakeEngine
) -> None:
    fake.ending = FinishReason.ERROR
    with pytest.raises(ServiceError, match="the server goes on: try again") as raised:
        _ = [delta async for delta in client.generate("hello")]
    assert raised.value.code is grpc.StatusCode.INTERNAL
    fake.ending = None
    assert [delta async for delta in client.generate("hello")]


async def test_a_stopped_engine_is_unavailable_and_no_news_for_the_log(
    client: AsyncClient, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    fake.error = EngineStopped("the engine is closed, or failed; its log says why")
    with pytest.raises(ServiceError, match="engine of this server has stopped") as raised:
        await anext(client.generate("hello"))
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    assert "a call failed" not in caplog.text


async def test_an_unexpected_exception_is_logged_and_not_shown_to_clients(
    client: AsyncClient, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    fake.error = RuntimeError("secret detail")
    with caplog.at_level(logging.ERROR), pytest.raises(ServiceError) as raised:
        await anext(client.generate("private prompt"))
    assert raised.value.code is grpc.StatusCode.INTERNAL
    assert raised.value.details == "the server failed; its log says why"
    assert "RuntimeError" in caplog.text
    assert "fake_engine.py" in caplog.text  # where it came from
    # What it says may quote the prompt, so it is for who asks for everything.
    assert "secret detail" not in caplog.text
    with caplog.at_level(logging.DEBUG), pytest.raises(ServiceError):
        await anext(client.generate("private prompt"))
    assert "secret detail" in caplog.text
    assert "private prompt" not in caplog.text


async def test_bytes_that_are_not_a_message_are_invalid(server: Server) -> None:
    """A raw client can send what no stub would: text that is not UTF-8."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        for request in (b"\x0a\x02\xff\xfe", b"\x0a\x03\xed\xa0\x80", b"\xff"):
            stream = channel.unary_stream("/octavo.v1.Generation/Generate")(request)
            with pytest.raises(grpc.aio.AioRpcError, match="is not a valid message") as raised:
                await stream.read()
            assert raised.value.code() is INVALID
            call = channel.unary_unary("/octavo.v1.Generation/Tokenize")(request)
            with pytest.raises(grpc.aio.AioRpcError, match="is not a valid message") as raised:
                await call
            assert raised.value.code() is INVALID


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a\ud800", "character 1 of a text is a lone surrogate"),
        ([{"role": "user", "content": "\udfff"}], "lone surrogate"),
        ([-1], "a prompt is a text, a list of token ids"),
        ([2**40], "a prompt is a text, a list of token ids"),
        ([{"role": "user", "text": "hello"}], "a prompt is a text"),
        (b"bytes", "the prompt is bytes; decode it"),
    ],
)
async def test_the_client_refuses_what_can_not_be_sent(
    prompt: Any, message: str, client: AsyncClient, fake: FakeEngine
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await anext(client.generate(prompt))
    assert not fake.calls


async def test_detokenize_names_the_id_that_is_not_in_the_vocabulary(client: AsyncClient) -> None:
    with pytest.raises(ServiceError, match=r"token_ids\[1\]: 258 is not in the voc.* 0 to 257"):
        await client.detokenize([1, VOCAB_SIZE])


async def test_nothing_to_tokenize_is_empty_and_no_input_is_an_error(
    client: AsyncClient, server: Server
) -> None:
    assert await client.tokenize("", add_special_tokens=False) == ()
    assert await client.detokenize([]) == ""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="input: is missing"):
            await stub.Tokenize(pb.TokenizeRequest())


async def test_abort_needs_a_name(client: AsyncClient) -> None:
    with pytest.raises(ServiceError, match="request_id: is empty") as raised:
        await client.abort("")
    assert raised.value.code is INVALID


async def test_a_message_above_the_limit_is_refused_and_one_below_is_served(
    fake: FakeEngine,
) -> None:
    server = Server(ServerConfig(port=0, max_message=1000, grace=0.05))
    await server.start()
    await server.set_engine(fake)
    async with AsyncClient(server.address) as client:
        with pytest.raises(ServiceError, match="larger than max") as raised:
            await anext(client.generate("x" * 1001))
        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not fake.calls
        deltas = [delta async for delta in client.generate("x" * 900, max_tokens=2)]
        assert deltas[-1].prompt_tokens == 900
    await server.stop()


async def test_a_server_that_is_not_there_is_named_with_the_way_out() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(ServiceError, match=r"no Octavo server answers at 127.0.0.1:1") as error:
            await client.model_info()
        assert error.value.code is grpc.StatusCode.UNAVAILABLE
        assert "octavo serve" in error.value.details
        assert not await client.is_ready()


async def test_an_answer_that_breaks_off_is_no_server_that_is_not_there(server: Server) -> None:
    host, port = server.address.rsplit(":", 1)
    sides: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sides.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    listener = await asyncio.start_server(proxy, "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener, AsyncClient(address) as client:
        stream = client.generate("forever", max_tokens=None)
        await anext(stream)
        for side in sides:
            side.transport.abort()
        with pytest.raises(ServiceError, match=f"the connection to the server at {address} broke"):
            async for _ in stream:
                pass
