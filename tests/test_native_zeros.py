"""Zeros of native code: what they hold, and what memory they take."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.model.empty_pool import empty_kv_pool
from pallas_kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

MIB = 2**20


def zeros(shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.jit(lambda: native.zeros(shape, dtype))()


def resident_bytes() -> int:
    """Of this process's own memory, no file's (proc_pid_status(5))."""
    status = Path("/proc/self/status").read_text()
    [kib] = re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib) * 1024


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12_289, 300_000, 64 * MIB + 3])
def test_all_is_zero_whatever_the_memory_held_before(size: int) -> None:
    """Three of each size, as malloc hands out what was freed: pages, and parts of them."""
    for _ in range(3):
        used = [jnp.full(size, 0xA5, jnp.uint8).block_until_ready() for _ in range(3)]
        del used
        gc.collect()
        arrays = [zeros((size,), "uint8") for _ in range(3)]
        for array in arrays:
            assert array.shape == (size,)
            assert not np.asarray(array).any()


def test_no_memory_outside_of_the_result_changes() -> None:
    neighbours = [jnp.full(5000, 0xA5, jnp.uint8).block_until_ready() for _ in range(50)]
    kept = neighbours[::2]
    del neighbours
    for _ in range(25):
        zeros((5000,), "uint8").block_until_ready()
    assert all((np.asarray(array) == 0xA5).all() for array in kept)


def test_a_pool_takes_memory_as_it_is_written_and_stays_where_it_is() -> None:
    shape = jax.ShapeDtypeStruct(
        (256, MIB // 4), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    write = jax.jit(lambda pool, row: pool.at[row].set(1), donate_argnums=0)
    make = jax.jit(lambda: empty_kv_pool(shape), out_shardings=shape.sharding)
    write = write.lower(shape, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    make = make.lower().compile()
    gc.collect()
    before = resident_bytes()
    pool = make().block_until_ready()
    address = pool.unsafe_buffer_pointer()
    assert resident_bytes() - before < 16 * MIB  # of 256
    for row in range(64):
        pool = write(pool, np.int32(row)).block_until_ready()
    assert pool.unsafe_buffer_pointer() == address
    assert 48 * MIB < resident_bytes() - before < 80 * MIB
    expected = np.arange(256) < 64
    assert (np.asarray(pool) == expected[:, None]).all()


def test_a_program_that_was_kept_on_disk_gives_zeros_too() -> None:
    """As the next start finds it."""
    for _ in range(2):
        jax.clear_caches()
        assert not np.asarray(zeros((100_000,), "bfloat16")).any()
