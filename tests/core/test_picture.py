"""Pictures of scheduler states: they say what pool, tier and queue say, and stay true."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from engine.core.block_pool import BlockPool
from engine.core.picture import MAX_WAITING, Picture, domain_tag, take_picture
from engine.types import Domain
from tests.core.driver import Driver, make_request
from tests.core.random_operations import (
    LIMITS,
    REQUEST,
    WEIGHTS,
    draw,
    make_simulation,
    perform,
    possible,
)
from tests.core.simulation import Simulation


def blocks_of(picture: Picture) -> tuple[list[int], list[int | None]]:
    """Reference count and first owner of each block, worked out block by block."""
    refs = [0] * picture.num_blocks
    owners: list[int | None] = [None] * picture.num_blocks
    for seq in picture.running + picture.kept:
        for block in seq.block_ids.tolist():
            refs[block] += 1
            owners[block] = seq.number if owners[block] is None else owners[block]
    return refs, owners


def check_against_core(picture: Picture, simulation: Simulation) -> None:
    """Everything in a picture against the structures that the scheduler itself works with."""
    core: Any = simulation.state.core
    assert isinstance(core.pool, BlockPool)
    refs, _ = blocks_of(picture)
    assert refs == core.pool._ref_counts
    assert picture.cached.tolist() == sorted(core.pool._cached)
    assert picture.host.tolist() == sorted(entry.slot for entry in core.host._entries.values())
    free = {block for block, count in enumerate(refs) if not count} - set(picture.cached.tolist())
    assert free == set(core.pool._free)
    assert [seq.request_id for seq in picture.running] == [
        seq.request.request_id for seq in core.running
    ]
    assert picture.num_waiting == len(core.sequences) - len(core.running)
    assert picture.holding == simulation.state.holding


def plain(picture: Picture) -> dict[str, Any]:
    """A deep copy to compare with, arrays as lists."""
    tree = {name: getattr(picture, name) for name in Picture.__slots__}
    tree["cached"], tree["host"] = picture.cached.tolist(), picture.host.tolist()
    for name in ("running", "kept"):
        tree[name] = [(*seq[:-1], seq.block_ids.tolist()) for seq in tree[name]]
    return copy.deepcopy(tree)


def pictures_of_a_random_run(seed: int, num_operations: int) -> tuple[list[Picture], Counter[str]]:
    """A picture after each operation, checked."""
    rng = random.Random(seed)
    simulation = make_simulation(draw(rng, LIMITS))
    pictures, texts = [], []
    for serial in range(num_operations):
        (operation,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if operation in possible(simulation):
            perform(simulation, operation, draw(rng, REQUEST), serial)
            pictures.append(take_picture(simulation.state))
            texts.append(plain(pictures[-1]))
            check_against_core(pictures[-1], simulation)
    simulation.drain()
    assert [plain(picture) for picture in pictures] == texts, "an old picture has changed"
    return pictures, simulation.counts


def test_a_picture_says_what_the_scheduler_knows_and_stays_true() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        pictures, counts = pictures_of_a_random_run(seed, 120)
        seen.update(counts.keys())
        for picture in pictures:
            seen["shared"] += max(blocks_of(picture)[0]) > 1
            seen["host"] += len(picture.host) > 0
            seen["cached"] += len(picture.cached) > 0
    for event in ("shared", "host", "cached", "preempted", "parted", "copies", "failed requests"):
        assert seen[event], f"no {event} came up"


def test_taking_a_picture_does_not_consume_the_state() -> None:
    driver = Driver()
    driver.admit(make_request("a", 5))
    take_picture(driver.state)
    driver.step()
    assert take_picture(driver.state).step == 1


def test_a_slab_shows_what_it_reserves() -> None:
    driver = Driver(allocator="contiguous", prefix_reuse=False, num_blocks=16, block_size=4)
    driver.admit(make_request("a", 5, max_tokens=16))
    driver.schedule()
    (seq,) = take_picture(driver.state).running
    assert seq.block_ids.tolist() == list(range(5))  # 5 + 16 - 1 positions
    assert seq.num_computed == 5  # so that three of them hold nothing


def test_a_picture_names_the_first_of_a_long_queue_and_counts_all() -> None:
    driver = Driver(max_waiting=100)
    driver.admit(*(make_request(f"r{number}", 3) for number in range(MAX_WAITING + 7)))
    picture = take_picture(driver.state)
    assert [request.request_id for request in picture.waiting] == [
        f"r{number}" for number in range(MAX_WAITING)
    ]
    assert picture.num_waiting == MAX_WAITING + 7


def test_a_picture_holds_no_token() -> None:
    driver = Driver()
    secret = 76543
    driver.admit(make_request("a", (secret,) * 5))
    driver.step({"a": secret})
    assert str(secret) not in str(plain(take_picture(driver.state)))


def test_a_domain_tag_tells_salts_apart_without_showing_them() -> None:
    tags = {domain_tag(Domain("t", salt)) for salt in ("hunter2", "hunter3")}
    tags |= {domain_tag(Domain("t")), domain_tag(Domain("th", "unter2"))}
    assert len(tags) == 4
    assert all("unter" not in tag for tag in tags)
    assert all(tag.startswith("t") for tag in tags)


@pytest.mark.parametrize("num_slots", [0, 3])
def test_an_empty_tier_has_no_used_slots(num_slots: int) -> None:
    picture = take_picture(Driver(host_blocks=num_slots).state)
    assert picture.host.dtype == picture.cached.dtype == np.int32
    assert len(picture.host) == len(picture.cached) == 0
