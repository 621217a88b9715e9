"""How the decoder reaches the matrix products: resolved once, weights packed once at load."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engine.config import Architecture, Quantization
from engine.weights.checkpoint import native_shapes
from pallas_kernels import matmul as mm
from pallas_kernels.matmul import Norm, Quantised, Resolved, resolve_backend, rms_norm

__all__ = [
    "BY_XLA",
    "Linear",
    "Norm",
    "Products",
    "Resolved",
    "Stacked",
    "Weight",
    "held",
    "matrix_shapes",
    "resolve_backend",
    "rms_norm",
]

Held = jax.Array | Quantised  # what a backend multiplies with


class Weight(nnx.Param):
    """A parameter that knows its logical axes (`axes`, one name or None a dimension)."""


class Stacked(Weight):
    """One that products take with all layers, as a slice would be a copy for native code: matrices,
    held as their backend wants them, and the norms before them."""


class Linear(nnx.Module):
    """The weights of x @ kernel (+ bias); the kernel is [in, out], of layers [L, in, out].

    One in int8 has `kernel_scale`, float32 [out] or [L, out].
    """

    def __init__(self, rngs, shape, axes, dtype, products: Products, *, use_bias: bool = False):
        # Random at the scale that keeps activations near one.
        scale = jnp.asarray(1.0 / math.sqrt(shape[-2]), dtype)
        kernel, scales = products.hold(jax.random.normal(rngs.params(), shape, dtype) * scale)
        column_shape, column_axes = (*shape[:-2], shape[-1]), (*axes[:-2], axes[-1])
        self.kernel = Stacked(kernel, axes=axes)
        self.kernel_scale = None if scales is None else Stacked(scales, axes=column_axes)
        self.bias = Weight(jnp.zeros(column_shape, dtype), axes=column_axes) if use_bias else None

    @property
    def matrix(self) -> Held:
        """The kernel, with its scales if it has any."""
        return held(self.kernel, self.kernel_scale)


def held(values: Weight, scales: Weight | None) -> Held:
    """Weights as `Products` take them."""
    return values[...] if scales is None else Quantised(values[...], scales[...])


@dataclasses.dataclass(frozen=True)
class Products:
    """Products of a step's rows with weights, by one backend.

    `quantization` is the config's, of the weights.
    """

    backend: mm.Backend
    quantization: Quantization = "none"

    def __call__(
        self,
        x_MK: jax.Array,
        stacks: Sequence[Held],
        layer: jax.Array | int,
        **options: Any,
    ) -> tuple[jax.Array, ...]:
        """See `pallas_kernels.matmul.matmul`."""
        return mm.matmul(x_MK, stacks, layer, backend=self.backend, **options)

    def feed_forward(self, x_MD: jax.Array, norm: Norm, *stacks_and_layer: Any) -> jax.Array:
        """See `pallas_kernels.matmul.feed_forward`."""
        return mm.feed_forward(x_MD, norm, *stacks_and_layer, backend=self.backend)

    def embed(self, table: Held, token_ids: jax.Array) -> jax.Array:
        """See `pallas_kernels.matmul.embed`."""
        return mm.embed(table, token_ids, self.backend)

    def scores(
        self, x_MD: jax.Array, weights: Held, *, is_table: bool
    ) -> tuple[jax.Array, jax.Array]:
        """See `pallas_kernels.matmul.scores`."""
        return mm.scores(x_MD, weights, self.backend, is_table=is_table)

    def hold(self, matrix: jax.Array, axis: int = -2) -> tuple[jax.Array, jax.Array | None]:
        """A new matrix before it is packed, and its scales if it is to be in int8.

        `axis` is the one that products sum over.
        """
        return (matrix, None) if self.quantization == "none" else mm.quantise(matrix, axis)

    def pack(self, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """A decoder's weights as the backend wants them, by the same names.

        `weights` is emptied on the way, so that the device holds no more than one of them twice.
        """
        if self.backend != "cpu":
            return weights
        is_tied = "lm_head.kernel" not in weights
        packed = {}
        for name in list(weights):
            array = weights.pop(name)
            if name.endswith(".kernel"):
                array = _pack(array, self.backend)
            elif name == "embed.weight" and is_tied:
                array = _pack_table(array, self.backend)
            # Nothing else may start before the old array is gone.
            packed[name] = jax.block_until_ready(array)
        return packed

    def packed(self, weights: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """What `pack` makes of weights, as shapes placed as they are."""
        shapes = jax.eval_shape(self.pack, weights)
        return {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=weights[name].sharding)
            for name, shape in shapes.items()
        }


BY_XLA = Products("xla")

_pack = jax.jit(mm.pack, static_argnums=1)
_pack_table = jax.jit(mm.pack_table, static_argnums=1)


def matrix_shapes(arch: Architecture) -> list[tuple[int, int]]:
    """(rows, columns) of every matrix that a decoder multiplies with."""
    shapes = native_shapes(arch)
    matrices = [shape for name, shape in shapes.items() if name.endswith(".kernel")]
    if arch.tie_embeddings:
        matrices.append(shapes["embed.weight"][::-1])
    return [(rows, columns) for *_, rows, columns in matrices]
