"""`octavo generate`: JSON lines in, JSON lines out, in order and all or nothing.

A line that can't be served becomes a line with an error; the others go on.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engine.llm import LLM, AnyPrompt, Completion
from engine.types import InvalidRequest, SamplingParams

_SAMPLING_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
_PROMPT_FIELDS = ("prompt", "prompt_ids", "messages")


class Line(NamedTuple):
    """One request of a file: where it stands, its own index, and what it asks for."""

    number: int
    index: int
    prompt: AnyPrompt
    sampling: SamplingParams


def generate_file(
    llm: LLM, source: Path, output: Path, progress: Callable[[str, int, int], None] | None = None
) -> int:
    """Generate for every line of a file.

    Args:
      llm: what generates.
      source: JSON lines, or `-` for standard input; see `parse_line`.
      output: written whole at the end, so it is never half there.
      progress: called with (what is being done, done, in all).

    Returns:
      0, or 1 if any line failed.
    """
    lines = read_lines(source)
    results: list[dict[str, Any] | None] = [None] * len(lines)
    requests: list[tuple[AnyPrompt, SamplingParams]] = []
    places: list[int] = []
    for place, line in enumerate(lines):
        if isinstance(line, Line):
            requests.append((line.prompt, line.sampling))
            places.append(place)
        else:
            results[place] = line
    done = len(lines) - len(requests)
    for index, result in llm.generate_each(requests):
        place = places[index]
        line = lines[place]
        assert isinstance(line, Line)
        results[place] = as_line(line.index, result)
        done += 1
        if progress:
            progress("Generating", done, len(lines))
    _write_atomically(output, (msgspec.json.encode(result) for result in results))
    failed = [result for result in results if result and "error" in result]
    if failed:
        print(
            f"octavo: {len(failed)} of {len(lines)} lines failed; first: "
            f"index {failed[0]['index']}: {failed[0]['error']}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def read_lines(source: Path) -> list[Line | dict[str, Any]]:
    """Parse a file of requests; a bad line is given as the error line it will become."""
    if str(source) == "-":
        texts = sys.stdin.buffer.read().splitlines()
    else:
        texts = source.read_bytes().splitlines()
    lines: list[Line | dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            lines.append(parse_line(text, number, len(lines)))
        except (ValueError, TypeError) as error:
            lines.append({"index": len(lines), "error": f"line {number}: {error}"})
    return lines


def parse_line(text: bytes, number: int, index: int) -> Line:
    """Read one request.

    Args:
      text: JSON with exactly one of `prompt`, `prompt_ids` and `messages`, any field of
        `SamplingParams`, and perhaps an `index` of its own.
      number: of the line in its file.
      index: which request it is, if it doesn't say.

    Raises:
      ValueError: it is no such JSON; the message says what is wrong.
    """
    try:
        tree = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError("must be a JSON object")
    given = [field for field in _PROMPT_FIELDS if field in tree]
    if len(given) != 1:
        raise ValueError(f"needs exactly one of {', '.join(_PROMPT_FIELDS)}")
    unknown = tree.keys() - _SAMPLING_FIELDS - {given[0], "index"}
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    index = tree.pop("index", index)
    if not isinstance(index, int):
        raise ValueError(f"index is {index!r}; it must be a whole number")
    prompt = tree.pop(given[0])
    if isinstance(prompt, str) != (given[0] == "prompt"):
        kind = "a text" if given[0] == "prompt" else "a list"
        raise ValueError(f"{given[0]} must be {kind}")
    try:
        sampling = msgspec.convert(tree, SamplingParams)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    return Line(number, index, prompt, sampling)


def as_line(index: int, result: Completion | Exception) -> dict[str, Any]:
    """What is written for a result."""
    if isinstance(result, Exception):
        if not isinstance(result, (InvalidRequest, RuntimeError)):
            raise result
        return {"index": index, "error": str(result)}
    line: dict[str, Any] = {
        "index": index,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason.value,
        "prompt_tokens": result.usage.prompt_tokens,
        "cached_tokens": result.usage.cached_tokens,
    }
    for name in ("logprobs", "prompt_logprobs"):
        if entries := getattr(result, name):
            line[name] = [entry._asdict() for entry in entries]
    return line


def _write_atomically(output: Path, lines: Iterator[bytes]) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        with open(partial, "wb") as file:
            for line in lines:
                file.write(line + b"\n")
        os.replace(partial, output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
