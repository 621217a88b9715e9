"""Rotary positions (RoFormer, Su et al., 2021)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rope(NamedTuple):
    """A step's angles, by which queries and keys are turned: float32."""

    cos: jax.Array  # [T, H / 2]
    sin: jax.Array  # [T, H]: the first half negated


def rotate(x_TNH: jax.Array, rope: Rope) -> jax.Array:
    """Turn the pairs (i, i + H/2) of each head, in float32."""
    tokens, heads, head_dim = x_TNH.shape
    cos, sin = rope.cos[:, None, None], rope.sin.reshape(tokens, 1, 2, head_dim // 2)
    halves = x_TNH.astype(jnp.float32).reshape(tokens, heads, 2, head_dim // 2)
    # Nothing is put together again, which would be three more operations a layer.
    rotated = halves * cos + halves[:, :, ::-1] * sin
    return rotated.astype(x_TNH.dtype).reshape(x_TNH.shape)
