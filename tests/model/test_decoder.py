"""The decoder's pieces against float64, with bounds that allow one rounding where one is due."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine.config import Architecture, RopeScaling
from engine.model import decoder
from engine.model.attention import Attention, Ragged
from engine.model.products import BY_XLA, Products
from pallas_kernels.paged_attention import rotate
from tests.architectures import LLAMA_8B, SMOLLM2_135M
from tests.paged_attention.oracle import NATIVE

U16, U32 = 2.0**-8, 2.0**-24  # unit roundoffs of bfloat16 and float32


def random(*shape: int, dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float64)


def test_a_bfloat16_product_is_summed_in_float32_and_rounded_once() -> None:
    size = 1536
    layer = decoder.Linear(nnx.Rngs(0), (size, 64), ("embed", "ffn"), jnp.bfloat16, BY_XLA)
    x = random(32, size)
    exact = wide(x) @ wide(layer.kernel[...])
    magnitude = np.abs(wide(x)) @ np.abs(wide(layer.kernel[...]))
    (y,) = jax.jit(lambda layer, x: BY_XLA(x, [layer.kernel[...][None]], 0))(layer, x)
    assert y.dtype == jnp.bfloat16
    assert (np.abs(wide(y) - exact) <= U16 * np.abs(exact) + size * U32 * magnitude).all()


def test_a_bfloat16_norm_is_computed_in_float32_and_rounded_twice() -> None:
    """After norming and after scaling, as transformers does."""
    norm = decoder.RMSNorm((576,), ("embed",), jnp.bfloat16, 1e-5)
    norm.scale[...] = random(576, seed=1)
    x = random(16, 576) * jnp.asarray(1e-3, jnp.bfloat16)  # so small that epsilon counts
    size = np.sqrt(np.mean(wide(x) ** 2, axis=-1, keepdims=True) + 1e-5)
    exact = wide(x) / size * wide(norm.scale[...])
    y = jax.jit(lambda norm, x: norm(x))(norm, x)
    assert y.dtype == jnp.bfloat16
    assert (np.abs(wide(y) - exact) <= 2.01 * U16 * np.abs(exact)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("arch", [SMOLLM2_135M, LLAMA_8B], ids=lambda arch: str(arch.head_dim))
def test_rotary_positions_turn_pairs_half_a_head_apart(arch: Architecture, dtype: Any) -> None:
    """Angles are float32, so far positions are off by their own rounding, and by no more."""
    positions = np.array([0, 1, 2, 255, 257, 4095, 8191], np.int32)
    x, half = random(len(positions), 3, arch.head_dim, dtype=dtype), arch.head_dim // 2
    angles = np.outer(positions, wide(jnp.asarray(decoder.rope_frequencies(arch))))[:, None]
    first, second = wide(x)[..., :half], wide(x)[..., half:]
    turned = (first + 1j * second) * np.exp(1j * angles)
    exact = np.concatenate((turned.real, turned.imag), axis=-1)
    y = rotate(x, decoder.rope_angles(jnp.asarray(positions), arch))
    assert y.dtype == dtype
    size = np.tile(np.abs(turned), 2)
    unit = U16 if dtype == jnp.bfloat16 else U32
    allowed = (unit * np.abs(exact)) + size * (4 * U32 + np.tile(angles, 2) * 2 * U32)
    assert (np.abs(wide(y) - exact) <= allowed).all()


def test_rope_frequencies_fall_from_one_to_the_inverse_of_theta() -> None:
    frequencies = decoder.rope_frequencies(SMOLLM2_135M)
    expected = [100_000.0 ** -(2 * pair / 64) for pair in range(32)]
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    assert frequencies.dtype == np.float32


def test_llama3_scaling_slows_long_waves_and_blends_between() -> None:
    """The three cases of Meta's `apply_scaling`, written out for each frequency."""
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    arch = dataclasses.replace(LLAMA_8B, rope_scaling=scaling)
    kinds = set()
    for pair, found in enumerate(decoder.rope_frequencies(arch)):
        frequency = arch.rope_theta ** -(2 * pair / arch.head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            kind, expected = "short", frequency
        elif wavelength > 8192 / 1.0:
            kind, expected = "long", frequency / 8.0
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            kind, expected = "between", (1 - smooth) * frequency / 8.0 + smooth * frequency
        kinds.add(kind)
        assert found == pytest.approx(expected, rel=2e-6)
    assert kinds == {"short", "between", "long"}


TINY = Architecture(
    family="llama",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=64,
    rope_theta=10_000.0,
)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_bfloat16_model_gives_float32_logits_and_keeps_its_pools_dtype(
    tie_embeddings: bool,
) -> None:
    """Also with a cache of another dtype than the model's; padding changes nothing."""
    arch = dataclasses.replace(TINY, tie_embeddings=tie_embeddings)
    model = decoder.Decoder(arch, jnp.bfloat16, nnx.Rngs(0))
    assert (model.lm_head is None) == tie_embeddings

    def logits(num_padded: int, pool_dtype: Any) -> jax.Array:
        real = jnp.arange(5, dtype=jnp.int32)
        ragged = Ragged(
            token_rows=jnp.pad(jnp.zeros(5, jnp.int32), (0, num_padded), constant_values=1),
            positions=jnp.pad(real, (0, num_padded)),
            query_starts=jnp.array([0, 5], jnp.int32),
            kv_lens=jnp.array([5], jnp.int32),
            block_tables=jnp.array([[1]], jnp.int32),
        )
        pool = jnp.full((3 * 2, 2, 8, 16), jnp.nan, pool_dtype)
        tokens = jnp.pad(real * 7, (0, num_padded), constant_values=49)
        hidden, pool = model(tokens, pool, ragged, Attention("xla"))
        assert hidden.dtype == jnp.bfloat16
        assert pool.dtype == pool_dtype
        # Layer l's copy of block 1 is entry 2 l + 1; five of its eight positions are written.
        written = np.isfinite(wide(pool)).all(axis=(1, 3))
        assert written.tolist() == [[False] * 8, [True] * 5 + [False] * 3] * 3
        return model.logits(hidden[:5])[0]

    plain = logits(0, jnp.bfloat16)
    assert plain.dtype == jnp.float32
    assert plain.shape == (5, 50)
    # Three layers of a few roundings each, which other shapes and dtypes may turn over.
    allowed = 16 * U16 * np.abs(plain).max()
    np.testing.assert_allclose(logits(3, jnp.bfloat16), plain, rtol=0, atol=allowed)
    np.testing.assert_allclose(logits(3, jnp.float32), plain, rtol=0, atol=allowed)


@pytest.mark.skipif(not NATIVE, reason="no native code")
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_model_with_packed_weights_computes_what_the_reference_does(
    tie_embeddings: bool,
) -> None:
    arch = dataclasses.replace(
        TINY, vocab_size=48, intermediate_size=64, tie_embeddings=tie_embeddings, qkv_bias=True
    )
    ragged = Ragged(
        token_rows=jnp.zeros(5, jnp.int32),
        positions=jnp.arange(5, dtype=jnp.int32),
        query_starts=jnp.array([0, 5], jnp.int32),
        kv_lens=jnp.array([5], jnp.int32),
        block_tables=jnp.array([[1]], jnp.int32),
    )

    def logits(products: Products) -> jax.Array:
        model = decoder.Decoder(arch, jnp.bfloat16, nnx.Rngs(0), products)
        definition, state = nnx.split(model)
        flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
        flat["layers.q_proj.bias"] = random(*flat["layers.q_proj.bias"].shape)
        shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in flat.items()}
        packed = products.pack(flat)
        assert flat == {} or packed is flat  # nothing is held twice
        assert packed.keys() == shapes.keys()
        tree: Any = {tuple(name.split(".")): leaf for name, leaf in packed.items()}
        model = nnx.merge(definition, nnx.from_flat_state(tree))
        pool = jnp.zeros((3 * 2, 2, 8, 16), jnp.bfloat16)
        tokens = jnp.arange(5, dtype=jnp.int32) * 7
        hidden, _ = jax.jit(lambda pool: model(tokens, pool, ragged, Attention("xla")))(pool)
        return jax.jit(model.logits)(hidden)[0]

    plain = logits(Products("reference"))
    packed = logits(Products("cpu"))
    assert packed.dtype == jnp.float32
    # Three layers of a few roundings each, which sums in another order may turn over.
    np.testing.assert_allclose(packed, plain, rtol=0, atol=16 * U16 * np.abs(plain).max())


def test_an_abstract_decoder_allocates_nothing_and_names_every_axis() -> None:
    model = decoder.abstract_decoder(LLAMA_8B, jnp.bfloat16)
    weights = nnx.to_flat_state(nnx.state(model, decoder.Weight))
    assert len(weights) == 12
    for _, weight in weights:
        assert isinstance(weight.get_value(), jax.ShapeDtypeStruct)
        assert len(weight.axes) == len(weight.shape)
