"""Which weights lie where. That a split model is the same model, tests/model shows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from engine.config import ConfigError, MeshConfig
from engine.model.decoder import abstract_decoder
from engine.runtime.mesh import kv_pool_sharding, make_mesh, replicated, weight_shardings
from tests.runtime.tiny import ARCH

# Which axis of each weight is split, counted from the end; the others are on every device whole.
SPLIT = {
    "embed.weight": -2,  # vocabulary
    "lm_head.kernel": -1,
    "layers.q_proj.kernel": -1,  # heads
    "layers.k_proj.kernel": -1,
    "layers.v_proj.kernel": -1,
    "layers.o_proj.kernel": -2,
    "layers.gate_proj.kernel": -1,  # feed-forward
    "layers.up_proj.kernel": -1,
    "layers.down_proj.kernel": -2,
    "layers.attn_norm.scale": None,
    "layers.mlp_norm.scale": None,
    "final_norm.scale": None,
}


def test_matrices_are_split_and_norms_are_not() -> None:
    mesh = make_mesh(MeshConfig(tensor=2), ARCH)
    placed = weight_shardings(abstract_decoder(ARCH, jnp.float32), mesh)
    assert placed.keys() == SPLIT.keys()
    for name, weight in placed.items():
        expected = list(weight.shape)
        if (axis := SPLIT[name]) is not None:
            expected[axis] //= 2
        assert isinstance(weight.sharding, NamedSharding)
        assert weight.sharding.shard_shape(weight.shape) == tuple(expected), name


def test_biases_and_head_norms_follow_their_projections() -> None:
    arch = dataclasses.replace(ARCH, family="qwen3", qkv_bias=True, qk_norm=True)
    placed = weight_shardings(
        abstract_decoder(arch, jnp.float32), make_mesh(MeshConfig(tensor=2), arch)
    )
    shards = {
        name: weight.sharding.shard_shape(weight.shape)
        for name, weight in placed.items()
        if weight.sharding is not None
    }
    assert shards["layers.q_proj.bias"] == (2, 32)
    assert shards["layers.k_proj.bias"] == (2, 16)
    assert shards["layers.q_norm.scale"] == (2, 16)


def test_the_pool_is_split_by_kv_head_and_the_rest_is_everywhere() -> None:
    mesh = make_mesh(MeshConfig(tensor=2), ARCH)
    assert kv_pool_sharding(mesh).shard_shape((64, 2, 16, 32)) == (64, 1, 16, 32)
    assert replicated(mesh).shard_shape((5, 7)) == (5, 7)


def test_a_mesh_takes_the_first_devices() -> None:
    assert list(make_mesh(MeshConfig(tensor=2), ARCH).devices) == jax.devices()[:2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(tensor=5), r"mesh.tensor is 5, but there are 4 devices \(cpu\); lower it"),
        (MeshConfig(tensor=3), "mesh.tensor is 3, which can't cut 4 query heads evenly"),
        (MeshConfig(data=2), "mesh.data is 2, but one engine serves one replica"),
    ],
)
def test_a_mesh_that_can_not_be_made_says_why(config: MeshConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(config, ARCH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 263}, "263 tokens of the vocabulary"),
        ({"intermediate_size": 263}, "263 FFN columns"),
        ({"num_heads": 12, "num_kv_heads": 3}, "neither divides 3 KV heads nor is a multiple"),
    ],
)
def test_what_must_divide_evenly_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(tensor=2), dataclasses.replace(ARCH, **changes))
