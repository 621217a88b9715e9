"""Which chips, and which part of each array lies on which."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine.config import Architecture, ConfigError, MeshConfig
from engine.model.attention import TENSOR
from engine.model.decoder import FFN, HEADS, KV_HEADS, VOCAB, Decoder, Weight

# Logical axes that are split over the tensor axis of the mesh; all others are replicated.
_SPLIT = frozenset({VOCAB, HEADS, KV_HEADS, FFN})


def make_mesh(config: MeshConfig, arch: Architecture) -> Mesh:
    """The mesh of the first `config.tensor` devices.

    Raises:
      ConfigError: not enough devices, or heads that don't divide evenly among them.
    """
    if config.data > 1:
        raise ConfigError(
            f"mesh.data is {config.data}, but one engine serves one replica so far; "
            "start one server a replica"
        )
    devices = jax.devices()
    if config.tensor > len(devices):
        raise ConfigError(
            f"mesh.tensor is {config.tensor}, but there are {len(devices)} devices "
            f"({devices[0].device_kind}); lower it or use a larger machine"
        )
    for name in ("num_kv_heads", "vocab_size", "intermediate_size"):
        if getattr(arch, name) % config.tensor:
            raise ConfigError(
                f"mesh.tensor is {config.tensor}, which doesn't divide the model's {name} "
                f"({getattr(arch, name)})"
            )
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


def kv_pool_sharding(mesh: Mesh) -> NamedSharding:
    """The KV pool, split by KV head."""
    return NamedSharding(mesh, P(None, TENSOR))
