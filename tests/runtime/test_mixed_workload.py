"""Sixty-four mixed requests at once through the step loop, against each of them run alone.

One run serves all tests of this file: prompts of 1 to 1,500 tokens that share prefixes, greedy
and seeded draws, some aborted on the way, and a pool that holds a fraction of them. The
scheduler's invariants are checked after each of its functions.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.aot.hlo import pool_copies, unaliased
from engine.config import BucketConfig, SchedulerConfig
from engine.core import scheduler
from engine.core.limits import Limits
from engine.model import sampler
from engine.runtime import compiles, loop
from engine.runtime.figures import Totals
from engine.runtime.loop import EngineLoop, News
from engine.runtime.replay import replay
from engine.types import FinishReason, Request, StepOutput, StepPlan, TokenLogprobs
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.runtime.tiny import random_ids

NUM_REQUESTS = 64
ABORT_AFTER = {3: 0, 10: 1, 17: 2, 24: 5, 31: 9, 38: 0, 45: 3}  # request -> tokens it may have
# float32 sums in another order; log-probabilities are of the order of ten.
TOLERANCE = 1e-4


@dataclasses.dataclass
class Run:
    """Everything that was seen of the run."""

    engine: SmallEngine
    limits: Limits
    requests: list[Request]
    results: dict[str, Result]
    plans: list[StepPlan]
    totals: Totals
    gauges: tuple[int, int, Any]
    num_checks: int
    num_compiles: int
    log: Path


class CheckedScheduler:
    """The scheduler's functions; each state that one returns is checked.

    The first admission waits for `all_submitted`, so that the others come at once and each run
    is the same.
    """

    def __init__(self) -> None:
        self.all_submitted = threading.Event()
        self.plans: list[StepPlan] = []
        self.num_checks = 0

    def admit(self, *arguments: Any) -> Any:
        self.all_submitted.wait()
        return self._check(scheduler.admit(*arguments))

    def abort(self, *arguments: Any) -> Any:
        state, outputs = scheduler.abort(*arguments)
        return self._check(state), outputs

    def schedule(self, *arguments: Any) -> Any:
        state, plan = scheduler.schedule(*arguments)
        self.plans.append(plan)
        return self._check(state), plan

    def commit(self, *arguments: Any) -> Any:
        state, outputs = scheduler.commit(*arguments)
        return self._check(state), outputs

    def _check(self, state: scheduler.SchedulerState) -> scheduler.SchedulerState:
        state.check()
        self.num_checks += 1
        return state


class Listener:
    """Takes the loop's news, aborts some requests on the way, and knows when all is done."""

    def __init__(self, requests: Sequence[Request], abort_after: dict[str, int]):
        self.results = {request.request_id: Result() for request in requests}
        self.loop: EngineLoop | None = None
        self.is_done = threading.Event()
        self._abort_after = abort_after
        self._num_running = len(requests)

    def __call__(self, news: News) -> None:
        assert self.loop is not None
        for item in news:
            assert isinstance(item, StepOutput), item
            result = self.results[item.request_id]
            result.add(item)
            self._num_running -= item.finish_reason is not None
            if len(result.token_ids) == self._abort_after.get(item.request_id):
                self.loop.abort(item.request_id)
        if self._num_running == 0:
            self.is_done.set()


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    # The pool on the device is large, so that a copy of it would show in the programs' memory.
    # The scheduler may use but a small part of it.
    engine = small_engine(
        tiny_model,
        num_blocks=2**15,
        block_size=16,
        max_model_len=2048,
        config=SchedulerConfig(max_num_seqs=16, max_step_tokens=128, max_waiting=NUM_REQUESTS),
        buckets=BucketConfig(decode_seqs=(4, 16), prefill_tokens=(32, 128), prefill_seqs=(16,)),
    )
    limits = dataclasses.replace(engine.limits, num_blocks=100)
    requests = mixed_requests()
    abort_after = {f"r{number}": count for number, count in ABORT_AFTER.items()}
    listener = Listener(requests, abort_after)
    checked = CheckedScheduler()
    num_compiles = compiles.counter()
    log = tmp_path_factory.mktemp("log") / "events.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "scheduler", checked)
        engine_loop = listener.loop = EngineLoop(engine.runner, limits, listener, str(log))
        try:
            engine_loop.submit(requests[0])
            while not engine_loop._inbox.num_taken:  # it is taken alone, and waits to be admitted
                time.sleep(0.001)
            for request in requests[1:]:
                engine_loop.submit(request)
            for request_id, count in abort_after.items():
                if count == 0:
                    engine_loop.abort(request_id)
            checked.all_submitted.set()
            while not listener.is_done.wait(0.1):
                assert engine_loop.is_alive
        finally:
            checked.all_submitted.set()
            engine_loop.close()
    return Run(
        engine,
        limits,
        requests,
        listener.results,
        checked.plans,
        engine_loop.totals,
        engine_loop.gauges,
        checked.num_checks,
        num_compiles(),
        log,
    )


