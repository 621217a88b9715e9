"""From a checkpoint to arrays on devices, in the shardings and dtypes that the model wants.

Each device's shard is read, cast and placed on its own, layer by layer, so that host memory
stays near one stacked tensor whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from engine.config import Architecture
from engine.weights.checkpoint import (
    Checkpoint,
    Index,
    WeightsError,
    is_stacked,
    is_stored_transposed,
    native_shapes,
)
from engine.weights.quantise import SCALE, QuantisedMatrix, Read

if TYPE_CHECKING:
    import jax

# Layers read at once: each takes host memory for one layer of one parameter.
_NUM_THREADS = 4

# Called with bytes placed so far and bytes in all.
Progress = Callable[[int, int], None]


def load_params(
    checkpoint: Checkpoint,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    progress: Progress | None = None,
    *,
    kv_copies: int = 1,
) -> dict[str, jax.Array]:
    """Load every parameter into its place.

    Args:
      checkpoint: from `open_checkpoint`.
      abstract: native name -> global shape, dtype (float32 or bfloat16, for instance) and
        sharding; a sharding of None is the default device. Must have the names of
        `native_shapes(checkpoint.architecture)`, no more and no fewer; but a matrix in int8 has
        its scales beside it, float32 for each of its columns (a table's rows), under its name
        and "_scale".
      progress: called after each parameter with the bytes loaded and the bytes in all, both
        in the wanted dtypes and over all shards.
      kv_copies: how often each KV head stands in `abstract`, one copy beside the other, so
        that more chips than KV heads can each hold one.

    Returns:
      The same names with arrays. Values are cast from what the file holds to the wanted dtype
      directly, rounding to nearest even, or to int8 by `quantise`.

    Raises:
      WeightsError: names or shapes differ from the checkpoint's, or a file can't be read.
    """
    check_abstract(checkpoint, abstract, kv_copies)
    from engine.weights.native import NativeCheckpoint

    if isinstance(checkpoint, NativeCheckpoint):
        return checkpoint.restore(abstract, progress, kv_copies)
    total = sum(num_bytes(wanted) for wanted in abstract.values())
    params: dict[str, jax.Array] = {}
    done = 0
    source = Source(checkpoint.read, checkpoint.architecture, abstract, kv_copies)
    for name, wanted in abstract.items():
        params[name] = source.load(name)
        done += num_bytes(wanted)
        if progress is not None:
            progress(done, total)
    return params


def check_abstract(
    checkpoint: Checkpoint, abstract: Mapping[str, jax.ShapeDtypeStruct], kv_copies: int = 1
) -> None:
    """Raise WeightsError unless names and shapes are those of the checkpoint."""
    file = f"{checkpoint.format} checkpoint"
    shapes = native_shapes(with_kv_copies(checkpoint.architecture, kv_copies))
    for name in [name for name in shapes if name in abstract and is_int8(abstract[name])]:
        axis = len(shapes[name]) - 2 + summed_axis(name)
        shapes[name + SCALE] = shapes[name][:axis] + shapes[name][axis + 1 :]
    if missing := sorted(abstract.keys() - shapes.keys()):
        raise WeightsError(
            file,
            f"the model wants it, but a {checkpoint.architecture.family} checkpoint of this "
            "architecture has no such parameter",
            tensor=missing[0],
        )
    if unused := sorted(shapes.keys() - abstract.keys()):
        raise WeightsError(
            file, "is in the checkpoint, but the model has no place for it", tensor=unused[0]
        )
    for name, wanted in abstract.items():
        if tuple(wanted.shape) != shapes[name]:
            raise WeightsError(
                file,
                f"has shape {list(shapes[name])}, but the model wants {list(wanted.shape)}",
                tensor=name,
            )


def with_kv_copies(arch: Architecture, copies: int) -> Architecture:
    """The same model, each of its KV heads `copies` times: it computes the same.

    Query heads keep their order: those that shared a KV head share its copies.
    """
    return dataclasses.replace(arch, num_kv_heads=arch.num_kv_heads * copies)


def repeats_heads(name: str, kv_copies: int) -> bool:
    """Whether a native parameter's last axis has the copies of the KV heads."""
    return kv_copies > 1 and name.startswith(("layers.k_proj.", "layers.v_proj."))


def read_repeated(
    read: Callable[[Index], np.ndarray], index: Index, head_dim: int, copies: int
) -> np.ndarray:
    """Read a part of a parameter whose last axis is to hold each head `copies` times.

    Args:
      read: gives a part of the parameter as it is stored.
      index: which part of the repeated parameter; its slices have no steps.
      head_dim: entries of a head on the last axis.
      copies: how often each head is repeated, one copy beside the other.
    """
    *rest, columns = index
    first, last = columns.start // (head_dim * copies), -(-columns.stop // (head_dim * copies))
    values = read((*rest, slice(first * head_dim, last * head_dim)))
    heads = values.reshape(*values.shape[:-1], last - first, head_dim)
    repeated = np.repeat(heads, copies, axis=-2).reshape(*values.shape[:-1], -1)
    start = columns.start - first * head_dim * copies
    return repeated[..., start : start + columns.stop - columns.start]


def from_shards(wanted: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array in its place, of parts that are read one by one.

    Args:
      wanted: shape, dtype and sharding.
      read: gives a part in the wanted dtype; the slices are plain, without steps.
    """
    import jax

    # Replicas of a shard share one host array, which goes when the parameter is placed.
    shards: dict[Index, np.ndarray] = {}

    def shard(given: Index | None) -> np.ndarray:
        parts = given or (slice(None),) * len(wanted.shape)
        index = tuple(
            slice(*part.indices(size)) for part, size in zip(parts, wanted.shape, strict=True)
        )
        if index not in shards:
            shards[index] = read(index)
        return shards[index]

    return jax.make_array_from_callback(tuple(wanted.shape), placement(wanted), shard)


def num_bytes(wanted: jax.ShapeDtypeStruct) -> int:
    """Bytes of the whole array, not counting replicas."""
    return wanted.size * np.dtype(wanted.dtype).itemsize


def placement(wanted: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """The wanted sharding, or the default device."""
    import jax

    return wanted.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def is_int8(wanted: jax.ShapeDtypeStruct) -> bool:
    """Whether a parameter is to be quantised."""
    return np.dtype(wanted.dtype) == np.int8


def summed_axis(name: str) -> int:
    """Which of a matrix's two axes products sum over: kernels are [in, out], the table [V, D]."""
    return 0 if is_stored_transposed(name) else 1


class Source:
    """What parameters are read from, shard by shard, as they are wanted.

    Args:
      read: as `Checkpoint.read`.
      architecture: the checkpoint's own.
      abstract, kv_copies: see `load_params`.
    """

    def __init__(
        self,
        read: Callable[[str, int | None, Index], np.ndarray],
        architecture: Architecture,
        abstract: Mapping[str, jax.ShapeDtypeStruct],
        kv_copies: int,
    ):
        self._read = read
        self._architecture = architecture
        self._abstract = abstract
        self._kv_copies = kv_copies
        self._quantised: dict[str, QuantisedMatrix] = {}

    def load(self, name: str) -> jax.Array:
        """One parameter in its place."""
        wanted = self._abstract[name]
        matrix = name.removesuffix(SCALE)
        read: Read
        if matrix in self._abstract and is_int8(self._abstract[matrix]):
            quantised = self._matrix(matrix)
            read = quantised.values if matrix == name else quantised.scales
        else:
            read = self._cast(name, np.dtype(wanted.dtype))
        stacked = is_stacked(name)
        return from_shards(wanted, lambda index: _read_shard(read, index, stacked, wanted.dtype))

    def _matrix(self, name: str) -> QuantisedMatrix:
        if name not in self._quantised:
            axis = summed_axis(name)
            depth = self._abstract[name].shape[axis - 2]
            self._quantised[name] = QuantisedMatrix(self._stored(name), depth, axis)
        return self._quantised[name]

    def _stored(self, name: str) -> Read:
        """A parameter as the file holds it, KV heads as often as they are wanted."""
        head_dim, copies = self._architecture.head_dim, self._kv_copies

        def read(layer: int | None, part: Index) -> np.ndarray:
            if not repeats_heads(name, copies):
                return self._read(name, layer, part)
            return read_repeated(
                lambda stored: self._read(name, layer, stored), part, head_dim, copies
            )

        return read

    def _cast(self, name: str, dtype: np.dtype) -> Read:
        stored = self._stored(name)

        def read(layer: int | None, part: Index) -> np.ndarray:
            with np.errstate(all="ignore"):  # a value too large for bfloat16 becomes infinite
                # Kept in the file's order: transposing is cheaper after the cast has halved it.
                return stored(layer, part).astype(dtype, order="K", copy=False)

        return read


def _read_shard(read: Read, index: Index, stacked: bool, dtype: np.dtype) -> np.ndarray:
    """The part of a parameter that one device holds."""
    if not stacked:
        return np.ascontiguousarray(read(None, index))
    layers, *rest = index
    out = np.empty([part.stop - part.start for part in index], dtype)

    def fill(row: int) -> None:
        out[row] = read(layers.start + row, tuple(rest))

    # NumPy lets go of the interpreter's lock while it dequantises and casts.
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for _ in threads.map(fill, range(len(out))):
            pass
    return out
