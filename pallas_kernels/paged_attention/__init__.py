"""Attention over a paged KV cache, for ragged batches that mix prompts and decodes.

``paged_attention`` is the one entry point. It writes the step's keys and values into the
pool and attends from every token to its sequence's context, which it finds through the block
table. Backends: ``reference`` (the oracle, plain and slow), ``xla`` (any device), ``tpu``
(Pallas, Mosaic) and ``gpu`` (Pallas, Mosaic GPU: Hopper only).

Shapes (legend in engine/types.py): T tokens, S sequences, P block-table columns, B tokens a
block, N query heads, K KV heads, H head dim, W a head's width in the pool.

The pool, one for all layers, is ``[num_layers * num_blocks, K, B, 2W]``: layer l's copy of
block b is entry ``l * num_blocks + b``; a head's keys are the first W of the last axis and its
values the other W. W is H, padded as the backend wants it (`head_width`). Head-major pages need
no shuffles in a kernel, and keys beside values fill 128 lanes at head dim 64. One flat pool for
all layers is carried through the layer scan without a copy.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.paged_attention.layout import (
    Backend,
    Options,
    Ragged,
    Shape,
    head_width,
    kv_pool_dtype,
    kv_pool_shape,
    not_hopper,
)
from pallas_kernels.paged_attention.rotary import Rope, rotate

__all__ = [
    "CACHE_DTYPES",
    "Backend",
    "Ragged",
    "Resolved",
    "Rope",
    "Shape",
    "check_supported",
    "head_width",
    "kv_pool_dtype",
    "kv_pool_shape",
    "paged_attention",
    "prepare",
    "quantise",
    "resolve_backend",
    "rotate",
]

DTYPES = ("float32", "bfloat16")  # of queries and output
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8")


class Resolved(NamedTuple):
    """The backend that runs, and why it is this one: a phrase to print beside its name.

    `is_fallback`: the device's own kernels can't run.
    """

    backend: Backend
    reason: str
    is_fallback: bool = False


def resolve_backend(name: str, platform: str, device_kind: str = "") -> Resolved:
    """The backend that `name` means on a device.

    Args:
      name: a backend, or "auto": those written for the device, or else xla.
      platform: as `jax.default_backend()` says it: "cpu", "gpu" or "tpu".
      device_kind: as `jax.devices()[0].device_kind` says it.

    Raises:
      ValueError: the backend does not exist or can't run there. Nothing falls back in silence.
    """
    device = device_kind or platform
    is_gpu = platform in ("gpu", "cuda")
    refusals: dict[str, str] = {}
    if platform != "tpu":
        refusals["tpu"] = f"{device} is not a TPU"
    if not is_gpu:
        refusals["gpu"] = f"{device} is not an NVIDIA GPU"
    elif reason := not_hopper(device):
        refusals["gpu"] = reason
    if platform != "cpu":
        refusals["cpu"] = f"{device} is not a CPU"
    elif name in ("auto", "cpu") and (reason := native.unavailable()):
        refusals["cpu"] = reason

    if name == "auto":
        for backend in ("tpu", "gpu"):
            if backend not in refusals:
                return Resolved(backend, f"made for {device}")
        if "cpu" not in refusals:
            return Resolved("cpu", native.instructions())
        return Resolved("xla", refusals["gpu" if is_gpu else "cpu"], is_fallback=True)
    if name not in get_args(Backend):
        raise ValueError(
            f"attention backend {name!r} is not one of auto, {', '.join(get_args(Backend))}"
        )
    if name in refusals:
        raise ValueError(
            f"attention backend {name!r} can't run: {refusals[name]}; "
            "take auto, or xla, which runs on any device"
        )
    reason = native.instructions() if name == "cpu" else "as asked for"
    return Resolved(name, reason)  # type: ignore[bad-argument-type]


def check_supported(shape: Shape, backend: Backend, device_kind: str = "") -> None:
    """Refuse what a backend can't compute, before anything is loaded or compiled.

    Raises:
      ValueError: with the reason and what is supported instead.
    """
    reason = _unsupported_anywhere(shape)
    if reason is not None:
        raise ValueError(f"attention: {reason}")
    reason = _module(backend).unsupported(shape, device_kind)
    if reason is not None:
        raise ValueError(f"attention backend {backend!r}: {reason}")


def prepare(ragged: Ragged, *, block_size: int, max_query_len: int, backend: Backend) -> Any:
    """What a backend derives from a batch once a step, for all layers: an opaque pytree.

    Args:
      ragged: the batch.
      block_size: tokens a block of the pool.
      max_query_len: a promise about every batch of this program: no row has more tokens. With
        1, backends leave out what prompts need.
      backend: from `resolve_backend`.
    """
    if max_query_len < 1:
        raise ValueError(f"{max_query_len=} must be at least 1, which promises decodes only")
    return _module(backend).prepare(ragged, block_size=block_size, max_query_len=max_query_len)


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
    rope: Rope | None = None,
    window: jax.Array | int | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    kv_scales_2K: jax.Array | None = None,
    interpret: Any = False,
    instructions: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Write this step's keys and values, then attend causally over each token's context.

    Products take the pool's dtype (bfloat16 for 8-bit pools); scores, softmax and sums are
    float32.

    Args:
      q_TNH, k_TKH, v_TKH: of this step's tokens. N is a multiple of K: query heads n * N/K … share
        KV head n.
      kv_pool: `kv_pool_shape` and `kv_pool_dtype` for this backend and one of CACHE_DTYPES;
        donate it.
      work: from `prepare`, by the same backend.
      first_block: int32[], the layer's first entry in the pool.
      scale: factor of the scores, usually H ** -0.5. There is no default.
      backend: from `resolve_backend`.
      rope: turns queries and keys before all else. None: they are as they should be.
      window: positions that a token sees, its own included, at least 1 (Mistral 7B, Jiang et
        al., 2023). An int32[] array may differ from layer to layer of a scan. None: no limit.
      softcap: scores become softcap * tanh(scores / softcap), after the scale (Gemma 2, 2024).
      sinks_N: float32[N], one more logit a query head in the softmax, which has no value; it is
        neither scaled nor capped (gpt-oss, 2025; Xiao et al., 2023).
      kv_scales_2K: float32[2, K], for keys and for values: a true value is the pool's times the
        scale. int8 pools need it, for float8_e4m3fn None means 1, float pools refuse it.
      interpret: run a Pallas kernel on the CPU: True, or an interpreter's parameters. Only tpu
        and gpu take it.
      instructions: the most that native code may use, of `native.INSTRUCTIONS`; None: all that the
        processor has. Only cpu takes it.

    Returns:
      The output, [T, N, H] in q's dtype (zero at padded tokens), and the pool.

    Raises:
      ValueError: arguments that don't fit each other or the backend.
    """
    _check_shapes(q_TNH, k_TKH, v_TKH, kv_pool, backend)
    cache_dtype = _cache_dtype(kv_pool, backend)
    _check_options(q_TNH, k_TKH, cache_dtype, window, softcap, sinks_N, kv_scales_2K)
    if interpret is not False and backend not in ("tpu", "gpu"):
        raise ValueError(f"{interpret=} is for the tpu and gpu backends; {backend} has no kernel")
    if instructions is not None and (backend != "cpu" or instructions not in native.INSTRUCTIONS):
        raise ValueError(
            f"{instructions=} must be one of {', '.join(native.INSTRUCTIONS)}, and for the cpu "
            f"backend; {backend} takes none"
        )
    head_dim, width = q_TNH.shape[-1], kv_pool.shape[3] // 2
    k_scales, v_scales = (None, None) if kv_scales_2K is None else kv_scales_2K
    if rope is not None and backend == "cpu" and (cache_dtype, width) == (k_TKH.dtype, head_dim):
        q_TNH, kv_new = _module("cpu").rotate(q_TNH, k_TKH, v_TKH, rope, instructions)
    else:
        if rope is not None:
            q_TNH, k_TKH = rotate(q_TNH, rope), rotate(k_TKH, rope)
        halves = (quantise(k_TKH, cache_dtype, k_scales), quantise(v_TKH, cache_dtype, v_scales))
        kv_new = jnp.concatenate([_pad(half, width) for half in halves], axis=-1)
    if kv_new.dtype != kv_pool.dtype:
        kv_new = jax.lax.bitcast_convert_type(kv_new, kv_pool.dtype)
    options = Options(
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks_N,
        k_scales=k_scales,
        v_scales=v_scales,
        interpret=interpret,
        instructions=instructions,
    )
    out, kv_pool = _module(backend).attend(
        _pad(q_TNH, width), kv_new, kv_pool, work, first_block, options
    )
    return out[..., :head_dim], kv_pool


