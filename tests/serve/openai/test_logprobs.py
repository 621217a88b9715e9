"""Names of tokens, where they collide and where they are no text."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from engine.serve.openai.logprobs import Entry, chat_logprobs, completion_logprobs
from engine.serve.openai.parts import json_array


class Tokenizer:
    """Two tokens with the same text, a half character, and an id that stands for nothing."""

    token_bytes = (b"x", b"x", "é".encode()[:1], b"")


TOKENIZER: Any = Tokenizer()


def written(answer: dict[str, Any]) -> dict[str, Any]:
    return json.loads(msgspec.json.encode(answer))


def test_of_two_tokens_with_one_text_the_likelier_is_told() -> None:
    """So that a reader who takes the largest of them still has the likeliest token's."""
    entry = Entry(1, -3.0, ((0, -0.5), (2, -1.0)), 0)
    found = written(completion_logprobs(TOKENIZER, [entry]))
    assert found["top_logprobs"] == [{"x": -0.5, r"bytes:\xc3": -1.0}]
    assert found["token_logprobs"] == [-3.0]


def test_what_is_impossible_is_a_number_all_the_same() -> None:
    entry = Entry(0, -math.inf, ((2, -0.0), (3, -math.inf)), 0)
    assert written(completion_logprobs(TOKENIZER, [entry]))["token_logprobs"] == [-9999.0]
    [content] = written(chat_logprobs(TOKENIZER, [entry]))["content"]
    assert content["logprob"] == -9999.0
    assert content["top_logprobs"] == [
        {"token": r"bytes:\xc3", "logprob": 0.0, "bytes": [0xC3]},
        {"token": "", "logprob": -9999.0, "bytes": []},
    ]


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_an_array_in_parts_is_the_array(count: int) -> None:
    """So that no thread is kept from going on until all of it is written."""
    items = [{"a": number, "b": [None, "x"]} for number in range(count)]
    assert bytes(json_array(iter(items))) == msgspec.json.encode(items)
