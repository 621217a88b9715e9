"""What all backends share: the pool's shape, the ragged batch, and a call's options.

Nothing here computes attention, so that a mistake in one backend can't hide in another.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Backend = Literal["tpu", "gpu", "cpu", "xla", "reference"]

# As in "NVIDIA H100 80GB HBM3", "NVIDIA H20" or "NVIDIA GH200 480GB".
_HOPPER = re.compile(r"\bG?H\d{2,3}\b")


class Ragged(NamedTuple):
    """Which token belongs to which sequence, and where its context lies.

    Tokens of a row lie one after the other. Padded tokens have row S; padded rows have
    kv_lens 0 and no tokens. Entries of block_tables beyond a row's context may be anything
    in range.
    """

    token_rows: jax.Array  # int32[T]
    positions: jax.Array  # int32[T]: position in the sequence, 0 …
    query_starts: jax.Array  # int32[S + 1]
    kv_lens: jax.Array  # int32[S]: context, this step's tokens included
    block_tables: jax.Array  # int32[S, P]: blocks of one layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `attend` needs beside the batch's arrays; see `paged_attention` for the meanings.

    Scores are `softcap`-ed (scale * k_scales * q·k), masked, and join `sinks` in the softmax;
    the output is v_scales * (weights · v). All of it is float32.
    """

    scale: float
    window: jax.Array | int | None = None  # int32[]: positions a token sees, its own included
    softcap: float | None = None
    sinks: jax.Array | None = None  # float32[N]
    k_scales: jax.Array | None = None  # float32[K]
    v_scales: jax.Array | None = None  # float32[K]
    interpret: Any = False  # False, True or an interpreter's parameters; tpu and gpu only
    instructions: str | None = None  # the most that native code may use; cpu only


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's attention on one device: what `check_supported` judges before anything runs.

    Heads are those of one device, where they are split over several. Dtypes are NumPy names.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: str  # of queries and output
    cache_dtype: str  # of the pool


def not_hopper(device_kind: str) -> str | None:
    """Why a GPU can't run the gpu kernels; None if it can.

    They are made of wgmma instructions, which only Hopper has: Blackwell dropped them.
    """
    if _HOPPER.search(device_kind):
        return None
    return f"{device_kind} is not a Hopper GPU, which the gpu kernels are made for"


def head_width(head_dim: int, backend: Backend) -> int:
    """Elements that a head's keys (and values) take in the pool: `head_dim`, padded.

    A TPU moves 128 lanes: keys beside values fill them at 64, and above 64 each of the two
    starts at a whole tile. Hopper's matrix units and its 128-byte swizzle take 64 at a time, a
    CPU's vectors 16.
    """
    if backend == "tpu":
        return 64 if head_dim <= 64 else _round_up(head_dim, 128)
    if backend == "gpu":
        return _round_up(head_dim, 64)
    if backend == "cpu":
        return _round_up(head_dim, 16)
    return head_dim


def kv_pool_shape(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    backend: Backend = "xla",
) -> tuple[int, int, int, int]:
    """Shape of the flat pool that holds every layer's blocks, as wide as `backend` wants it."""
    width = 2 * head_width(head_dim, backend)
    return (num_layers * num_blocks, num_kv_heads, block_size, width)


def kv_pool_dtype(cache_dtype: Any, backend: Backend) -> jnp.dtype:
    """What the pool is held as: the cache's dtype, or the bits of float8_e4m3fn as uint8.

    Kernels read float8. Where XLA itself gathers and scatters, a CPU has no float8, and XLA
    would convert the whole pool to a wider dtype and back at each of the two.
    """
    dtype = jnp.dtype(cache_dtype)
    if backend in ("cpu", "xla", "reference") and dtype == jnp.float8_e4m3fn:
        return jnp.dtype(jnp.uint8)
    return dtype


def from_bits(kv: jax.Array) -> jax.Array:
    """What was read from a pool, as values, if the pool holds their bits; see `kv_pool_dtype`."""
    if kv.dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type(kv, jnp.float8_e4m3fn)
    return kv


def product_dtype(cache_dtype: Any) -> jnp.dtype:
    """The dtype that matrix products take: the pool's, or bfloat16, which holds every 8-bit value.

    Products of float32 need precision HIGHEST; all accumulate in float32.
    """
    dtype = jnp.dtype(cache_dtype)
    return dtype if dtype.itemsize > 1 else jnp.dtype(jnp.bfloat16)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
