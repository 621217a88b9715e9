"""A KV pool in which nothing is written yet."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import native


def empty_kv_pool(pool: jax.ShapeDtypeStruct) -> jax.Array:
    """A pool of zeros, placed as `pool` says: the result of a function that `jax.jit` compiles.

    Where it is this machine's memory, and native code runs, a block takes none of it before it is
    first written.
    """
    platforms = [device.platform for device in pool.sharding.device_set]
    if platforms == ["cpu"] and native.unavailable() is None:
        return native.zeros(pool.shape, pool.dtype)
    return jnp.zeros(pool.shape, pool.dtype)
