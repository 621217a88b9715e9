"""What a client gets: choices that grow by pieces, and the JSON of both endpoints.

A `Prompt` is what a request asks to go on from, a `Piece` what is new of one of its outputs. Whole
answers are all pieces of a choice put together; a stream has an event for each.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.serve.openai.logprobs import Entry, Offsets, chat_logprobs, completion_logprobs
from engine.text import Message, Tokenizer

if TYPE_CHECKING:
    from engine.frontend import Delta, Usage


class Piece(NamedTuple):
    """What is new of a choice; `entries` are its tokens, if log-probabilities are asked for."""

    text: str
    entries: list[Entry]
    finish_reason: str | None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a request.

    Attributes:
      first_choice: index of its first output among the request's choices.
      given: as the engine takes it; token ids if log-probabilities are wanted.
      echo: its text, if outputs begin with that.
      echo_start: where its first token stands in that: below 0 by the length of what the tokenizer
        put before the text.
      echo_only: outputs are that and nothing else.
    """

    first_choice: int
    given: str | tuple[int, ...] | tuple[Message, ...]
    echo: str = ""
    echo_start: int = 0
    echo_only: bool = False


class Outputs:
    """The outputs of one prompt, as pieces of choices.

    Args:
      prompt: whose.
      tokenizer: of the model.
      has_logprobs: whether tokens and their log-probabilities are wanted.
      skip_special_tokens: they are no part of the text.
    """

    def __init__(
        self, prompt: Prompt, tokenizer: Tokenizer, has_logprobs: bool, skip_special_tokens: bool
    ):
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._skip = skip_special_tokens
        self._offsets: dict[int, Offsets] = {}
        self._echoed: list[Entry] = []
        self._usages: dict[int, Usage] = {}  # by output

    def pieces(self, delta: Delta) -> list[tuple[int, Piece]]:
        """Choices' indices and what a delta adds to each; the prompt's text comes first."""
        prompt, index = self._prompt, self._prompt.first_choice + delta.index
        reason = None if delta.finish_reason is None else str(delta.finish_reason)
        is_first = delta.index not in self._usages
        self._usages[delta.index] = delta.usage
        pieces = []
        if is_first and prompt.echo:
            if delta.index == 0:  # the first to come; it brings the prompt's log-probabilities
                self._echoed = self._prompt_entries(delta)
            ends = "length" if prompt.echo_only else None
            pieces.append((index, Piece(prompt.echo, self._echoed, ends)))
        if prompt.echo_only:
            return pieces
        entries = self._entries(delta) if self._has_logprobs else []
        if delta.text or entries or reason:
            pieces.append((index, Piece(delta.text, entries, reason, delta.stop_reason)))
        return pieces

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens of the prompt, those of them that came from the cache, and of all outputs."""
        last = list(self._usages.values())
        tokens = 0 if self._prompt.echo_only else sum(each.completion_tokens for each in last)
        return last[0].prompt_tokens, last[0].cached_tokens, tokens

    def _prompt_entries(self, delta: Delta) -> list[Entry]:
        if not self._has_logprobs:
            return []
        ids = self._ids
        offsets = Offsets(self._tokenizer, (), self._prompt.echo_start, skip_special_tokens=False)
        first = Entry(ids[0], None, (), offsets.take(ids[0]))
        return [first, *offsets.entries(delta.prompt_logprobs)]

    def _entries(self, delta: Delta) -> list[Entry]:
        if delta.index not in self._offsets:
            start = len(self._prompt.echo)
            self._offsets[delta.index] = Offsets(self._tokenizer, self._ids, start, self._skip)
        return self._offsets[delta.index].entries(delta.logprobs)

    @property
    def _ids(self) -> tuple[int, ...]:
        given: Any = self._prompt.given
        return given if isinstance(given[0], int) else ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """The JSON of one answer.

    Attributes:
      name: of the request, of which the answer's `id` is made.
      model: as the client knows it.
      tokenizer: names tokens.
      has_logprobs: whether choices have log-probabilities.
      created: Unix time in seconds.
    """

    name: str
    model: str
    tokenizer: Tokenizer
    has_logprobs: bool
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    operation = "text_completion"
    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    @property
    def id(self) -> str:
        """What the client knows it by."""
        return f"{self.prefix}-{self.name}"

    def whole(self, choices: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer: of each choice, all its pieces, put together."""
        whole = [
            self.choice(
                index,
                Piece(
                    "".join(piece.text for piece in pieces),
                    [entry for piece in pieces for entry in piece.entries],
                    pieces[-1].finish_reason,
                    pieces[-1].stop_reason,
                ),
            )
            for index, pieces in enumerate(choices)
        ]
        return self._about(self.kind) | {"choices": whole, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """An event of the stream."""
        return self._about(self.chunk_kind) | {"choices": choices} | fields

    def piece(self, index: int, piece: Piece, **fields: Any) -> dict[str, Any]:
        """An event with a piece of one choice."""
        return self.chunk([self.part(index, piece)], **fields)

    def openings(self, num_choices: int) -> Iterable[dict[str, Any]]:
        """What a stream begins with: one choice each."""
        return ()

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice, as a whole answer has it."""
        return self._choice(index, piece, {"text": piece.text})

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice, as a stream has it."""
        return self._choice(index, piece, {"text": piece.text})

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """The log-probabilities of a piece."""
        return completion_logprobs(self.tokenizer, piece.entries) if self.has_logprobs else None

    def _choice(self, index: int, piece: Piece, contents: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": index,
            **contents,
            "logprobs": self.logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _about(self, kind: str) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created}
        return about | {"model": self.model}


@dataclasses.dataclass(frozen=True)
class ChatAnswer(Answer):
    """The JSON of one answer in a chat."""

    operation = "chat"
    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def openings(self, num_choices: int) -> Iterable[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        for index in range(num_choices):
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, piece, {"message": message})

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece, {"delta": {"content": piece.text} if piece.text else {}})

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        return chat_logprobs(self.tokenizer, piece.entries) if self.has_logprobs else None


def usage_json(outputs: Iterable[Outputs]) -> dict[str, Any]:
    """Counts of all prompts of a request together."""
    prompt, cached, completion = map(sum, zip(*(each.counts for each in outputs), strict=True))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
