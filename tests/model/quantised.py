"""What an 8-bit cache does to keys and values, in NumPy: shares nothing with the engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from engine.config import Architecture, CacheDtype
from engine.weights.kv_scales import encode_scales
from tests.model import numpy_llama
from tests.model.numpy_llama import Holding

EIGHT_BITS: tuple[CacheDtype, ...] = ("int8", "float8_e4m3fn")
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
KINDS = ("k", "v")


def largest_values(
    arch: Architecture, params: Mapping[str, np.ndarray], prompts: Iterable[np.ndarray]
) -> np.ndarray:
    """The largest absolute key and value of each layer and KV head, [L, 2, K]."""
    largest = np.zeros((arch.num_layers, 2, arch.num_kv_heads), np.float32)

    def look(layer: int, kind: str, x: np.ndarray) -> np.ndarray:
        place = largest[layer, KINDS.index(kind)]
        np.maximum(place, np.abs(x).max(axis=(0, 2)), out=place)
        return x

    for prompt in prompts:
        numpy_llama.forward(arch, params, prompt, held=look)
    return largest


def hold(dtype: CacheDtype, scales: np.ndarray) -> Holding:
    """Divide by the scale, clip, round to 8 bits, and multiply again."""

    def held(layer: int, kind: str, x: np.ndarray) -> np.ndarray:
        scale = scales[layer, KINDS.index(kind)][:, None]
        x = np.clip(x / scale, -LARGEST[dtype], LARGEST[dtype])
        x = np.rint(x) if dtype == "int8" else x.astype(ml_dtypes.float8_e4m3fn)
        return x.astype(np.float32) * scale

    return held


def write_scales(path: Path, largest: np.ndarray, dtype: CacheDtype) -> np.ndarray:
    """A file of the scales under which the largest values just fit; returns them."""
    scales = (largest / LARGEST[dtype]).astype(np.float32)
    path.write_bytes(encode_scales(scales, dtype))
    return scales
