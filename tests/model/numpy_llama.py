"""A Llama in NumPy, one sequence at a time, that can round wherever bfloat16 would.

It shares nothing with the engine but the checkpoint's reader, whose names its weights have.
Sums are float32; with `round_bfloat16`, each weight and each result that the engine holds in
bfloat16 is rounded to it once. So it says what rounding alone does to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from engine.config import Architecture

Rounding = Callable[[np.ndarray], np.ndarray]
# What a cache makes of keys or values [positions, K, H]: (layer, "k" or "v", them) -> them.
Holding = Callable[[int, str, np.ndarray], np.ndarray]


def exact(array: np.ndarray) -> np.ndarray:
    """No rounding beyond float32."""
    return array


def round_bfloat16(array: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, held in float32."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


Product = Callable[[np.ndarray, np.ndarray], np.ndarray]


def forward(
    arch: Architecture,
    params: Mapping[str, np.ndarray],
    token_ids: np.ndarray,
    rounded: Rounding = exact,
    held: Holding = lambda layer, kind, x: x,
    product: Product = np.matmul,
) -> np.ndarray:
    """Logits float32[positions, V] of one sequence, for Llama without rope scaling.

    `params` are native parameters, rounded already. Attention reads keys and values as `held`
    gives them back. `product` is of rows with a matrix of weights.
    """
    length, group = len(token_ids), arch.num_heads // arch.num_kv_heads
    half = arch.head_dim // 2
    frequency = arch.rope_theta ** (-np.arange(half) / half)
    angles = np.outer(np.arange(length), frequency)
    turn = np.exp(1j * angles)[:, None]  # rotary positions as complex numbers

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        size = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + arch.rms_norm_eps)
        return rounded(rounded(x / size) * scale)

    def rotate(x: np.ndarray) -> np.ndarray:
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return rounded(np.concatenate((turned.real, turned.imag), axis=-1).astype(np.float32))

    hidden = x = params["embed.weight"][token_ids]
    mask = np.where(np.tri(length, dtype=bool), 0.0, -np.inf).astype(np.float32)
    for layer in range(arch.num_layers):

        def linear(x: np.ndarray, name: str, layer: int = layer) -> np.ndarray:
            return rounded(product(x, params[f"layers.{name}_proj.kernel"][layer]))

        hidden = norm(x, params["layers.attn_norm.scale"][layer])
        q, k, v = (
            linear(hidden, name).reshape(length, -1, arch.head_dim) for name in ("q", "k", "v")
        )
        q, k = rotate(q), rotate(k)
        k, v = held(layer, "k", k), held(layer, "v", v)
        attended = np.empty_like(q)
        for head in range(arch.num_heads):
            keys, values = k[:, head // group], v[:, head // group]
            scores = q[:, head] @ keys.T * np.float32(arch.head_dim**-0.5) + mask
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            total = weights.sum(axis=-1, keepdims=True)
            attended[:, head] = rounded(rounded(weights) @ values / total)
        x = rounded(x + linear(attended.reshape(length, -1), "o"))
        hidden = norm(x, params["layers.mlp_norm.scale"][layer])
        gate, up = linear(hidden, "gate"), linear(hidden, "up")
        x = rounded(x + linear(rounded(gate / (1 + np.exp(-gate)) * up), "down"))
    hidden = norm(x, params["final_norm.scale"])
    if arch.tie_embeddings:
        return product(hidden, params["embed.weight"].T)
    return product(hidden, params["lm_head.kernel"])
