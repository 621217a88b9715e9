"""Beam search in the scheduler: the same outputs as a search without a cache, on shared blocks."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from engine.sampling import InvalidRequest
from engine.types import (
    FinishReason,
    Fork,
    Request,
    StepOutput,
    StepPlan,
    StepTokens,
    TokenLogprobs,
)
from tests.core import mutants
from tests.core.beam_oracle import Found, Search, Tokens
from tests.core.driver import Driver, make_limits, make_request, row_of, rows_of
from tests.core.random_operations import SEARCH_LIMITS, SEARCH_REQUEST, run_random

VOCABULARY = 12
NUM_RUNS = 40  # of the simulation


@functools.cache
def model(context: Tokens) -> list[float]:
    """Log-probabilities after these tokens, prompt included."""
    rng = random.Random(repr(context))
    weights = [rng.expovariate(1.0) ** 3 for _ in range(VOCABULARY)]
    return [math.log(weight / sum(weights)) for weight in weights]


def beams(name: str, prompt: int | tuple[int, ...], width: int, **fields: Any) -> Request:
    """A request for that many beams, all of which are returned unless `n` says otherwise."""
    forks = tuple(Fork(f"{name}.{index}", 0) for index in range(1, width))
    fields = {"n": width, "beam_width": width, "forks": forks, **fields}
    return make_request(name, prompt, **fields)


def search(request: Request) -> Search:
    """What the request asks for."""
    sampling = request.sampling
    return Search(
        sampling.beam_width,
        request.max_tokens,
        request.stop_ids,
        sampling.length_penalty,
        sampling.early_stopping,
    )


def expected(request: Request) -> list[Found]:
    """What the request finds when nothing is shared and nobody else there."""
    found, _ = search(request).run(lambda output: model(request.prompt_ids + output))
    return found[: request.sampling.n]


class Searching(Driver):
    """A scheduler with the model above; a row that isn't a beam's samples 7."""

    def take_in(self, plan: StepPlan) -> tuple[StepOutput, ...]:
        """Commit a step with what the model says after the tokens of each row."""
        logprobs = {}
        for index, row in enumerate(plan.rows):
            if row.samples and row.request.num_logprobs is not None:
                context = tuple(self.state.core.sequences[row.request.request_id].token_ids)
                top = sorted(enumerate(model(context)), key=lambda entry: -entry[1])
                entry = TokenLogprobs(7, 0.0, tuple(top[: row.request.num_logprobs]))
                logprobs[index] = entry
        return self.commit(plan, StepTokens((7,) * len(plan.rows), logprobs))

    def search(self, *requests: Request) -> list[StepPlan]:
        """Run requests to their ends, a step planned ahead of what is known."""
        self.admit(*requests)
        plans: list[StepPlan] = []
        waiting: list[StepPlan] = []
        while not self.state.is_idle or waiting:
            plan = self.schedule()
            assert plan.rows or waiting, "nothing can run"
            assert len(plans) < 2000, "no end in sight"
            plans.append(plan)
            waiting += [plan] if plan.rows else []
            if len(waiting) > 1 or not plan.rows:
                self.take_in(waiting.pop(0))
        assert self.state.pool.owned == 0
        return plans

    def found(self, request: Request) -> list[Found]:
        """What came out for a request, in the order of its names."""
        news = [out for out in self.outputs if out.request_id in request.replies]
        assert [out.request_id for out in news] == list(request.replies)
        results = []
        for out in news:
            assert out.beam is not None
            is_stopped = out.token_ids[-1] in request.stop_ids
            assert out.finish_reason == (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
            results.append(Found(out.token_ids, out.beam.logprob, out.beam.score))
        return results


def assert_same(found: Iterable[Found], wanted: Iterable[Found]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
        assert ours.score == pytest.approx(theirs.score, abs=1e-9)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
@pytest.mark.parametrize("width", [2, 3, 4, 7])
def test_beams_find_what_a_search_without_a_cache_finds(
    width: int, penalty: float, early_stopping: bool
) -> None:
    stopped = 0
    for prompt in range(1, 10):
        for stops in ((), (prompt,), (3, 8, 11)):
            driver = Searching(num_blocks=64, max_num_seqs=8)
            request = beams(
                f"{prompt}",
                prompt,
                width,
                max_tokens=11,
                stop_ids=frozenset(stops),
                length_penalty=penalty,
                early_stopping=early_stopping,
            )
            driver.search(request)
            found = driver.found(request)
            assert_same(found, expected(request))
            stopped += sum(len(each.token_ids) < 11 for each in found)
    assert stopped, "no output ended early"


@pytest.mark.parametrize("steps", [1, 2])
def test_beams_as_wide_as_the_vocabulary_find_the_best_of_all_outputs(steps: int) -> None:
    driver = Searching(num_blocks=64, max_num_seqs=16, max_waiting=16)
    request = beams("a", 3, VOCABULARY, max_tokens=steps)
    driver.search(request)
    every = search(request).exhaust(lambda output: model(request.prompt_ids + output))
    assert_same(driver.found(request), every)


def test_fewer_outputs_than_beams_are_the_best_of_them() -> None:
    driver = Searching()
    request = beams("a", 3, 4, n=2)
    driver.search(request)
    assert_same(driver.found(request), expected(request))
    assert {out.request_id for out in driver.outputs} == {"a", "a.1"}


def test_equally_likely_tokens_go_by_the_beam_and_then_by_their_order() -> None:
    driver = Driver()
    driver.admit(beams("a", 3, 2, max_tokens=2))
    plan = driver.schedule()
    even = tuple((token, -1.0) for token in (5, 2))
    driver.commit(plan, StepTokens((0,), {0: TokenLogprobs(0, 0.0, even)}))
    plan = driver.schedule()
    assert [row.token_ids for row in plan.rows] == [(5,), (2,)]
    tops = {index: TokenLogprobs(0, 0.0, even) for index in range(2)}
    outputs = driver.commit(plan, StepTokens((0, 0), tops))
    assert [out.token_ids for out in outputs] == [(5, 5), (5, 2)]


def test_beams_advance_together_and_only_when_their_tokens_are_known() -> None:
    driver = Searching()
    driver.admit(beams("a", 3, 3, max_tokens=4), make_request("b", 3))
    first = driver.schedule()
    assert rows_of(first) == [("a", 0, 3), ("b", 0, 3)]
    second = driver.schedule()
    assert rows_of(second) == [("b", 3, 1)], "others go on without waiting"
    driver.take_in(first)
    third = driver.schedule()
    assert rows_of(third) == [("a", 3, 1), ("a.1", 3, 1), ("a.2", 3, 1), ("b", 4, 1)]
    assert all(row.token_ids for row in third.rows[:3])
    assert third.rows[3].token_ids == ()


def test_beams_of_a_long_prompt_share_its_blocks_and_copy_what_they_write_to() -> None:
    """1,001 tokens fill 62 blocks of 16 and begin one; four beams of it are not four times that."""
    limits = make_limits(
        num_blocks=200, block_size=16, max_num_seqs=8, max_step_tokens=1024, max_model_len=1100
    )
    driver = Searching(limits)
    request = beams("a", tuple(n % VOCABULARY for n in range(1001)), 4, max_tokens=20)
    plans = driver.search(request)
    assert_same(driver.found(request), expected(request))
    most = max(len({b for row in plan.rows for b in row.block_ids.tolist()}) for plan in plans)
    assert 63 + 3 <= most <= 62 + 4 * 2
    assert [len(plan.block_copies) for plan in plans if plan.rows][:2] == [0, 3]
    forked = sum(len(plan.block_copies) for plan in plans)
    assert forked > 3, "no beam forked on the way"


@pytest.mark.parametrize("priority", [-1, 0])
@pytest.mark.parametrize("num_blocks", [18, 20, 24])
def test_beams_that_lose_their_blocks_find_the_same(num_blocks: int, priority: int) -> None:
    """Two searches and plain requests in a pool that holds one search's worst case."""
    driver = Searching(num_blocks=num_blocks, max_num_seqs=8, max_preemptions=2)
    requests = [
        make_request("p", 5, max_tokens=30, priority=priority),
        beams("a", 6, 3, max_tokens=16),
        beams("b", 5, 2, max_tokens=20, stop_ids=frozenset({3})),
        make_request("q", 9, max_tokens=20),
    ]
    plans = driver.search(*requests)
    lost = [name for plan in plans for name in plan.preempted]
    for request in requests[1:3]:
        assert_same(driver.found(request), expected(request))
        counts = {lost.count(name) for name in request.names}
        assert max(counts) <= 2
    assert {"a", "a.1", "a.2"} <= set(lost) or {"b", "b.1"} <= set(lost)
    assert len(driver.tokens_of("p")) == 30
    assert len(driver.tokens_of("q")) == 20


