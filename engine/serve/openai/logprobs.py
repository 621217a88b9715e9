"""Log-probabilities in OpenAI's two forms, and where each token stands in the text.

A token's text is that of its bytes. Bytes that are no text by themselves (a part of a character)
are written `bytes:\\xe2\\x80`, as OpenAI does: so different tokens keep different names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from engine.serve.openai.parts import json_array
from engine.text import Detokenizer, Tokenizer
from engine.types import TokenLogprobs

LEAST = -9999.0  # OpenAI's for what is not to be expected at all: JSON has no infinity


class Entry(NamedTuple):
    """One token of an answer. A prompt's first has no log-probability: nothing is before it.

    Attributes:
      token_id: which token.
      logprob: its natural logarithm of probability, or None.
      top: the likeliest tokens in its place, likeliest first.
      offset: characters of the choice's text before it.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


class Offsets:
    """Follows a text token by token.

    Args:
      tokenizer: whose tokens.
      before: tokens that the text goes on from.
      start: characters of the text before its first token; below 0, tokens up to there have no
        place in the text.
      skip_special_tokens: control tokens take no place in the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], start: int, skip_special_tokens: bool
    ):
        self._detokenizer = Detokenizer(tokenizer, before, skip_special_tokens)
        self._length = start

    def entries(self, logprobs: Iterable[TokenLogprobs]) -> list[Entry]:
        """The next tokens, with their places."""
        return [
            Entry(token_id, logprob, top, self.take(token_id))
            for token_id, logprob, top in logprobs
        ]

    def take(self, token_id: int) -> int:
        """Where the next token begins."""
        offset = max(0, self._length)
        self._length += len(self._detokenizer.push((token_id,)))
        return offset


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[Entry]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/completions, its lists as JSON."""
    return {
        "text_offset": json_array(entry.offset for entry in entries),
        "token_logprobs": json_array(_number(entry.logprob) for entry in entries),
        "tokens": json_array(_name(tokenizer, entry.token_id) for entry in entries),
        "top_logprobs": json_array(_top(tokenizer, entry) for entry in entries),
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[Entry]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions."""

    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes[token_id]
        return {
            "token": _name(tokenizer, token_id),
            "logprob": _number(logprob),
            "bytes": list(data),
        }

    content = (
        one(entry.token_id, entry.logprob) | {"top_logprobs": [one(*each) for each in entry.top]}
        for entry in entries
    )
    return {"content": json_array(content), "refusal": None}


def _top(tokenizer: Tokenizer, entry: Entry) -> dict[str, float | None] | None:
    """The likeliest tokens and the chosen one, by name; of equal names the likelier is kept."""
    if entry.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        top.setdefault(_name(tokenizer, token_id), _number(logprob))
    return top


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    data = tokenizer.token_bytes[token_id]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