def mixed_requests() -> list[Request]:
    """The same sixty-four each time; those of one group share up to 700 tokens."""
    draw = np.random.default_rng(7)
    prefixes = [random_ids(length, seed=1) for length in (48, 300, 700)]
    requests = []
    for number in range(NUM_REQUESTS):
        length = (1, 1500, 2, 15, 16, 17, 31, 32, 33)[number] if number < 9 else 0
        length = length or int(draw.choice([20, 90, 300, 800])) + int(draw.integers(0, 100))
        prefix = prefixes[number % 3][: length - 1] if number % 4 else ()
        prompt = (*prefix, *random_ids(length - len(prefix), seed=100 + number))
        fields: dict[str, Any] = {"seed": number}
        if number % 3 == 0:
            fields["stop_ids"] = frozenset(draw.integers(0, 264, 4).tolist())
        if number % 2:
            fields |= {"temperature": float(draw.choice([0.5, 1.0, 2.0]))}
            fields |= [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}][number // 2 % 4]
        if number % 5 == 0 or (length <= 100 and number % 2):
            fields |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_tokens": 4}
        if number % 7 == 0:
            fields |= {"logprobs": 3, "prompt_logprobs": 2}
        if number % 11 == 0:
            fields |= {"bad_word_ids": ((5,), (7, 9)), "logit_bias": ((65, 2.0),)}
        if length <= 100:
            # Short prompts come first, and with their long answers outgrow the pool.
            fields["priority"], max_tokens = 0, int(draw.integers(120, 200))
        else:
            fields["priority"], max_tokens = int(draw.integers(1, 3)), int(draw.integers(1, 40))
        requests.append(make_request(f"r{number}", prompt, max_tokens, **fields))
    assert {1, 1500} <= {len(request.prompt_ids) for request in requests}
    assert max(len(request.prompt_ids) for request in requests) == 1500
    return requests


def alone(run: Run, request: Request) -> Result:
    """The request by itself: nothing shared, nothing planned ahead, default priority."""
    limits = dataclasses.replace(run.limits, prefix_reuse=False)
    return run.engine.run_one(request, limits=limits, ahead=False)


def assert_same_logprobs(ours: Sequence[TokenLogprobs], theirs: Sequence[TokenLogprobs]) -> None:
    assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        values = [mine.logprob, *(value for _, value in mine.top)]
        expected = [other.logprob, *(value for _, value in other.top)]
        np.testing.assert_allclose(values, expected, atol=TOLERANCE)


def test_every_finished_output_equals_the_same_request_run_alone(run: Run) -> None:
    finished = 0
    for request in run.requests:
        result, expected = run.results[request.request_id], alone(run, request)
        if result.finish_reason is FinishReason.ABORT:
            assert result.token_ids == expected.token_ids[: len(result.token_ids)]
            continue
        finished += 1
        assert result.token_ids == expected.token_ids, request.request_id
        assert result.finish_reason is expected.finish_reason
        assert_same_logprobs(result.logprobs, expected.logprobs)
        assert_same_logprobs(result.prompt_logprobs, expected.prompt_logprobs)
    assert finished >= NUM_REQUESTS - len(ABORT_AFTER)


def test_the_run_had_everything_that_can_go_wrong(run: Run) -> None:
    assert run.totals.preemptions > 0
    assert run.totals.cached_prompt_tokens > 0
    rows = [row for plan in run.plans for row in plan.rows]
    chunks = [r for r in rows if 0 < r.start + r.num_tokens < len(r.request.prompt_ids)]
    assert chunks, "no prompt was cut"
    resumed = [row for row in rows if row.history and row.start + row.num_tokens > 1]
    assert resumed, "nothing was resumed in the middle of its output"
    sampling = [row.request.sampling for row in resumed]
    assert {params.edits_logits for params in sampling} == {True, False}
    assert {params.is_greedy for params in sampling} == {True, False}
    mixed = [p for p in run.plans if {r.num_tokens > 1 for r in p.rows} == {True, False}]
    assert mixed, "no step had both prompts and decodes"
    reasons = {result.finish_reason for result in run.results.values()}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT}
    assert max(len(plan.rows) for plan in run.plans) > 12
    assert len({tuple(result.token_ids) for result in run.results.values()}) > NUM_REQUESTS // 2


