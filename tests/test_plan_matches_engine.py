"""`octavo plan` against the engine: the bytes it plans are the bytes the engine would allocate.

Everything is abstract, so full-size models cost nothing; four virtual devices make the meshes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from engine import memory_plan
from engine.config import (
    Architecture,
    AttentionConfig,
    Backend,
    CacheDtype,
    Config,
    MeshConfig,
    Quantization,
)
from engine.config_file import from_tree
from engine.model import decoder, sampler
from engine.model.products import Products
from engine.runtime import mesh as engine_mesh
from engine.weights import with_kv_copies
from pallas_kernels.paged_attention import head_width, kv_pool_shape
from tests.architectures import LLAMA_8B, QWEN3_8B, SMOLLM2_135M

# On four chips, each holds a copy of one of two KV heads, biases too; the kernels pad 80 to 128.
TWO_KV_HEADS = Architecture(
    family="qwen2",
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=16,
    num_kv_heads=2,
    head_dim=80,
    max_position=32_768,
    rope_theta=1e6,
    tie_embeddings=True,
    qkv_bias=True,
)
MODELS = {
    "smollm2": (SMOLLM2_135M, 3),
    "llama-8b": (LLAMA_8B, 4),
    "qwen3-8b": (QWEN3_8B, 2),
    "two-kv-heads": (TWO_KV_HEADS, 4),
}


def config_of(tensor: int, backend: Backend = "xla", **cache: Any) -> Config:
    tree = {"model": {"source": "x"}, "mesh": {"tensor": tensor}}
    return from_tree({**tree, "attention": {"backend": backend}, "cache": cache})


def held(arch: Architecture, tensor: int) -> Architecture:
    """The model with its KV heads as often as chips hold them."""
    return with_kv_copies(arch, memory_plan.kv_copies(arch, tensor))


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(("arch", "tensor"), MODELS.values(), ids=MODELS)
def test_a_chip_s_weights_are_those_the_mesh_places_on_it(
    arch: Architecture, tensor: int, quantization: Quantization
) -> None:
    mesh = engine_mesh.make_mesh(MeshConfig(tensor=tensor), arch)
    products = Products("xla", quantization)
    model = decoder.abstract_decoder(held(arch, tensor), jnp.bfloat16, products)
    placed = engine_mesh.weight_shardings(model, mesh)
    on_a_chip = 0
    for weight in placed.values():
        assert isinstance(weight.sharding, NamedSharding)
        on_a_chip += math.prod(weight.sharding.shard_shape(weight.shape)) * weight.dtype.itemsize
    config = config_of(tensor, num_blocks=8)
    model_config = dataclasses.replace(config.model, quantization=quantization)
    made = memory_plan.plan(dataclasses.replace(config, model=model_config), arch)
    assert made.weight_bytes_per_chip == on_a_chip
    whole = decoder.abstract_decoder(arch, jnp.bfloat16)
    shapes = [weight.shape for _, weight in nnx.to_flat_state(nnx.state(whole, decoder.Weight))]
    assert made.num_parameters == sum(map(math.prod, shapes))


def pool_bytes_on_a_chip(config: Config, arch: Architecture, num_blocks: int) -> int:
    """Of the pool that the engine makes."""
    backend = config.attention.backend
    assert backend != "auto"
    pool = kv_pool_shape(
        num_layers=arch.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=held(arch, config.mesh.tensor).num_kv_heads,
        block_size=config.cache.block_size,
        head_dim=arch.head_dim,
        backend=backend,
    )
    mesh = engine_mesh.make_mesh(config.mesh, arch)
    shard = engine_mesh.kv_pool_sharding(mesh).shard_shape(pool)
    return math.prod(shard) * jnp.dtype(config.cache_dtype).itemsize


@pytest.mark.parametrize("backend", ["tpu", "gpu", "cpu", "xla", "reference"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("arch", "tensor"), MODELS.values(), ids=MODELS)
def test_a_chip_s_pool_is_the_shard_the_engine_makes(
    arch: Architecture, tensor: int, dtype: CacheDtype, backend: Backend
) -> None:
    config = config_of(tensor, backend, num_blocks=100, dtype=dtype)
    made = memory_plan.plan(config, arch)
    assert made.config_pool_bytes_per_chip == pool_bytes_on_a_chip(config, arch, 100)


@pytest.mark.parametrize("backend", ["tpu", "gpu", "cpu", "xla", "reference"])
@pytest.mark.parametrize(("arch", "tensor"), MODELS.values(), ids=MODELS)
def test_the_pool_takes_no_more_memory_than_was_asked_for_and_no_less_by_a_block(
    arch: Architecture, tensor: int, backend: Backend
) -> None:
    memory = 2**30 + 12345
    asked = config_of(tensor, "auto", memory=memory)
    config = dataclasses.replace(asked, attention=AttentionConfig(backend=backend))
    # As the engine does: `auto` has turned out to be this one.
    num_blocks = memory_plan.config_blocks(asked, arch, backend)
    assert num_blocks == memory_plan.config_blocks(config, arch)
    taken = [tensor * pool_bytes_on_a_chip(config, arch, num_blocks + more) for more in (0, 1)]
    assert taken[0] <= memory < taken[1]
    assert memory_plan.config_blocks(asked, arch) <= num_blocks  # a plan for whatever it will be


def test_a_head_is_as_wide_as_the_kernels_make_it() -> None:
    backends: tuple[Any, ...] = ("tpu", "gpu", "cpu", "xla", "reference")
    for head_dim in range(1, 513):
        widths = {backend: head_width(head_dim, backend) for backend in backends}
        planned = {backend: memory_plan.cache_width(head_dim, backend) for backend in backends}
        assert planned == widths
        assert memory_plan.cache_width(head_dim, "auto") == max(widths.values())


@pytest.mark.parametrize("arch", [arch for arch, _ in MODELS.values()], ids=MODELS)
def test_the_sampler_s_state_is_the_planned_one_but_for_a_few_ids(arch: Architecture) -> None:
    state = jax.eval_shape(lambda: sampler.initial_state(65, arch.vocab_size))
    arrays = [(math.prod(array.shape) * array.dtype.itemsize, array.shape) for array in state]
    by_vocabulary = sum(size for size, shape in arrays if shape[-1] == arch.vocab_size)
    assert memory_plan.sampler_bytes(arch, max_num_seqs=64) == by_vocabulary
    assert sum(size for size, _ in arrays) < 1.01 * by_vocabulary
