"""What holds a request back, what running ones are expected to need, and who is never preempted
again; forks and copy-on-write at the plan's level."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from math import sqrt
from typing import Any

import numpy as np
import pytest

from engine.core.forecast import (
    LEAST,
    MEMORY,
    MOMENTS,
    RENEWED,
    SPREAD,
    Demand,
    Forecast,
    WorkingSet,
)
from engine.sampling import InvalidRequest
from engine.types import BlockCopy, Fork
from tests.core.driver import Driver, make_request, rows_of


def lengths_of(*outputs: int) -> Forecast:
    lengths = Forecast()
    for output in outputs:
        lengths.add(output)
    return lengths


def demand_of(lengths: Forecast, *sequences_and_block_size: Any) -> Demand:
    moments = lengths.moments()
    assert moments is not None
    return Demand(0, moments, *lengths.blocks(moments, *sequences_and_block_size))


def working_set(seen: list[int], sequences: list[tuple[int, int, int]], block_size: int) -> float:
    """Once more, with fractions and loops: (generated, held, most) of each sequence."""
    seen = sorted(seen[-MEMORY:])
    horizon = seen[int(Fraction(len(seen) * 9, 10))]
    steps = [int(Fraction(k * horizon, MOMENTS - 1)) for k in range(MOMENTS)]
    worst = 0.0
    for step in steps:
        mean, variance = Fraction(0), Fraction(0)
        for generated, held, most in sequences:
            now = sum(length > generated for length in seen)
            then = sum(length >= generated + step for length in seen)
            alive = min(Fraction(then, now), Fraction(1)) if now else Fraction(1)
            if held + step > most:
                alive = Fraction(0)
            blocks = Fraction(held + step, block_size) + Fraction(1, 2)
            mean += alive * blocks
            variance += alive * (1 - alive) * blocks**2
        worst = max(worst, float(mean) + SPREAD * sqrt(variance))
    return worst


@pytest.mark.parametrize("seed", range(20))
def test_the_working_set_is_what_loops_and_fractions_give(seed: int) -> None:
    rng = random.Random(seed)
    seen = [rng.choice((1, 5, 40, rng.randint(1, 300))) for _ in range(rng.randint(LEAST, 700))]
    sequences = []
    for _ in range(rng.randint(1, 9)):
        generated, prompt = rng.randint(0, 350), rng.randint(1, 90)
        sequences.append((generated, generated + prompt, prompt + rng.randint(generated, 400)))
    block_size = rng.choice((1, 4, 16))
    generated, held, most = map(np.array, zip(*sequences, strict=True))
    demand = demand_of(lengths_of(*seen), generated, held, most, block_size)
    assert demand.peak == pytest.approx(working_set(seen, sequences, block_size), rel=1e-9)


def test_nothing_is_forecast_from_too_few_outputs() -> None:
    assert lengths_of(*[3] * (LEAST - 1)).moments() is None
    assert lengths_of(*[3] * LEAST).moments() is not None


def test_old_outputs_are_forgotten() -> None:
    """All that are remembered ended after 10 tokens, so 4 of the prompt become 14."""
    lengths = lengths_of(*[900] * 50, *[10] * MEMORY)
    zero = np.array([0])
    assert demand_of(lengths, zero, zero + 4, zero + 999, 1).peak == 14 + 0.5


def learned(**changes: Any) -> Driver:
    """A driver that has seen twenty outputs of 20 tokens; blocks of 4, 16 of them."""
    driver = Driver(**changes)
    for number in range(20):
        driver.admit(make_request(f"x{number}", 1, max_tokens=20))
        driver.run()
    return driver


def test_a_request_waits_while_those_that_run_are_expected_to_need_its_blocks() -> None:
    """Each comes to 4 + 20 tokens, six blocks: two fit in 16, and three are let in by a
    scheduler that looks at what is free now."""
    requests = [make_request(name, 4, max_tokens=20) for name in "abc"]
    unlearned, driver = Driver(), learned()
    unlearned.admit(*requests)
    driver.admit(*requests)
    assert len(unlearned.step().rows) == 3
    assert len(driver.step().rows) == 2
    assert driver.state.holding == "forecast"
    assert driver.state.snapshot()["holding"] == "forecast"
    plans = driver.run()
    assert not any(plan.preempted for plan in plans)


def crowded() -> Driver:
    """One that has seen outputs of 150 tokens; two sequences run, and a third one waits as their
    last blocks will be needed."""
    driver = Driver(num_blocks=90, max_model_len=512)
    for number in range(LEAST):
        driver.admit(make_request(f"x{number}", 1, max_tokens=150))
        driver.run()
    driver.admit(*(make_request(name, 4, max_tokens=150) for name in "abc"))
    assert len(driver.step().rows) == 2
    assert driver.state.holding == "forecast"
    return driver


def test_what_running_sequences_need_is_worked_out_once_in_a_while() -> None:
    driver = crowded()
    made = []
    every = RENEWED + 1
    for _ in range(3 * every):
        assert driver.state.core.forecast.demand is not None
        made.append(driver.state.core.forecast.demand.step)
        driver.step()
        assert driver.state.holding == "forecast"
    assert made == [made[0] + every * (number // every) for number in range(3 * every)]


@pytest.mark.parametrize("at_longest", [True, False])
def test_between_two_looks_what_starts_is_added(at_longest: bool) -> None:
    """At its longest if that fits, and else what it is expected to need from now on."""
    driver = crowded()
    driver.step()
    core = driver.state.core
    known = core.forecast.demand
    assert known is not None
    expected = WorkingSet(core)
    driver.admit(make_request("z", 9, max_tokens=44 if at_longest else 300))
    seq = core.sequences["z"]
    assert expected.has_room_for(seq) == at_longest
    expected.add(seq, 0)
    now = core.forecast.demand
    assert now is not None
    assert now.step == known.step
    for moment, before, after in zip(known.moments, known.mean, now.mean, strict=True):
        later = max(int(moment) - 2, 0)  # the next plan is the second after it
        assert after - before == (13 if at_longest else pytest.approx((9 + later) / 4 + 0.5))


def test_who_is_preempted_is_not_expected_to_need_anything() -> None:
    driver = crowded()
    driver.state.core.preempt(driver.state.core.running[-1])
    assert driver.state.core.forecast.demand is None


def test_a_request_that_is_alone_starts_whatever_is_expected() -> None:
    driver = learned(num_blocks=6)
    driver.admit(make_request("a", 12, max_tokens=12), make_request("b", 12, max_tokens=12))
    assert rows_of(driver.step()) == [("a", 0, 12)]
    driver.run()
    assert len(driver.tokens_of("b")) == 12


def test_shared_blocks_are_expected_once() -> None:
    """Three sequences of 33 tokens and more would take 27 blocks and more, were they not shared."""
    driver = learned(num_blocks=24, max_step_tokens=64)
    prompt = range(500, 532)
    driver.admit(make_request("a", prompt, max_tokens=2))
    driver.step()
    driver.admit(*(make_request(name, prompt, max_tokens=2) for name in "bc"))
    assert len(driver.step().rows) == 3


@pytest.mark.parametrize("steps_before", [0, 1])
def test_forks_are_expected_to_grow_before_and_after_they_part(steps_before: int) -> None:
    """Three samples come to 24 tokens each and share the first block: 16 and more. A request
    beside them waits, while beside a single sample it would start."""
    forks = (Fork("f", 1), Fork("g", 2))
    alone, driver = learned(max_step_tokens=8), learned(max_step_tokens=8)
    alone.admit(make_request("a", 4, max_tokens=20))
    driver.admit(make_request("a", 4, max_tokens=20, forks=forks))
    for each in (alone, driver):
        for _ in range(steps_before):
            each.step()
        each.admit(make_request("b", 4, max_tokens=20))
    assert "b" in [row.request.request_id for row in alone.step().rows]
    assert "b" not in [row.request.request_id for row in driver.step().rows]
    assert driver.state.holding == "forecast"


def test_the_prompt_of_forks_is_expected_once() -> None:
    """Three samples of 32 tokens would take 24 blocks, did they not share the first three."""
    driver = learned(num_blocks=22)
    forks = (Fork("f", 1), Fork("g", 2))
    driver.admit(make_request("a", 12, max_tokens=20, forks=forks))
    driver.admit(make_request("b", 1, max_tokens=1))
    assert "b" in [row.request.request_id for row in driver.step().rows]


@pytest.mark.parametrize(
    ("changes", "requests", "reason"),
    [
        ({}, [("a", 4)], None),
        ({"max_num_seqs": 1}, [("a", 4), ("b", 4)], "slots"),
        ({"max_step_tokens": 4}, [("a", 4), ("b", 4)], "budget"),
        ({"num_blocks": 2}, [("a", 4), ("b", 4)], "blocks"),
    ],
)
def test_the_state_says_what_holds_the_head_of_the_queue(
    changes: dict[str, Any], requests: list[tuple[str, int]], reason: str | None
) -> None:
    driver = Driver(**changes)
    driver.admit(*(make_request(name, size, max_tokens=4) for name, size in requests))
    driver.step()
    assert driver.state.holding == reason


def test_nobody_is_preempted_more_often_than_allowed() -> None:
    """Ten that all want most of a pool which holds two of them."""
    for most in (1, 2):
        driver = Driver(num_blocks=8, max_num_seqs=4, max_preemptions=most, max_waiting=16)
        driver.admit(*(make_request(f"{n}", 3, max_tokens=24, ignore_eos=True) for n in range(10)))
        preempted: Counter[str] = Counter()
        for plan in driver.run():
            preempted.update(plan.preempted)
        assert max(preempted.values()) == most
        assert all(len(driver.tokens_of(f"{n}")) == 24 for n in range(10))


def test_a_protected_sequence_starts_with_every_block_it_can_need() -> None:
    driver = Driver(num_blocks=5, max_preemptions=1)
    driver.admit(make_request("a", 8, max_tokens=4), make_request("b", 8, max_tokens=9))
    driver.step()
    assert driver.step().preempted == ("b",)
    while "a" in driver.state:
        driver.step()
    plan = driver.step()
    assert [row.request.request_id for row in plan.rows] == ["b"]
    assert driver.state.pool.owned == 4  # for 16 positions; those known fill three


def test_forks_take_what_is_computed_and_not_their_parent_s_reserve() -> None:
    driver = Driver()
    driver.admit(make_request("a", 16, max_tokens=8, forks=(Fork("b", 1),)))
    driver.state.core.sequences["a"].num_preemptions = driver.limits.max_preemptions
    plan = driver.step()
    assert [row.block_ids.size for row in plan.rows] == [4, 4]
    assert driver.state.pool.owned == 6  # four of the prompt, and two that are kept for a
    driver.run()
    assert [len(driver.tokens_of(name)) for name in "ab"] == [8, 8]


def test_forks_share_the_prompt_and_each_but_the_last_copies_its_end() -> None:
    driver = Driver()
    driver.admit(make_request("a", 6, forks=(Fork("b", 1), Fork("c", 2))))
    first = driver.step()
    assert rows_of(first) == [("a", 0, 6), ("b", 6, 0), ("c", 6, 0)]
    assert [row.logits_of for row in first.rows] == [None, 0, 0]
    assert driver.state.pool.owned == 2
    second = driver.step()
    assert second.block_copies == (BlockCopy(1, 2), BlockCopy(1, 3))
    assert [row.block_ids.tolist() for row in second.rows] == [[0, 2], [0, 3], [0, 1]]
    assert driver.step().block_copies == ()


def test_forks_of_whole_blocks_copy_nothing() -> None:
    driver = Driver()
    driver.admit(make_request("a", 8, forks=(Fork("b", 1),)))
    assert not any(plan.block_copies for plan in driver.run())


def test_what_ends_before_the_prompt_is_computed_leaves_its_place_to_the_next_fork() -> None:
    driver = Driver(max_step_tokens=4)
    driver.admit(make_request("a", 10, forks=(Fork("b", 1), Fork("c", 2))))
    driver.step()
    driver.abort("a")
    assert driver.state.num_waiting == 2
    plans = driver.run()
    assert rows_of(plans[-1])
    assert [len(driver.tokens_of(name)) for name in "abc"] == [0, 8, 8]


def test_forks_that_can_not_run_are_refused_by_the_name_of_their_field() -> None:
    forks = tuple(Fork(f"f{n}", n) for n in range(4))
    with pytest.raises(InvalidRequest, match=r"n: 5 samples .* at most 4 sequences"):
        Driver().admit(make_request("a", 4, forks=forks))
    with pytest.raises(InvalidRequest, match="request_id: 'a' is already running"):
        Driver().admit(make_request("a", 4, forks=(Fork("a", 1),)))
    with pytest.raises(InvalidRequest, match="n: the contiguous allocator shares no prompt"):
        Driver(prefix_reuse=False, allocator="contiguous").admit(
            make_request("a", 4, forks=forks[:1])
        )
