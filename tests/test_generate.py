"""`octavo generate`: good lines, bad lines, and a file that is whole or not there."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.frontend import Usage
from engine.generate import Line, LineError, generate_file, parse_line, read_lines
from engine.llm import LLM, Completion
from engine.sampling import Constraint, InvalidRequest, SamplingParams
from engine.types import FinishReason, TokenLogprobs


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


class FakeLLM:
    """Answers in reverse order; refuses prompts that say so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.is_closed = False

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def generate_each(self, requests: Any) -> Iterator[tuple[int, Completion | Exception]]:
        self.asked = list(requests)
        for index in reversed(range(len(self.asked))):
            prompt, sampling = self.asked[index]
            if prompt == "refuse":
                yield index, InvalidRequest("prompt", "is refused")
            elif prompt == "crash":
                yield index, KeyError("a bug")
            else:
                yield index, completion(str(prompt), sampling)


def completion(text: str, sampling: SamplingParams) -> Completion:
    entry = TokenLogprobs(5, -0.25, ((5, -0.25), (6, -1.5)))
    return Completion(
        text=text,
        token_ids=(5, 6),
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
        usage=Usage(3, 1, 2),
        logprobs=(entry,) * 2 if sampling.logprobs is not None else (),
        prompt_logprobs=(entry,) if sampling.prompt_logprobs is not None else (),
    )


def run(source: Path, output: Path, **options: Any) -> tuple[int, FakeLLM]:
    llm = FakeLLM()
    code = generate_file(lambda: llm, source, output, **options)  # type: ignore[bad-argument-type]
    assert llm.is_closed
    return code, llm


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.jsonl"


def test_lines_out_follow_lines_in(source: Path, output: Path) -> None:
    lines = [
        line(prompt="one", max_tokens=3),
        line(prompt_ids=[1, 2], temperature=0),
        line(messages=[{"role": "user", "content": "hi"}], stop=["x"], logit_bias=[[3, 1.5]]),
        line(prompt="four", index=-7, logprobs=1, prompt_logprobs=0),
    ]
    source.write_bytes(b"\n".join(lines))
    told: list[tuple[str, int, int]] = []
    code, llm = run(source, output, progress=lambda *step: told.append(step))
    assert code == 0
    assert [prompt for prompt, _ in llm.asked][:2] == ["one", [1, 2]]
    assert llm.asked[0][1] == SamplingParams(max_tokens=3)
    assert llm.asked[2][1] == SamplingParams(stop=("x",), logit_bias=((3, 1.5),))
    plain, _, _, full = read(output)
    assert plain == {
        "index": 0,
        "text": "one",
        "token_ids": [5, 6],
        "finish_reason": "length",
        "prompt_tokens": 3,
        "cached_tokens": 1,
    }
    entry = {"token_id": 5, "logprob": -0.25, "top": [[5, -0.25], [6, -1.5]]}
    assert full == plain | {
        "index": -7,
        "text": "four",
        "logprobs": [entry] * 2,
        "prompt_logprobs": [entry],
    }
    assert [record["index"] for record in read(output)] == [0, 1, 2, -7]
    assert told == [("Generating", done, 4) for done in (1, 2, 3, 4)]


