"""Blocks copied inside the pool, against NumPy, and in place."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from engine.aot.hlo import pool_copies
from engine.runtime.block_copies import AT_A_TIME, BlockCopier
from engine.types import BlockCopy
from tests.runtime.pools import BLOCKS, DTYPES, LAYERS, random_pool


def make(
    dtype: str, num_devices: int, max_copies: int
) -> tuple[BlockCopier, np.ndarray, jax.Array]:
    """The program, and a pool of random bits on the host and on devices that split its heads."""
    pool, on_device, struct = random_pool(dtype, num_devices)
    return BlockCopier(struct, LAYERS, max_copies), pool, on_device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_devices", "count"), [(1, 1), (1, 2 * AT_A_TIME + 1), (2, 5)])
def test_every_layer_s_block_is_copied_bit_by_bit(dtype: str, num_devices: int, count: int) -> None:
    copier, pool, on_device = make(dtype, num_devices, max_copies=3 * AT_A_TIME)
    blocks = np.random.default_rng(count).permutation(BLOCKS).tolist()
    copies = [BlockCopy(blocks[0], blocks[1 + index]) for index in range(count)]  # one to many
    expected = pool.copy().reshape(LAYERS, BLOCKS, -1)
    for source, destination in copies:
        expected[:, destination] = expected[:, source]
    found = np.asarray(copier(on_device, copies))
    assert found.tobytes() == expected.tobytes()


def test_sources_are_read_before_anything_is_written_and_the_last_copy_counts() -> None:
    """A block may be given up and taken again within one plan."""
    copier, pool, on_device = make("float32", 1, max_copies=4)
    found = np.asarray(copier(on_device, [BlockCopy(0, 1), BlockCopy(2, 0), BlockCopy(3, 1)]))
    before, after = (array.reshape(LAYERS, BLOCKS, -1) for array in (pool, found))
    np.testing.assert_array_equal(after[:, 0], before[:, 2])
    np.testing.assert_array_equal(after[:, 1], before[:, 3])
    np.testing.assert_array_equal(after[:, 2:], before[:, 2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pool_is_updated_in_place(dtype: str) -> None:
    copier, pool, _ = make(dtype, 1, max_copies=256)
    assert pool_copies(copier.program, num_elements=pool.size, num_bytes=pool.nbytes) == []
