"""Checkpoints: GGUF files, Hugging Face folders and Octavo's own, read into native parameters.

Start at `checkpoint` (what a checkpoint is), then `gguf` or `hf` (a format and its name map)
and `load` (from files to sharded arrays). Importing this costs no jax.
"""

from engine.weights.checkpoint import (
    Checkpoint,
    WeightsError,
    native_shapes,
    open_checkpoint,
)
from engine.weights.convert import convert
from engine.weights.load import load_params, with_kv_copies
from engine.weights.native import save

__all__ = [
    "Checkpoint",
    "WeightsError",
    "convert",
    "load_params",
    "native_shapes",
    "open_checkpoint",
    "save",
    "with_kv_copies",
]
