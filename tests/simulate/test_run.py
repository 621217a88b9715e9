"""The simulation: streams small enough to work out by hand, and what must hold for large ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from engine.core import scheduler
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.sampling import SamplingParams
from engine.simulate.cost import DEVICES, CostModel
from engine.simulate.report import Shares, figures, summary
from engine.simulate.run import ALLOCATORS, Allocator, Outcome, run
from engine.simulate.stream import LAST_TURN, Stream, sharegpt_like
from engine.types import Request, StepTokens

SECOND_A_STEP = CostModel(
    name="test",
    weight_bytes=0,
    kv_bytes_per_token=0,
    flops_per_token=0,
    flops_per_pair=0,
    bytes_per_s=1,
    flops_per_s=1,
    overhead_s=1,
    memory_bytes=0,
)


def make_limits(**changes: Any) -> Limits:
    """A pool of 16 blocks of 4 tokens, a context of 16."""
    values: dict[str, Any] = {
        "num_blocks": 16,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_step_tokens": 64,
        "max_model_len": 16,
        "prefix_reuse": False,
    }
    return Limits(**{**values, **changes})


def make_stream(*requests: tuple[float, int, int], conversation: bool = False) -> Stream:
    """(arrival, prompt, output) of each; one conversation, or as many as there are requests."""
    count = len(requests)
    arrival, prompt, output = zip(*requests, strict=True)
    following = [*range(1, count), LAST_TURN] if conversation else [LAST_TURN] * count
    return Stream(
        np.array(arrival, np.float64),
        np.array(prompt),
        np.array(output),
        np.zeros(count, np.int64) if conversation else np.arange(count),
        np.array(following),
        np.full(count, 2.0),
    )


def run_small(stream: Stream, allocator: Allocator, **changes: Any) -> Outcome:
    """A second a step, a sample a step."""
    return run(stream, make_limits(**changes), SECOND_A_STEP, allocator, sample_steps=1)


# The stream that is worked out by hand. A: 5 prompt tokens, 3 of output; B: 2 and 2. Positions in
# the cache after the steps: A 5, 6, 7 (its third token is never fed back), B 2, 3.
TWO = make_stream((0.0, 5, 3), (0.0, 2, 2))


def test_two_paged_requests_hold_what_they_hold_by_hand() -> None:
    found = figures(run_small(TWO, "paged"), TWO.prompt_tokens)
    # A owns two blocks for three steps, B one for two: 12, 12, 8 places for 7, 9, 7 tokens.
    # To come: 2 and 1 after the first step, 1 and 0 after the second.
    assert found.owned == pytest.approx(Shares(23 / 32, 0, 4 / 32, 5 / 32))
    assert found.widest_gap == 3
    assert found.running == pytest.approx(5 / 3)
    assert found.running_peak == 2
    assert found.output_tokens_per_s == pytest.approx(5 / 3)
    assert (found.duration_s, found.steps) == (3.0, 3)
    assert found.pool is None  # nobody waited
    assert found.ttft_s == pytest.approx((1.0, 1.0, 1.0))
    assert found.latency_s.p50 == pytest.approx(2.5)


def test_two_slabs_are_sized_for_the_context_by_hand() -> None:
    found = figures(run_small(TWO, "contiguous"), TWO.prompt_tokens)
    # 15 positions can be fed back, so a slab has four blocks: 32, 32, 16 places.
    assert found.owned == pytest.approx(Shares(23 / 80, 0, 4 / 80, 53 / 80))
    assert found.widest_gap == 14  # B's two tokens in sixteen places
    assert found.running == pytest.approx(5 / 3)


def test_the_slab_is_as_long_as_the_client_allows() -> None:
    outcome = run(TWO, make_limits(), SECOND_A_STEP, "contiguous", max_tokens=3, sample_steps=1)
    found = figures(outcome, TWO.prompt_tokens)
    assert found.owned.held == pytest.approx(23 / 32)  # 7 positions and 4: paged by chance


def test_free_blocks_that_are_no_slab_are_external_fragmentation() -> None:
    found = figures(run_small(TWO, "contiguous", num_blocks=6), TWO.prompt_tokens)
    # B waits three steps while A has four blocks of the six; the other eight places are idle.
    assert found.pool is not None
    assert found.pool == pytest.approx(
        Shares(held=18 / 72, coming=0, reserved=3 / 72, never_used=27 / 72, unusable=24 / 72)
    )
    assert found.waiting == pytest.approx(3 / 5)
    assert found.duration_s == 5.0
    assert found.ttft_s.p99 == pytest.approx(1 + 0.99 * 3)  # 1 s and 4 s


def test_free_runs_too_short_for_the_next_request_are_unusable_though_they_add_up() -> None:
    # Slabs of three blocks fill the pool; the outer two end with their first step. What comes then
    # needs four blocks in a row, and six are free.
    stream = make_stream((0.0, 4, 1), (0.0, 4, 3), (0.0, 4, 1), (0.5, 8, 1))
    limits = make_limits(num_blocks=9, max_model_len=64)
    outcome = run(stream, limits, SECOND_A_STEP, "contiguous", max_tokens=9, sample_steps=1)
    assert [(s.running, s.waiting, s.unusable, s.free) for s in outcome.samples] == [
        (3, 0, 0, 0),
        (1, 1, 24, 0),
        (1, 1, 24, 0),
        (1, 0, 0, 20),
    ]


def test_places_of_a_prompt_cut_into_chunks_are_coming() -> None:
    stream = make_stream((0.0, 10, 1))
    outcome = run_small(stream, "paged", max_step_tokens=8)
    assert [(s.held, s.coming, s.reserved, s.never_used) for s in outcome.samples] == [
        (8, 2, 0, 2),
        (10, 0, 0, 2),
    ]


def test_a_request_is_not_seen_before_it_arrives() -> None:
    stream = make_stream((0.0, 3, 2), (100.5, 3, 2))
    outcome = run_small(stream, "paged")
    assert outcome.first_token_s.tolist() == [1.0, 101.5]
    assert outcome.finish_s.tolist() == [2.0, 102.5]


def test_a_turn_comes_after_the_answer_and_finds_what_was_said() -> None:
    stream = make_stream((0.0, 6, 3), (0.0, 11, 2), conversation=True)
    outcome = run_small(stream, "paged", prefix_reuse=True)
    assert outcome.arrival_s.tolist() == [0.0, 3.0 + 2.0]  # two seconds to think
    assert outcome.num_cached.tolist() == [0, 8]  # eight of the nine tokens fill two blocks
    found = figures(outcome, stream.prompt_tokens)
    assert (found.cached_tokens, found.recomputed_tokens) == (8, 0)
    apart = run_small(make_stream((0.0, 6, 3), (5.0, 11, 2)), "paged", prefix_reuse=True)
    assert apart.num_cached.tolist() == [0, 0]  # strangers share nothing


def test_what_fits_nowhere_is_rejected_with_the_turns_after_it() -> None:
    stream = make_stream((0.0, 16, 1), (0.0, 17, 1), (0.0, 18, 1), conversation=True)
    outcome = run_small(stream, "paged")
    found = figures(outcome, stream.prompt_tokens)
    assert (found.finished, found.rejected, found.steps) == (0, 3, 0)
    assert np.isnan(outcome.finish_s).all()
    assert summary([found], 4)  # no division by the time that didn't pass


def test_a_gigantic_prompt_is_rejected_before_it_is_made() -> None:
    outcome = run_small(make_stream((0.0, 2**62, 1)), "paged")
    assert np.isnan(outcome.finish_s).all()


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_request_finishes_and_gets_its_tokens(allocator: Allocator) -> None:
    stream = sharegpt_like(150, rate=20.0, turns=3.0, seed=3)
    limits = make_limits(
        num_blocks=300, block_size=16, max_model_len=2048, max_step_tokens=256, prefix_reuse=True
    )
    ended: list[int] = []
    outcome = run(stream, limits, DEVICES["v6e"], allocator, progress=ended.append)
    fits = stream.prompt_tokens < 2048
    for index in np.flatnonzero(~fits):  # a conversation ends with its first turn that is too long
        while (index := stream.next_turn[index]) != LAST_TURN:
            assert not fits[index]
    expected = np.minimum(stream.output_tokens, 2048 - stream.prompt_tokens)
    assert (outcome.num_generated == np.where(fits, expected, 0)).all()
    assert (np.isnan(outcome.finish_s) == ~fits).all()
    assert (outcome.finish_s >= outcome.first_token_s)[fits].all()
    assert (outcome.first_token_s > outcome.arrival_s)[fits].all()
    assert ended[-1] == len(stream)
    pool = {
        sample.owned + sample.cached + sample.unusable + sample.free for sample in outcome.samples
    }
    assert pool == {300 * 16}


def test_holding_arrivals_back_changes_no_step() -> None:
    stream = sharegpt_like(120, seed=8)
    limits = make_limits(
        num_blocks=140, block_size=16, max_model_len=2048, max_step_tokens=256, max_waiting=120
    )
    outcome = run(stream, limits, SECOND_A_STEP, "paged")
    state = SchedulerState.initial(limits)
    stops: dict[str, int] = {}
    for index, prompt in enumerate(stream.prompt_tokens.tolist()):
        if prompt >= 2048:
            continue
        longest = 2048 - prompt
        stops[str(index)] = min(int(stream.output_tokens[index]), longest)
        sampling = SamplingParams(temperature=0.0)
        request = Request(str(index), (7,) * prompt, sampling, longest, stop_ids=frozenset({1}))
        state = scheduler.admit(state, limits, request)
    finished = {}
    clock = 0
    generated = dict.fromkeys(stops, 0)
    while not state.is_idle:
        state, plan = scheduler.schedule(state, limits)
        clock += bool(plan.rows)
        tokens = []
        for row in plan.rows:
            name = row.request.request_id
            generated[name] += row.samples
            tokens.append(1 if generated[name] == stops[name] else 7)
        state, outputs = scheduler.commit(state, plan, StepTokens(tuple(tokens)), limits)
        finished |= {out.request_id: clock for out in outputs if out.finish_reason}
    assert outcome.num_preemptions > 0
    assert {str(i): s for i, s in enumerate(outcome.finish_s) if not np.isnan(s)} == finished


def _crowd(allocator: Allocator, **changes: Any) -> Outcome:
    stream = sharegpt_like(300, seed=1)
    limits = make_limits(
        num_blocks=1200, block_size=16, max_num_seqs=64, max_model_len=2048, max_step_tokens=1024
    )
    return run(stream, limits, DEVICES["v6e"], allocator, sample_steps=1, **changes)


def test_paged_waste_is_in_last_blocks_and_slabs_are_mostly_empty() -> None:
    prompts = sharegpt_like(300, seed=1).prompt_tokens
    paged, naive = (figures(_crowd(name), prompts) for name in ALLOCATORS)
    assert paged.widest_gap < 16
    assert paged.owned.reserved + paged.owned.never_used < 0.04
    assert naive.owned.held < 0.4
    assert paged.running > 2 * naive.running
    assert paged.output_tokens_per_s > 1.5 * naive.output_tokens_per_s
    line = summary([paged, naive], 16)
    assert line.startswith(f"paged {paged.owned.held + paged.owned.coming:.1%} useful, waste only")
    assert line.count("last blocks") == 1


def test_preempted_requests_compute_positions_again() -> None:
    stream = sharegpt_like(60, seed=2)
    limits = make_limits(num_blocks=130, block_size=16, max_model_len=2048, max_step_tokens=256)
    outcome = run(stream, limits, DEVICES["v6e"], "paged")
    found = figures(outcome, stream.prompt_tokens)
    assert (found.preemptions > 0) == (found.recomputed_tokens > 0)
    assert found.preemptions > 0
    calm = figures(
        run(stream, dataclasses.replace(limits, num_blocks=4000), DEVICES["v6e"], "paged"),
        stream.prompt_tokens,
    )
    assert (calm.preemptions, calm.recomputed_tokens) == (0, 0)


def test_a_step_takes_the_longer_of_reading_and_computing() -> None:
    cost = CostModel(
        name="round numbers",
        weight_bytes=1000,
        kv_bytes_per_token=10,
        flops_per_token=50,
        flops_per_pair=4,
        bytes_per_s=100,
        flops_per_s=100,
        overhead_s=0.25,
        memory_bytes=10_000,
    )
    assert cost.step_s(1, 20, 20) == pytest.approx(0.25 + 12)  # 1,200 bytes against 130 flops
    assert cost.step_s(40, 820, 40) == pytest.approx(0.25 + 52.8)  # 5,280 flops
    assert cost.blocks_beside_weights(16) == 50  # 9,000 less 1,000 bytes, 160 a block
    assert cost.blocks_in(799, 16) == 4


def test_the_time_of_a_chunk_counts_each_pair_of_positions() -> None:
    cost = dataclasses.replace(SECOND_A_STEP, flops_per_pair=1, overhead_s=0, kv_bytes_per_token=0)
    stream = make_stream((0.0, 10, 2), (0.0, 3, 1))
    outcome = run(stream, make_limits(max_step_tokens=8), cost, "paged")
    # Chunks of 8; then 2 with the other's 3; then one token of the first.
    pairs = [sum(range(1, 9)), 9 + 10 + 1 + 2 + 3, 11]
    assert outcome.first_token_s.tolist() == [sum(pairs[:2])] * 2
    assert outcome.end_s == sum(pairs)


def test_blocks_that_move_to_host_memory_and_back_take_their_time() -> None:
    cost = DEVICES["v6e"]
    moved = cost.step_s(1, 1, 1, num_swapped=160) - cost.step_s(1, 1, 1)
    assert moved == pytest.approx(160 * 131_072 / 32e9)  # 128 KiB a token, 32 GB a second
