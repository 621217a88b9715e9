"""The naive allocator against a map of single blocks, and under the real scheduler."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.block_pool import OutOfBlocks, PoolCounts
from engine.core.contiguous import ContiguousPool
from engine.types import FinishReason
from tests.core.driver import Driver, make_request


class Bitmap:
    """The same allocator, found by looking at every block."""

    def __init__(self, num_blocks: int):
        self.is_free = [True] * num_blocks

    def runs(self) -> list[tuple[int, int]]:
        """(length, first block) of each free run."""
        runs: list[tuple[int, int]] = []
        length = 0
        for block, free in enumerate([*self.is_free, False]):
            if free:
                length += 1
            elif length:
                runs.append((length, block - length))
                length = 0
        return runs

    def allocate(self, count: int) -> list[int] | None:
        """The first blocks of the shortest run that is long enough, the lowest of equals."""
        fitting = [run for run in self.runs() if run[0] >= count]
        if not fitting:
            return None
        first = min(fitting)[1]
        self.is_free[first : first + count] = [False] * count
        return list(range(first, first + count))


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(1, 24),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=60),
)
def test_slabs_and_free_runs_are_those_of_a_bitmap(
    num_blocks: int, steps: list[tuple[bool, int]]
) -> None:
    pool, bitmap = ContiguousPool(num_blocks), Bitmap(num_blocks)
    slabs: list[list[int]] = []
    for takes, number in steps:
        if takes:
            count = number % (num_blocks + 1) + 1
            expected = bitmap.allocate(count)
            assert pool.has_room(count, growth=99) == (expected is not None)
            if expected is None:
                with pytest.raises(OutOfBlocks, match=f"run of {count} blocks"):
                    pool.allocate(count)
            else:
                assert pool.allocate(count) == expected
                slabs.append(expected)
        elif slabs:
            slab = slabs.pop(number % len(slabs))
            pool.release(slab)
            for block in slab:
                bitmap.is_free[block] = True
        free = sum(bitmap.is_free)
        assert pool.counts == PoolCounts(free, 0, num_blocks - free)
        assert pool.largest_free_run == max((length for length, _ in bitmap.runs()), default=0)
        pool.check(slabs)


def test_a_released_slab_merges_with_the_free_runs_on_both_sides() -> None:
    pool = ContiguousPool(12)
    slabs = [pool.allocate(3) for _ in range(4)]
    pool.release(slabs[0])
    pool.release(slabs[2])
    assert (pool.counts.free, pool.largest_free_run) == (6, 3)  # fragmented: no slab of 4
    assert not pool.has_room(4, growth=0)
    pool.release(slabs[1])
    assert (pool.counts.free, pool.largest_free_run) == (9, 9)
    assert pool.allocate(9) == list(range(9))


def test_the_shortest_run_that_fits_is_used() -> None:
    pool = ContiguousPool(12)
    first, _, third, _ = (pool.allocate(count) for count in (5, 1, 2, 1))
    pool.release(first)
    pool.release(third)
    assert pool.allocate(2) == [6, 7]  # not the first five blocks, nor the last three
    assert pool.allocate(3) == [9, 10, 11]
    assert pool.allocate(5) == [0, 1, 2, 3, 4]


def test_a_full_pool_has_no_room_and_gets_it_back() -> None:
    pool = ContiguousPool(4)
    slab = pool.allocate(4)
    assert pool.counts == PoolCounts(0, 0, 4)
    assert (pool.largest_free_run, pool.num_available) == (0, 0)
    assert not pool.has_room(1, growth=0)
    with pytest.raises(OutOfBlocks, match="longest of the 0 free blocks has 0"):
        pool.allocate(1)
    pool.release(slab)
    assert pool.counts == PoolCounts(4, 0, 0)


def test_part_of_a_slab_or_a_free_one_is_not_released() -> None:
    pool = ContiguousPool(8)
    slab = pool.allocate(4)
    for wrong in (slab[:2], slab[1:], [4, 5]):
        with pytest.raises(AssertionError, match="no slab"):
            pool.release(wrong)
    pool.release(slab)
    with pytest.raises(AssertionError, match="no slab"):
        pool.release(slab)


def test_nothing_is_shared_cached_or_found_again() -> None:
    pool = ContiguousPool(8)
    slab = pool.allocate(2)
    pool.name(slab[0], b"key")
    assert pool.match([b"key"]) == []
    assert pool.num_cached(slab) == 0
    assert not pool.is_shared(slab[0])
    pool.share([])
    with pytest.raises(AssertionError, match="one owner"):
        pool.share(slab)
    pool.release(slab)
    pool.forget_names()
    assert pool.take_evicted() == []
    assert pool.counts == PoolCounts(8, 0, 0)


def test_a_copy_goes_its_own_way() -> None:
    pool = ContiguousPool(8)
    slab = pool.allocate(3)
    twin = pool.copy()
    pool.release(slab)
    twin.check([slab])
    assert twin.allocate(5) == [3, 4, 5, 6, 7]
    pool.check([])
    assert pool.largest_free_run == 8


def test_a_request_gets_a_slab_for_its_longest_reply_and_keeps_it() -> None:
    driver = _driver(num_blocks=16)
    driver.admit(make_request("a", 5, max_tokens=12))
    driver.step()
    assert driver.state.pool == PoolCounts(12, 0, 4)  # 5 + 12 - 1 positions in blocks of 4
    plans = driver.run()
    assert driver.state.pool == PoolCounts(16, 0, 0)
    assert plans[-1].rows[0].block_ids.tolist() == [0, 1, 2, 3]


def test_a_request_waits_for_a_run_though_enough_blocks_are_free() -> None:
    driver = _driver(num_blocks=9)
    for name in "abc":
        driver.admit(make_request(name, 4, max_tokens=9))  # 3 blocks each
    driver.step()
    driver.abort("a")
    driver.abort("c")
    driver.admit(make_request("long", 4, max_tokens=13))  # 4 blocks; 6 are free, in two runs
    driver.step()
    assert driver.state.pool.free == 6
    assert driver.state.num_waiting == 1
    driver.abort("b")
    assert [row.request.request_id for row in driver.step().rows] == ["long"]


def test_every_request_of_a_crowd_gets_its_tokens_without_a_preemption() -> None:
    draw = random.Random(5)
    driver = _driver(num_blocks=24, max_num_seqs=8, max_step_tokens=16, max_waiting=64)
    wanted = {}
    for number in range(40):
        name = f"{number:03}"
        wanted[name] = draw.randint(1, 20)
        driver.admit(make_request(name, draw.randint(1, 30), max_tokens=wanted[name]))
    plans = driver.run()
    assert not any(plan.preempted for plan in plans)
    assert {name: len(driver.tokens_of(name)) for name in wanted} == wanted
    assert all(out.finish_reason in (None, FinishReason.LENGTH) for out in driver.outputs)
    assert driver.state.pool == PoolCounts(24, 0, 0)


def _driver(**changes: Any) -> Driver:
    return Driver(prefix_reuse=False, allocator="contiguous", **changes)
