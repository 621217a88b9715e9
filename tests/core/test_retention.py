"""What stays in the cache and for whom: times to live, flushing, and public prefixes."""

from __future__ import annotations

from typing import Any

import pytest

from engine.core import upkeep
from engine.core.block_pool import BlockPool
from engine.core.forecast import LEAST
from engine.core.host_tier import HostTier
from engine.core.retention import Tag
from engine.sampling import InvalidRequest
from engine.types import (
    Domain,
    FinishReason,
    Fork,
    Request,
    StepPlan,
    StepTokens,
    TokenLogprobs,
)
from tests.core.driver import Driver, make_request, row_of

ALICE, BOB = Domain("alice"), Domain("bob")
TEXT = tuple(range(1, 13))  # three blocks


def num_cached(driver: Driver, request: Request) -> int:
    """How many prompt tokens a request finds. It runs to its end."""
    driver.admit(request)
    start = row_of(driver.step(), request.request_id).start
    driver.run()
    return start


def tick(driver: Driver, now: int) -> None:
    driver.state = upkeep.tick(driver.state, now)
    driver.state.check()


def flush(driver: Driver, domain: Domain | None) -> None:
    driver.state = upkeep.flush(driver.state, domain)
    driver.state.check()


def names() -> Any:
    return (f"r{number}" for number in range(100))


# Time to live.


def test_blocks_stay_for_their_time_to_live_and_are_then_erased() -> None:
    driver = Driver()
    tick(driver, 1_000)
    old = make_request("old", TEXT, domain=ALICE, cache_ttl=500, max_tokens=4)
    first = driver.admit(old) or driver.schedule()
    blocks = row_of(first, "old").block_ids.tolist()
    driver.commit(first)
    driver.run()
    assert driver.state.pool.cached == 3
    assert upkeep.next_expiry(driver.state) == 1_500
    tick(driver, 1_499)
    assert driver.state.pool.cached == 3
    assert driver.state.is_idle
    tick(driver, 1_500)
    assert driver.state.pool == (16, 0, 0)
    assert not driver.state.is_idle, "what is left to do is to erase them"
    plan = driver.schedule()
    assert (plan.rows, sorted(plan.erased_blocks)) == ((), sorted(blocks[:3]))
    assert driver.state.is_idle
    assert upkeep.next_expiry(driver.state) is None
    assert num_cached(driver, make_request("new", (*TEXT, 50), domain=ALICE)) == 0


def test_use_prolongs_it_and_a_domain_without_a_limit_keeps_its_blocks() -> None:
    driver, name = Driver(), names()
    for domain, ttl in ((ALICE, 500), (BOB, 0)):
        request = make_request(next(name), TEXT, domain=domain, cache_ttl=ttl, max_tokens=1)
        assert num_cached(driver, request) == 0
    for now in (400, 800, 1_200):
        tick(driver, now)
        request = make_request(next(name), (*TEXT, 50), domain=ALICE, cache_ttl=500, max_tokens=1)
        assert num_cached(driver, request) == 12
    tick(driver, 10_000)
    assert num_cached(driver, make_request(next(name), (*TEXT, 50), domain=ALICE)) == 0
    assert num_cached(driver, make_request(next(name), (*TEXT, 50), domain=BOB)) == 12


def test_a_partial_block_is_erased_when_its_sequence_ends() -> None:
    driver = Driver()
    driver.admit(make_request("r", (*TEXT, 13, 14), domain=ALICE, cache_ttl=500, max_tokens=1))
    plan = driver.step()
    last = row_of(plan, "r").block_ids[3]
    assert driver.schedule().erased_blocks == (last,)


