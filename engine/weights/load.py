"""From a checkpoint to arrays on devices, in the shardings and dtypes that the model wants.

Each device's shard is read, cast and placed on its own, layer by layer, so that host memory
stays near one stacked tensor whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from engine.weights.checkpoint import Checkpoint, WeightsError, is_stacked, native_shapes

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
) -> dict[str, jax.Array]:
    """Load every parameter into its place.

    Args:
      checkpoint: from `open_checkpoint`.
      abstract: native name -> global shape, dtype (float32 or bfloat16, for instance) and
        sharding; a sharding of None is the default device. Must have the names of
        `native_shapes(checkpoint.architecture)`, no more and no fewer.
      progress: called after each parameter with the bytes loaded and the bytes in all, both
        in the wanted dtypes and over all shards.

    Returns:
      The same names with arrays. Values are cast from what the file holds to the wanted dtype
      directly, rounding to nearest even.

    Raises:
      WeightsError: names or shapes differ from the checkpoint's, or a file can't be read.
    """
    check_abstract(checkpoint, abstract)
    from engine.weights.native import NativeCheckpoint

    if isinstance(checkpoint, NativeCheckpoint):
        return checkpoint.restore(abstract, progress)
    total = sum(num_bytes(wanted) for wanted in abstract.values())
    params: dict[str, jax.Array] = {}
    done = 0
    for name, wanted in abstract.items():
        params[name] = _load_one(checkpoint, name, wanted)
        done += num_bytes(wanted)
        if progress is not None:
            progress(done, total)
    return params


def check_abstract(checkpoint: Checkpoint, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise WeightsError unless names and shapes are those of the checkpoint."""
    file = f"{checkpoint.format} checkpoint"
    shapes = native_shapes(checkpoint.architecture)
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


def num_bytes(wanted: jax.ShapeDtypeStruct) -> int:
    """Bytes of the whole array, not counting replicas."""
    return wanted.size * np.dtype(wanted.dtype).itemsize


def placement(wanted: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """The wanted sharding, or the default device."""
    import jax

    return wanted.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _load_one(checkpoint: Checkpoint, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    import jax

    # Replicas of a shard share one host array, which goes when the parameter is placed.
    shards: dict[tuple[slice, ...], np.ndarray] = {}

    def shard(given: tuple[slice, ...] | None) -> np.ndarray:
        parts = given or (slice(None),) * len(wanted.shape)
        index = tuple(
            slice(*part.indices(size)) for part, size in zip(parts, wanted.shape, strict=True)
        )
        if index not in shards:
            shards[index] = _read_shard(checkpoint, name, index, np.dtype(wanted.dtype))
        return shards[index]

    return jax.make_array_from_callback(tuple(wanted.shape), placement(wanted), shard)


def _read_shard(
    checkpoint: Checkpoint, name: str, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Read and cast the part of a parameter that one device holds."""

    def read(layer: int | None, part: tuple[slice, ...]) -> np.ndarray:
        values = checkpoint.read(name, layer, part)
        with np.errstate(all="ignore"):  # a value too large for bfloat16 becomes infinite
            # Kept in the file's order: transposing is cheaper after the cast has halved it.
            return values.astype(dtype, order="K", copy=False)

    if not is_stacked(name):
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
