"""One decoder for the whole Llama family, read top-down; variants are values of `Architecture`.

Each weight is declared once, with its shape, its logical axes and its initialiser. Layers are
stacked on a leading axis and scanned, and the KV pool of all layers is carried through the
scan as one flat array, which XLA updates in place.

Suffixes name dimensions (legend in engine/types.py): ``x_TD`` is [T, D].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.config import Architecture
from engine.model.attention import Attention, Ragged, Rope
from engine.model.products import (
    BY_XLA,
    Linear,
    Norm,
    Products,
    Stacked,
    Weight,
    held,
    rms_norm,
)

# A weight's logical axes; runtime/mesh.py says which mesh axis each is split over.
LAYERS, VOCAB, EMBED, HEADS, KV_HEADS, FFN = "layers", "vocab", "embed", "heads", "kv_heads", "ffn"


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, shape, axes, dtype, epsilon: float, kind: type[Weight] = Weight):
        self.scale = kind(jnp.ones(shape, dtype), axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.epsilon)

    @property
    def of_layers(self) -> Norm:
        return Norm(self.scale[...], self.epsilon)


class Embed(nnx.Module):
    """Token embeddings, [V, D]; also the output projection where the two are tied."""

    def __init__(self, rngs, arch: Architecture, dtype, products: Products):
        shape = (arch.vocab_size, arch.hidden_size)
        table = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(0.02, dtype)
        weight, scales = products.hold(table, axis=-1) if arch.tie_embeddings else (table, None)
        self.weight = Weight(weight, axes=(VOCAB, EMBED))
        self.weight_scale = None if scales is None else Weight(scales, axes=(VOCAB,))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each normed before and added after. Called with what is `Stacked`
    of all layers, and with all else of one."""

    def __init__(self, rngs: nnx.Rngs, arch: Architecture, dtype, products: Products):
        self.arch = arch
        self.products = products
        layers, width, ffn = arch.num_layers, arch.hidden_size, arch.intermediate_size
        q_width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim

        def linear(rows, columns, row_axis, column_axis, use_bias=False):
            axes = (LAYERS, row_axis, column_axis)
            shape = (layers, rows, columns)
            return Linear(rngs, shape, axes, dtype, products, use_bias=use_bias)

        def norm(size, axis, kind):
            return RMSNorm((layers, size), (LAYERS, axis), dtype, arch.rms_norm_eps, kind)

        self.attn_norm = norm(width, EMBED, Stacked)
        self.q_proj = linear(width, q_width, EMBED, HEADS, arch.qkv_bias)
        self.k_proj = linear(width, kv_width, EMBED, KV_HEADS, arch.qkv_bias)
        self.v_proj = linear(width, kv_width, EMBED, KV_HEADS, arch.qkv_bias)
        self.q_norm = norm(arch.head_dim, None, Weight) if arch.qk_norm else None
        self.k_norm = norm(arch.head_dim, None, Weight) if arch.qk_norm else None
        self.o_proj = linear(q_width, width, HEADS, EMBED)
        self.mlp_norm = norm(width, EMBED, Stacked)
        self.gate_proj = linear(width, ffn, EMBED, FFN)
        self.up_proj = linear(width, ffn, EMBED, FFN)
        self.down_proj = linear(ffn, width, FFN, EMBED)

    def __call__(self, x_TD, kv_pool, layer, attend):
        q_TNH, k_TKH, v_TKH = self._project(x_TD, layer)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        out_TNH, kv_pool = attend(q_TNH, k_TKH, v_TKH, kv_pool)
        out_TNH = out_TNH.reshape(len(x_TD), -1)
        (x_TD,) = self.products(out_TNH, [self.o_proj.matrix], layer, add_MN=x_TD)
        stacks = [linear.matrix for linear in (self.gate_proj, self.up_proj, self.down_proj)]
        return self.products.feed_forward(x_TD, self.mlp_norm.of_layers, *stacks, layer), kv_pool

    def _project(self, x_TD, layer):
        """Queries, keys and values, biases added, by head."""
        linears = self.q_proj, self.k_proj, self.v_proj
        stacks = [linear.matrix for linear in linears]
        results = self.products(x_TD, stacks, layer, norm=self.attn_norm.of_layers)
        for y, linear in zip(results, linears, strict=True):
            biased = y if linear.bias is None else y + jnp.expand_dims(linear.bias[...], 0)
            yield biased.reshape(len(y), -1, self.arch.head_dim)


