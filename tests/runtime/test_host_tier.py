"""Blocks that go to host memory and come back: bit by bit, in place, and without a trace in any
output of a real model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

from engine.aot.hlo import pool_copies
from engine.config import BucketConfig, SchedulerConfig
from engine.runtime.block_file import Miss, as_array
from engine.runtime.host_pool import AT_A_TIME, HostPool
from engine.types import Request, StepPlan, SwapIn, SwapOut
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.runtime.pools import BLOCKS, DTYPES, LAYERS, random_pool
from tests.runtime.tiny import random_ids

SLOTS = 40


def make(
    dtype: str, num_devices: int, memory_kind: str | None = None
) -> tuple[HostPool, np.ndarray, jax.Array]:
    """A host pool, and a device's pool of random bits on both sides."""
    pool, on_device, struct = random_pool(dtype, num_devices)
    return HostPool(struct, LAYERS, SLOTS, memory_kind), pool, on_device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_devices", "count"), [(1, 1), (1, 2 * AT_A_TIME + 3), (2, 5)])
def test_blocks_come_back_bit_by_bit_into_other_places(
    dtype: str, num_devices: int, count: int
) -> None:
    host, pool, on_device = make(dtype, num_devices)
    rng = np.random.default_rng(count)
    blocks, slots = (rng.permutation(size)[:count].tolist() for size in (BLOCKS, SLOTS))
    keys = [bytes([index]) for index in range(count)]
    host.swap_out(on_device, list(map(SwapOut, blocks, slots, keys)))
    targets = rng.permutation(BLOCKS)[:count].tolist()
    swaps = list(map(SwapIn, slots, targets))
    found = np.asarray(host.swap_in(on_device, swaps, host.read(slots)))
    expected = pool.copy().reshape(LAYERS, BLOCKS, -1)
    expected[:, targets] = pool.reshape(LAYERS, BLOCKS, -1)[:, blocks]
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_slots_in_pinned_memory_hold_the_same(num_devices: int) -> None:
    """As on a TPU or a GPU; jax's CPU knows that kind of memory too. Reading one as NumPy, as the
    disk's threads do, leaves no second copy beside the slot."""
    host, pool, on_device = make("bfloat16", num_devices, "pinned_host")
    outgoing = host.swap_out(on_device, [SwapOut(3, 7, b"a"), SwapOut(4, 8, b"b")])
    by_layer = pool.reshape(LAYERS, BLOCKS, *pool.shape[1:])
    for (_, contents), block in zip(outgoing.finish(), (3, 4), strict=True):
        assert isinstance(contents, jax.Array)
        assert contents.sharding.memory_kind == "pinned_host"
        assert np.asarray(host.as_read_later(contents)).tobytes() == by_layer[:, block].tobytes()
        assert contents._npy_value is None  # type: ignore[missing-attribute]
    staged = host.stage(by_layer[:, 5].copy())
    assert isinstance(staged, jax.Array)
    assert staged.sharding == host.block.sharding
    host.write(9, staged)
    swaps = [SwapIn(7, 20), SwapIn(9, 21)]
    found = host.swap_in(on_device, swaps, host.read([7, 9]))
    assert found.sharding == on_device.sharding
    after = np.asarray(found).reshape(by_layer.shape)
    assert after[:, 20].tobytes() == by_layer[:, 3].tobytes()
    assert after[:, 21].tobytes() == by_layer[:, 5].tobytes()


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
def test_erased_contents_are_overwritten_where_they_lie(
    memory_kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, pool, on_device = make("float32", 1, memory_kind)
    outgoing = host.swap_out(on_device, [SwapOut(3, 7, b"key")])
    ((_, contents),) = outgoing.finish()
    assert isinstance(contents, jax.Array)
    zeros = []
    zero = host._zero

    def watched(array: jax.Array) -> None:
        zeros.append((array.unsafe_buffer_pointer(), zero(array)))

    monkeypatch.setattr(host, "_zero", watched)
    swaps = [SwapIn(7, 9)]
    found = host.swap_in(on_device, swaps, host.read([7]))  # reads it first, whenever it runs
    host.erase([7, 8])
    ((place, after),) = zeros
    assert after.unsafe_buffer_pointer() == place
    assert not np.asarray(after).any()
    assert contents.is_deleted()
    by_layer = pool.reshape(LAYERS, BLOCKS, *pool.shape[1:])
    np.testing.assert_array_equal(np.asarray(found).reshape(by_layer.shape)[:, 9], by_layer[:, 3])
    with pytest.raises(AssertionError, match="slot 7 is read, but was never filled"):
        host.read([7])


def test_a_slot_is_read_before_the_same_plan_fills_it() -> None:
    host, pool, on_device = make("float32", 1)
    host.swap_out(on_device, [SwapOut(3, 7, b"old")])
    contents = host.read([7])
    host.swap_out(on_device, [SwapOut(4, 7, b"new")]).finish()
    found = np.asarray(host.swap_in(on_device, [SwapIn(7, 9)], contents))
    by_layer, before = (array.reshape(LAYERS, BLOCKS, -1) for array in (found, pool))
    np.testing.assert_array_equal(by_layer[:, 9], before[:, 3])
    np.testing.assert_array_equal(
        host.read([7])[0], pool.reshape(LAYERS, BLOCKS, *pool.shape[1:])[:, 4]
    )


def test_what_failed_on_its_way_fails_whoever_waits_or_reads_it() -> None:
    """Or a slot with nobody's contents would be taken for what its key says."""
    host, _, on_device = make("float32", 1)
    outgoing = host.swap_out(on_device, [SwapOut(3, 7, b"key")])
    lost = cast("jax.Array", Lost())
    outgoing._contents = [lost]
    host._slots[7] = lost
    for use in (outgoing.finish, outgoing.finish):
        with pytest.raises(RuntimeError, match="the device is lost"):
            use()
    with pytest.raises(TypeError):
        host.swap_in(on_device, [SwapIn(7, 9)], host.read([7]))


class Lost:
    """An array whose computation failed."""

    def is_deleted(self) -> bool:
        return False

    def block_until_ready(self) -> None:
        raise RuntimeError("the device is lost")


def test_contents_from_below_are_not_overwritten_by_a_transfer_that_was_under_way() -> None:
    """The slot was given away after the plan that started the transfer, which ends later."""
    host, pool, on_device = make("float32", 1)
    outgoing = host.swap_out(on_device, [SwapOut(3, 7, b"old")])
    restored = np.random.default_rng(1).random((LAYERS, *pool.shape[1:]), np.float32)
    host.write(7, host.stage(restored))
    ((swap, contents),) = outgoing.finish()
    assert swap.key == b"old"
    by_layer = pool.reshape(LAYERS, BLOCKS, *pool.shape[1:])
    np.testing.assert_array_equal(contents, by_layer[:, 3])  # whoever kept it still has it
    found = np.asarray(host.swap_in(on_device, [SwapIn(7, 9)], host.read([7])))
    np.testing.assert_array_equal(found.reshape(by_layer.shape)[:, 9], restored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pool_is_filled_in_place(dtype: str) -> None:
    host, pool, _ = make(dtype, 1)
    found = pool_copies(host.scatter, num_elements=pool.size, num_bytes=pool.nbytes)
    assert found == []


NUM_BLOCKS = 11


def engine(source: Path, host_blocks: int) -> SmallEngine:
    return small_engine(
        source,
        num_blocks=64,
        block_size=16,
        max_model_len=160,
        config=SchedulerConfig(max_num_seqs=4, max_step_tokens=64),
        buckets=BucketConfig(decode_seqs=(4,), prefill_tokens=(64,), prefill_seqs=(4,)),
        host_blocks=host_blocks,
    )


def requests() -> list[Request]:
    """More than the pool holds at once, some with a prefix in common."""
    shared = random_ids(32, seed=3)
    return [
        make_request(
            f"r{number}",
            (shared if number % 2 else ()) + random_ids(17 + number),
            80,
            seed=number,
            temperature=0.8 * (number % 3 > 0),
            ignore_eos=True,
        )
        for number in range(8)
    ]


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "one at a time"])
def test_swapped_and_preempted_sequences_give_what_each_gives_alone(
    tiny_model: Path, ahead: bool
) -> None:
    plain, tiered = engine(tiny_model, 0), engine(tiny_model, 100)
    expected = {each.request_id: plain.run_one(each) for each in requests()}
    swaps = {"in": 0, "out": 0}
    preempted: list[str] = []

    def on_plan(plan: StepPlan, _: object) -> None:
        swaps["in"] += len(plan.swap_ins)
        swaps["out"] += len(plan.swap_outs)
        preempted.extend(plan.preempted)

    limits = dataclasses.replace(tiered.limits, num_blocks=NUM_BLOCKS)
    found: dict[str, Result] = tiered.run(requests(), limits=limits, on_plan=on_plan, ahead=ahead)
    assert len(set(preempted)) >= len(requests()) - 2  # the first two outrank all others
    assert swaps["in"] >= 5
    assert swaps["out"] > 10
    for name, result in found.items():
        assert result.token_ids == expected[name].token_ids, name