def test_a_bad_line_becomes_an_error_and_the_others_go_on(
    source: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        b"",
        line(prompt="good"),
        b"{not json",
        b"  ",
        line(prompt="x", temperature=-1, index=40),
        line(prompt="refuse", index=41),
        line(prompt="crash"),
        line(prompt="also good"),
    ]
    source.write_bytes(b"\r\n".join(texts))
    code, _ = run(source, output)
    assert code == 1
    good, broken, wrong, refused, crashed, last = read(output)
    assert (good["index"], good["text"]) == (0, "good")
    assert broken["index"] == 1
    assert broken["error"].startswith("line 3: not valid JSON")
    assert wrong == {
        "index": 40,
        "error": "line 5: temperature: -1.0 is not a number in [0, 100]",
    }
    assert refused == {"index": 41, "error": "prompt: is refused"}
    assert crashed["index"] == 4
    assert "a bug" in crashed["error"]
    assert (last["index"], last["text"]) == (5, "also good")
    shown = capsys.readouterr().err
    assert shown.startswith("octavo: 4 of 6 lines failed; first: index 1: line 3: not valid JSON")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b"{}", "needs exactly one of prompt, prompt_ids, messages"),
        (line(prompt="x", prompt_ids=[1]), "needs exactly one of"),
        (line(prompt="x", temprature=1), "unknown field 'temprature'"),
        (line(prompt=["x"]), "prompt must be a text"),
        (line(prompt=None), "prompt must be a text"),
        (line(prompt_ids="abc"), "prompt_ids must be a list of token ids"),
        (line(prompt_ids=[1, True]), "prompt_ids must be a list of token ids"),
        (line(prompt_ids=[1.0]), "prompt_ids must be a list of token ids"),
        (line(prompt_ids=[{"role": "user", "content": "x"}]), "prompt_ids must be a list of"),
        (line(messages=[1, 2]), "messages must be a list of objects with a role and a content"),
        (line(messages="hi"), "messages must be a list of objects"),
        (line(prompt="x", index="1"), "index is '1'; it must be a whole number"),
        (line(prompt="x", index=True), "index is True"),
        (line(prompt="x", index=2**80), "index is 1208925819614629174706176"),
        (line(prompt="x", max_tokens=2.5), "max_tokens"),
        (line(prompt="x", max_tokens=0), "max_tokens: 0 is not a whole number in"),
        (line(prompt="x", top_p="high"), "top_p"),
        (line(prompt="x", stop="word"), "stop"),
        (line(prompt="x", seed=-1), "seed: -1 is not a whole number"),
        (line(prompt="x", logit_bias=[[1, 1], [1, 2]]), "names a token twice"),
        (b'{"prompt": "x", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "not valid JSON"),
        (b'{"prompt_ids": [' + b"9" * 5000 + b"]}", "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_line_that_is_no_request_says_why(text: bytes, message: str) -> None:
    with pytest.raises(LineError) as raised:
        parse_line(text, 1, 0)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300


def test_every_sampling_field_is_read() -> None:
    fields: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": [[1, 2.0]],
        "allowed_token_ids": [1, 2],
        "bad_words": ["no"],
        "stop": ["stop"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "seed": 2**64 - 1,
        "logprobs": 1,
        "prompt_logprobs": 2,
        "skip_special_tokens": False,
        "n": 3,
    }
    beams = {"beam_width": 4, "length_penalty": 0.5, "early_stopping": True}
    known = fields.keys() | beams.keys() | {"constraint"}
    assert known == set(SamplingParams.__dataclass_fields__)
    for given in (fields, beams):
        sampling = parse_line(line(prompt="x", **given), 1, 0).sampling
        for name, value in given.items():
            found = getattr(sampling, name)
            assert json.loads(json.dumps(found)) == value != getattr(SamplingParams(), name), name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"kind": "regex", "text": "[a-z]+"}, Constraint("regex", "[a-z]+")),
        ({"kind": "json_object"}, Constraint("json_object")),
        ({"kind": "choice", "choices": ["a", "b"]}, Constraint("choice", choices=("a", "b"))),
        (
            {"kind": "json_schema", "text": {"type": "object", "maxProperties": 2}},
            Constraint("json_schema", '{"type":"object","maxProperties":2}'),
        ),
    ],
    ids=lambda each: each["kind"] if isinstance(each, dict) else "",
)
def test_a_constraint_is_an_object_and_so_may_its_schema_be(
    given: dict[str, Any], expected: Constraint
) -> None:
    assert parse_line(line(prompt="x", constraint=given), 1, 0).sampling.constraint == expected


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"kind": "regex"}, "constraint.text: is empty, but regex takes one"),
        ({"kind": "poem", "text": "x"}, "Invalid enum value 'poem'"),
        ({"kind": "regex", "text": 5}, "Expected `str`, got `int`"),
        ("[a-z]", "Expected `object"),
    ],
    ids=["empty", "kind", "text", "string"],
)
def test_a_constraint_that_is_none_is_told(given: Any, problem: str) -> None:
    with pytest.raises(LineError, match=re.escape(problem)):
        parse_line(line(prompt="x", constraint=given), 1, 0)


