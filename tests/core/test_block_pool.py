"""The block pool: its three states, its order of eviction, and a plain model beside it."""

from __future__ import annotations

import random

import pytest

from engine.core.block_pool import BlockPool, OutOfBlocks


def key(name: int | str) -> bytes:
    return str(name).encode().ljust(32, b"-")


def cached_pool(*names: int | str, num_blocks: int = 8) -> BlockPool:
    """A pool that holds one released sequence with a block for each name, in order."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.name(block, key(name))
    pool.release(blocks)
    pool.check([])
    return pool


def test_a_new_pool_is_free_and_hands_out_low_blocks_first():
    pool = BlockPool(4)
    assert pool.counts == (4, 0, 0)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.counts == (1, 0, 3)


def test_asking_for_more_than_there_is_takes_nothing():
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks, match="3 blocks asked for, but only 2 are available"):
        pool.allocate(3)
    assert pool.counts == (2, 0, 2)


def test_a_released_block_without_a_name_is_free_and_one_with_a_name_is_cached():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.name(blocks[0], key("a"))
    pool.release(blocks)
    assert pool.counts == (3, 1, 0)
    assert pool.match([key("a")]) == [blocks[0]]


def test_a_match_is_the_longest_prefix_and_takes_no_ownership():
    pool = cached_pool("a", "b", "c")
    assert pool.match([key("a"), key("b"), key("x"), key("c")]) == [0, 1]
    assert pool.match([key("x"), key("a")]) == []
    assert pool.counts == (5, 3, 0)


def test_a_shared_block_is_returned_when_its_last_owner_releases_it():
    pool = cached_pool("a")
    pool.share([0])
    pool.share([0])
    assert (pool.counts.owned, pool.num_cached([0])) == (1, 0)
    pool.release([0])
    assert pool.counts.owned == 1
    pool.release([0])
    assert (pool.counts.owned, pool.num_cached([0])) == (0, 1)


def test_what_is_available_counts_free_and_cached_blocks():
    pool = cached_pool("a", "b", num_blocks=3)
    assert pool.num_available == 3
    pool.share([0])
    assert pool.num_available == 2
    assert len(pool.allocate(2)) == 2


def test_free_blocks_go_before_cached_ones():
    pool = cached_pool("a", "b", num_blocks=4)
    assert set(pool.allocate(2)) == {2, 3}
    assert pool.match([key("a"), key("b")]) == [0, 1]


def test_the_end_of_a_sequence_is_evicted_before_its_beginning():
    pool = cached_pool("a", "b", "c", num_blocks=3)
    assert pool.allocate(1) == [2]
    assert pool.match([key("a"), key("b"), key("c")]) == [0, 1]


def test_the_least_recently_released_sequence_is_evicted_first():
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block in (*old, *new):
        pool.name(block, key(block))
    pool.release(old)
    pool.release(new)
    pool.share(old)
    pool.release(old)  # used again: now the other is older
    assert pool.allocate(2) == [new[1], new[0]]
    assert pool.allocate(2) == [old[1], old[0]]


def test_an_evicted_block_loses_its_name():
    pool = cached_pool("a", num_blocks=1)
    pool.allocate(1)
    assert pool.match([key("a")]) == []
    pool.release([0])
    assert pool.counts == (1, 0, 0)


def test_an_owned_block_is_never_evicted():
    pool = cached_pool("a", "b", num_blocks=2)
    pool.share([0])
    assert pool.allocate(1) == [1]
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)
    assert pool.match([key("a")]) == [0]


def test_of_two_blocks_with_the_same_contents_the_first_keeps_the_name():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.name(first, key("a"))
    pool.name(second, key("a"))
    assert pool.match([key("a")]) == [first]
    pool.release([first])
    pool.release([second])
    assert pool.counts == (3, 1, 0)
    pool.check([])


def test_a_block_keeps_its_first_name():
    pool = BlockPool(1)
    pool.allocate(1)
    pool.name(0, key("a"))
    pool.name(0, key("b"))
    assert pool.match([key("b")]) == []
    assert pool.match([key("a")]) == [0]


def test_forgetting_names_frees_what_was_cached_and_leaves_owners_alone():
    pool = cached_pool("a", "b", num_blocks=4)
    pool.share([0])
    pool.forget_names()
    pool.check([[0]])
    assert pool.counts == (3, 0, 1)
    assert pool.match([key("a")]) == []
    pool.name(0, key("again"))
    assert pool.match([key("again")]) == [0]


def test_a_copy_goes_its_own_way():
    pool = cached_pool("a", "b", num_blocks=4)
    twin = pool.copy()
    pool.share([0])
    pool.allocate(3)
    twin.check([])
    assert twin.counts == (2, 2, 0)
    assert twin.match([key("a"), key("b")]) == [0, 1]


def test_releasing_more_often_than_owned_is_a_mistake_of_ours():
    pool = BlockPool(2)
    pool.release(pool.allocate(1))
    with pytest.raises(AssertionError, match="block 0 was released more often than owned"):
        pool.release([0])


def test_sharing_a_free_block_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="block 1 is shared, but it is free"):
        BlockPool(2).share([1])


def test_naming_a_block_that_nobody_owns_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="block 1 is named, but nobody owns it"):
        BlockPool(2).name(1, key("a"))


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        ([[0, 0]], "holds a block twice"),
        ([], "reference counts differ"),
        ([[0], [0]], "reference counts differ"),
    ],
)
def test_check_notices_owners_that_the_pool_does_not_know(owners: list[list[int]], message: str):
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match=message):
        pool.check(owners)


class PlainPool:
    """The pool again: a list of owners a block and a list of what was released, in order."""

    def __init__(self, num_blocks: int):
        self.owners = [0] * num_blocks
        self.names: list[bytes | None] = [None] * num_blocks
        self.free = list(range(num_blocks))[::-1]
        self.cached: list[int] = []

    def allocate(self, count: int) -> list[int]:
        taken = []
        for _ in range(count):
            block = self.free.pop() if self.free else self.cached.pop(0)
            self.names[block] = None
            self.owners[block] = 1
            taken.append(block)
        return taken

    def match(self, keys: list[bytes]) -> list[int]:
        found = []
        for wanted in keys:
            if wanted not in self.names:
                break
            found.append(self.names.index(wanted))
        return found

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self.owners[block] += 1
            if block in self.cached:
                self.cached.remove(block)

    def release(self, blocks: list[int]) -> None:
        for block in blocks[::-1]:
            self.owners[block] -= 1
            if self.owners[block] == 0:
                (self.free if self.names[block] is None else self.cached).append(block)

    def name(self, block: int, wanted: bytes) -> None:
        if wanted not in self.names and self.names[block] is None:
            self.names[block] = wanted

    def forget_names(self) -> None:
        self.names = [None] * len(self.names)
        self.free += self.cached
        self.cached = []


@pytest.mark.parametrize("seed", range(40))
def test_the_pool_does_block_for_block_what_a_plain_model_does(seed: int):
    rng = random.Random(seed)
    num_blocks = rng.randint(1, 12)
    pool, plain = BlockPool(num_blocks), PlainPool(num_blocks)
    held: list[list[int]] = []
    for _ in range(400):
        choice = rng.random()
        if choice < 0.4:  # a sequence starts: what matches is shared, the rest is new
            keys = [key(rng.randint(0, 2) * 100 + index) for index in range(rng.randint(0, 4))]
            hits = pool.match(keys)
            assert hits == plain.match(keys)
            fresh = rng.randint(0, 3)
            if fresh <= pool.num_available - pool.num_cached(hits):
                pool.share(hits)
                plain.share(hits)
                blocks = pool.allocate(fresh)
                assert blocks == plain.allocate(fresh)
                held.append(hits + blocks)
        elif choice < 0.6 and held:
            blocks = rng.choice(held)
            for index, block in enumerate(blocks):
                name = key(rng.randint(0, 2) * 100 + index)
                pool.name(block, name)
                plain.name(block, name)
        elif choice < 0.62:
            pool.forget_names()
            plain.forget_names()
        elif choice < 0.65:
            pool = pool.copy()
        elif held:
            blocks = held.pop(rng.randrange(len(held)))
            pool.release(blocks)
            plain.release(blocks)
        pool.check(held)
        assert pool.counts.owned == sum(count > 0 for count in plain.owners)
        assert list(pool._cached) == plain.cached
        assert [pool._key_of.get(block) for block in range(num_blocks)] == plain.names
    for blocks in held:
        pool.release(blocks)
    assert pool.counts.owned == 0
