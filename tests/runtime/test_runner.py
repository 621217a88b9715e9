"""The runner: warm-up, slots that are used again, resets, and buckets that change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.config import BucketConfig, SchedulerConfig
from engine.core import batching
from engine.core.limits import Limits
from engine.model.prompt_logprobs import ROWS as PROMPT_LOGPROB_ROWS
from engine.runtime import compiles
from engine.sampling import MAX_LOGPROBS
from engine.types import StepPlan
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.runtime.tiny import VOCAB_SIZE, make_runner, random_ids


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> SmallEngine:
    return small_engine(tiny_model)


def test_a_reset_gives_back_an_empty_engine_and_compiles_nothing(engine: SmallEngine) -> None:
    request = make_request("a", random_ids(20), 6, repetition_penalty=1.2)
    before = engine.run_one(request)
    count = compiles.counter()
    engine.runner.reset()
    assert engine.run_one(request) == before
    assert count() == 0


def test_a_slot_that_was_used_before_keeps_nothing(engine: SmallEngine) -> None:
    """Penalties, bias, bad words and bans of the one before would change these outputs."""
    quiet = make_request("quiet", random_ids(7), 10, seed=3)
    edited = make_request("edited", random_ids(7), 10, seed=3, presence_penalty=0.5)
    expected = engine.run_one(quiet), engine.run_one(edited)
    strong = make_request(
        "strong",
        random_ids(30),
        20,
        logit_bias=((1, 80.0),),
        bad_word_ids=((2,), (3, 4)),
        repetition_penalty=50.0,
        frequency_penalty=2.0,
        allowed_token_ids=tuple(range(9)),
        min_tokens=15,
        stop_ids=frozenset({5}),
    )
    assert set(engine.run_one(strong).token_ids) <= set(range(9)) - {2}
    assert (engine.run_one(quiet), engine.run_one(edited)) == expected


def test_warm_up_compiles_every_bucket_and_buckets_change_nothing_but_the_cost(
    engine: SmallEngine,
) -> None:
    runner = make_runner(
        scheduler=SchedulerConfig(max_num_seqs=7, max_step_tokens=48),
        buckets=BucketConfig(decode_seqs=(7,), prefill_tokens=(48,), prefill_seqs=(7,)),
    )
    told: list[tuple[int, int]] = []
    runner.warm_up(lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    shape = runner.shape
    limits = Limits(
        num_blocks=shape.num_blocks,
        block_size=shape.block_size,
        max_num_seqs=7,
        max_step_tokens=48,
        max_model_len=128,
    )
    wide = SmallEngine(engine.checkpoint, runner, limits)
    count = compiles.counter()
    requests = [
        make_request(f"r{number}", random_ids(1 + 11 * number), 8, seed=number, **fields)
        for number, fields in enumerate(
            ({}, {"temperature": 1.0}, {"top_k": 5, "temperature": 2.0}, {"min_p": 0.2})
        )
    ]
    buckets = set()

    def on_plan(plan: StepPlan, _: object) -> None:
        buckets.add(batching.choose_bucket(plan, shape.buckets))

    found = wide.run(requests, on_plan=on_plan)
    assert buckets == set(shape.buckets)
    assert count() == 0
    expected = engine.run(requests)
    assert {name: result.token_ids for name, result in found.items()} == {
        name: result.token_ids for name, result in expected.items()
    }


@pytest.mark.parametrize("length", [1, 2, PROMPT_LOGPROB_ROWS, 31, 33, 70])
def test_prompt_logprobs_are_those_of_the_same_tokens_generated(
    engine: SmallEngine, length: int
) -> None:
    """Chunked or not, position by position: forcing a token gives its log-probability too."""
    prompt = random_ids(length)
    result = engine.run_one(make_request("a", prompt, 1, prompt_logprobs=4))
    assert [entry.token_id for entry in result.prompt_logprobs] == list(prompt[1:])
    for position in sorted({1, length // 2, length - 1} & set(range(1, length))):
        token = prompt[position]
        forced = engine.run_one(
            make_request("b", prompt[:position], 1, logprobs=4, allowed_token_ids=(token,))
        )
        [expected] = forced.logprobs
        found = result.prompt_logprobs[position - 1]
        assert found.token_id == expected.token_id == token
        assert [i for i, _ in found.top] == [i for i, _ in expected.top]
        ours = [found.logprob, *(value for _, value in found.top)]
        theirs = [expected.logprob, *(value for _, value in expected.top)]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, MAX_LOGPROBS])
def test_as_many_log_probabilities_come_as_were_asked_for(engine: SmallEngine, count: int) -> None:
    request = make_request("a", random_ids(5), 3, logprobs=count, prompt_logprobs=count)
    results = engine.run([request, make_request("b", random_ids(6), 3)])
    assert len(results["a"].logprobs) == 3
    assert len(results["a"].prompt_logprobs) == 4
    for entry in (*results["a"].logprobs, *results["a"].prompt_logprobs):
        assert len(entry.top) == count
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        assert all(0 <= token < VOCAB_SIZE for token, _ in entry.top)
        if count and entry in results["a"].logprobs:
            assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob))  # greedy
    assert results["b"] == Result(
        results["b"].token_ids, results["b"].finish_reason, results["b"].num_cached_tokens
    )
