"""`octavo generate`: JSON lines in, JSON lines out, in order and all or nothing.

A line that can't be served becomes a line with an error; the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import msgspec

from engine.sampling import SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM, AnyPrompt, Completion

_SAMPLING_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
# What a prompt consists of, and how to call that.
_PROMPT_FIELDS: dict[str, tuple[type, str]] = {
    "prompt": (str, "a text"),
    "prompt_ids": (int, "a list of token ids"),
    "messages": (dict, "a list of objects with a role and a content"),
}


class Line(NamedTuple):
    """One request of a file: where it stands, its own index, and what it asks for."""

    number: int
    index: int
    prompt: AnyPrompt
    sampling: SamplingParams


class LineError(ValueError):
    """A line that is no request. `index` is which one it would be."""

    def __init__(self, index: int, message: str):
        super().__init__(message)
        self.index = index


def generate_file(
    load: Callable[[], LLM],
    source: Path,
    output: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Generate for every line of a file.

    Args:
      load: gives what generates. It is called once the files have been opened, because it
        takes long.
      source: JSON lines, or `-` for standard input; see `parse_line`.
      output: written whole at the end, so it is never half there.
      progress: called with (what is being done, done, in all).

    Returns:
      0, or 1 if any line failed.

    Raises:
      OSError: a file can't be read or written.
    """
    lines = read_lines(source)
    results: list[dict[str, Any]] = [line if isinstance(line, dict) else {} for line in lines]
    requests = {place: line for place, line in enumerate(lines) if isinstance(line, Line)}
    places = list(requests)
    done = len(lines) - len(requests)
    with replacing(output) as file:
        with load() as llm:
            asked = ((line.prompt, line.sampling) for line in requests.values())
            for number, result in llm.generate_each(asked):
                place = places[number]
                results[place] = as_line(requests[place].index, result)
                done += 1
                if progress:
                    progress("Generating", done, len(lines))
        file.writelines(msgspec.json.encode(result) + b"\n" for result in results)
    failed = [result for result in results if "error" in result]
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
        except LineError as error:
            lines.append({"index": error.index, "error": f"line {number}: {error}"})
    return lines


def parse_line(text: bytes, number: int, index: int) -> Line:
    """Read one request.

    Args:
      text: JSON with exactly one of `prompt`, `prompt_ids` and `messages`, any field of
        `SamplingParams`, and perhaps an `index` of its own. The text of a constraint may be an
        object, a JSON schema that is not written as text.
      number: of the line in its file.
      index: which request it is, if it doesn't say.

    Raises:
      LineError: it is no such JSON; the message says what is wrong.
    """
    try:
        tree = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineError(index, f"not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise LineError(index, "must be a JSON object")
    own_index = tree.pop("index", index)
    if type(own_index) is not int or not -(2**63) <= own_index < 2**63:
        raise LineError(index, f"index is {own_index!r:.40}; it must be a whole number")
    given = [field for field in _PROMPT_FIELDS if field in tree]
    if len(given) != 1:
        raise LineError(own_index, f"needs exactly one of {', '.join(_PROMPT_FIELDS)}")
    unknown = tree.keys() - _SAMPLING_FIELDS - {given[0]}
    if unknown:
        raise LineError(own_index, f"unknown field {min(unknown)!r:.40}")
    prompt = tree.pop(given[0])
    kind, what = _PROMPT_FIELDS[given[0]]
    if kind is str:
        is_right = isinstance(prompt, str)
    else:
        is_right = isinstance(prompt, list) and all(type(item) is kind for item in prompt)
    if not is_right:
        raise LineError(own_index, f"{given[0]} must be {what}")
    constraint = tree.get("constraint")
    if isinstance(constraint, dict) and isinstance(schema := constraint.get("text"), dict):
        constraint["text"] = msgspec.json.encode(schema).decode()  # written out as it is
    try:
        sampling = msgspec.convert(tree, SamplingParams)
    except msgspec.ValidationError as error:
        raise LineError(own_index, str(error)) from None
    return Line(number, own_index, prompt, sampling)


def as_line(index: int, result: Completion | Exception) -> dict[str, Any]:
    """What is written for a result."""
    if isinstance(result, Exception):
        return {"index": index, "error": str(result)}
    line = {
        "index": index,
        **_sample(result),
        "prompt_tokens": result.usage.prompt_tokens,
        "cached_tokens": result.usage.cached_tokens,
    }
    if result.others:
        line["others"] = [_sample(other) for other in result.others]
    return line


def _sample(result: Completion) -> dict[str, Any]:
    line: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason.value,
    }
    if result.beam is not None:
        line["beam"] = result.beam._asdict()
    for name in ("logprobs", "prompt_logprobs"):
        if entries := getattr(result, name):
            line[name] = [entry._asdict() for entry in entries]
    return line


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `output` if the block ends without an error."""
    target = output.resolve()  # what a link points to is replaced, not the link
    in_place = target.exists() and not target.is_file()  # a pipe, or a device
    # A name of its own, created exclusively: neither another run nor a planted link shares it.
    partial = target if in_place else target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(partial, "wb" if in_place else "xb") as file:
            yield file
        if not in_place:
            os.replace(partial, target)
    except BaseException as error:
        if not in_place:
            with contextlib.suppress(OSError):
                partial.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(output)) from None
        raise
