"""Several samples of one prompt on a real model: they share its blocks, and are what each alone
would be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import BucketConfig, SchedulerConfig
from engine.sampling import SamplingParams
from engine.types import Fork, Request, StepPlan
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.runtime.tiny import random_ids

BLOCK_SIZE = 16
NUM_SAMPLES = 8


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> SmallEngine:
    return small_engine(
        tiny_model,
        num_blocks=800,
        block_size=BLOCK_SIZE,
        max_model_len=1200,
        config=SchedulerConfig(max_num_seqs=NUM_SAMPLES, max_step_tokens=512),
        buckets=BucketConfig(decode_seqs=(8,), prefill_tokens=(512,), prefill_seqs=(8,)),
    )


def samples(prompt: tuple[int, ...], count: int, max_tokens: int, **fields: Any) -> Request:
    """One request for many samples; sample i has the seed 100 + i."""
    request = make_request("s0", prompt, max_tokens, seed=100, **fields)
    forks = tuple(Fork(f"s{index}", 100 + index) for index in range(1, count))
    return dataclasses.replace(request, forks=forks)


def alone(engine: SmallEngine, request: Request) -> dict[str, Result]:
    """Each sample as a request of its own, in an engine that has nothing else to do."""
    requests = [dataclasses.replace(request, forks=()), *map(request.fork, request.forks)]
    return {each.request_id: engine.run_one(each) for each in requests}


FIELDS: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 1.0},
    "edited": {"temperature": 0.9, "presence_penalty": 0.7, "bad_words": (), "top_k": 40},
    "with log-probabilities": {"temperature": 1.0, "logprobs": 3, "prompt_logprobs": 1},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("length", [1, 15, 16, 1000], ids="prompt of {}".format)
def test_samples_are_what_separate_requests_with_their_seeds_give(
    length: int, fields: dict[str, Any], engine: SmallEngine
) -> None:
    request = samples(random_ids(length), NUM_SAMPLES, 20, **fields, ignore_eos=True)
    together, separate = engine.run([request]), alone(engine, request)
    assert together.keys() == separate.keys()
    for name, result in together.items():
        expected = separate[name]
        assert result.token_ids == expected.token_ids, name
        assert result.finish_reason is expected.finish_reason
        for ours, theirs in (
            (result.logprobs, expected.logprobs),
            (result.prompt_logprobs, expected.prompt_logprobs),
        ):
            np.testing.assert_allclose(
                [entry.logprob for entry in ours], [entry.logprob for entry in theirs], atol=2e-5
            )
    assert len({result.token_ids for result in together.values()}) > 1


def test_eight_samples_of_a_long_prompt_take_little_more_than_one(engine: SmallEngine) -> None:
    """The least that blocks allow: the prompt once, and a copy of its last block for each."""
    owned: dict[int, list[int]] = {}
    copies: list[int] = []
    for count in (1, NUM_SAMPLES):
        blocks = owned.setdefault(count, [])

        def on_plan(plan: StepPlan, _: object, blocks: list[int] = blocks) -> None:
            blocks.append(len({block for row in plan.rows for block in row.block_ids.tolist()}))
            copies.append(len(plan.block_copies))

        engine.run([samples(random_ids(1000), count, 4, temperature=1.0)], on_plan=on_plan)
    prompt_blocks = -(-1000 // BLOCK_SIZE)
    assert owned[1] == [32, prompt_blocks, prompt_blocks, prompt_blocks, prompt_blocks]
    assert owned[NUM_SAMPLES][1] == prompt_blocks
    assert owned[NUM_SAMPLES][2] == prompt_blocks + NUM_SAMPLES - 1 < 1.3 * owned[1][2]
    assert [count for count in copies if count] == [NUM_SAMPLES - 1]


def test_samples_that_are_preempted_give_the_same(engine: SmallEngine) -> None:
    request = samples(random_ids(40), 6, 60, temperature=1.0, ignore_eos=True)
    other = make_request("other", random_ids(30, seed=1), 50, ignore_eos=True, priority=-1)
    expected = {**alone(engine, request), "other": engine.run_one(other)}
    preempted: set[str] = set()
    found = engine.run(
        [request, other],
        limits=dataclasses.replace(engine.limits, num_blocks=14),
        on_plan=lambda plan, _: preempted.update(plan.preempted),
    )
    assert len(preempted) > 2
    for name, result in found.items():
        assert result.token_ids == expected[name].token_ids, name


def test_a_fork_asks_for_no_log_probabilities_of_the_prompt() -> None:
    request = samples((1, 2), 2, 3, prompt_logprobs=1)
    fork = request.fork(request.forks[0])
    assert fork.sampling == SamplingParams(temperature=0.0)
    assert (fork.request_id, fork.seed, fork.forks) == ("s1", 101, ())