class Decoder(nnx.Module):
    """Token ids in, hidden states out; `logits` turns chosen hidden states into scores."""

    def __init__(self, arch: Architecture, dtype: Any, rngs: nnx.Rngs, products: Products = BY_XLA):
        self.arch = arch
        self.products = products
        self.embed = Embed(rngs, arch, dtype, products)
        self.layers = DecoderLayer(rngs, arch, dtype, products)
        self.final_norm = RMSNorm((arch.hidden_size,), (EMBED,), dtype, arch.rms_norm_eps)
        shape = (arch.hidden_size, arch.vocab_size)
        axes = (EMBED, VOCAB)
        self.lm_head = None if arch.tie_embeddings else Linear(rngs, shape, axes, dtype, products)

    def __call__(
        self,
        token_ids: jax.Array,
        kv_pool: jax.Array,
        ragged: Ragged,
        attention: Attention,
        kv_scales_L2K: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute a ragged batch, writing its keys and values into the pool.

        Args:
          token_ids: int32[T].
          kv_pool: shaped by `kv_pool_shape`; donate it.
          ragged: which sequence and position each token has. A batch with as many tokens as
            rows (T == S) promises one token a row, as core/batching does.
          attention: the kernels to use.
          kv_scales_L2K: float32, of keys and of values, for a pool of 8 bits.

        Returns:
          Normed hidden states [T, D] in the model's dtype, and the pool.
        """
        arch = self.arch
        num_tokens, num_seqs = len(token_ids), len(ragged.kv_lens)
        work = attention.prepare(
            ragged,
            block_size=kv_pool.shape[2],
            max_query_len=1 if num_tokens == num_seqs else num_tokens,
        )
        rope = rope_angles(ragged.positions, arch)
        num_blocks = kv_pool.shape[0] // arch.num_layers
        definition, matrices, weights = nnx.split(self.layers, Stacked, ...)

        def run_layer(carry, layer):
            x_TD, pool = carry
            layer_weights, index, kv_scales_2K = layer
            module = nnx.merge(definition, matrices, layer_weights)

            def attend(q, k, v, pool):
                return attention(
                    q,
                    k,
                    v,
                    pool,
                    work,
                    first_block=index * num_blocks,
                    scale=arch.head_dim**-0.5,
                    rope=rope,
                    kv_scales_2K=kv_scales_2K,
                )

            return module(x_TD, pool, index, attend), None

        # The sum of all layers is float32 whatever the weights are: rounding it to bfloat16
        # sixty times would be most of the error, and it is small beside everything else.
        table = held(self.embed.weight, self.embed.weight_scale)  # packed where it is tied
        x_TD = self.products.embed(table, token_ids) if self.lm_head is None else table[token_ids]
        x_TD = x_TD.astype(jnp.float32)
        indices = jnp.arange(arch.num_layers, dtype=jnp.int32)
        layers = (weights, indices, kv_scales_L2K)
        (x_TD, kv_pool), _ = jax.lax.scan(run_layer, (x_TD, kv_pool), layers)
        return self.final_norm(x_TD), kv_pool

    def logits(self, x_SD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores over the vocabulary, float32[S, V], and the best token of each row, int32[S]."""
        if self.lm_head is not None:
            return self.products.scores(x_SD, self.lm_head.matrix, is_table=False)
        table = held(self.embed.weight, self.embed.weight_scale)
        return self.products.scores(x_SD, table, is_table=True)


def abstract_decoder(arch: Architecture, dtype: Any, products: Products = BY_XLA) -> Decoder:
    """A decoder whose weights are shapes only, not packed: nothing is computed or allocated."""
    return nnx.eval_shape(lambda: Decoder(arch, dtype, nnx.Rngs(0), products))


def rope_frequencies(arch: Architecture) -> np.ndarray:
    """Radians a position for each pair of a head's dimensions, float32[H / 2].

    RoFormer (Su et al., 2021); Llama 3 slows long wavelengths by `factor` and blends between.
    """
    exponent = np.arange(0, arch.head_dim, 2, dtype=np.float32) / arch.head_dim
    frequency = (1.0 / arch.rope_theta**exponent).astype(np.float32)
    scaling = arch.rope_scaling
    if scaling is None:
        return frequency
    wavelength = 2 * np.pi / frequency
    turns = scaling.original_max_position / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (frequency * blend + frequency / scaling.factor * (1 - blend)).astype(np.float32)


def rope_angles(positions: jax.Array, arch: Architecture) -> Rope:
    """Of each token, for `Attention`."""
    frequency = jnp.asarray(rope_frequencies(arch))
    angles = positions.astype(jnp.float32)[:, None] * frequency[None]
    sin = jnp.sin(angles)
    return Rope(jnp.cos(angles), jnp.concatenate([-sin, sin], axis=1))