def test_a_gang_that_was_preempted_as_often_as_allowed_keeps_every_block_it_can_need() -> None:
    driver = Searching(num_blocks=14, max_num_seqs=8, max_preemptions=1)
    request = beams("a", 6, 3, max_tokens=14)
    driver.admit(request)
    for name in request.names:
        driver.state.core.sequences[name].num_preemptions = 1
    owned = []
    while not driver.state.is_idle:
        plan = driver.schedule()
        owned.append(driver.state.pool.owned)
        driver.take_in(plan)
    assert set(owned) == {1 + 3 * 4}  # one block of the prompt is full, and a beam comes to five
    assert_same(driver.found(request), expected(request))


def test_nobody_shares_what_a_protected_gang_makes_and_a_failure_takes_its_reserve() -> None:
    """What its losers let go of must be free for the others, whatever follows upon them."""
    driver = Searching(num_blocks=40, block_size=1, max_num_seqs=8, max_preemptions=1)
    request = beams("a", 4, 3, max_tokens=10)
    driver.admit(request)
    for name in request.names:
        driver.state.core.sequences[name].num_preemptions = 1
    for _ in range(5):
        driver.take_in(driver.schedule())
    beam = driver.state.core.sequences["a.1"]
    driver.admit(make_request("b", tuple(beam.token_ids), max_tokens=2))
    plan = driver.schedule()
    assert row_of(plan, "b").start == 4
    only_b = dataclasses.replace(plan, rows=plan.rows[3:])
    assert driver.fail(only_b)[0].request_id == "b"
    assert driver.state.pool.owned == 0
    driver.search()
    assert_same(driver.found(request), expected(request))


