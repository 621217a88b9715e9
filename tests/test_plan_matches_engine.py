"""`octavo plan` against the engine: the bytes it plans are the bytes the engine would allocate.

Everything is abstract, so full-size models cost nothing; four virtual devices make the meshes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from engine import memory_plan
from engine.config import Architecture, MeshConfig, from_tree
from engine.model import decoder, sampler
from engine.runtime import mesh as engine_mesh
from pallas_kernels.paged_attention import kv_pool_shape
from tests.architectures import LLAMA_8B, QWEN3_8B, SMOLLM2_135M

MODELS = {"smollm2": (SMOLLM2_135M, 3), "llama-8b": (LLAMA_8B, 4), "qwen3-8b": (QWEN3_8B, 2)}


@pytest.mark.parametrize(("arch", "tensor"), MODELS.values(), ids=MODELS)
def test_a_chip_s_weights_are_those_the_mesh_places_on_it(arch: Architecture, tensor: int) -> None:
    mesh = engine_mesh.make_mesh(MeshConfig(tensor=tensor), arch)
    placed = engine_mesh.weight_shardings(decoder.abstract_decoder(arch, jnp.bfloat16), mesh)
    on_a_chip = 0
    for weight in placed.values():
        assert isinstance(weight.sharding, NamedSharding)
        on_a_chip += math.prod(weight.sharding.shard_shape(weight.shape)) * weight.dtype.itemsize
    config = from_tree(
        {"model": {"source": "x"}, "cache": {"num_blocks": 8}, "mesh": {"tensor": tensor}}
    )
    made = memory_plan.plan(config, arch)
    assert made.weight_bytes_per_chip == on_a_chip
    assert made.num_parameters == sum(math.prod(weight.shape) for weight in placed.values())


@pytest.mark.parametrize(("arch", "tensor"), MODELS.values(), ids=MODELS)
def test_a_chip_s_pool_is_the_shard_the_engine_makes(arch: Architecture, tensor: int) -> None:
    config = from_tree(
        {"model": {"source": "x"}, "cache": {"num_blocks": 100}, "mesh": {"tensor": tensor}}
    )
    pool = kv_pool_shape(
        num_layers=arch.num_layers,
        num_blocks=100,
        num_kv_heads=arch.num_kv_heads,
        block_size=config.cache.block_size,
        head_dim=arch.head_dim,
    )
    mesh = engine_mesh.make_mesh(config.mesh, arch)
    shard = engine_mesh.kv_pool_sharding(mesh).shard_shape(pool)
    made = memory_plan.plan(config, arch)
    assert made.config_pool_bytes_per_chip == math.prod(shard) * jnp.bfloat16.dtype.itemsize


@pytest.mark.parametrize("arch", [arch for arch, _ in MODELS.values()], ids=MODELS)
def test_the_sampler_s_state_is_the_planned_one_but_for_a_few_ids(arch: Architecture) -> None:
    state = jax.eval_shape(lambda: sampler.initial_state(65, arch.vocab_size))
    arrays = [(math.prod(array.shape) * array.dtype.itemsize, array.shape) for array in state]
    by_vocabulary = sum(size for size, shape in arrays if shape[-1] == arch.vocab_size)
    assert memory_plan.sampler_bytes(arch, max_num_seqs=64) == by_vocabulary
    assert sum(size for size, _ in arrays) < 1.01 * by_vocabulary
