"""Blocks that must not stay are zeros afterwards: in the pool, in host memory, and without a
request that would bring another step."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from engine.aot.hlo import pool_copies
from engine.core import scheduler, upkeep
from engine.core.scheduler import SchedulerState
from engine.runtime.block_copies import BlockEraser
from engine.runtime.host_pool import HostPool
from engine.runtime.inbox import EngineStopped
from engine.runtime.replay import replay
from engine.types import Domain, SwapOut
from tests.engines import make_request, small_engine
from tests.runtime.fake_runner import LIMITS, FakeRunner, start_loop
from tests.runtime.pools import BLOCKS, DTYPES, LAYERS, random_pool
from tests.runtime.tiny import random_ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_devices", "count"), [(1, 1), (2, 40)])
def test_those_blocks_are_zeros_in_every_layer_and_all_others_as_they_were(
    dtype: str, num_devices: int, count: int
) -> None:
    pool, on_device, struct = random_pool(dtype, num_devices)
    eraser = BlockEraser(struct, LAYERS)
    blocks = np.random.default_rng(count).permutation(BLOCKS)[:count].tolist()
    expected = pool.copy().reshape(LAYERS, BLOCKS, -1)
    expected[:, blocks] = 0
    found = np.asarray(eraser(on_device, blocks))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pool_is_erased_in_place(dtype: str) -> None:
    pool, _, struct = random_pool(dtype, 1)
    program = BlockEraser(struct, LAYERS).program
    assert pool_copies(program, num_elements=pool.size, num_bytes=pool.nbytes) == []


def test_more_blocks_than_one_call_takes_are_erased_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, on_device, struct = random_pool("float32", 1)
    monkeypatch.setattr(BlockEraser, "AT_A_CALL", 16)
    assert any(pool.tobytes())
    assert not any(np.asarray(BlockEraser(struct, LAYERS)(on_device, range(BLOCKS))).tobytes())


def test_a_slot_that_something_is_on_its_way_to_is_erased_after_it() -> None:
    pool, on_device, struct = random_pool("float32", 1)
    host = HostPool(struct, LAYERS, 8)
    outgoing = host.swap_out(on_device, [SwapOut(3, 5, b"a"), SwapOut(4, 6, b"b")])
    host.erase([5])
    [(swap, kept)] = outgoing.finish()
    assert swap.slot == 6
    with pytest.raises(AssertionError, match="never filled"):
        host.read([5])
    np.testing.assert_array_equal(kept, pool.reshape(LAYERS, BLOCKS, *pool.shape[1:])[:, 4])


def test_nothing_of_a_request_is_left_on_the_device_after_its_time(tiny_model: Path) -> None:
    engine = small_engine(tiny_model)
    engine.runner.reset()
    limits, clinic = engine.limits, Domain("clinic")
    prompt = random_ids(30, seed=1)
    state = SchedulerState.initial(limits)
    state = upkeep.tick(state, 1_000)
    request = make_request("r", prompt, domain=clinic, cache_ttl=500, max_tokens=4)
    state = scheduler.admit(state, limits, request)
    while not state.is_idle:
        state, plan = scheduler.schedule(state, limits)
        if plan.rows:
            step = engine._launch(plan, lambda plan, batch: None)
            state, _ = scheduler.commit(state, plan, step.wait(), limits)
        else:
            engine.runner.move_blocks(plan)
    blocks = _by_block(engine.runner.kv_pool, limits.num_blocks)
    assert state.pool.cached == 4
    assert np.count_nonzero(blocks.any(axis=(0, 2))) == 4, "the last, partial one was erased"
    state = upkeep.tick(state, 1_500)
    state, plan = scheduler.schedule(state, limits)
    engine.runner.move_blocks(plan)
    assert not np.asarray(engine.runner.kv_pool).any()


def _by_block(kv_pool: object, num_blocks: int) -> np.ndarray:
    """[L, blocks, bytes of one]."""
    array = np.asarray(kv_pool)
    return array.reshape(array.shape[0] // num_blocks, num_blocks, -1)


# The loop, which has a clock.


def test_an_idle_loop_wakes_up_to_erase_and_its_log_replays(tmp_path: Path) -> None:
    runner, log = FakeRunner(), tmp_path / "log.jsonl"
    engine_loop, listener = start_loop(runner, record=str(log))
    engine_loop.submit(make_request("r", random_ids(10), cache_ttl=300, max_tokens=2))
    listener.until_ended("r")
    while not any(event.startswith("erase 2") for event in runner.events):
        time.sleep(0.01)
    _, _, pool = engine_loop.gauges
    engine_loop.close()
    assert pool.free == LIMITS.num_blocks
    assert replay(log).requests == 1


def test_a_flush_says_how_many_blocks_went(tmp_path: Path) -> None:
    runner, log = FakeRunner(), tmp_path / "log.jsonl"
    engine_loop, listener = start_loop(runner, record=str(log))
    engine_loop.submit(make_request("r", random_ids(10), max_tokens=2))
    listener.until_ended("r")
    assert engine_loop.flush(Domain("another")).result() == 0
    assert engine_loop.flush(Domain()).result() == 2
    engine_loop.close()
    assert "erase 2" in runner.events
    replay(log)
    with pytest.raises(EngineStopped):
        engine_loop.flush(None).result()


def test_a_loop_that_failed_leaves_no_flush_waiting() -> None:
    runner = FakeRunner()
    runner.fail_launches, runner.fail_reset = {0}, True
    engine_loop, listener = start_loop(runner)
    engine_loop.submit(make_request("r", random_ids(10), max_tokens=2))
    listener.until_ended("r")
    with pytest.raises(EngineStopped):
        engine_loop.flush(None).result()
    engine_loop.close()
