"""Any checkpoint to Octavo's own format, which loads sharded and needs no dequantising."""

from __future__ import annotations

from pathlib import Path

from engine.config import Dtype
from engine.weights.checkpoint import native_shapes, open_checkpoint
from engine.weights.load import Progress, load_params
from engine.weights.native import check_destination, save


def convert(
    source: str | Path,
    output: str | Path,
    dtype: Dtype = "bfloat16",
    progress: Progress | None = None,
) -> None:
    """Convert a checkpoint; the new folder is complete, with the tokenizer's files.

    Takes host memory for the whole model in `dtype`, whatever the accelerator.

    Args:
      source: anything that `open_checkpoint` takes.
      output: a folder that doesn't exist yet, or is empty.
      dtype: of every parameter written.
      progress: called with bytes read and bytes in all; writing follows.

    Raises:
      WeightsError: see `open_checkpoint`, `load_params` and `save`.
      OSError: the output can't be written.
    """
    check_destination(output)  # before minutes of reading
    import jax

    checkpoint = open_checkpoint(source)
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=host)
        for name, shape in native_shapes(checkpoint.architecture).items()
    }
    params = load_params(checkpoint, abstract, progress)
    save(output, params, checkpoint.architecture, tokenizer=checkpoint)
