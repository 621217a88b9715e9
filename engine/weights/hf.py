"""Hugging Face folders as checkpoints: config.json and safetensors, in one file or in shards.

Only the slices asked for are read, so that a device's shard costs its own bytes. PyTorch's
pickled `.bin` files are never opened: a pickle can run code.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Architecture
from engine.weights.checkpoint import (
    Index,
    WeightsError,
    check_tensors,
    is_stored_transposed,
)
from engine.weights.fingerprint import fingerprint
from engine.weights.hf_config import read_architecture, read_json, read_token_ids

NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.attn_norm.scale": "model.layers.{layer}.input_layernorm.weight",
    "layers.q_proj.kernel": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers.k_proj.kernel": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers.v_proj.kernel": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers.q_proj.bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers.k_proj.bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers.v_proj.bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers.q_norm.scale": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers.k_norm.scale": "model.layers.{layer}.self_attn.k_norm.weight",
    "layers.o_proj.kernel": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers.mlp_norm.scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.gate_proj.kernel": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers.up_proj.kernel": "model.layers.{layer}.mlp.up_proj.weight",
    "layers.down_proj.kernel": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True, eq=False)
class FolderCheckpoint:
    """A Hugging Face folder, opened. See `Checkpoint`.

    Attributes:
      handles: safetensors file -> its open `safe_open`, which has it mapped.
      files: tensor -> the file that holds it.
    """

    folder: Path
    architecture: Architecture
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    handles: Mapping[Path, Any]
    files: Mapping[str, Path]
    format: str = "safetensors"
    metadata: None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Over config.json, the shards' whole headers, and samples of their data.

        See `fingerprint.fingerprint` for what that does and doesn't tell apart.
        """
        config = self.folder / "config.json"
        heads = [(config, config.stat().st_size)]
        for path in sorted(set(self.files.values())):
            with path.open("rb") as stream:
                heads.append((path, 8 + struct.unpack("<Q", stream.read(8))[0]))
        return fingerprint(heads)

    def read(self, name: str, layer: int | None = None, index: Index | None = None) -> np.ndarray:
        """Read one tensor as stored; a kernel comes as a transposed view. See `Checkpoint`."""
        tensor = NAMES[name].format(layer=layer)
        stored = _slice(self.handles[self.files[tensor]], tensor)
        index = index or (slice(None),) * len(stored.get_shape())
        return stored[index[::-1]].T if is_stored_transposed(name) else stored[index]


def open_folder(folder: Path) -> FolderCheckpoint:
    """Open a folder with config.json and safetensors. Raises WeightsError."""
    if not (folder / "config.json").exists():
        raise WeightsError(
            folder,
            "has neither config.json (Hugging Face) nor octavo.json (`octavo convert`), so it "
            "is not a checkpoint",
        )
    config = read_json(folder / "config.json")
    architecture = read_architecture(folder / "config.json", config)
    weight_map = _weight_map(folder)
    paths = sorted(set(weight_map.values())) if weight_map else [_only_file(folder)]
    handles = {path: _open(path) for path in paths}
    # What the files hold decides; the index only says where, and must not promise more.
    files = {tensor: path for path, handle in handles.items() for tensor in handle.keys()}  # noqa: SIM118
    for tensor, path in weight_map.items():
        if files.get(tensor) != path:
            raise WeightsError(path, f"doesn't hold it, although {INDEX} says so", tensor=tensor)
    shapes = {}
    for tensor, path in files.items():
        view = _slice(handles[path], tensor)
        shapes[tensor] = tuple(view.get_shape())
        if not _is_harmless(tensor, architecture) and view.get_dtype() not in _DTYPES:
            raise WeightsError(
                path,
                f"has dtype {view.get_dtype()}; {', '.join(_DTYPES)} are read. A quantised "
                "model can be loaded as GGUF",
                tensor=tensor,
            )
    is_harmless = functools.partial(_is_harmless, architecture=architecture)
    check_tensors(folder, architecture, NAMES, shapes, is_harmless)
    eos, bos = (_token_ids(folder, config, architecture, f"{n}_token_id") for n in ("eos", "bos"))
    checkpoint = FolderCheckpoint(
        folder, architecture, eos, bos[0] if bos else None, handles, files
    )
    _check_tied_head(checkpoint)
    return checkpoint