def test_what_goes_to_host_memory_expires_there_too() -> None:
    driver, name = Driver(num_blocks=6, host_blocks=4), names()
    num_cached(driver, make_request("a", TEXT, domain=ALICE, cache_ttl=500, max_tokens=1))
    plans: list[StepPlan] = []
    driver.admit(make_request("b", 20, domain=BOB, max_tokens=1))
    plans += driver.run()
    slots = [swap.slot for plan in plans for swap in plan.swap_outs]
    assert len(slots) == 2
    # The blocks that were evicted hold another's tokens now, and nothing of the first.
    assert {swap.block for plan in plans for swap in plan.swap_outs} <= {
        block for plan in plans for block in plan.erased_blocks
    }
    tick(driver, 500)
    plan = driver.schedule()
    assert sorted(plan.erased_slots) == sorted(slots)
    assert num_cached(driver, make_request(next(name), (*TEXT, 50), domain=ALICE)) == 0


def test_what_a_failed_plan_was_to_erase_is_erased_by_the_next() -> None:
    driver = Driver(num_blocks=6, host_blocks=4)
    num_cached(driver, make_request("a", TEXT, domain=ALICE, cache_ttl=500, max_tokens=1))
    num_cached(driver, make_request("b", 20, domain=BOB, max_tokens=1))
    tick(driver, 500)
    plan = driver.schedule()
    assert plan.erased_slots
    driver.fail(plan)
    assert set(plan.erased_slots) <= set(driver.schedule().erased_slots)


# Flushing.


@pytest.mark.parametrize("whose", [ALICE, None])
def test_a_flush_forgets_a_domain_or_all(whose: Domain | None) -> None:
    driver, name = Driver(), names()
    for domain in (ALICE, BOB):
        num_cached(driver, make_request(next(name), TEXT, domain=domain, max_tokens=1))
    flush(driver, whose)
    erased = driver.schedule().erased_blocks
    assert len(erased) == (6 if whose is None else 3)
    assert num_cached(driver, make_request(next(name), (*TEXT, 50), domain=ALICE)) == 0
    expected = 0 if whose is None else 12
    assert num_cached(driver, make_request(next(name), (*TEXT, 50), domain=BOB)) == expected


def test_what_runs_during_a_flush_goes_on_unseen_and_is_erased_at_its_end() -> None:
    driver = Driver()
    driver.admit(make_request("old", TEXT, domain=ALICE))
    plan = driver.step()
    blocks = set(row_of(plan, "old").block_ids.tolist())
    flush(driver, ALICE)
    driver.admit(make_request("new", (*TEXT, 50), domain=ALICE, max_tokens=1))
    plan = driver.step()
    assert row_of(plan, "new").start == 0, "it found what was flushed"
    plans = driver.run()
    assert driver.tokens_of("old") == [7] * 8, "it was disturbed"
    plans.append(driver.schedule())
    assert blocks <= {block for plan in plans for block in plan.erased_blocks}


# Public prefixes.


def pin(driver: Driver, name: str = "public", text: tuple[int, ...] = TEXT) -> None:
    driver.admit(make_request(name, text, max_tokens=1, is_public=True))
    driver.run()


def test_every_domain_shares_a_public_prefix_and_nothing_after_it() -> None:
    driver, name = Driver(num_blocks=32), names()
    pin(driver)
    assert driver.state.core.public.num_blocks == 3
    own = (*TEXT, 50, 51, 52, 53)
    assert num_cached(driver, make_request(next(name), (*own, 60), domain=ALICE)) == 12
    assert num_cached(driver, make_request(next(name), (*own, 60), domain=BOB)) == 12
    assert num_cached(driver, make_request(next(name), (*own, 60), domain=ALICE)) == 16
    # The control: without the declaration, nobody finds what another one sent.
    driver = Driver(num_blocks=32)
    num_cached(driver, make_request(next(name), TEXT, domain=BOB))
    assert num_cached(driver, make_request(next(name), (*own, 60), domain=ALICE)) == 0


def test_a_block_of_two_public_prefixes_is_counted_once() -> None:
    driver = Driver(num_blocks=32)
    pin(driver, "one", (*TEXT, 50, 51, 52, 53))
    pin(driver, "two", (*TEXT, 60, 61, 62, 63))
    assert driver.state.core.public.num_blocks == 5
    assert driver.state.pool.owned == 5


