"""Octavo's own checkpoints: an orbax tree of native parameters, and what it takes to use them.

A folder holds `octavo.json`, `params/` (orbax, OCDBT and zarr3) and the tokenizer's files, so
that it is complete in itself. Restoring reads each device's chunks straight to that device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from engine.config import Architecture
from engine.weights.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    Index,
    WeightsError,
    is_stacked,
    native_shapes,
)
from engine.weights.hf_config import read_json, read_token_ids
from engine.weights.load import (
    Progress,
    Source,
    check_abstract,
    is_int8,
    num_bytes,
    placement,
    repeats_heads,
)
from engine.weights.quantise import SCALE

if TYPE_CHECKING:
    import jax

MANIFEST = "octavo.json"
FORMAT_VERSION = 1
PARAMS = "params"
GGUF_TOKENIZER = "gguf_tokenizer.json"
# A device that holds a slice reads whole chunks; this bounds what it reads in vain, while a
# chunk still takes far longer to transfer than to find.
_CHUNK_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class NativeCheckpoint:
    """A folder written by `save`, opened. See `Checkpoint`.

    `fingerprint` is the SHA-256 over the architecture and all names, shapes, dtypes and values
    that `save` recorded: equal models have equal fingerprints wherever they came from. It is
    not computed again on opening, so it doesn't notice files that were changed afterwards.
    """

    path: Path
    architecture: Architecture
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    fingerprint: str
    metadata: Mapping[str, Any] | None
    format: str = "octavo"

    @property
    def folder(self) -> Path | None:
        """The folder itself, unless the tokenizer came from a GGUF file."""
        return None if self.metadata is not None else self.path

    def read(self, name: str, layer: int | None = None, index: Index | None = None) -> np.ndarray:
        """Read one tensor as stored. See `Checkpoint`.

        The whole stacked parameter is restored for it; `restore` is the way to load a model.
        """
        values = self._on_host(name)
        values = values[layer] if is_stacked(name) else values
        return values if index is None else values[index]

    def restore(
        self,
        abstract: Mapping[str, jax.ShapeDtypeStruct],
        progress: Progress | None = None,
        kv_copies: int = 1,
    ) -> dict[str, jax.Array]:
        """Restore all parameters in the wanted shardings and dtypes; see `load_params`.

        What is more than cast comes into this process's memory first, one parameter at a time.
        """
        check_abstract(self, abstract, kv_copies)
        import jax

        total = sum(num_bytes(wanted) for wanted in abstract.values())
        if progress is not None:
            progress(0, total)
        shapes = native_shapes(self.architecture)
        made_on_host = [
            name for name in shapes if repeats_heads(name, kv_copies) or is_int8(abstract[name])
        ]
        placed = {
            name: jax.ShapeDtypeStruct(
                shape, abstract[name].dtype, sharding=placement(abstract[name])
            )
            for name, shape in shapes.items()
            if name not in made_on_host
        }
        params = self._load(placed)
        stored: dict[str, np.ndarray] = {}

        def read(name: str, layer: int | None, part: Index) -> np.ndarray:
            return stored[name][part if layer is None else (layer, *part)]

        source = Source(read, self.architecture, abstract, kv_copies)
        for name in made_on_host:
            stored = {name: self._on_host(name)}
            params[name] = source.load(name)
            if is_int8(abstract[name]):
                params[name + SCALE] = source.load(name + SCALE)
        if progress is not None:
            progress(total, total)
        return {name: params[name] for name in abstract}

    @functools.cached_property
    def _stored(self) -> Mapping[str, Any]:
        """Native name -> orbax's metadata of the array, checked against the architecture."""
        ocp = _orbax()
        # Orbax, tensorstore and their JSON raise errors of many unrelated types.
        try:
            stored = ocp.metadata(self.path / PARAMS).metadata
        except Exception as error:
            raise _unreadable(self.path, error) from error
        if not isinstance(stored, dict):
            raise WeightsError(self.path / PARAMS, "does not hold a mapping of parameters")
        shapes = native_shapes(self.architecture)
        if stored.keys() != shapes.keys():
            name = min(stored.keys() ^ shapes.keys(), key=str)
            where = "is missing from" if name in shapes else "is not expected in"
            raise WeightsError(
                self.path / PARAMS,
                f"{where} a checkpoint of this architecture; convert the model again",
                tensor=str(name),
            )
        for name, shape in shapes.items():
            found = tuple(getattr(stored[name], "shape", ()))
            if found != shape:
                raise WeightsError(
                    self.path / PARAMS,
                    f"has shape {list(found)}, but {MANIFEST} asks for {list(shape)}",
                    tensor=name,
                )
        return stored

    def _on_host(self, name: str) -> np.ndarray:
        """A whole parameter as it is stored, in this process's memory, which jax knows as a device
        of its own."""
        import jax

        try:
            host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        except RuntimeError as error:  # JAX_PLATFORMS leaves the CPU out
            raise WeightsError(
                self.path / PARAMS,
                "has to be read into this machine's own memory first, which jax can't use here "
                f"({error}); add cpu to JAX_PLATFORMS, such as tpu,cpu",
            ) from None
        stored = self._stored[name]
        wanted = {name: jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=host)}
        return np.asarray(self._load(wanted)[name])

    def _load(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        ocp = _orbax()
        tree = {name: wanted.get(name, ocp.PLACEHOLDER) for name in self._stored}
        try:
            loaded = ocp.load(self.path / PARAMS, tree)
        except Exception as error:  # as in `_stored`
            raise _unreadable(self.path, error) from error
        return {name: loaded[name] for name in wanted}


def open_native(path: Path) -> NativeCheckpoint:
    """Open a folder written by `save`. Raises WeightsError."""
    manifest = path / MANIFEST
    tree = read_json(manifest)
    version = tree.get("format_version")
    if version != FORMAT_VERSION:
        raise WeightsError(
            manifest,
            f"format_version is {version!r:.60}; this engine reads {FORMAT_VERSION}. Convert the "
            "model again",
        )
    try:
        architecture = msgspec.convert(tree.get("architecture"), Architecture)
    except (msgspec.ValidationError, ValueError) as error:
        raise WeightsError(manifest, f"architecture is not valid: {error}") from None
    fingerprint = tree.get("fingerprint")
    if not isinstance(fingerprint, str) or len(fingerprint) != 64:
        raise WeightsError(manifest, f"fingerprint is {fingerprint!r:.80}, not a SHA-256")
    vocab = architecture.vocab_size
    bos = read_token_ids(manifest, tree, "bos_token_id", vocab)
    gguf = path / GGUF_TOKENIZER
    checkpoint = NativeCheckpoint(
        path=path,
        architecture=architecture,
        eos_token_ids=read_token_ids(manifest, tree, "eos_token_ids", vocab),
        bos_token_id=bos[0] if bos else None,
        fingerprint=fingerprint,
        metadata=read_json(gguf) if gguf.exists() else None,
    )
    # Like the other formats: an incomplete checkpoint is refused on opening.
    _ = checkpoint._stored
    return checkpoint


def save(
    path: str | Path,
    params: Mapping[str, jax.Array],
    architecture: Architecture,
    *,
    tokenizer: Checkpoint | None = None,
) -> None:
    """Write a native checkpoint.

    It is written beside its place and moved there when it is complete, so a folder with this
    name is never half a checkpoint.

    Args:
      path: a folder that doesn't exist yet, or is empty.
      params: every parameter of `native_shapes(architecture)`, all of it on this process's
        devices.
      architecture: what they are for.
      tokenizer: where tokenizer files and the special token ids come from; without it the
        checkpoint has none, and serves token ids only.

    Raises:
      WeightsError: the folder isn't empty, or names or shapes aren't the architecture's.
      OSError: it can't be written.
    """
    path = check_destination(path)
    shapes = native_shapes(architecture)
    if (found := {name: tuple(array.shape) for name, array in params.items()}) != shapes:
        name = min(name for name in found | shapes if found.get(name) != shapes.get(name))
        raise WeightsError(
            path,
            f"has shape {found.get(name)}, but the architecture asks for {shapes.get(name)}",
            tensor=name,
        )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        ocp = _orbax()
        context = ocp.Context()
        context.array.saving.use_zarr3 = True
        context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
        with context:
            ocp.save(partial / PARAMS, dict(params))
        _copy_tokenizer(tokenizer, partial)
        bos = tokenizer.bos_token_id if tokenizer else None
        manifest = {
            "format_version": FORMAT_VERSION,
            "architecture": architecture,
            "eos_token_ids": tokenizer.eos_token_ids if tokenizer else (),
            "bos_token_id": bos,
            "fingerprint": content_hash(params, architecture),
        }
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        (partial / MANIFEST).write_bytes(text + b"\n")
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_destination(path: str | Path) -> Path:
    """The absolute path, if a checkpoint can be written there; otherwise raises WeightsError."""
    path = Path(path).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise WeightsError(path, "exists and is not an empty folder; give another path")
    return path


def content_hash(params: Mapping[str, jax.Array], architecture: Architecture) -> str:
    """Hex SHA-256 over the architecture and every parameter's name, shape, dtype and values.

    Equal weights under another rotary base or epsilon make other keys and values, so that
    blocks cached for one model must not serve the other.
    """
    digest = hashlib.sha256(b"octavo params 2\n" + msgspec.json.encode(architecture))
    for name in sorted(params):
        array = np.asarray(params[name])
        digest.update(f"\n{name}\n{array.shape}\n{array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _copy_tokenizer(tokenizer: Checkpoint | None, folder: Path) -> None:
    if tokenizer is None:
        return
    if tokenizer.folder is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer.folder / name).exists():
                shutil.copyfile(tokenizer.folder / name, folder / name)
    elif tokenizer.metadata is not None:
        keys = {k: v for k, v in tokenizer.metadata.items() if k.startswith("tokenizer.")}
        (folder / GGUF_TOKENIZER).write_bytes(msgspec.json.encode(keys))


def _orbax() -> Any:
    """Orbax's v1 API. Imported on use: it takes a third of a second."""
    import orbax.checkpoint.experimental.v1 as ocp

    return ocp


def _unreadable(path: Path, error: Exception) -> WeightsError:
    reason = str(error).strip().partition("\n")[0]
    return WeightsError(
        path / PARAMS,
        f"is incomplete or corrupt ({type(error).__name__}: {reason:.300}); convert the model "
        "again",
    )