def test_an_aborted_request_has_no_more_tokens_than_were_on_the_way(run: Run) -> None:
    for number, count in ABORT_AFTER.items():
        result = run.results[f"r{number}"]
        if result.finish_reason is FinishReason.ABORT:
            assert len(result.token_ids) <= count + 1  # one step is always planned ahead


def test_invariants_held_after_every_step_and_every_block_came_back(run: Run) -> None:
    assert run.num_checks >= 2 * len(run.plans)
    running, waiting, pool = run.gauges
    assert (running, waiting, pool.owned) == (0, 0, 0)
    assert pool.free + pool.cached == run.limits.num_blocks


def test_totals_count_what_happened(run: Run) -> None:
    totals, results = run.totals, run.results.values()
    assert totals.generated_tokens == sum(len(result.token_ids) for result in results)
    assert totals.prompt_tokens == sum(len(request.prompt_ids) for request in run.requests)
    assert totals.cached_prompt_tokens == sum(result.num_cached_tokens for result in results)
    assert sum(totals.finished.values()) == NUM_REQUESTS
    assert totals.steps == sum(bool(plan.rows) for plan in run.plans)
    assert totals.computed_tokens == sum(plan.num_tokens for plan in run.plans)
    assert totals.padded_tokens >= totals.computed_tokens
    assert totals.failed_steps == 0


def test_nothing_was_compiled_after_the_warm_up(run: Run) -> None:
    assert run.num_compiles == 0


def test_the_recorded_log_replays_to_identical_plans(run: Run) -> None:
    seen = replay(run.log, check=True)
    assert seen.requests == NUM_REQUESTS
    assert seen.steps == len(run.plans)
    assert seen.preemptions == run.totals.preemptions
    assert seen.tokens == run.totals.generated_tokens
    assert seen.state.is_idle


def test_the_compile_counter_counts_a_compile() -> None:
    count = compiles.counter()
    assert count() == 0
    later = compiles.counter()
    double = jax.jit(lambda x: x * 2)
    double(jnp.ones(3)).block_until_ready()
    assert count() > 0
    before = count()
    double(jnp.ones(3)).block_until_ready()  # cached in memory
    assert count() == before
    assert later() == before


def test_no_step_copies_the_pool(run: Run) -> None:
    runner = run.engine.runner
    assert len(runner.shape.buckets) == 4
    pool = math.prod(runner.kv_pool.shape)
    state = jax.eval_shape(
        lambda: sampler.initial_state(runner.shape.max_num_seqs + 1, runner.arch.vocab_size)
    )
    state_bytes = sum(array.size * array.dtype.itemsize for array in state)
    assert 4 * pool >= 2**27
    for bucket in runner.shape.buckets:
        program = runner.compile(bucket)
        assert pool_copies(program, num_elements=pool, num_bytes=4 * pool) == [], bucket
        assert unaliased(runner._choose[bucket.num_seqs], state_bytes) == [], bucket


def pool_as_scan_output(pool: jax.Array) -> jax.Array:
    layers = pool.reshape(2, -1, *pool.shape[1:])
    return jax.lax.scan(lambda carry, layer: (carry, layer.at[0].set(carry)), 1.0, layers)[1]


@pytest.mark.parametrize(
    ("program", "donate", "complaint"),
    [
        (lambda pool: pool.at[3].set(1.0), False, "bytes are aliased"),
        (lambda pool: jnp.roll(pool, 1, axis=0), True, "temporary bytes"),
        (lambda pool: (pool.at[3].set(1.0), pool), True, "copy makes"),
        (pool_as_scan_output, True, "dynamic-update-slice makes"),
    ],
    ids=["not donated", "moved", "kept", "scanned"],
)
def test_a_program_that_copies_the_pool_is_found_out(
    program: Callable[[jax.Array], Any], donate: bool, complaint: str
) -> None:
    pool = jax.ShapeDtypeStruct((4096, 2, 16, 32), jnp.float32)
    compiled = jax.jit(program, donate_argnums=0 if donate else ()).lower(pool).compile()
    found = pool_copies(compiled, num_elements=pool.size, num_bytes=4 * pool.size)
    assert any(complaint in problem for problem in found), found


def test_a_program_that_writes_in_place_is_not() -> None:
    pool = jax.ShapeDtypeStruct((4096, 2, 16, 32), jnp.float32)
    write = jax.jit(lambda pool: pool.at[3].set(1.0), donate_argnums=0).lower(pool).compile()
    assert pool_copies(write, num_elements=pool.size, num_bytes=4 * pool.size) == []


def test_limits_of_the_run_are_tight(run: Run) -> None:
    """The pool holds a small part of what was asked for, or the rest proves nothing."""
    limits = run.limits
    wanted = sum(len(r.prompt_ids) + r.max_tokens for r in run.requests)
    assert wanted > 5 * limits.num_blocks * limits.block_size
