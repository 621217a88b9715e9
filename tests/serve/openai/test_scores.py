"""Log-probabilities over the wire, against a direct computation in NumPy, and a real model's text.

The tiny model's tokens are bytes, so that one position of a text is one token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import numpy as np
import pytest

from engine.config_file import from_tree
from engine.frontend import Engine
from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.model import numpy_llama
from tests.runtime import tiny
from tests.serve.fake_engine import until
from tests.serve.openai.calls import chat, chunks, complete, error_of, post

TEXT = "Four score and seven years ago"
CLOSE = 2e-4  # float32 on both sides: sums in another order


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    engine = Engine.from_config(from_tree(tiny.config_tree(folder)))
    yield engine
    engine.close()


@pytest.fixture
async def http(engine: Engine) -> AsyncIterator[httpx2.AsyncClient]:
    server = Server(ServerConfig(port=0, grace=0.05, http="127.0.0.1:0"))
    await server.start()
    await server.set_engine(engine)
    assert server.page is not None
    async with httpx2.AsyncClient(base_url=server.page, timeout=60) as client:
        yield client
    await server.stop()


def logprobs_after(ids: list[int]) -> np.ndarray:
    """The model's log-probabilities of each next token, float64[positions, V]."""
    logits = numpy_llama.forward(tiny.ARCH, tiny.weights(), np.array(ids)).astype(np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_scored_text_has_the_model_s_log_probabilities(
    stream: bool, http: httpx2.AsyncClient
) -> None:
    ids = list(TEXT.encode())
    body: dict[str, Any] = {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 3}
    if stream:
        [part] = await chunks(http, "/v1/completions", **body)
        [choice] = part["choices"]
    else:
        [choice] = (await complete(http, **body))["choices"]
    assert choice["text"] == TEXT
    found = choice["logprobs"]
    assert found["tokens"] == list(TEXT)
    assert found["text_offset"] == list(range(len(TEXT)))
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    expected = logprobs_after(ids)
    direct = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found["token_logprobs"][1:], direct, atol=CLOSE)
    for row, top in zip(expected, found["top_logprobs"][1:], strict=False):
        likeliest = np.sort(row)[::-1][:3]
        np.testing.assert_allclose(sorted(top.values())[::-1][:3], likeliest, atol=CLOSE)


async def test_what_lm_eval_asks_is_answered_as_it_reads_it(http: httpx2.AsyncClient) -> None:
    """One token more than is scored, and batches of token ids of several lengths."""
    prompts = [list(TEXT.encode()), list(b"a"), list(b"short")]
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = (await complete(http, prompt=prompts, **body))["choices"]
    for ids, choice in zip(prompts, choices, strict=True):
        rows = logprobs_after(ids)
        tokens, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(tokens) == len(tops) == len(ids) + 1
        for position, (row, token) in enumerate(zip(rows, ids[1:], strict=False), 1):
            is_greedy = tokens[position] == max(tops[position].values())
            assert is_greedy == (token == row.argmax())
            assert abs(tokens[position] - row[token]) < CLOSE
        assert tokens[-1] == max(tops[-1].values())
        assert abs(tokens[-1] - rows[-1].max()) < CLOSE


async def test_generated_tokens_have_the_model_s_log_probabilities(
    http: httpx2.AsyncClient,
) -> None:
    answer = await chat(http, "Hello", temperature=0, max_tokens=8, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    prompt = [tiny.TURN, *b"user:Hello", tiny.TURN_END, tiny.TURN, *b"assistant:"]
    ids = prompt + [_id(entry["bytes"]) for entry in content]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    rows = logprobs_after(ids)[len(prompt) - 1 :]
    for row, entry in zip(rows, content, strict=False):
        likeliest = np.argsort(row)[::-1][:2]
        assert [_id(top["bytes"]) for top in entry["top_logprobs"]] == likeliest.tolist()
        assert abs(entry["logprob"] - row[likeliest[0]]) < CLOSE


async def test_whole_and_streamed_answers_are_the_same(http: httpx2.AsyncClient) -> None:
    body: dict[str, Any] = {"prompt": [TEXT, "x"], "max_tokens": 12, "n": 2, "seed": 5}
    body |= {"echo": True, "logprobs": 2}
    whole = (await complete(http, **body))["choices"]
    parts = await chunks(http, "/v1/completions", **body)
    for choice in whole:
        pieces = [p for part in parts for p in part["choices"] if p["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name, row in choice["logprobs"].items():
            joined = [entry for piece in pieces for entry in piece["logprobs"][name]]
            assert json.dumps(joined) == json.dumps(row)
    assert whole[0]["text"] != whole[1]["text"]  # a draw each


async def test_a_prompt_that_is_too_long_is_refused_by_its_field(http: httpx2.AsyncClient) -> None:
    for prompt in ([5] * 512, [[5], [5] * 512], "x" * 512):
        error = await error_of(http, prompt=prompt, logprobs=1)
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert "has 512 tokens" in error["message"]
    messages = [{"role": "user", "content": "x" * 512}]
    error = await error_of(http, "/v1/chat/completions", messages=messages)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert (await error_of(http, prompt=[tiny.VOCAB_SIZE]))["param"] == "prompt"


async def test_an_output_keeps_to_its_form(http: httpx2.AsyncClient) -> None:
    schema = {
        "type": "object",
        "properties": {"river": {"enum": ["Rhine", "Nile"]}, "long": {"type": "boolean"}},
        "required": ["river", "long"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "river", "schema": schema}}
    for number in range(3):
        answer = await chat(http, response_format=form, max_tokens=100, seed=number)
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["message"]["content"])
        assert found.keys() == {"river", "long"}
        assert found["river"] in ("Rhine", "Nile")
        assert isinstance(found["long"], bool)
        answer = await complete(
            http, prompt="Yes or no?", structured_outputs={"choice": ["yes", "no"]}, n=2
        )
        assert {choice["text"] for choice in answer["choices"]} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}}, ""),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
    ],
)
async def test_a_form_that_can_t_be_kept_to_is_refused(
    fields: dict[str, Any], param: str, http: httpx2.AsyncClient
) -> None:
    error = await error_of(http, prompt="x", **fields)
    assert error["param"] == (param or "response_format")
    assert await complete(http, prompt="x", max_tokens=1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_returns_every_block(
    stream: bool, http: httpx2.AsyncClient, engine: Engine
) -> None:
    body = {"prompt": ["x" * 40] * 2, "max_tokens": 400, "n": 2, "ignore_eos": True}
    task = asyncio.create_task(post(http, "/v1/completions", stream=stream, **body))
    await until(lambda: engine.stats().running == 4)
    assert engine.stats().owned_blocks
    task.cancel()
    await until(lambda: not (engine.stats().running or engine.stats().owned_blocks))
    assert (await complete(http, prompt="x", max_tokens=1))["usage"]["completion_tokens"] == 1


def _id(data: list[int]) -> int:
    marks = {b"<s>": tiny.BOS, b"</s>": tiny.EOS, b"<turn>": tiny.TURN, b"</turn>": tiny.TURN_END}
    return marks[bytes(data)] if bytes(data) in marks else data[0]