def test_beams_that_could_never_run_are_refused_by_the_name_of_their_field() -> None:
    with pytest.raises(InvalidRequest, match=r"beam_width: 5 beams .* at most 4 sequences"):
        Driver().admit(beams("a", 4, 5))
    with pytest.raises(
        InvalidRequest, match=r"beam_width: 3 beams of up to 37 tokens .* 28 blocks"
    ):
        Driver().admit(beams("a", 6, 3, max_tokens=32))
    with pytest.raises(InvalidRequest, match="beam_width: is 3, but the request has 2 sequences"):
        Driver().admit(dataclasses.replace(beams("a", 6, 3), forks=(Fork("b", 1),)))
    with pytest.raises(InvalidRequest, match="beam_width: the contiguous allocator shares no"):
        Driver(prefix_reuse=False, allocator="contiguous").admit(beams("a", 4, 2))


@pytest.mark.parametrize("name", ["a", "a.2"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_abort_of_any_beam_ends_all_and_gives_every_block_back(name: str, steps: int) -> None:
    driver = Searching(num_blocks=24, max_step_tokens=4)
    driver.admit(beams("a", 6, 3, n=2, max_tokens=20))
    for _ in range(steps):
        driver.take_in(driver.schedule())
    outputs = driver.abort(name, FinishReason.DEADLINE)
    assert [(out.request_id, out.finish_reason) for out in outputs] == [
        ("a", FinishReason.DEADLINE),
        ("a.1", FinishReason.DEADLINE),
    ]
    assert driver.state.is_idle
    assert driver.state.pool.owned == 0


def test_beams_whose_step_fails_end_and_those_not_in_it_start_over() -> None:
    driver = Searching(num_blocks=40, max_num_seqs=8)
    driver.admit(beams("a", 6, 3, n=1, max_tokens=9), beams("b", 7, 2, max_tokens=9))
    driver.take_in(driver.schedule())
    first = driver.schedule()
    alone = dataclasses.replace(first, rows=first.rows[:3])
    outputs = driver.fail(alone)
    assert [(out.request_id, out.finish_reason) for out in outputs] == [("a", FinishReason.ERROR)]
    assert driver.state.pool.owned == 0
    driver.search()
    assert_same(driver.found(b := beams("b", 7, 2, max_tokens=9)), expected(b))


def test_a_step_without_log_probabilities_ends_its_search_with_an_error() -> None:
    """As a model does that gives NaN."""
    driver = Driver()
    driver.admit(beams("a", 3, 2))
    nan = TokenLogprobs(0, math.nan, ((1, math.nan), (2, -math.inf)))
    outputs = driver.commit(driver.schedule(), StepTokens((0,), {0: nan}))
    assert [out.finish_reason for out in outputs] == [FinishReason.ERROR] * 2
    assert driver.state.is_idle


def test_a_copy_of_the_state_goes_on_by_itself() -> None:
    driver = Searching()
    request = beams("a", 3, 3)
    driver.admit(request)
    for _ in range(3):
        driver.take_in(driver.schedule())
    original, driver.state = driver.state, driver.state.copy()
    before = original.snapshot()
    driver.search()
    assert_same(driver.found(request), expected(request))
    assert original.snapshot() == before
    original.check()
    driver.state, driver.outputs = original, []
    driver.search()
    assert_same(driver.found(request), expected(request))


def simulate() -> Counter[str]:
    """The simulation with its checks, on requests most of which are searches."""
    counts: Counter[str] = Counter()
    for seed in range(NUM_RUNS):
        try:
            counts += run_random(seed, 250, SEARCH_LIMITS, SEARCH_REQUEST)
        except Exception as error:
            raise AssertionError(f"run_random({seed}, …) failed") from error
    return counts


def test_many_searches_in_small_pools_break_nothing() -> None:
    counts = simulate()
    assert counts["gangs preempted"] >= NUM_RUNS // 2
    assert counts["beams dropped"]
    assert counts["beam steps"] >= 10 * NUM_RUNS


@pytest.mark.parametrize("name", mutants.BEAM_MUTANTS)
def test_every_mutant_of_beam_search_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants.BEAM_MUTANTS[name](monkeypatch)
    with mutants.caught():
        simulate()