def test_a_public_prefix_outlives_pressure_flushes_and_failures() -> None:
    driver, name = Driver(), names()
    pin(driver)
    for _ in range(4):
        num_cached(driver, make_request(next(name), 40, domain=ALICE))
    flush(driver, None)
    assert num_cached(driver, make_request(next(name), (*TEXT, 50), domain=BOB)) == 12
    driver.admit(make_request("victim", 4))
    driver.fail(driver.schedule())
    assert driver.state.core.public.num_blocks == 0, "its contents are lost"
    driver.run()
    assert driver.state.core.public.num_blocks == 3, "and computed again"
    assert num_cached(driver, make_request(next(name), (*TEXT, 50), domain=BOB)) == 12


def test_a_prefix_that_generation_completes_is_public_too() -> None:
    """Equal tokens make equal blocks, whoever computed them."""
    driver, name = Driver(), names()
    text = (*TEXT[:8], 7, 7, 7, 7)
    pin(driver, text=text)
    request = make_request(next(name), TEXT[:8], domain=ALICE, max_tokens=5)
    assert num_cached(driver, request) == 4  # its last token must be computed
    pool = driver.state.core.pool
    assert isinstance(pool, BlockPool)
    tags = [pool.retention._tags[block] for block in pool.retention._tags]
    assert all(tag.domain is None for tag in tags), "it was computed a second time for one domain"


@pytest.mark.parametrize(
    ("limits", "num_before", "message"),
    [
        ({"prefix_reuse": False}, 0, "turn prefix_reuse on"),
        ({}, 1, "come before all other requests"),
        ({"num_blocks": 5}, 0, "take 3 blocks, but at most half of the cache's 5"),
    ],
)
def test_a_prefix_that_can_not_be_pinned_is_refused(
    limits: dict[str, Any], num_before: int, message: str
) -> None:
    driver = Driver(**limits)
    for number in range(num_before):
        driver.admit(make_request(f"before {number}", 4))
    with pytest.raises(InvalidRequest, match=message):
        pin(driver)


def test_a_request_must_fit_into_what_is_not_pinned() -> None:
    driver = Driver(num_blocks=8)
    driver.admit(make_request("r", 4, max_tokens=21))
    driver.run()
    pin(driver)
    driver.admit(make_request("fits", 4, max_tokens=17))
    with pytest.raises(InvalidRequest, match="may reach 21 tokens, but the whole cache holds 20"):
        driver.admit(make_request("does not", 4, max_tokens=18))
    driver.run()


# What leaves nothing, and what only seemed to.


def test_a_private_request_leaves_nothing() -> None:
    driver, name = Driver(), names()
    driver.admit(make_request("p", (*TEXT, 13), domain=ALICE, is_private=True, max_tokens=4))
    blocks: set[int] = set()
    erased: set[int] = set()
    while not driver.state.is_idle:
        plan = driver.step()
        blocks.update(*(row.block_ids.tolist() for row in plan.rows))
        erased.update(plan.erased_blocks)
    assert driver.state.pool == (16, 0, 0)
    assert erased == blocks
    num_cached(driver, make_request(next(name), TEXT, domain=ALICE, max_tokens=1))
    private = make_request("q", (*TEXT, 13), domain=ALICE, is_private=True)
    assert num_cached(driver, private) == 0, "it used what others left"


@pytest.mark.parametrize("changes", [{}, {"beam_width": 2, "n": 1}])
def test_what_ran_during_a_flush_leaves_nothing_however_it_is_held(changes: dict[str, Any]) -> None:
    """The partly filled block too, and whatever beams hold or keep."""
    driver = Driver()
    forks = (Fork("r.1", 1),) if changes else ()
    request = make_request("r", (*TEXT, 13, 14), domain=ALICE, max_tokens=6, forks=forks, **changes)
    driver.admit(request)
    tops = ((3, -0.5), (4, -0.7), (5, -0.9))
    blocks: set[int] = set()
    erased: set[int] = set()
    flushed = False
    while not driver.state.is_idle:
        plan = driver.schedule()
        blocks.update(*(row.block_ids.tolist() for row in plan.rows))
        blocks.update(copy.destination for copy in plan.block_copies)
        erased.update(plan.erased_blocks)
        rows = range(len(plan.rows))
        logprobs = {row: TokenLogprobs(3, -0.5, tops) for row in rows} if changes else {}
        driver.commit(plan, StepTokens((7,) * len(plan.rows), logprobs))
        if not flushed:
            flush(driver, ALICE)
            flushed = True
    assert erased == blocks
    assert driver.state.pool == (16, 0, 0)


