"""OpenAI's own client against our API: an independent reader of what is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pydantic
import pytest

from engine.sampling import Constraint
from engine.serve.server import Server
from engine.types import FinishReason, QueueFull
from tests.serve.fake_engine import FakeEngine, until

MODEL = "echo"


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{server.page}v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def test_a_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], n=2, stop=["never"]
    )
    assert [choice.message.content for choice in answer.choices] == ["user:hi\n"] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 16)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_a_streamed_chat_with_log_probabilities(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, tokens, last = "", [], None
    async for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if choice.logprobs is not None:
                tokens += choice.logprobs.content or []
    assert text == "".join(entry.token for entry in tokens) == "user:hi\n"
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in tokens)
    assert last is not None
    assert last.usage is not None
    assert last.usage.total_tokens == 16


async def test_a_schema_from_a_class(client: openai.AsyncOpenAI, fake: FakeEngine) -> None:
    class River(pydantic.BaseModel):
        name: str
        length_km: int

    with pytest.raises(openai.LengthFinishReasonError):  # what the fake says of every answer
        await client.chat.completions.parse(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], response_format=River
        )
    constraint = fake.calls[0].sampling.constraint
    assert isinstance(constraint, Constraint)
    assert constraint.kind == "json_schema"
    assert '"length_km"' in constraint.text


async def test_a_completion_with_its_prompt_scored(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt=list(b"abc"), max_tokens=0, echo=True, logprobs=1
    )
    [choice] = answer.choices
    assert choice.text == "abc"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.text_offset == [0, 1, 2]


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError, match="not served here"):
        await client.models.retrieve("other/model")


async def test_errors_are_those_that_the_client_knows(
    client: openai.AsyncOpenAI, fake: FakeEngine
) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="calls no tools"):
        await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    fake.error = QueueFull("full")
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model=MODEL, prompt="a")
    fake.error = None
    fake.ending = FinishReason.ERROR
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(model=MODEL, prompt="a")
    with pytest.raises(openai.APIError, match="log says why"):
        async for _ in await client.completions.create(model=MODEL, prompt="ab", stream=True):
            pass


async def test_a_stream_that_is_left_is_aborted(
    client: openai.AsyncOpenAI, fake: FakeEngine
) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="forever", max_tokens=9999, stream=True
    )
    async with stream:
        async for _ in stream:
            break
    await until(lambda: not fake.running)
    assert fake.finished == {"closed": 1}


async def test_a_client_that_waits_no_longer_is_gone(
    client: openai.AsyncOpenAI, fake: FakeEngine
) -> None:
    answer = asyncio.create_task(
        client.completions.create(model=MODEL, prompt="forever", max_tokens=9999)
    )
    await until(lambda: fake.running)
    answer.cancel()
    await until(lambda: not fake.running)
