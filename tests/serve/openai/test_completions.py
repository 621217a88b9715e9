"""POST /v1/completions over an engine that echoes its prompt, a token a byte."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from engine.client import AsyncClient
from engine.sampling import Constraint, SamplingParams
from engine.serve.server import Server
from engine.types import Domain, FinishReason
from tests.serve.fake_engine import FakeEngine, until
from tests.serve.openai.calls import chunks, complete, error_of, events, post

PATH = "/v1/completions"


async def test_a_text_is_completed(http: httpx2.AsyncClient, fake: FakeEngine) -> None:
    answer = await complete(http, prompt="hello", model="echo", max_tokens=5)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer == {
        "object": "text_completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "text": "hello",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 5,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    [call] = fake.calls
    assert call.sampling == SamplingParams(max_tokens=5)
    assert (call.prompt, call.domain, call.share_prefix) == ("hello", Domain(), True)
    assert (call.priority, call.timeout) == (0, None)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (list(b"ids"), ["ids"]),
        (["one", "two"], ["one", "two"]),
        ([list(b"one"), list(b"two")], ["one", "two"]),
        (["one"], ["one"]),
    ],
)
async def test_prompts_of_every_form_are_answered_in_their_order(
    prompt: Any, texts: list[str], http: httpx2.AsyncClient
) -> None:
    answer = await complete(http, prompt=prompt, max_tokens=3)
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    assert answer["usage"]["completion_tokens"] == sum(map(len, texts))


async def test_samples_of_a_prompt_stand_beside_each_other(http: httpx2.AsyncClient) -> None:
    answer = await complete(http, prompt=["ab", "cde"], n=2, best_of=2, max_tokens=2)
    choices = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert choices == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 8


# By field: what a client sends, and what the sampler gets.
FIELDS: dict[str, tuple[Any, Any]] = {
    "max_tokens": (3, {"max_tokens": 3}),
    "n": (2, {"n": 2}),
    "stop": (["a", "b"], {"stop": ("a", "b")}),
    "temperature": (0, {"temperature": 0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "seed": (7, {"seed": 7}),
    "presence_penalty": (1.5, {"presence_penalty": 1.5}),
    "frequency_penalty": (-1, {"frequency_penalty": -1}),
    "logit_bias": ({"5": 2, "6": -100}, {"logit_bias": ((5, 2.0), (6, -100.0))}),
    "logprobs": (3, {"logprobs": 3}),
    "top_k": (4, {"top_k": 4}),
    "min_p": (0.1, {"min_p": 0.1}),
    "repetition_penalty": (1.1, {"repetition_penalty": 1.1}),
    "min_tokens": (2, {"min_tokens": 2}),
    "stop_token_ids": ([9], {"stop_token_ids": (9,)}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "skip_special_tokens": (False, {"skip_special_tokens": False}),
    "allowed_token_ids": ([1, 2], {"allowed_token_ids": (1, 2)}),
    "bad_words": (["bad"], {"bad_words": ("bad",)}),
    "response_format": (
        {"type": "json_object"},
        {"constraint": Constraint("json_object")},
    ),
    "structured_outputs": ({"regex": "a+"}, {"constraint": Constraint("regex", "a+")}),
}


@pytest.mark.parametrize("field", FIELDS)
async def test_every_field_reaches_the_sampler(
    field: str, http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    value, expected = FIELDS[field]
    await complete(http, prompt="hello", **{field: value})
    values: dict[str, Any] = {"max_tokens": 16} | expected
    assert fake.calls[0].sampling == SamplingParams(**values)


async def test_a_null_is_a_field_that_was_left_out(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    nulls = dict.fromkeys([*FIELDS, "stream", "echo", "suffix", "user", "best_of", "model"])
    await complete(http, prompt="hello", **nulls)
    assert fake.calls[0].sampling == SamplingParams(max_tokens=16)


@pytest.mark.parametrize(("given", "expected"), [("end", ("end",)), (["end"], ("end",))])
async def test_one_stop_text_needs_no_list(
    given: Any, expected: tuple[str, ...], http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    await complete(http, prompt="hello", stop=given)
    assert fake.calls[0].sampling.stop == expected


async def test_all_of_a_top_k_is_minus_one_too(http: httpx2.AsyncClient, fake: FakeEngine) -> None:
    await complete(http, prompt="hello", top_k=-1)
    assert fake.calls[0].sampling.top_k == 0


@pytest.mark.parametrize("fields", [{"user": "anna"}, {"cache_salt": "anna"}])
async def test_a_user_or_a_salt_narrows_what_is_shared(
    fields: dict[str, str], http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    await complete(http, prompt="hello", priority=-3, share_prefix=False, timeout=9, **fields)
    [call] = fake.calls
    assert call.domain == Domain("default", "anna")
    assert (call.priority, call.share_prefix, call.timeout) == (-3, False, 9)


async def test_an_echo_begins_with_the_prompt(http: httpx2.AsyncClient) -> None:
    for prompt in ("hello", list(b"hello")):
        answer = await complete(http, prompt=prompt, max_tokens=2, echo=True)
        assert answer["choices"][0]["text"] == "hellohe"
        assert answer["choices"][0]["logprobs"] is None


async def test_log_probabilities_of_prompt_and_output_stand_in_one_row(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    answer = await complete(http, prompt="abc", max_tokens=2, echo=True, logprobs=1)
    [choice] = answer["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<bos>", "a", "b", "c", "<bos>", "a"]
    assert choice["text"] == "abca"  # control tokens are no text
    assert logprobs["token_logprobs"] == [None, *[-0.5] * 5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"a": -0.5, "b": -1.5}
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3, 3]
    assert fake.calls[0].sampling.prompt_logprobs == 1


async def test_nothing_but_a_score_is_an_echo_of_no_tokens(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    answer = await complete(http, prompt=list(b"abc"), max_tokens=0, echo=True, logprobs=0)
    [choice] = answer["choices"]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert answer["usage"]["completion_tokens"] == 0
    assert fake.calls[0].sampling.max_tokens == 1
    error = await error_of(http, prompt="abc", max_tokens=0)
    assert error["param"] == "max_tokens"


async def test_a_token_that_is_no_text_is_written_as_bytes(http: httpx2.AsyncClient) -> None:
    answer = await complete(http, prompt=list("é".encode()), max_tokens=1, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [r"bytes:\xc3"]
    assert logprobs["top_logprobs"] == [{r"bytes:\xc3": -0.5, r"bytes:\xc4": -1.5}]


async def test_a_stream_is_what_it_is_to_the_byte(http: httpx2.AsyncClient) -> None:
    reply = await post(http, PATH, prompt="ab", max_tokens=2, stream=True)
    head = json.loads(reply.content.split(b"\n\n")[0].removeprefix(b"data: "))
    about = f'"id":"{head["id"]}","object":"text_completion","created":{head["created"]}'

    def event(text: str, reason: str) -> str:
        return (
            f'data: {{{about},"model":"echo","choices":[{{"index":0,"text":"{text}",'
            f'"logprobs":null,"finish_reason":{reason},"stop_reason":null}}]}}\n\n'
        )

    expected = event("a", "null") + event("b", '"length"') + "data: [DONE]\n\n"
    assert reply.content == expected.encode()
    assert reply.headers["cache-control"] == "no-store"


async def test_a_stream_says_the_same_as_the_whole(http: httpx2.AsyncClient) -> None:
    body: dict[str, Any] = {"prompt": ["abc", "de"], "n": 2, "echo": True, "logprobs": 1}
    whole = await complete(http, **body)
    parts = await chunks(http, PATH, **body)
    assert len({part["id"] for part in parts}) == 1
    for choice in whole["choices"]:
        pieces = [p for part in parts for p in part["choices"] if p["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name, row in choice["logprobs"].items():
            assert [entry for piece in pieces for entry in piece["logprobs"][name]] == row
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]


async def test_a_stream_ends_with_the_counts_if_they_are_wanted(http: httpx2.AsyncClient) -> None:
    options = {"include_usage": True}
    body = {"prompt": ["ab", "cd"], "max_tokens": 2}
    *parts, last = await chunks(http, PATH, **body, stream_options=options)
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == last["usage"]["completion_tokens"] == 4
    assert all("usage" not in part for part in await chunks(http, PATH, prompt="ab"))


async def test_what_ended_an_answer_is_told(http: httpx2.AsyncClient, fake: FakeEngine) -> None:
    fake.ending, fake.stop_reason = FinishReason.STOP, "xyz"
    [choice] = (await complete(http, prompt="hello", stop="xyz"))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "xyz")


async def test_an_error_before_the_first_token_has_a_status_of_its_own(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    fake.ending = FinishReason.DEADLINE
    error = await error_of(http, prompt="a", max_tokens=1, status=504, stream=True)
    assert error["code"] == "deadline_exceeded"


async def test_an_error_in_a_stream_is_its_last_event(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    fake.ending = FinishReason.ERROR
    *_, last = await events(http, PATH, prompt="hello")
    error = json.loads(last)["error"]
    assert error["type"] == "server_error"
    assert "the server's log says why" in error["message"]


async def test_one_bad_prompt_ends_all_of_its_request(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    assert (await error_of(http, prompt=["forever", ""]))["param"] == "prompt"
    fake.error = RuntimeError("a secret")
    error = await error_of(http, prompt=["forever", "other"], status=500)
    assert "secret" not in str(error)
    await until(lambda: not fake.running)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_abort_over_grpc_ends_it_by_its_name(
    stream: bool, wire: httpx2.AsyncClient, server: Server, fake: FakeEngine
) -> None:
    task = asyncio.create_task(post(wire, PATH, prompt="forever", max_tokens=9999, stream=stream))
    await until(lambda: fake.running)
    [name] = fake.running
    async with AsyncClient(server.address) as client:
        assert await client.abort(name)
    reply = await task
    assert reply.status_code == 200
    assert '"finish_reason":"abort"' in reply.text
    assert name in reply.text
