"""Read a stream of requests from a file: JSON lines, checked one by one.

A line is ``{"arrival": 0.25, "prompt_tokens": 35, "output_tokens": 240}``, and may name a
``"conversation"``, whose later turns begin with all that was said before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from engine.simulate.stream import LAST_TURN, MAX_REQUESTS, Stream

MAX_LINE_BYTES = 4096
MAX_TOKENS = 2**31 - 1
MAX_ARRIVAL_S = 1e9
_MAX_BAD_LINES_SHOWN = 10

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_ARRIVAL_S)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request.

    Attributes:
      arrival: seconds from the start of the trace; lines need not be in order.
      prompt_tokens: with the earlier turns of its conversation.
      output_tokens: of the answer.
      conversation: any name; None for a request of its own. A turn comes when the answer before
        it is complete, if that is later than `arrival`.
    """

    arrival: _Seconds
    prompt_tokens: _Tokens
    output_tokens: _Tokens
    conversation: _Name | None = None


def read_trace(path: Path) -> Stream:
    """Read the requests of a file, in the order of their arrival.

    Raises:
      ValueError: there is no request, or lines are wrong; their numbers are given.
      OSError: the file can't be read.
    """
    decoder = msgspec.json.Decoder(TraceLine)
    lines: list[tuple[int, TraceLine]] = []
    bad: list[str] = []
    with path.open("rb") as file:
        number = 0
        while text := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(text) > MAX_LINE_BYTES:
                bad.append(f"{path}:{number}: is longer than {MAX_LINE_BYTES} bytes")
                break  # where the next line begins is not worth reading on for
            if not text.strip():
                continue
            if len(lines) == MAX_REQUESTS:
                bad.append(f"{path}:{number}: more than {MAX_REQUESTS:,} requests; cut the trace")
                break
            try:
                lines.append((number, decoder.decode(text)))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                bad.append(f"{path}:{number}: {error}")
                if len(bad) > _MAX_BAD_LINES_SHOWN:
                    break
    if not bad and not lines:
        raise ValueError(f"{path} has no requests; write one JSON object a line")
    lines.sort(key=lambda entry: entry[1].arrival)  # stable: equals stay as they are written
    bad += [] if bad else _wrong_turns(path, lines)
    if bad:
        more = ["and more"] if len(bad) > _MAX_BAD_LINES_SHOWN else []
        raise ValueError("\n".join(bad[:_MAX_BAD_LINES_SHOWN] + more))
    return _as_stream([line for _, line in lines])


def _wrong_turns(path: Path, lines: list[tuple[int, TraceLine]]) -> list[str]:
    """What is wrong with conversations: a turn that can't begin with what was said before."""
    bad: list[str] = []
    said: dict[str, tuple[int, int]] = {}  # where a conversation's last turn is, and its tokens
    for number, line in lines:
        if line.conversation is None:
            continue
        before = said.get(line.conversation)
        if before is not None and line.prompt_tokens <= before[1]:
            bad.append(
                f"{path}:{number}: prompt_tokens is {line.prompt_tokens}, but the conversation "
                f"{line.conversation!r:.80} has {before[1]} tokens by then (line {before[0]}), "
                "which its prompt repeats; count them in, or leave out the conversation"
            )
        said[line.conversation] = (number, line.prompt_tokens + line.output_tokens)
    return bad


def _as_stream(lines: list[TraceLine]) -> Stream:
    count = len(lines)
    conversation = np.zeros(count, np.int64)
    next_turn = np.full(count, LAST_TURN)
    numbers: dict[str, int] = {}
    last: dict[str, int] = {}
    num_conversations = 0
    for index, line in enumerate(lines):
        name = line.conversation
        if name is None or name not in numbers:
            conversation[index] = num_conversations
            num_conversations += 1
        if name is None:
            continue
        conversation[index] = numbers.setdefault(name, int(conversation[index]))
        if name in last:
            next_turn[last[name]] = index
        last[name] = index
    return Stream(
        np.array([line.arrival for line in lines], np.float64),
        np.array([line.prompt_tokens for line in lines], np.int64),
        np.array([line.output_tokens for line in lines], np.int64),
        conversation,
        next_turn,
        np.zeros(count),
    )
