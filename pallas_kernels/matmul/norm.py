"""Root-mean-square norm, which goes before a decoder's products."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Norm(NamedTuple):
    """The norms of all layers; `epsilon` keeps a row of zeros from a division by zero."""

    scales_LD: jax.Array
    epsilon: float

    def __call__(self, x_MD: jax.Array, layer: jax.Array) -> jax.Array:
        """The norm of a layer, [M, D] in the dtype of its scales."""
        scale = jax.lax.dynamic_index_in_dim(self.scales_LD, layer, keepdims=False)
        return rms_norm(x_MD, scale, self.epsilon)


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """RMS norm over the last axis, computed in float32 (Zhang & Sennrich, 2019)."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = scale_D.reshape((1,) * (x.ndim - 1) + (-1,))
    normed = wide * jax.lax.rsqrt(mean_square + epsilon)
    return (normed * scale.astype(jnp.float32)).astype(scale.dtype)
