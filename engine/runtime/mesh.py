"""Which chips, and which part of each array lies on which."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine.config import Architecture, ConfigError, MeshConfig
from engine.memory_plan import check_split
from engine.model.attention import TENSOR
from engine.model.decoder import FFN, HEADS, KV_HEADS, VOCAB, Decoder, Weight

# Logical axes that are split over the tensor axis of the mesh; all others are replicated.
_SPLIT = frozenset({VOCAB, HEADS, KV_HEADS, FFN})


def make_mesh(config: MeshConfig, arch: Architecture, devices: Sequence[jax.Device] = ()) -> Mesh:
    """The mesh of the first `config.tensor` devices.

    Args:
      config, arch: what is to be split, and how.
      devices: to take them from, also those of a described topology; by default this
        process's own.

    Raises:
      ConfigError: not enough devices, or heads that don't divide evenly among them.
    """
    if config.data > 1:
        raise ConfigError(
            f"mesh.data is {config.data}, but one engine serves one replica so far; "
            "start one server a replica"
        )
    devices = devices or jax.devices()
    if config.tensor > len(devices):
        raise ConfigError(
            f"mesh.tensor is {config.tensor}, but there are {len(devices)} devices "
            f"({devices[0].device_kind}); lower it or use a larger machine"
        )
    check_split(arch, config.tensor)
    return Mesh(np.array(devices[: config.tensor]), (TENSOR,), axis_types=(AxisType.Auto,))


def weight_shardings(model: Decoder, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Each weight's shape, dtype and placement by its dotted name, such as
    `layers.q_proj.kernel`."""
    placed = {}
    for path, weight in nnx.to_flat_state(nnx.state(model, Weight)):
        spec = P(*(TENSOR if axis in _SPLIT else None for axis in weight.axes))
        placed[".".join(map(str, path))] = jax.ShapeDtypeStruct(
            weight.shape, weight.dtype, sharding=NamedSharding(mesh, spec)
        )
    return placed


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def logits_sharding(mesh: Mesh) -> NamedSharding:
    """Scores over the vocabulary, [S, V], split as the weights that they come from."""
    return NamedSharding(mesh, P(None, TENSOR))


def kv_scales_sharding(mesh: Mesh) -> NamedSharding:
    """The scales of an 8-bit pool, [L, 2, K], split by KV head."""
    return NamedSharding(mesh, P(None, None, TENSOR))


def kv_pool_sharding(mesh: Mesh) -> NamedSharding:
    """The KV pool, split by KV head."""
    return NamedSharding(mesh, P(None, TENSOR))