def quantise(x_TKH: jax.Array, dtype: Any, scales_K: jax.Array | None = None) -> jax.Array:
    """Keys or values as the pool holds them: divided by their head's scale, clipped, rounded.

    Float pools round as usual. 8-bit pools clip to their finite range, as float8_e4m3fn has no
    infinity and would answer an overflow with NaN; int8 rounds halves to even. The division is
    a product with the scale's float32 reciprocal, which XLA would make of it in some programs
    and not in others: so the pool's bits don't depend on the program.
    """
    dtype = jnp.dtype(dtype)
    if dtype.itemsize > 1:
        return x_TKH.astype(dtype)
    x = x_TKH.astype(jnp.float32)
    if scales_K is not None:
        x = x * (1.0 / scales_K)[None, :, None]
    limits = jnp.iinfo(dtype) if dtype == jnp.int8 else jnp.finfo(dtype)
    x = jnp.clip(x, float(limits.min), float(limits.max))
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype)


def _module(backend: Backend) -> Any:
    """A backend's module, imported when it is first used: each needs other parts of JAX."""
    return importlib.import_module(f"{__name__}.{backend}")


def _pad(x: jax.Array, width: int) -> jax.Array:
    padding = width - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding))) if padding else x


def _unsupported_anywhere(shape: Shape) -> str | None:
    if shape.dtype not in DTYPES:
        return f"queries can't be {shape.dtype}, only {' or '.join(DTYPES)}"
    if shape.cache_dtype not in CACHE_DTYPES:
        return f"the cache can't be {shape.cache_dtype}, only one of {', '.join(CACHE_DTYPES)}"
    if shape.num_kv_heads < 1 or shape.num_heads < 1 or shape.num_heads % shape.num_kv_heads:
        return (
            f"{shape.num_heads} query heads can't share {shape.num_kv_heads} KV heads evenly; "
            "the first must be a multiple of the second"
        )
    if shape.head_dim < 1 or shape.block_size < 1:
        return (
            f"head dim {shape.head_dim} and blocks of {shape.block_size} tokens must both be "
            "at least 1"
        )
    return None


