"""Products of a step's rows with the weights of one layer out of a stack.

``matmul``, ``feed_forward`` and ``scores`` are the entry points. They take along what goes before
and after a product, which costs as much as a product of a row where it is a call of its own.
Backends: ``reference`` (the oracle, in float32), ``xla`` (any device) and ``cpu`` (native code,
bfloat16, for x86-64: weights packed once, no thread pool but XLA's). ``pack`` gives weights the
layout that a backend wants. With any of them, weights may be ``Quantised``, in int8.

Shapes: M rows, K depth, N columns, L layers of a stack.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.matmul.int8 import MAX_DEPTH, Quantised, quantise
from pallas_kernels.matmul.norm import Norm, rms_norm

__all__ = [
    "Backend",
    "Norm",
    "Quantised",
    "Resolved",
    "embed",
    "feed_forward",
    "matmul",
    "pack",
    "pack_table",
    "quantise",
    "resolve_backend",
    "rms_norm",
    "scores",
]

Backend = Literal["reference", "xla", "cpu"]


class Resolved(NamedTuple):
    """The backend that runs, and why it is this one: a phrase to print beside its name.

    `is_fallback`: the device's own code can't run.
    """

    backend: Backend
    reason: str
    is_fallback: bool = False


def resolve_backend(
    name: str,
    platform: str,
    *,
    num_devices: int = 1,
    dtype: str = "bfloat16",
    in_int8: bool = False,
    shapes: Sequence[tuple[int, int]] = (),
) -> Resolved:
    """The backend that `name` means for a model on a device.

    Args:
      name: a backend, or "auto": cpu where it runs, or else xla.
      platform: as `jax.default_backend()` says it: "cpu", "gpu" or "tpu".
      num_devices: that the weights are split over.
      dtype: of the model.
      in_int8: whether its matrices are `Quantised`.
      shapes: (K, N) of every matrix.

    Raises:
      ValueError: the backend does not exist or can't run there, or none can. Nothing falls back in
        silence.
    """
    deepest = max((depth for depth, _ in shapes), default=0)
    if in_int8 and deepest > MAX_DEPTH:
        raise ValueError(
            f"a matrix has {deepest} rows, but of more than {MAX_DEPTH} in int8 a sum may not fit "
            "int32; leave the weights as they are"
        )
    if name not in ("auto", *get_args(Backend)):
        raise ValueError(
            f"matmul backend {name!r} is not one of auto, {', '.join(get_args(Backend))}"
        )
    if name in ("reference", "xla"):
        return Resolved(name, "as asked for")  # type: ignore[bad-argument-type]
    if platform != "cpu":
        refusal = f"the device is a {platform}"
    elif num_devices > 1:
        refusal = f"weights are split over {num_devices} devices"
    else:
        refusal = _module("cpu").unsupported(dtype, in_int8, shapes)
    if refusal is None:
        return Resolved("cpu", native.instructions())
    if name == "auto":
        return Resolved("xla", refusal, is_fallback=platform == "cpu")
    raise ValueError(
        f"matmul backend 'cpu' can't run: {refusal}; take auto, or xla, which runs on any device"
    )


def pack(matrices: jax.Array, backend: Backend) -> jax.Array:
    """Matrices [..., K, N] as a backend wants them; `matmul` takes stacks of the result.

    Of `Quantised` ones the values are packed; their scales stay as they are.
    """
    return _module(backend).pack(matrices)


def pack_table(table_VD: jax.Array, backend: Backend) -> jax.Array:
    """Embeddings that are the output projection too; `embed` and `scores` take the result."""
    return _module(backend).pack_table(table_VD)


def embed(table: jax.Array | Quantised, token_ids: jax.Array, backend: Backend) -> jax.Array:
    """Rows of a packed table, [T, D]; in float32 if it is `Quantised`."""
    return _module(backend).embed(table, token_ids)


def scores(
    x_MD: jax.Array, weights: jax.Array | Quantised, backend: Backend, *, is_table: bool
) -> tuple[jax.Array, jax.Array]:
    """Scores of all tokens, and each row's best token.

    Args:
      x_MD: in the weights' dtype, beside int8 in the model's.
      weights: from `pack_table`, or else a matrix [D, V] from `pack`.
      backend: from `resolve_backend`.
      is_table: which of the two.

    Returns:
      float32[M, V]; and int32[M], the first of the highest, or any token where one's is NaN.
    """
    return _module(backend).scores(x_MD, weights, is_table)


def matmul(
    x_MK: jax.Array,
    stacks: Sequence[jax.Array | Quantised],
    layer: jax.Array | int,
    *,
    backend: Backend,
    dtype: Any = None,
    norm: Norm | None = None,
    add_MN: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """x @ stack[layer] for each of several stacks, summed in float32, or of int8 in int32.

    Products of one x go in one call, which has more to share among threads.

    Args:
      x_MK: in the weights' dtype, beside int8 in the model's; float32 where its norm is multiplied.
      stacks: [L, …], each matrix from `pack` by the same backend; K is that of x.
      layer: int32[], which of each stack.
      backend: from `resolve_backend`.
      dtype: of the results, float32 or bfloat16; by default that of x, or of its norm.
      norm: multiply the norm of x, rounded to the dtype of its scales.
      add_MN: float32, added to the product with the only stack; the result is float32. Backends
        may round the product before.

    Returns:
      [M, N] for each stack, its own N.
    """
    layer = jnp.asarray(layer, jnp.int32)
    if add_MN is not None:
        dtype = jnp.float32
    elif dtype is None:
        dtype = x_MK.dtype if norm is None else norm.scales_LD.dtype
    dtype = jnp.dtype(dtype)
    return tuple(_module(backend).matmul(x_MK, stacks, layer, dtype, norm, add_MN))


def feed_forward(
    x_MD: jax.Array,
    norm: Norm,
    gate: jax.Array | Quantised,
    up: jax.Array | Quantised,
    down: jax.Array | Quantised,
    layer: jax.Array | int,
    *,
    backend: Backend,
) -> jax.Array:
    """x + (silu(n @ gate) * (n @ up)) @ down, where n is the norm of x (Shazeer, 2020).

    Args:
      x_MD: float32.
      norm: of x.
      gate, up, down: stacks of [D, F], [D, F] and [F, D], from `pack` by the same backend.
      layer: int32[], which of each.
      backend: from `resolve_backend`.

    Returns:
      float32[M, D]. What silu gives is rounded to the dtype of the norm's scales.
    """
    layer = jnp.asarray(layer, jnp.int32)
    return _module(backend).feed_forward(x_MD, norm, gate, up, down, layer)


def _module(backend: Backend) -> Any:
    # A backend is imported when it is used: native code is loaded then.
    return importlib.import_module(f"pallas_kernels.matmul.{backend}")
