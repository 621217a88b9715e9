"""Beam search on the tiny models: what transformers' finds, and what plain forward passes say."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from engine.config import Architecture, BucketConfig, SchedulerConfig
from engine.types import Fork, Request, StepPlan
from engine.weights import open_checkpoint
from tests.conftest import DATA
from tests.core.beam_oracle import Found, Search, Tokens
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.model.goldens import golden
from tests.model.numpy_llama import forward
from tests.runtime.tiny import random_ids
from tests.weights.checkpoints import read_all

# Sums of a dozen log-probabilities, from forward passes that add up in different orders.
TOLERANCE = 1e-4
MODEL = DATA / "tiny" / "llama"
CASES = json.loads((DATA / "beams.json").read_text())["cases"]


def engine(name: str = "llama") -> SmallEngine:
    return small_engine(
        DATA / "tiny" / name,
        num_blocks=192,
        config=SchedulerConfig(max_num_seqs=20, max_step_tokens=64),
        buckets=BucketConfig(decode_seqs=(20,), prefill_tokens=(64,), prefill_seqs=(20,)),
    )


def beams(name: str, prompt: Iterable[int], width: int, max_tokens: int, **fields: Any) -> Request:
    """A request for that many beams, all of which are returned."""
    forks = tuple(Fork(f"{name}.{index}", 0) for index in range(1, width))
    fields = {"n": width, "beam_width": width, "forks": forks, **fields}
    return make_request(name, prompt, max_tokens, **fields)


def found(request: Request, results: dict[str, Result]) -> list[Found]:
    """What came out for a request, best first."""
    outputs = []
    for name in request.replies:
        result = results[name]
        assert result.beam is not None
        outputs.append(Found(result.token_ids, result.beam.logprob, result.beam.score))
    return outputs


def assert_same(ours: list[Found], theirs: list[Found]) -> None:
    assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]
    for kind in ("logprob", "score"):
        np.testing.assert_allclose(
            [getattr(each, kind) for each in ours],
            [getattr(each, kind) for each in theirs],
            atol=TOLERANCE,
        )


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_beams_are_those_of_transformers(name: str) -> None:
    """All searches of a model at once, so that they also share the engine with each other."""
    cases = [case for case in CASES if case["model"] == name]
    requests = [
        beams(
            f"case {index}",
            case["prompt_ids"],
            case["beam_width"],
            case["max_tokens"],
            stop_ids=frozenset(case["stop_ids"]),
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
        )
        for index, case in enumerate(cases)
    ]
    limits = dataclasses.replace(engine(name).limits, max_waiting=1000)
    results = engine(name).run(requests, limits=limits)
    assert len(cases) > 40
    for case, request in zip(cases, requests, strict=True):
        outputs = found(request, results)
        wanted = [tuple(each["token_ids"]) for each in case["found"]]
        assert [each.token_ids for each in outputs] == wanted, case
        np.testing.assert_allclose(
            [each.score for each in outputs],
            [each["score"] for each in case["found"]],
            atol=TOLERANCE,
        )


@functools.cache
def model() -> tuple[Architecture, dict[str, np.ndarray]]:
    checkpoint = open_checkpoint(MODEL)
    return checkpoint.architecture, read_all(checkpoint)


@functools.cache
def plain_forward(context: Tokens) -> np.ndarray:
    """Log-probabilities after these tokens, without a cache: float64[V]."""
    logits = forward(*model(), np.array(context))[-1]
    logits = logits.astype(np.float64)
    return logits - np.log(np.sum(np.exp(logits)))


def search(request: Request, width: int | None = None) -> Search:
    sampling = request.sampling
    return Search(
        width or sampling.beam_width,
        request.max_tokens,
        request.stop_ids,
        sampling.length_penalty,
        sampling.early_stopping,
    )


def expected(request: Request) -> list[Found]:
    """By an independent search over plain forward passes."""
    outputs, _ = search(request).run(lambda output: plain_forward(request.prompt_ids + output))
    return outputs


SEARCHES: list[dict[str, Any]] = [
    {"width": 2},
    {"width": 5, "length_penalty": 0.3},
    {"width": 4, "stop_ids": frozenset(range(0, 128, 9)), "length_penalty": -1.0},
    {"width": 4, "stop_ids": frozenset(range(0, 128, 9)), "early_stopping": True},
    {"width": 20},
]


@pytest.mark.parametrize("length", [1, 7, 8, 30])
def test_beams_are_those_of_a_search_by_plain_forward_passes(length: int) -> None:
    prompt = tuple(token % 128 for token in random_ids(length))
    requests = [
        beams(f"{index}", prompt, max_tokens=9, **fields) for index, fields in enumerate(SEARCHES)
    ]
    results = engine().run(requests)
    for request in requests:
        assert_same(found(request, results), expected(request))


def test_a_wide_search_finds_the_best_of_all_outputs() -> None:
    """Of the 16,384 outputs of two tokens, twenty beams miss none of the best five here."""
    request = beams("a", golden("llama")["greedy_prompt"], 20, max_tokens=2)
    every = search(request, 5).exhaust(lambda output: plain_forward(request.prompt_ids + output))
    assert_same(found(request, engine().run([request]))[:5], every)


def test_beams_that_are_preempted_find_the_same() -> None:
    prompts = [tuple(token % 128 for token in random_ids(20, seed)) for seed in range(3)]
    requests = [
        beams("a", prompts[0], 4, 24),
        make_request("plain", prompts[1], 40, priority=-1, ignore_eos=True),
        beams("b", prompts[2], 3, 24, length_penalty=0.5),
    ]
    alone = [engine().run([request]) for request in requests]
    lost: list[str] = []

    def on_plan(plan: StepPlan, _: object) -> None:
        lost.extend(plan.preempted)

    limits = dataclasses.replace(engine().limits, num_blocks=18)
    results = engine().run(requests, limits=limits, on_plan=on_plan)
    assert {"b", "b.1", "b.2"} <= set(lost)
    assert results["plain"].token_ids == alone[1]["plain"].token_ids
    for request, result in zip(requests[::2], alone[::2], strict=True):
        assert_same(found(request, results), found(request, result))
