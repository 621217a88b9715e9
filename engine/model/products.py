"""How the decoder reaches the matrix products: resolved once, weights packed once at load."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from engine.config import Architecture
from engine.weights.checkpoint import native_shapes
from pallas_kernels import matmul as mm
from pallas_kernels.matmul import Norm, Resolved, resolve_backend, rms_norm

__all__ = [
    "BY_XLA",
    "Norm",
    "Products",
    "Resolved",
    "matrix_shapes",
    "resolve_backend",
    "rms_norm",
]


@dataclasses.dataclass(frozen=True)
class Products:
    """Products of a step's rows with weights, by one backend."""

    backend: mm.Backend

    def __call__(
        self,
        x_MK: jax.Array,
        stacks: Sequence[jax.Array],
        layer: jax.Array | int,
        **options: Any,
    ) -> tuple[jax.Array, ...]:
        """See `pallas_kernels.matmul.matmul`."""
        return mm.matmul(x_MK, stacks, layer, backend=self.backend, **options)

    def feed_forward(self, x_MD: jax.Array, norm: Norm, *stacks_and_layer: Any) -> jax.Array:
        """See `pallas_kernels.matmul.feed_forward`."""
        return mm.feed_forward(x_MD, norm, *stacks_and_layer, backend=self.backend)

    def embed(self, table: jax.Array, token_ids: jax.Array) -> jax.Array:
        """See `pallas_kernels.matmul.embed`."""
        return mm.embed(table, token_ids, self.backend)

    def scores(
        self, x_MD: jax.Array, weights: jax.Array, *, is_table: bool
    ) -> tuple[jax.Array, jax.Array]:
        """See `pallas_kernels.matmul.scores`."""
        return mm.scores(x_MD, weights, self.backend, is_table=is_table)

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
