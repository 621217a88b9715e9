"""The weights of a GGUF file as the peers take them: a Hugging Face folder, and other GGUF files.

The values are the dequantised ones, rounded once to what the new file holds, so that all engines
compute with the same. The tokenizer is the engine's own: transformers' conversion of GGUF files
loses that SmolLM's splits numbers into digits.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from engine.config import Architecture
from engine.text.tokenizer import Tokenizer
from engine.weights import WeightsError, native_shapes, open_checkpoint
from engine.weights.checkpoint import is_stacked, is_stored_transposed
from engine.weights.gguf import GGUFCheckpoint
from engine.weights.hf import NAMES, SINGLE

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_SPECIAL = ("bos", "eos", "padding", "unknown")  # in GGUF's names


def hugging_face_folder(source: Path, cache: Path) -> Path:
    """A folder in bfloat16 as vLLM and transformers take it; made once, and then kept in `cache`.

    Raises:
      WeightsError, TokenizerError: the file can't be used, see `open_checkpoint`.
    """
    checkpoint = _open(source)
    return _made(cache / f"{_stem(checkpoint)}-bf16", lambda to: _write_folder(checkpoint, to))


def gguf_file(source: Path, cache: Path, kind: str) -> Path:
    """A GGUF file with matrices in `bf16` or `q8_0`; made once, and then kept in `cache`.

    Vectors stay in float32, as llama.cpp's own converter has them.

    Raises:
      WeightsError: the file can't be used.
    """
    from gguf import GGMLQuantizationType

    checkpoint = _open(source)
    quant = GGMLQuantizationType[kind.upper()]
    path = cache / f"{_stem(checkpoint)}-{kind}.gguf"
    return _made(path, lambda to: _write_gguf(checkpoint, quant, to))


def _open(source: Path) -> GGUFCheckpoint:
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, GGUFCheckpoint):
        raise WeightsError(
            source, "peers are compared on a GGUF file; set model.source to one, as configs/ do"
        )
    return checkpoint


def _stem(checkpoint: GGUFCheckpoint) -> str:
    """A name that another model's files don't have."""
    return f"{checkpoint.file.path.stem}-{checkpoint.fingerprint[:8]}"


def _made(path: Path, write: Callable[[Path], None]) -> Path:
    """What `write` writes, put in its place when it is whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as scratch:
            write(Path(scratch) / path.name)
            with contextlib.suppress(FileExistsError):  # another run has made it meanwhile
                os.rename(Path(scratch) / path.name, path)
    return path


def _write_folder(checkpoint: GGUFCheckpoint, folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    tensors = {}
    for name in native_shapes(checkpoint.architecture):
        layers = range(checkpoint.architecture.num_layers) if is_stacked(name) else (None,)
        for layer in layers:
            values = checkpoint.read(name, layer)
            values = values.T if is_stored_transposed(name) else values
            values = np.ascontiguousarray(values).astype(ml_dtypes.bfloat16)
            tensors[NAMES[name].format(layer=layer)] = values
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    metadata = checkpoint.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _SPECIAL}
    bos, eos, pad, unknown = (None if i is None else tokens[i] for i in ids.values())
    ends = {"bos_token_id": ids["bos"], "eos_token_id": list(checkpoint.eos_token_ids)}
    for file, content in {
        "config.json": _config(checkpoint.architecture) | ends,
        "generation_config.json": ends,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": checkpoint.architecture.max_position,
            "clean_up_tokenization_spaces": False,
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad or eos,
            "unk_token": unknown,
            "chat_template": metadata.get("tokenizer.chat_template"),
        },
    }.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(Tokenizer.from_gguf(metadata).to_json())


def _config(arch: Architecture) -> dict[str, Any]:
    """The architecture as transformers has it."""
    if arch.rope_scaling is not None or arch.family != "llama":
        raise ValueError(
            f"peers can be given models of the family llama without a scaling of positions; this "
            f"is {arch.family}, with {arch.rope_scaling}"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "max_position_embeddings": arch.max_position,
        "rope_theta": arch.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "rms_norm_eps": arch.rms_norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "attention_bias": arch.qkv_bias,
        "mlp_bias": False,
        "hidden_act": "silu",
    }


def _write_gguf(checkpoint: GGUFCheckpoint, quant: GGMLQuantizationType, path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants

    file = checkpoint.file
    writer = GGUFWriter(path, file.metadata["general.architecture"])
    for field in GGUFReader(file.path).fields.values():
        # The writer sets the first two itself; the third says what the old matrices were.
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{quant.name}"])
    writer.add_quantization_version(2)
    for name, entry in file.tensors.items():
        values = file.dequantise(name)
        kind = quant if len(entry.shape) > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
