"""What a checkpoint is: an architecture, native tensors read one layer at a time, token ids.

The formats (`gguf`, `hf`, `native`) each map their own names onto the native ones listed here,
and refuse a file whose tensors are not exactly those of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.config import Architecture

if TYPE_CHECKING:
    import numpy as np

# Which part of one tensor to read: one slice an axis, without steps.
Index = tuple[slice, ...]
# What `engine.text.Tokenizer.from_folder` reads: a model that is fetched, or converted to our
# own format, brings all of these along.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class WeightsError(ValueError):
    """A checkpoint that can't be used.

    Args:
      file: the file or folder, as the user would name it.
      reason: what was found, what is needed, and the way out.
      tensor: the tensor concerned, by its name in the file.
    """

    def __init__(self, file: str | Path, reason: str, *, tensor: str | None = None):
        where = f"{file}: " if tensor is None else f"{file}: tensor {tensor:.200}: "
        super().__init__(where + reason)
        self.file = str(file)
        self.tensor = tensor
        self.reason = reason


class Checkpoint(Protocol):
    """Weights on disk, opened but not read. Every implementation is frozen."""

    @property
    def format(self) -> str:
        """`gguf`, `safetensors` or `octavo`."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The decoder that these weights are for, checked against the tensors in the file."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 that tells these weights from others; each format says how surely."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, the main one first; empty if the files name none."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the files name one."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where tokenizer.json and its companions are; None if `metadata` has the tokenizer."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any] | None:
        """GGUF metadata with the `tokenizer.*` keys; None if `folder` has the tokenizer."""
        ...

    def read(self, name: str, layer: int | None = None, index: Index | None = None) -> np.ndarray:
        """Read one tensor, of one layer if its native name starts with `layers.`.

        Args:
          name: a key of `native_shapes`.
          layer: from 0; None for tensors outside the layers.
          index: which part, one slice for each axis (without the layer axis); None is all.

        Returns:
          The values in native orientation, dequantised to float32 or in the dtype they are
          stored in (float32, float16 or ml_dtypes.bfloat16). It may be a read-only view.

        Raises:
          WeightsError: the file has changed since it was opened, or can't be read.
        """
        ...


def native_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The decoder's parameters: name -> shape.

    Layers are stacked on a leading axis and matrices are [in, out]; axes are named in
    `engine.types`.
    """
    a = architecture
    query, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    width, ffn = a.hidden_size, a.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.scale": (width,),
        "q_proj.kernel": (width, query),
        "k_proj.kernel": (width, keys),
        "v_proj.kernel": (width, keys),
    }
    if a.qkv_bias:
        layer |= {"q_proj.bias": (query,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
    if a.qk_norm:
        layer |= {"q_norm.scale": (a.head_dim,), "k_norm.scale": (a.head_dim,)}
    layer |= {
        "o_proj.kernel": (query, width),
        "mlp_norm.scale": (width,),
        "gate_proj.kernel": (width, ffn),
        "up_proj.kernel": (width, ffn),
        "down_proj.kernel": (ffn, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (a.vocab_size, width)}
    shapes |= {f"layers.{name}": (a.num_layers, *shape) for name, shape in layer.items()}
    shapes["final_norm.scale"] = (width,)
    if not a.tie_embeddings:
        shapes["lm_head.kernel"] = (width, a.vocab_size)
    return shapes


def is_stacked(name: str) -> bool:
    """Whether the native parameter has a leading axis of layers."""
    return name.startswith("layers.")


def is_stored_transposed(name: str) -> bool:
    """Whether GGUF and Hugging Face files hold it as [out, in] where the native one is [in, out].

    Both follow torch.nn.Linear; the embedding table is [V, D] everywhere.
    """
    return name.endswith(".kernel")


def check_tensors(
    file: str | Path,
    architecture: Architecture,
    names: Mapping[str, str],
    stored: Mapping[str, tuple[int, ...]],
    is_harmless: Callable[[str], bool],
) -> None:
    """Check that a file holds the tensors of an architecture, in its shapes, and no others.

    The work is bounded by the number of tensors in the file, whatever the architecture claims.

    Args:
      file: named in errors.
      architecture: what the file's metadata says.
      names: native name -> the format's name, with `{layer}` in it for the stacked ones.
      stored: the format's name -> shape, as in the file ([out, in] for matrices).
      is_harmless: whether a tensor that the decoder doesn't know can be left out.

    Raises:
      WeightsError: a tensor is missing, has another shape, or would be dropped.
    """
    expected: set[str] = set()
    for name, shape in native_shapes(architecture).items():
        layers = range(architecture.num_layers) if is_stacked(name) else (None,)
        shape = shape[1:] if is_stacked(name) else shape
        shape = shape[::-1] if is_stored_transposed(name) else shape
        for layer in layers:
            tensor = names[name].format(layer=layer)
            if tensor not in stored:
                raise WeightsError(
                    file,
                    f"is missing; the file has {len(stored)} tensors, and its metadata describe "
                    f"a {architecture.family} model of {architecture.num_layers} layers that "
                    "needs this one. The file is incomplete, or the metadata are another model's",
                    tensor=tensor,
                )
            if stored[tensor] != shape:
                raise WeightsError(
                    file,
                    f"has shape {list(stored[tensor])}, but the model's metadata ask for "
                    f"{list(shape)}; the two don't belong together",
                    tensor=tensor,
                )
            expected.add(tensor)
    for tensor in stored:
        if tensor not in expected and not is_harmless(tensor):
            raise WeightsError(
                file,
                f"is not part of this engine's {architecture.family} decoder of "
                f"{architecture.num_layers} layers (biases are taken on q, k and v only); "
                "leaving it out would change the model, so the file is refused",
                tensor=tensor,
            )


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint: read its index and metadata, check them, and read no weights yet.

    Args:
      source: a `.gguf` file; a folder in the Hugging Face layout (config.json and
        *.safetensors) or written by `save`; or `hf:org/name[@revision]`, which is downloaded
        into huggingface_hub's cache if it isn't there.

    Raises:
      WeightsError: nothing is there, the format isn't known, or the file is corrupt,
        incomplete or of a model that the engine doesn't implement.
    """
    # Formats are imported on use: each brings its own libraries.
    if str(source).startswith("hf:"):
        from engine.weights import hub

        source = hub.download(str(source))
    path = Path(source).expanduser()
    if not path.exists():
        raise WeightsError(
            path, "there is no such file or folder; give a .gguf file, a folder, or hf:org/name"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise WeightsError(
                path, "is not a .gguf file; for safetensors give the folder that holds it"
            )
        from engine.weights import gguf

        return gguf.open_gguf(path)
    if not path.is_dir():
        raise WeightsError(path, "is neither a file nor a folder")
    from engine.weights import native

    if (path / native.MANIFEST).exists():
        return native.open_native(path)
    from engine.weights import hf

    return hf.open_folder(path)
