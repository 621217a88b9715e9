"""Generate and Abort, as a gateway uses them: token ids out, and every way in which that ends."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb

from engine.serve.server import Server
from engine.serve.vllm import responses
from engine.serve.vllm.responses import Responses
from engine.server_config import ServerConfig
from engine.streams import Delta, Usage
from engine.types import FinishReason, QueueFull, TokenLogprobs
from tests.serve.fake_engine import FakeEngine, collect, until

PROMPT = pb.TokenizedInput(input_ids=b"hello")
FOREVER = pb.TokenizedInput(input_ids=b"forever")


def asking(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(tokenized=PROMPT, **fields)


async def status(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await collect(call)
    return raised.value.code(), str(raised.value.details())


async def test_without_streaming_the_answer_is_one_message(worker: Any) -> None:
    (only,) = await collect(worker.Generate(asking()))
    assert only.complete == pb.GenerateComplete(
        output_ids=b"hello",
        finish_reason="length",
        prompt_tokens=5,
        completion_tokens=5,
        cached_tokens=2,
    )


async def test_a_stream_is_chunks_of_new_tokens_and_an_end(worker: Any) -> None:
    *chunks, last = await collect(worker.Generate(asking(stream=True)))
    assert [bytes(message.chunk.token_ids) for message in chunks] == [b"h", b"e", b"l", b"l", b"o"]
    assert [message.chunk.completion_tokens for message in chunks] == [1, 2, 3, 4, 5]
    assert {message.chunk.prompt_tokens for message in chunks} == {5}
    assert {message.chunk.cached_tokens for message in chunks} == {2}
    assert bytes(last.complete.output_ids) == b"hello"
    assert last.complete.finish_reason == "length"
    assert last.complete.completion_tokens == 5


def delta(
    index: int,
    ids: tuple[int, ...],
    so_far: int,
    *,
    reason: FinishReason | None = None,
    stop: str | int | None = None,
    logprobs: bool = False,
    prompt: tuple[TokenLogprobs, ...] = (),
) -> Delta:
    entries = tuple(TokenLogprobs(each, -0.5, ((each, -0.5), (9, -1.5))) for each in ids)
    usage = Usage(3, 2, so_far)
    return Delta(index, "", ids, entries if logprobs else (), prompt, reason, stop, usage)


def test_each_of_several_outputs_has_its_own_end() -> None:
    made = Responses((1, 2, 3), stream=True)
    deltas = [
        delta(0, (10,), 1),
        delta(1, (20,), 1),
        delta(0, (11,), 2, reason=FinishReason.STOP, stop=11),
        delta(1, (21, 22), 3, reason=FinishReason.STOP, stop="xy"),
    ]
    messages = [message for each in deltas for message in made.of(each)]
    kinds = [message.WhichOneof("response") for message in messages]
    assert kinds == ["chunk", "chunk", "chunk", "complete", "chunk", "complete"]
    first, second = messages[3].complete, messages[5].complete
    assert (first.index, list(first.output_ids)) == (0, [10, 11])
    assert (first.WhichOneof("matched_stop"), first.matched_token_id) == ("matched_token_id", 11)
    assert (second.index, list(second.output_ids)) == (1, [20, 21, 22])
    assert second.matched_stop_str == "xy"
    assert first.finish_reason == second.finish_reason == "stop"
    quiet = Responses((1, 2, 3), stream=False)
    ends = [message.complete for each in deltas for message in quiet.of(each)]
    assert ends == [first, second]
    assert not made._outputs  # what has ended is not kept until the last one has
    assert not quiet._outputs


def test_log_probabilities_come_with_their_tokens_and_those_of_the_prompt_once() -> None:
    prompt = (TokenLogprobs(2, -1.0, ((2, -1.0),)), TokenLogprobs(3, -2.0, ((7, -0.1),)))
    deltas = [
        delta(0, (10,), 1, logprobs=True, prompt=prompt),
        delta(0, (11,), 2, logprobs=True, reason=FinishReason.LENGTH),
    ]
    made = Responses((1, 2, 3), stream=True)
    first, second, last = [message for each in deltas for message in made.of(each)]
    scores = first.chunk.output_logprobs
    assert list(scores.token_ids) == [10]
    assert list(scores.token_logprobs) == [-0.5]
    assert list(scores.top_logprobs[0].token_ids) == [10, 9]
    assert list(scores.top_logprobs[0].values) == [-0.5, -1.5]
    of_prompt = first.chunk.input_logprobs
    assert list(of_prompt.token_ids) == [1, 2, 3]
    assert not of_prompt.token_logprobs[0].HasField("value")
    assert [each.value for each in of_prompt.token_logprobs[1:]] == [-1.0, -2.0]
    assert [list(each.token_ids) for each in of_prompt.top_logprobs] == [[], [2], [7]]
    assert not second.chunk.HasField("input_logprobs")
    assert not last.complete.HasField("output_logprobs")  # the chunks had them
    quiet = Responses((1, 2, 3), stream=False)
    (only,) = [message for each in deltas for message in quiet.of(each)]
    assert list(only.complete.output_logprobs.token_ids) == [10, 11]
    assert only.complete.input_logprobs == of_prompt


def test_many_log_probabilities_are_spread_over_chunks() -> None:
    size = responses.MAX_LOGPROB_POSITIONS
    ids = tuple(range(size + 5))
    *chunks, last = Responses((1,), stream=True).of(
        delta(0, ids, len(ids) + 2, logprobs=True, reason=FinishReason.LENGTH)
    )
    assert [len(each.chunk.token_ids) for each in chunks] == [size, 5]
    assert [len(each.chunk.output_logprobs.token_ids) for each in chunks] == [size, 5]
    assert [each.chunk.completion_tokens for each in chunks] == [size + 2, size + 7]
    assert tuple(last.complete.output_ids) == ids


async def test_log_probabilities_are_served(worker: Any) -> None:
    params = pb.SamplingParams(logprobs=2, prompt_logprobs=2)
    (only,) = await collect(worker.Generate(asking(sampling_params=params)))
    assert bytes(only.complete.output_logprobs.token_ids) == b"hello"
    assert bytes(only.complete.input_logprobs.token_ids) == b"hello"


async def test_an_abort_ends_the_stream_that_is_left_open(worker: Any, fake: FakeEngine) -> None:
    """SMG does this when its client goes away."""
    request = pb.GenerateRequest(request_id="mine", tokenized=FOREVER, stream=True)
    call = worker.Generate(request)
    read = asyncio.create_task(collect(call))
    await until(lambda: fake.running)
    for _ in range(3):  # it may be sent again, and for what was never there
        await worker.Abort(pb.AbortRequest(request_ids=["not mine", "mine"]))
    *_, last = await read
    assert last.complete.finish_reason == "abort"
    assert await call.code() is grpc.StatusCode.OK
    await until(lambda: not fake.running)
    assert fake.finished == {"abort": 1}
    await worker.Abort(pb.AbortRequest(request_ids=["mine"]))


async def test_a_reader_that_goes_away_ends_its_request(worker: Any, fake: FakeEngine) -> None:
    call = worker.Generate(pb.GenerateRequest(tokenized=FOREVER, stream=True))
    await call.read()
    call.cancel()
    await until(lambda: not fake.running)
    assert fake.finished == {"closed": 1}


async def test_two_requests_of_one_name_are_not_mixed_up(worker: Any, fake: FakeEngine) -> None:
    first = worker.Generate(pb.GenerateRequest(request_id="a", tokenized=FOREVER, stream=True))
    await first.read()
    code, message = await status(worker.Generate(asking(request_id="a")))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert message.startswith("a request named a is running")
    first.cancel()
    await until(lambda: not fake.running)
    assert len(await collect(worker.Generate(asking(request_id="a")))) == 1


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (FinishReason.ERROR, grpc.StatusCode.INTERNAL),
        (FinishReason.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_an_answer_that_fails_ends_with_a_status(
    ending: FinishReason, code: grpc.StatusCode, worker: Any, fake: FakeEngine
) -> None:
    fake.ending = ending
    assert (await status(worker.Generate(asking())))[0] is code


async def test_the_time_limit_of_the_call_is_the_request_s(worker: Any, fake: FakeEngine) -> None:
    await collect(worker.Generate(asking(), timeout=50))
    timeout = fake.calls[-1].timeout
    assert timeout is not None
    assert 0 < timeout < 60
    assert fake.calls[-1].domain is not None
    assert fake.calls[-1].domain.tenant == "default"


async def test_a_full_queue_says_when_to_try_again(worker: Any, fake: FakeEngine) -> None:
    fake.error = QueueFull("512 requests wait; try again later")
    code, message = await status(worker.Generate(asking()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again later" in message


async def test_embeddings_are_not_made(worker: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="make no embeddings") as raised:
        await worker.Embed(pb.EmbedRequest(tokenized=PROMPT))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_before_the_model_is_loaded_calls_are_refused_and_health_says_so() -> None:
    server = Server(ServerConfig(port=0, grace=0.05))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            from smg_grpc_proto import vllm_engine_pb2_grpc

            early: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            assert (await status(early.Generate(asking())))[0] is grpc.StatusCode.UNAVAILABLE
            health = await early.HealthCheck(pb.HealthCheckRequest())
            assert not health.healthy
            assert "still loading its model" in health.message
            fake = FakeEngine()
            await server.set_engine(fake)
            assert (await early.HealthCheck(pb.HealthCheckRequest())).healthy
            life: Any = fake.life
            life.trouble = "the device hangs"
            health = await early.HealthCheck(pb.HealthCheckRequest())
            assert (health.healthy, health.message) == (False, "the device hangs")
            assert (await status(early.Generate(asking())))[0] is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop()