def _check_shapes(
    q: jax.Array, k: jax.Array, v: jax.Array, kv_pool: jax.Array, backend: Backend
) -> None:
    (tokens, heads, head_dim), (_, kv_heads, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape != (tokens, kv_heads, head_dim):
        raise ValueError(f"{q.shape=}, {k.shape=} and {v.shape=} don't fit each other")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads can't share {kv_heads} KV heads evenly")
    width = 2 * head_width(head_dim, backend)
    fits = kv_pool.ndim == 4 and kv_pool.shape[1] == kv_heads and kv_pool.shape[3] % 2 == 0
    if not fits or kv_pool.shape[3] < width:
        raise ValueError(
            f"{kv_pool.shape=} must be [blocks, {kv_heads}, B, {width}] for the {backend} backend "
            "(or wider), as `kv_pool_shape` makes it"
        )


def _cache_dtype(kv_pool: jax.Array, backend: Backend) -> jnp.dtype:
    """The dtype of the values that a pool holds."""
    held = {kv_pool_dtype(dtype, backend): jnp.dtype(dtype) for dtype in CACHE_DTYPES}
    if kv_pool.dtype not in held:
        raise ValueError(
            f"{kv_pool.dtype=} must be one of {', '.join(map(str, held))} for the {backend} "
            "backend, as `kv_pool_dtype` gives it"
        )
    return held[kv_pool.dtype]


def _check_options(q, k, cache_dtype, window, softcap, sinks, kv_scales) -> None:
    if window is not None:
        is_scalar = jnp.ndim(window) == 0 and jnp.issubdtype(jnp.result_type(window), jnp.integer)
        if not is_scalar or (isinstance(window, (int, np.integer)) and window < 1):
            raise ValueError(f"{window=} must be an integer of at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{softcap=} must be positive, or None for none")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype != jnp.float32):
        raise ValueError(f"sinks must be float32[{q.shape[1]}], not {sinks.dtype}{sinks.shape}")
    num_kv_heads = k.shape[1]
    if kv_scales is None:
        if cache_dtype == jnp.int8:
            raise ValueError("an int8 pool needs kv_scales, float32[2, KV heads]")
    elif cache_dtype.itemsize > 1:
        raise ValueError(f"a {cache_dtype} pool takes no kv_scales; only 8-bit pools do")
    elif kv_scales.shape != (2, num_kv_heads) or kv_scales.dtype != jnp.float32:
        raise ValueError(
            f"kv_scales must be float32[2, {num_kv_heads}], not {kv_scales.dtype}{kv_scales.shape}"
        )