def test_times_that_are_past_caring_are_not_kept() -> None:
    driver = Driver()
    day = 24 * 3600 * 1000
    for number in range(500):
        request = make_request(f"r{number}", (*TEXT, 50), cache_ttl=day, max_tokens=1)
        driver.admit(request)
        driver.run()
    assert len(driver.state.core.pool.retention._expiries) <= 2 * 16 + 64


def test_nor_are_those_of_blocks_in_host_memory() -> None:
    """And of what is there, all is dropped at its last time, and nothing before."""
    tier = HostTier(8)
    for time in range(1, 1_000):
        for number in range(8):
            tier.restore(bytes([number]), Tag(ALICE, 1), time * 10 + number, 0)
    assert len(tier._expiries) <= 2 * 8 + 64 + 8
    assert tier.next_expiry is not None
    for number in range(8):
        tier.expire(9_990 + number - 1)
        assert len(tier) == 8 - number
    tier.expire(9_997)
    assert len(tier) == 0
    assert tier.next_expiry is None
    assert sorted(tier.take_erased()) == list(range(8))


def test_what_expires_together_goes_in_the_order_it_came() -> None:
    """And not by key: in the replay of a log that holds hashes, keys are others."""
    tier = HostTier(4)
    keys = [bytes([number]) for number in (3, 1, 4, 2)]
    slots = [tier.restore(key, Tag(ALICE, 1), 10, 0) for key in keys]
    tier.expire(10)
    assert tier.take_erased() == slots


def test_a_slot_that_gives_way_is_erased_before_it_is_filled_again() -> None:
    driver = Driver(num_blocks=4, host_blocks=2)
    num_cached(driver, make_request("a", 12, domain=ALICE, cache_ttl=500, max_tokens=1))
    used: set[int] = set()
    erased: set[int] = set()
    for number in range(4):
        driver.admit(make_request(f"b{number}", 12, domain=BOB, max_tokens=1))
        for plan in driver.run():
            used.update(swap.slot for swap in plan.swap_outs)
            erased.update(plan.erased_slots)
    assert used == {0, 1}
    assert erased == {0, 1}


def test_a_public_prefix_is_tried_again_and_then_given_up() -> None:
    driver = Driver(max_preemptions=2)
    driver.admit(make_request("public", TEXT, max_tokens=1, is_public=True))
    for _ in range(2):
        assert driver.fail(driver.schedule()) == ()
    [output] = driver.fail(driver.schedule())
    assert output.finish_reason is FinishReason.ERROR
    assert not driver.state.core.public.keys
    driver.admit(make_request("all", 4, max_tokens=61))  # nothing is kept for it any more
    driver.run()


def test_a_failure_of_the_device_is_no_preemption() -> None:
    driver = Driver(max_preemptions=2)
    driver.admit(make_request("a", 4), make_request("b", 4))
    driver.step()
    for _ in range(3):
        driver.fail()
        driver.step()
    assert all(seq.num_preemptions == 0 for seq in driver.state.core.running)


def test_pinned_blocks_are_no_room_to_grow() -> None:
    driver = Driver(max_num_seqs=3, max_preemptions=9)
    for length in range(LEAST):  # outputs of 16 tokens are known
        num_cached(driver, make_request(f"seen {length}", 4, max_tokens=16))
    flush(driver, None)
    pin(driver, text=tuple(range(100, 132)))
    driver.admit(make_request("a", 16, max_tokens=17), make_request("b", 16, max_tokens=17))
    plans = driver.run()
    assert not any(plan.preempted for plan in plans)
