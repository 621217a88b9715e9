"""A KV pool of random bits, on the host and on devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYERS, BLOCKS = 3, 64
DTYPES = ["float32", "bfloat16", "int8", "uint8"]


def random_pool(dtype: str, num_devices: int) -> tuple[np.ndarray, jax.Array, jax.ShapeDtypeStruct]:
    """The pool on the host, on devices that split its heads, and its shape there."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("tensor",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    shape = (LAYERS * BLOCKS, 4, 16, 32)
    bits = np.random.default_rng(0).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize))
    pool = bits.astype(np.uint8).view(jnp.dtype(dtype))[..., 0]
    struct = jax.ShapeDtypeStruct(shape, pool.dtype, sharding=sharding)
    return pool, jax.device_put(pool, sharding), struct
