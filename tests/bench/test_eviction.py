"""The comparison of orders of eviction: its model of the pool, and its optimum."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.eviction import merge, record, working_set
from benchmarks.eviction_orders import ORDERS, Block, Order
from benchmarks.eviction_replay import BLOCK_SIZE, Replay, blocks_of, optimum
from engine.simulate.stream import LAST_TURN, sharegpt_like

STREAM = sharegpt_like(80, rate=5.0, turns=3.4, think_s=20.0, system_share=0.5, seed=3)


@pytest.mark.parametrize("num_blocks", [550, 700])
def test_replaying_the_engine_s_order_gives_its_hits_and_nothing_beats_the_optimum(
    num_blocks: int,
) -> None:
    events, simulated, tokens = record(STREAM, num_blocks)
    hits = {}
    for name, make in ORDERS.items():
        replayed = Replay(STREAM, num_blocks, make(num_blocks)).run(events)
        assert replayed.missing == 0
        hits[name] = replayed.hits
    assert hits["LRU"] * BLOCK_SIZE == round(simulated * tokens) > 0
    best = optimum(STREAM, num_blocks, events, 0).hits
    assert max(hits.values()) <= best
    unlimited_events, unlimited, _ = record(STREAM, 100_000)
    assert best * BLOCK_SIZE <= unlimited * tokens
    assert num_blocks < working_set(STREAM, unlimited_events)


def test_the_optimum_is_the_best_of_all_choices() -> None:
    """Every way to evict, tried out, on pools of three blocks with random requests of one block."""
    random = np.random.Generator(np.random.PCG64(5))
    for _ in range(20):
        asked = random.integers(0, 5, 9).tolist()
        most = max(
            _hits(asked, choices) for choices in itertools.product(range(3), repeat=len(asked))
        )
        assert _optimum_hits(asked) == most


def _hits(asked: list[int], choices: tuple[int, ...]) -> int:
    cache: list[int] = []
    hits = 0
    for item, choice in zip(asked, choices, strict=True):
        if item in cache:
            hits += 1
        elif len(cache) < 3:
            cache.append(item)
        else:
            cache[choice] = item
    return hits


def _optimum_hits(asked: list[int]) -> int:
    from benchmarks.eviction_orders import Optimum

    now = 0

    def next_use(block: Block) -> float:
        later = (n for n in range(now + 1, len(asked)) if asked[n] == block[1])
        return next(later, float("inf"))

    order, hits, size = Optimum(3, next_use), 0, 0
    for now, item in enumerate(asked):  # noqa: B007 - next_use reads it
        block = (1, item, 0)
        if block in order:
            order.remove(block)
            hits += 1
        elif size == 3:
            order.pop()
        else:
            size += 1
        order.begin_release()
        order.add(block)
    return hits


@pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS)
def test_no_order_evicts_a_block_before_those_that_follow_it(make: Callable[[int], Order]) -> None:
    """Chains that part from a common beginning, released and matched at random."""
    random = np.random.Generator(np.random.PCG64(7))
    order = make(40)

    def chain(number: int) -> list[Block]:
        return [(0, 0, 0), (0, 0, 1), *((1, number, index) for index in range(2, 6))]

    present: set[Block] = set()
    for _ in range(600):
        blocks = chain(int(random.integers(0, 12)))
        found = list(itertools.takewhile(present.__contains__, blocks))
        for block in found:
            order.remove(block)
            order.hit(block)
        order.begin_release()
        for block in reversed(blocks):
            order.add(block)
        present.update(blocks)
        while len(present) > 30:
            evicted = order.pop()
            present.remove(evicted)
            kind, number, index = evicted
            followers = {(1, n, 2) for n in range(12)} if evicted == (0, 0, 1) else set()
            followers |= {(kind, number, index + 1)}
            assert not followers & present, f"{evicted} went before what follows it"


def test_merged_streams_keep_their_conversations_apart() -> None:
    chats = sharegpt_like(30, rate=5.0, turns=3.0, seed=1)
    both = merge(chats, sharegpt_like(20, rate=5.0, seed=2, system_share=1.0))
    assert len(both) == 50
    later = np.flatnonzero(both.next_turn != LAST_TURN)
    assert (both.conversation[later] == both.conversation[both.next_turn[later]]).all()
    assert len(np.unique(both.conversation)) == len(np.unique(chats.conversation)) + 20
    assert blocks_of(both, 0, 2) == [(1, 0, 0), (1, 0, 1)]
    assert [kind for kind, _, _ in blocks_of(both, 49, 33)] == [0] * 32 + [1]
