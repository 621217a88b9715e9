"""POST /v1/chat/completions over an engine that echoes the conversation."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from engine.sampling import Constraint, SamplingParams
from engine.text import Message
from tests.serve.fake_engine import FakeEngine
from tests.serve.openai.calls import chat, chunks, error_of
from tests.serve.openai.test_completions import FIELDS

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


async def test_a_chat_is_answered(http: httpx2.AsyncClient, fake: FakeEngine) -> None:
    answer = await chat(http, "hi", model="echo")
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1.7e9
    text = "user:hi\n"
    assert answer == {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(text),
            "completion_tokens": len(text),
            "total_tokens": 2 * len(text),
            "prompt_tokens_details": {"cached_tokens": len(text) // 2},
        },
    }
    assert fake.calls[0].prompt == (Message("user", "hi"),)
    assert fake.calls[0].sampling == SamplingParams()


async def test_parts_of_a_message_are_lines(http: httpx2.AsyncClient, fake: FakeEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await chat(http, messages=[{"role": "system", "content": "be brief"}, *HI])
    await chat(http, messages=[{"role": "user", "content": parts}])
    assert [call.prompt for call in fake.calls] == [
        (Message("system", "be brief"), Message("user", "hi")),
        (Message("user", "one\ntwo"),),
    ]


async def test_an_answer_can_be_sent_back(http: httpx2.AsyncClient, fake: FakeEngine) -> None:
    answer = (await chat(http))["choices"][0]["message"]
    nothing = {"tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    await chat(http, messages=[*HI, answer | nothing, *HI])
    assert fake.calls[1].prompt[1] == Message("assistant", answer["content"])


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "logprobs"])
async def test_every_field_reaches_the_sampler(
    field: str, http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    value, expected = FIELDS[field]
    await chat(http, **{field: value})
    assert fake.calls[0].sampling == SamplingParams(**expected)


async def test_both_names_of_the_most_tokens_are_known(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    await chat(http, max_completion_tokens=3)
    await chat(http, max_completion_tokens=3, max_tokens=3)
    assert [call.sampling.max_tokens for call in fake.calls] == [3, 3]
    error = await error_of(http, PATH, messages=HI, max_completion_tokens=3, max_tokens=4)
    assert error["param"] == "max_tokens"


async def test_log_probabilities_come_with_their_bytes(http: httpx2.AsyncClient) -> None:
    answer = await chat(http, logprobs=True, top_logprobs=2, max_tokens=1)
    [entry] = answer["choices"][0]["logprobs"]["content"]
    top = [
        {"token": "u", "logprob": -0.5, "bytes": [117]},
        {"token": "v", "logprob": -1.5, "bytes": [118]},
    ]
    assert entry == top[0] | {"top_logprobs": top}
    error = await error_of(http, PATH, messages=HI, top_logprobs=2)
    assert "set it to true" in error["message"]
    error = await error_of(http, PATH, messages=HI, logprobs=True, top_logprobs=21)
    assert error["param"] == "top_logprobs"


async def test_a_stream_begins_with_the_role(http: httpx2.AsyncClient) -> None:
    first, *parts = await chunks(http, PATH, messages=HI, max_tokens=2)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert [part["choices"][0]["delta"] for part in parts] == [{"content": "u"}, {"content": "s"}]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, "length"]


async def test_samples_are_streamed_side_by_side(http: httpx2.AsyncClient) -> None:
    parts = await chunks(
        http, PATH, messages=HI, n=3, max_tokens=2, stream_options={"include_usage": True}
    )
    for index in range(3):
        deltas = [c["delta"] for p in parts for c in p["choices"] if c["index"] == index]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == "us"
    assert parts[-1]["usage"]["completion_tokens"] == 6


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            ("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}}}'),
        ),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, None),
        ({"structured_outputs": {"json": '{"type": "string"}'}}, None),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", "", ("a", "b"))),
        ({"structured_outputs": {"json_object": True}}, ("json_object",)),
        ({"structured_outputs": {"grammar": "start: /a+/"}}, ("lark", "start: /a+/")),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, ("ebnf", 'root ::= "a"')),
    ],
)
async def test_an_output_s_form_becomes_a_constraint(
    fields: dict[str, Any], constraint: Any, http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    await chat(http, **fields)
    found = fake.calls[0].sampling.constraint
    if constraint is not None:
        assert found == Constraint(*constraint)
    elif "structured_outputs" in fields:
        assert found is not None
        assert found.kind == "json_schema"
        assert '"type"' in found.text
    else:
        assert found is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"messages": []}, "messages"),
        ({"messages": HI * 300}, "messages"),
        ({"messages": [{"role": "", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [*HI, {"role": "user", "content": "", "name": "x"}]}, "messages[1].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "", "image": 1}]}, "messages[0].image"),
        ({"messages": [{"role": "tool", "content": "", "tool_call_id": "x"}]}, "messages[0]."),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"echo": True}, "echo"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
async def test_what_can_t_be_done_is_refused_by_its_name(
    fields: dict[str, Any], param: str, http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    body: dict[str, Any] = {"messages": HI} | fields
    error = await error_of(http, PATH, **body)
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"
    assert not fake.calls


async def test_what_asks_for_no_tools_is_taken(http: httpx2.AsyncClient) -> None:
    await chat(http, tools=[], tool_choice="none", parallel_tool_calls=True, modalities=["text"])
