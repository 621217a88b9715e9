"""The scales of an 8-bit KV cache: a small safetensors file, written by `octavo calibrate`.

A key or value is divided by its layer's and KV head's scale before it is held in 8 bits. The
file may come from anywhere: shape, dtype and values are checked, and nothing in it is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.config import (
    CACHE_DTYPE_BYTES,
    Architecture,
    CacheDtype,
    Config,
    ConfigError,
    resolve_scales,
)

TENSOR = "kv_scales"
LARGEST: Mapping[str, float] = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The largest value that each 8-bit dtype holds."""
SMALLEST_SCALE, LARGEST_SCALE = 1e-20, 1e20
"""No model comes near them. A cache multiplies by a scale and by its reciprocal, both float32:
the reciprocal of a subnormal scale is infinite, and that of a huge one makes zeros of all."""


def load_scales(config: Config, arch: Architecture) -> np.ndarray | None:
    """The scales that a config's cache is held with, float32 [L, 2, K]: keys, then values.

    None where the cache needs none: not quantised, or float8_e4m3fn without a file.

    Raises:
      ConfigError: the cache is int8 and no file is named, or the file can't be used.
    """
    path, dtype = resolve_scales(config), config.cache_dtype
    if CACHE_DTYPE_BYTES[dtype] > 1:
        return None
    if path is not None:
        return read_scales(path, arch, dtype)
    if dtype == "int8":
        raise ConfigError(
            "cache.dtype is int8, which needs cache.scales; make them with `octavo calibrate "
            f"--config {config.path or 'CONFIG'} --output scales.safetensors`, or take "
            "float8_e4m3fn, which does without"
        )
    return None


def read_scales(path: Path, arch: Architecture, dtype: CacheDtype) -> np.ndarray:
    """Read a file of scales for a model and a cache dtype.

    Raises:
      ConfigError: it is missing, is no safetensors file, is for another dtype or another
        shape of model, or has a scale that is no number from SMALLEST_SCALE to LARGEST_SCALE.
    """
    from safetensors import SafetensorError, safe_open

    def refusal(reason: str) -> ConfigError:
        return ConfigError(f"cache.scales: {path}: {reason}")

    again = "; make them again with `octavo calibrate`"
    if not path.is_file():
        reason = "is not a file" if path.exists() else "there is no such file"
        raise refusal(f"{reason}; make one with `octavo calibrate`")
    shape = (arch.num_layers, 2, arch.num_kv_heads)
    try:
        # Maps the file: its shapes are known, and compared, before anything is read.
        with safe_open(path, framework="numpy") as file:
            if list(file.keys()) != [TENSOR]:
                names = ", ".join(map(repr, sorted(file.keys())[:3])) or "nothing"
                raise refusal(f"holds {names:.120} instead of {TENSOR!r}{again}")
            made_for = (file.metadata() or {}).get("dtype")
            if made_for is not None and made_for != dtype:
                raise refusal(
                    f"is for a cache of {made_for:.40}, but cache.dtype is {dtype}{again}"
                )
            part = file.get_slice(TENSOR)
            found = (part.get_dtype(), tuple(part.get_shape()))
            if found != ("F32", shape):
                raise refusal(
                    f"{TENSOR} is {found[0]} {list(found[1])}, but this model needs F32 "
                    f"{list(shape)} (layers, keys and values, KV heads){again}"
                )
            scales = file.get_tensor(TENSOR)
    except (SafetensorError, OSError) as error:
        raise refusal(f"is not a safetensors file that can be read ({error}){again}") from None
    # NaN is in no range.
    bad = np.argwhere(~((scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE)))
    if len(bad):
        layer, which, head = bad[0].tolist()
        raise refusal(
            f"the scale of layer {layer}, {('keys', 'values')[which]}, KV head {head} is "
            f"{scales[layer, which, head]!s}; every one must be from {SMALLEST_SCALE} to "
            f"{LARGEST_SCALE}{again}"
        )
    return scales


def encode_scales(scales: np.ndarray, dtype: CacheDtype) -> bytes:
    """The content of a file of scales, float32 [L, 2, K], for a cache dtype."""
    from safetensors.numpy import save

    return save({TENSOR: np.ascontiguousarray(scales, np.float32)}, {"dtype": dtype})


def scales_of(largest: np.ndarray, dtype: CacheDtype) -> np.ndarray:
    """Scales under which the largest absolute values seen just fit.

    Args:
      largest: float [L, 2, K], the largest absolute key and value of each layer and head.
      dtype: of the cache, of 8 bits.

    Raises:
      ValueError: a value is not finite, or too large for any scale: the model overflows in the
        dtype that it ran in.
    """
    fitting = largest / LARGEST[dtype]
    bad = np.argwhere(~(fitting <= LARGEST_SCALE))
    if len(bad):
        raise ValueError(
            f"keys or values of layer {bad[0][0]} are as large as {largest[tuple(bad[0])]:.3g}, "
            "for which there is no scale; run the model in float32 (--set model.dtype=float32)"
        )
    fitting = np.maximum(fitting, SMALLEST_SCALE)
    # A head that only ever gave zeros is held exactly by any scale.
    return np.where(largest > 0, fitting, 1.0).astype(np.float32)


def scales_fingerprint(scales: np.ndarray | None) -> str:
    """Tells caches quantised in one way from those quantised in another."""
    if scales is None:
        return "unscaled"
    return hashlib.sha256(np.ascontiguousarray(scales, "<f4").tobytes()).hexdigest()
