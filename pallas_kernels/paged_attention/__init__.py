"""Attention over a paged KV cache, for ragged batches that mix prompts and decodes.

``paged_attention`` is the one entry point. It writes the step's keys and values into the
pool and attends from every token to its sequence's context, which it finds through the block
table. Backends: ``reference`` (the oracle, plain and slow) and ``xla`` (any device).

Shapes (legend in engine/types.py): T tokens, S sequences, P block-table columns, B tokens a
block, N query heads, K KV heads, H head dim.

The pool, chosen once for all layers and backends, is ``[num_layers * num_blocks, K, B, 2H]``:
layer l's copy of block b is entry ``l * num_blocks + b``; a head's keys are the first H of
the last axis and its values the other H. Head-major pages need no shuffles in a kernel, and
keys beside values fill 128 lanes at head dim 64. One flat pool for all layers is carried
through the layer scan without a copy.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import reference, xla
from pallas_kernels.paged_attention.layout import Ragged, kv_pool_shape

__all__ = ["Backend", "Ragged", "kv_pool_shape", "paged_attention", "prepare", "resolve_backend"]

Backend = Literal["xla", "reference"]

_BACKENDS = {"xla": xla, "reference": reference}


def resolve_backend(name: str, platform: str) -> Backend:
    """The backend that `name` means on `platform` (as `jax.default_backend()` says it).

    Raises:
      ValueError: the backend does not exist. Nothing falls back in silence.
    """
    if name == "auto":
        return "xla"
    if name not in _BACKENDS:
        raise ValueError(
            f"attention backend {name!r} is not one of auto, {', '.join(_BACKENDS)} "
            f"(device: {platform})"
        )
    return name  # type: ignore[return-value]


def prepare(ragged: Ragged, *, block_size: int, backend: Backend) -> Any:
    """What a backend derives from a batch once a step, for all layers: an opaque pytree."""
    return _BACKENDS[backend].prepare(ragged, block_size=block_size)


def paged_attention(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    kv_pool: jax.Array,
    work: Any,
    *,
    first_block: jax.Array,
    scale: float,
    backend: Backend,
) -> tuple[jax.Array, jax.Array]:
    """Write this step's keys and values, then attend causally over each token's context.

    Args:
      q_TNH, k_TKH, v_TKH: of this step's tokens, rotary positions applied. N is a multiple of
        K: query heads n * N/K … share KV head n.
      kv_pool: `kv_pool_shape`, any float dtype; donate it.
      work: from `prepare`, by the same backend.
      first_block: int32[], the layer's first entry in the pool.
      scale: factor of the scores, usually H ** -0.5. There is no default.
      backend: from `resolve_backend`.

    Returns:
      The output, [T, N, H] in q's dtype (zero at padded tokens), and the pool.
    """
    _check_shapes(q_TNH, k_TKH, v_TKH, kv_pool)
    kv_T = jnp.concatenate((k_TKH, v_TKH), axis=-1).astype(kv_pool.dtype)
    return _BACKENDS[backend].attend(q_TNH, kv_T, kv_pool, work, first_block, scale)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, kv_pool: jax.Array) -> None:
    (tokens, heads, head_dim), (_, kv_heads, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape != (tokens, kv_heads, head_dim):
        raise ValueError(f"{q.shape=}, {k.shape=} and {v.shape=} don't fit each other")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads can't share {kv_heads} KV heads evenly")
    if kv_pool.ndim != 4 or kv_pool.shape[1] != kv_heads or kv_pool.shape[3] != 2 * head_dim:
        raise ValueError(f"{kv_pool.shape=} must be [blocks, {kv_heads}, B, {2 * head_dim}]")