def test_a_dash_is_standard_input(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(line(prompt="one") + b"\n" + line(prompt="two"))

    monkeypatch.setattr("sys.stdin", Stdin)
    code, llm = run(Path("-"), output)
    assert code == 0
    assert [prompt for prompt, _ in llm.asked] == ["one", "two"]


def test_a_file_without_requests_gives_a_file_without_answers(source: Path, output: Path) -> None:
    source.write_bytes(b"\n\n")
    assert run(source, output)[0] == 0
    assert output.read_bytes() == b""


def test_the_numbers_of_lines_and_indices_count_differently(source: Path) -> None:
    source.write_bytes(b"\n" + line(prompt="x") + b"\n\n" + line(prompt="y"))
    first, second = read_lines(source)
    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert (first.number, first.index) == (2, 0)
    assert (second.number, second.index) == (4, 1)


class Broken(FakeLLM):
    """Fails after the first answer."""

    def generate_each(self, requests: Any) -> Iterator[tuple[int, Completion | Exception]]:
        yield from list(super().generate_each(requests))[:1]
        raise RuntimeError("the machine is on fire")


def test_a_run_that_breaks_off_leaves_the_old_output_as_it_was(source: Path, output: Path) -> None:
    source.write_bytes(line(prompt="x") + b"\n" + line(prompt="y"))
    output.write_text("the old one")
    llm = Broken()
    with pytest.raises(RuntimeError, match="on fire"):
        generate_file(lambda: llm, source, output)  # type: ignore[bad-argument-type]
    assert llm.is_closed
    assert output.read_text() == "the old one"
    assert list(output.parent.iterdir()) == [output]


def test_the_output_appears_only_when_it_is_complete(source: Path, output: Path) -> None:
    source.write_bytes(line(prompt="x") + b"\n" + line(prompt="y"))
    seen: list[bool] = []
    run(source, output, progress=lambda *_: seen.append(output.exists()))
    assert seen == [False, False]
    assert list(output.parent.iterdir()) == [output]


def test_what_a_link_points_to_is_replaced_and_not_the_link(source: Path, output: Path) -> None:
    source.write_bytes(line(prompt="x"))
    target = output.with_name("target.jsonl")
    target.write_text("old")
    output.symlink_to(target)
    run(source, output)
    assert output.is_symlink()
    assert read(target)[0]["text"] == "x"


def never() -> LLM:
    raise AssertionError("the model was loaded in vain")


def test_files_that_can_not_be_used_show_before_the_model_is_loaded(
    source: Path, output: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        generate_file(never, source, output)
    assert missing.value.filename == str(source)
    source.write_bytes(line(prompt="x"))
    for wrong, kind in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "no folder" / "out.jsonl", FileNotFoundError),
        (source / "below a file", NotADirectoryError),
        (tmp_path / ("x" * 300), OSError),
    ):
        with pytest.raises(kind) as raised:
            generate_file(never, source, wrong)
        assert raised.value.filename == str(wrong)  # as the user wrote it
        assert raised.value.strerror


def test_a_disk_that_fills_up_is_an_error_of_the_output(source: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    source.write_bytes(line(prompt="x"))
    with pytest.raises(OSError, match="No space left on device") as raised:
        run(source, full)
    assert raised.value.filename == "/dev/full"
    assert full.is_char_device()


def test_a_pipe_is_written_in_place(source: Path) -> None:
    source.write_bytes(line(prompt="x"))
    assert run(source, Path("/dev/null"))[0] == 0
    assert Path("/dev/null").is_char_device()