def test_a_prefix_that_was_evicted_is_a_hit_in_the_host_tier(tiny_model: Path) -> None:
    tiered = engine(tiny_model, 100)
    limits = dataclasses.replace(tiered.limits, num_blocks=NUM_BLOCKS)
    first = make_request("first", random_ids(100), 4)
    others = [make_request(f"o{n}", random_ids(120, seed=n), 4) for n in range(3)]
    again = dataclasses.replace(first, request_id="again")
    results = tiered.run([first, *others, again], limits=limits)
    assert results["again"].token_ids == results["first"].token_ids
    assert results["again"].num_cached_tokens == 96
    bare = dataclasses.replace(limits, host_blocks=0)
    assert (
        engine(tiny_model, 0).run([first, *others, again], limits=bare)["again"].num_cached_tokens
        < 96
    )


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
def test_a_slot_is_erased_where_it_lies_though_a_disk_s_thread_has_read_it(
    num_devices: int, memory_kind: str | None
) -> None:
    """A view of it would keep jax from writing there: what is read is a copy. What was not read by
    then can't be."""
    host, pool, on_device = make("bfloat16", num_devices, memory_kind)
    [(_, contents)] = host.swap_out(on_device, [SwapOut(3, 7, b"a")]).finish()
    assert isinstance(contents, jax.Array)
    block = pool.reshape(LAYERS, BLOCKS, *pool.shape[1:])[:, 3].copy()
    early, late = host.as_read_later(contents), host.as_read_later(contents)
    read = np.asarray(early)
    host.erase([7])
    assert contents.is_deleted(), "its memory was given to the zeros"
    assert read.tobytes() == block.tobytes()
    assert isinstance(as_array(late), Miss)
    assert late.shape == block.shape


def test_a_slot_is_not_erased_while_it_is_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are done under one lock: what is made to be read is copied under it, too."""
    host, _, on_device = make("float32", 1, None)
    [(_, contents)] = host.swap_out(on_device, [SwapOut(3, 7, b"a")]).finish()
    was_locked: dict[str, bool] = {}
    zero, make_array = host._zero, jax.make_array_from_single_device_arrays

    class Copied:
        """An array that is made to be read."""

        def __init__(self, array: jax.Array):
            self._array = array

        def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
            was_locked["copied"] = host._reading.locked()
            return np.array(self._array)

    def watched_make(*arguments: Any) -> Copied:
        was_locked["made"] = host._reading.locked()
        return Copied(make_array(*arguments))

    def watched_zero(array: jax.Array) -> None:
        was_locked["erased"] = host._reading.locked()
        zero(array)

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", watched_make)
    monkeypatch.setattr(host, "_zero", watched_zero)
    np.asarray(host.as_read_later(contents))
    assert not host._reading.locked()
    host.erase([7])
    assert was_locked == {"made": True, "copied": True, "erased": True}
