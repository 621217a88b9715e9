"""What a runner and `compare` say to each other: a JSON object a line, over the runner's pipes.

The runner says `{"ready": {"version": …}}` when its engine is loaded. It is then sent rounds,
`{"requests": [{"prompt_ids": …, "max_tokens": …}, …]}`, and answers each with a `{"round": …}` of
`Round`'s fields, or with `{"error": …}`. It ends when its standard input does.

Standard library and Python 3.11 only: peers have a virtual environment of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

UNKNOWN = -1  # in the place of a token that came, but whose id was not told

_PR_SET_PDEATHSIG = 1


class ProtocolError(ValueError):
    """A line that is none of the protocol's."""


class Request(NamedTuple):
    """One request of a round: greedy, and no token ends it early."""

    prompt_ids: list[int]
    max_tokens: int


@dataclasses.dataclass
class Answer:
    """What came back for one request. Times are seconds since the round began.

    Attributes:
      arrived: (time, number of tokens) of each delta that had tokens, as its reader got it.
      end: when the reader knew that it was complete.
      token_ids: all generated tokens; some may be `UNKNOWN`.
      text: the same as text.
      prompt_tokens, cached_tokens: of the prompt, and how many of them came from a cache.
      failure: what went wrong, else None.
    """

    arrived: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    end: float = 0.0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    failure: str | None = None


@dataclasses.dataclass
class Round:
    """The answers in the order of the requests, and the seconds from sending to the last end."""

    wall: float
    answers: list[Answer]


def encode_requests(requests: list[Request]) -> str:
    """The line that asks for a round."""
    return json.dumps({"requests": [request._asdict() for request in requests]})


def decode_requests(line: str) -> list[Request]:
    """The requests that such a line asks for."""
    try:
        return [Request(**request) for request in json.loads(line)["requests"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"not a round of requests: {line[:200]!r} ({error})") from None


def decode_reply(line: str) -> dict[str, Any]:
    """A runner's line, with a `Round` in the place of its fields."""
    try:
        reply = json.loads(line)
        (kind,) = reply
        if kind == "round":
            fields = reply["round"]
            answers = [
                Answer(**answer | {"arrived": [(float(t), int(n)) for t, n in answer["arrived"]]})
                for answer in fields["answers"]
            ]
            return {"round": Round(float(fields["wall"]), answers)}
        if kind in ("ready", "error"):
            return reply
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProtocolError(f"not a reply: {line[:200]!r} ({error})") from None
    raise ProtocolError(f"not a reply: {line[:200]!r}")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every runner takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--cores", required=True, help="to run on, such as 0,1")
    return options


def die_with_parent() -> None:
    """End this process with the one that started it: stopped, it would stay for good (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def channel(cores: str) -> Iterator[Channel]:
    """Pin this process to cores and open its end; everything else it prints goes to stderr.

    Call it before anything heavy is imported: thread pools look at the cores when they start.
    """
    if sys.platform == "linux":
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    die_with_parent()
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield Channel(sys.stdin, out)


class Channel:
    """The runner's end."""

    def __init__(self, lines: TextIO, out: TextIO):
        self._lines = lines
        self._out = out

    def serve(self, version: str, run: Callable[[list[Request]], Round]) -> None:
        """Say that the engine is loaded, then run rounds until there are no more."""
        self._say({"ready": {"version": version}})
        for line in self._lines:
            try:
                reply = {"round": dataclasses.asdict(run(decode_requests(line)))}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            self._say(reply)

    def _say(self, reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=self._out, flush=True)