def _weight_map(folder: Path) -> dict[str, Path]:
    """Tensor -> file of a sharded checkpoint; empty if it is not sharded."""
    path = folder / INDEX
    if (folder / SINGLE).exists() or not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(path, "has no weight_map that says which file holds which tensor")
    files = {}
    for tensor, name in weight_map.items():
        # A name from a file must not lead out of the folder.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+\.safetensors", name):
            raise WeightsError(path, f"names {name!r:.100} as its file", tensor=tensor)
        if not (folder / name).is_file():
            raise WeightsError(
                folder / name,
                f"is missing, but {INDEX} says it holds this tensor; download the rest of the "
                "model",
                tensor=tensor,
            )
        files[tensor] = folder / name
    return files


def _only_file(folder: Path) -> Path:
    """The one safetensors file of a checkpoint that is not sharded."""
    if (folder / SINGLE).exists():
        return folder / SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        reason = f"has {len(found)} safetensors files but no {INDEX} that says what is where"
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        reason = (
            "has PyTorch pickles only, which are not read because they can run code; save the "
            "model as safetensors"
        )
    else:
        reason = f"has a config.json but no {SINGLE}; download the rest of the model"
    raise WeightsError(folder, reason)


def _open(path: Path) -> Any:
    """Map a safetensors file; the library checks that its index fits the file."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise WeightsError(path, f"is truncated or corrupt ({error}); download it again") from None
    except OSError as error:
        raise WeightsError(path, f"can't be read: {error}") from None


def _slice(handle: Any, tensor: str) -> Any:
    """A tensor of an open file, with its shape and dtype, not read yet."""
    return handle.get_slice(tensor)


def _is_harmless(tensor: str, architecture: Architecture) -> bool:
    # A buffer that old versions of transformers saved; it follows from rope_theta.
    if tensor.endswith("rotary_emb.inv_freq"):
        return True
    # The embedding again: `_check_tied_head` makes sure of it.
    return tensor == NAMES["lm_head.kernel"] and architecture.tie_embeddings


def _check_tied_head(checkpoint: FolderCheckpoint, num_rows: int = 4096) -> None:
    """A head in the file of a tied model must be the embedding, or leaving it out changes it."""
    head, embedding = NAMES["lm_head.kernel"], NAMES["embed.weight"]
    if not checkpoint.architecture.tie_embeddings or head not in checkpoint.files:
        return
    views = [_slice(checkpoint.handles[checkpoint.files[t]], t) for t in (head, embedding)]
    same = views[0].get_shape() == views[1].get_shape()
    vocab = checkpoint.architecture.vocab_size
    for start in range(0, vocab if same else 0, num_rows):
        rows = slice(start, min(start + num_rows, vocab))
        same = same and np.array_equal(views[0][rows], views[1][rows])
    if not same:
        raise WeightsError(
            checkpoint.files[head],
            "differs from the embedding, but config.json says tie_word_embeddings; set that to "
            "false if the model has its own head",
            tensor=head,
        )


def _token_ids(
    folder: Path, config: Mapping[str, Any], architecture: Architecture, key: str
) -> tuple[int, ...]:
    """From generation_config.json, which lists all of them, or else from config.json."""
    path = folder / "generation_config.json"
    if path.exists():
        generation = read_json(path)
        if tokens := read_token_ids(path, generation, key, architecture.vocab_size):
            return tokens
    return read_token_ids(folder / "config.json", config, key, architecture.vocab_size)
