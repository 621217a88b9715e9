"""Streams: those drawn like ShareGPT, and those read from a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.simulate.stream import (
    FIRST_ANSWERS,
    FIRST_PROMPTS,
    LAST_TURN,
    LATER_ANSWERS,
    LATER_PROMPTS,
    NO_SYSTEM,
    Lengths,
    sharegpt_like,
)
from engine.simulate.trace import MAX_LINE_BYTES, read_trace


def test_a_stream_has_the_lengths_of_sharegpt() -> None:
    stream = sharegpt_like(200_000, seed=4)
    quantiles = np.quantile(stream.prompt_tokens, (0.1, 0.5, 0.9, 0.99))
    np.testing.assert_allclose(quantiles, (8, 34, 794, 3405), rtol=0.06)
    quantiles = np.quantile(stream.output_tokens, (0.1, 0.5, 0.9, 0.99))
    np.testing.assert_allclose(quantiles, (35, 256, 616, 930), rtol=0.06)


@pytest.mark.parametrize(
    ("lengths", "mean"),
    # Means over the data set, without the longest thousandth; the fit knows its quantiles only.
    [
        (FIRST_PROMPTS, 266),
        (FIRST_ANSWERS, 292),
        (LATER_PROMPTS, 49),
        (LATER_ANSWERS, 280),
    ],
)
def test_the_fit_has_the_means_of_the_data(lengths: Lengths, mean: float) -> None:
    assert lengths.at(np.linspace(0, 0.999, 100_001)).mean() == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("lengths", [FIRST_PROMPTS, FIRST_ANSWERS, LATER_PROMPTS, LATER_ANSWERS])
def test_a_fit_is_a_distribution(lengths: Lengths) -> None:
    assert len(lengths.shares) == len(lengths.tokens)
    assert (lengths.shares[0], lengths.shares[-1]) == (0, 1)
    assert list(lengths.shares) == sorted(set(lengths.shares))
    assert list(lengths.tokens) == sorted(lengths.tokens)
    assert lengths.tokens[0] >= 1


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    stream = sharegpt_like(50_000, rate=8.0, seed=1)
    gaps = np.diff(stream.arrival_s)
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.03)  # an exponential's is its mean
    assert (sharegpt_like(10, seed=1).arrival_s == 0).all()


def test_turns_repeat_what_was_said_and_keep_the_rate_of_requests() -> None:
    stream = sharegpt_like(30_000, rate=10.0, turns=3.4, seed=6)
    assert len(stream) / (stream.conversation[-1] + 1) == pytest.approx(3.4, rel=0.03)
    assert len(stream) / stream.arrival_s.max() == pytest.approx(10.0, rel=0.05)
    later = np.flatnonzero(stream.next_turn != LAST_TURN)
    following = stream.next_turn[later]
    assert (stream.conversation[later] == stream.conversation[following]).all()
    said = stream.prompt_tokens[later] + stream.output_tokens[later]
    own = stream.prompt_tokens[following] - said
    assert own.min() >= 1
    assert np.median(own) == pytest.approx(16, abs=1)
    assert stream.has_conversations
    assert set(stream.first_turns) == set(range(len(stream))) - set(following)


def test_some_conversations_begin_with_a_system_prompt_and_are_else_the_same() -> None:
    options: dict[str, Any] = {"rate": 10.0, "turns": 3.4, "seed": 6}
    plain = sharegpt_like(20_000, **options)
    stream = sharegpt_like(
        20_000, **options, system_share=0.4, system_tokens=300, num_system_prompts=3
    )
    assert plain.system is None
    assert stream.system is not None
    number, tokens = stream.system
    assert (tokens == np.where(number == NO_SYSTEM, 0, 300)).all()
    assert (stream.prompt_tokens == plain.prompt_tokens + tokens).all()
    assert (stream.output_tokens == plain.output_tokens).all()
    by_conversation = number[np.flatnonzero(np.diff(stream.conversation, prepend=-1))]
    assert (by_conversation[stream.conversation] == number).all()  # each keeps its own
    assert np.mean(by_conversation != NO_SYSTEM) == pytest.approx(0.4, abs=0.02)
    counts = np.bincount(by_conversation[by_conversation != NO_SYSTEM])
    np.testing.assert_allclose(counts / counts[0], (1, 1 / 2, 1 / 3), rtol=0.1)


def test_a_seed_names_a_stream() -> None:
    one, same, other = (sharegpt_like(100, rate=1.0, turns=2, seed=seed) for seed in (5, 5, 6))
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "next_turn", "think_s"):
        assert (getattr(one, name) == getattr(same, name)).all()
    assert (one.prompt_tokens != other.prompt_tokens).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_requests": 0}, "requests is 0"),
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"turns": 0.5}, "turns is 0.5"),
        ({"think_s": -1.0}, "think_s is -1"),
        ({"system_share": 1.5}, "system_share is 1.5"),
        ({"system_share": float("nan")}, "system_share is nan"),
        ({"system_tokens": 0}, "system_tokens is 0"),
        ({"num_system_prompts": 0}, "system_prompts is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_stream_refuses_numbers_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharegpt_like(**{"num_requests": 10, **options})  # type: ignore[arg-type]


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_trace_is_read_in_the_order_of_arrival(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "trace.jsonl",
        '{"arrival": 2.5, "prompt_tokens": 30, "output_tokens": 3, "conversation": "x"}',
        "",
        '{"arrival": 1, "prompt_tokens": 7, "output_tokens": 9}',
        '{"arrival": 0.5, "prompt_tokens": 10, "output_tokens": 5, "conversation": "x"}',
        '{"arrival": 1, "prompt_tokens": 8, "output_tokens": 9}',
    )
    stream = read_trace(path)
    assert stream.arrival_s.tolist() == [0.5, 1.0, 1.0, 2.5]
    assert stream.prompt_tokens.tolist() == [10, 7, 8, 30]
    assert stream.output_tokens.tolist() == [5, 9, 9, 3]
    assert stream.next_turn.tolist() == [3, LAST_TURN, LAST_TURN, LAST_TURN]
    assert stream.conversation[0] == stream.conversation[3]
    assert len(set(stream.conversation.tolist())) == 3
    assert stream.first_turns.tolist() == [0, 1, 2]


GOOD = '{"arrival": 0, "prompt_tokens": 10, "output_tokens": 5}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "truncated"),
        ("[1, 2]", "Expected `object`"),
        ('{"arrival": 0, "prompt_tokens": 10}', "missing required field `output_tokens`"),
        (GOOD[:-1] + ', "prompt": "hi"}', "unknown field `prompt`"),
        (GOOD.replace("10", "0"), r">= 1.*prompt_tokens"),
        (GOOD.replace("10", "1.5"), r"Expected `int`.*prompt_tokens"),
        (GOOD.replace("10", "4294967296"), r"prompt_tokens"),
        (GOOD.replace('": 0', '": -1'), r">= 0.*arrival"),
        (GOOD.replace('": 0', '": NaN'), "malformed"),
        (GOOD.replace('": 0', '": 1e999'), "arrival|out of range"),
        (GOOD[:-1] + ', "conversation": ""}', "conversation"),
        (GOOD[:-1] + ', "conversation": "' + "x" * MAX_LINE_BYTES + '"}', "longer than"),
        ("\udcff", "malformed|UTF-8|invalid"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(f"{GOOD}\n{line}\n{GOOD}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"trace.jsonl:2: .*({message})"):
        read_trace(path)


def test_many_bad_lines_are_cut_short(tmp_path: Path) -> None:
    path = _write(tmp_path / "trace.jsonl", *["{"] * 1000)
    with pytest.raises(ValueError, match="and more") as caught:
        read_trace(path)
    assert len(str(caught.value).splitlines()) == 11


def test_an_empty_trace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no requests"):
        read_trace(_write(tmp_path / "trace.jsonl", "", " "))


def test_a_turn_must_repeat_what_was_said(tmp_path: Path) -> None:
    first = '{"arrival": 0, "prompt_tokens": 10, "output_tokens": 5, "conversation": "x"}'
    second = '{"arrival": 9, "prompt_tokens": 15, "output_tokens": 5, "conversation": "x"}'
    with pytest.raises(ValueError, match=r"trace.jsonl:2: prompt_tokens is 15.*'x' has 15.*line 1"):
        read_trace(_write(tmp_path / "trace.jsonl", first, second))
    read_trace(_write(tmp_path / "trace.jsonl", first, second.replace("15", "16")))
