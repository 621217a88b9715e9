"""The soak's verdict: a run that shows anything other than what it is there to show fails."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.soak import Output, broken_bounds, make_cases
from engine.types import TokenLogprobs

GOOD: dict[str, Any] = {
    "seconds": 720.0,
    "calls": {"read": 18000, "read: INTERNAL": 400, "abort: UNAVAILABLE": 200},
    "injected": {"failed steps": 127, "hung steps": 12},
    "least_whole_answers_of_a_case": 90,
    "num_wrong": 0,
    "preemptions": 60,
    "swapped_in_blocks": 7000,
    "compiles_after_warmup": 0,
    "failed_steps": 139,
    "rss_rise_mib": 0.3,
    "threads": (81, 83),
    "descriptors": (24, 26),
    "blocks_left": 0,
    "sequences_left": 0,
}


def test_a_run_as_it_should_be_is_passed() -> None:
    assert broken_bounds(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_wrong": 1}, "1 answers are wrong or lost"),
        ({"least_whole_answers_of_a_case": 11}, "11 whole answers of some case were compared"),
        ({"rss_rise_mib": 9.0}, "memory rose by 9.0 MiB"),
        ({"threads": (81, 162)}, "threads went from 81 to 162"),
        ({"descriptors": (24, 30)}, "descriptors went from 24 to 30"),
        ({"blocks_left": 1}, "1 blocks and 0 sequences are left"),
        ({"sequences_left": 2}, "0 blocks and 2 sequences are left"),
        ({"compiles_after_warmup": 1}, "1 programs were compiled"),
        ({"failed_steps": 138}, "138 steps failed, and 139 were made to"),
        ({"failed_steps": 300}, "300 steps failed"),
        ({"calls": {"read": 18000, "read: INTERNAL": 4}}, "0 times to wait"),
        ({"calls": {"read": 18000, "read: UNAVAILABLE": 4}}, "0 failed steps"),
        ({"injected": {"failed steps": 139}}, "must fail and hang"),
        ({"preemptions": 0}, "nothing was preempted"),
        ({"swapped_in_blocks": 0}, "no block came back"),
    ],
)
def test_each_figure_has_a_bound(changes: dict[str, Any], words: str) -> None:
    [found] = broken_bounds(GOOD | changes)
    assert words in found


def test_a_server_that_refuses_everything_is_not_passed() -> None:
    calls = {"read: RESOURCE_EXHAUSTED": 20_000}
    broken = broken_bounds(GOOD | {"calls": calls, "least_whole_answers_of_a_case": 0})
    assert any("0 whole answers" in words for words in broken)


def test_memory_is_judged_after_a_warm_up_only() -> None:
    assert broken_bounds(GOOD | {"seconds": 90.0, "rss_rise_mib": 99.0, "preemptions": 0}) == []


def test_outputs_are_compared_in_full() -> None:
    logprobs = tuple(TokenLogprobs(token, -0.5, ((token, -0.5), (9, -2.0))) for token in (1, 2, 3))
    right = Output((1, 2, 3), "abc", logprobs)

    def problem(tokens: tuple[int, ...], text: str, count: int, *, is_whole: bool) -> str | None:
        return Output(tokens, text, logprobs[:count]).problem(right, is_whole=is_whole)

    assert problem((1, 2, 3), "abc", 3, is_whole=True) is None
    assert problem((1, 2), "a", 2, is_whole=False) is None
    assert problem((), "", 0, is_whole=False) is None
    assert problem((1, 2), "ab", 2, is_whole=True)
    assert problem((1, 3), "ab", 2, is_whole=False)
    assert problem((1, 2, 3, 3), "abcc", 3, is_whole=False)
    assert problem((1, 2, 3), "ab", 3, is_whole=True)
    assert problem((1, 2, 3), "abc", 2, is_whole=True)
    for other, is_near in ((-0.5002, True), (-0.51, False), (-2.0, False)):
        found = (*logprobs[:2], TokenLogprobs(3, -0.5, ((3, other), (9, -2.0))))
        difference = Output((1, 2, 3), "abc", found).problem(right, is_whole=True)
        assert (difference is None) is is_near


def test_the_load_has_every_kind_of_request() -> None:
    cases = make_cases(random.Random(0), 96)
    assert {case.number for case in cases} == set(range(96))
    for field in ("constraint", "stop", "stop_token_ids", "logprobs"):
        assert any(getattr(case.sampling, field) for case in cases), field
