"""GGUF files as checkpoints: llama.cpp's names and metadata, for llama, qwen2 and qwen3.

llama.cpp stores some things its own way: query and key rows of llama are permuted for
interleaved rotary positions, and llama3's rope scaling is a tensor of factors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Architecture, ConfigError, RopeScaling
from engine.weights.checkpoint import (
    Index,
    WeightsError,
    check_tensors,
    is_stored_transposed,
)
from engine.weights.fingerprint import fingerprint
from engine.weights.gguf_file import GGUFFile, read_index

NAMES = {
    "embed.weight": "token_embd.weight",
    "layers.attn_norm.scale": "blk.{layer}.attn_norm.weight",
    "layers.q_proj.kernel": "blk.{layer}.attn_q.weight",
    "layers.k_proj.kernel": "blk.{layer}.attn_k.weight",
    "layers.v_proj.kernel": "blk.{layer}.attn_v.weight",
    "layers.q_proj.bias": "blk.{layer}.attn_q.bias",
    "layers.k_proj.bias": "blk.{layer}.attn_k.bias",
    "layers.v_proj.bias": "blk.{layer}.attn_v.bias",
    "layers.q_norm.scale": "blk.{layer}.attn_q_norm.weight",
    "layers.k_norm.scale": "blk.{layer}.attn_k_norm.weight",
    "layers.o_proj.kernel": "blk.{layer}.attn_output.weight",
    "layers.mlp_norm.scale": "blk.{layer}.ffn_norm.weight",
    "layers.gate_proj.kernel": "blk.{layer}.ffn_gate.weight",
    "layers.up_proj.kernel": "blk.{layer}.ffn_up.weight",
    "layers.down_proj.kernel": "blk.{layer}.ffn_down.weight",
    "final_norm.scale": "output_norm.weight",
    "lm_head.kernel": "output.weight",
}
FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"

# GGUF has a key for one end-of-sequence token, while the makers of these models list several
# in generation_config.json. Tokenizer (`tokenizer.ggml.pre`) -> all of them.
_END_TOKENS = {
    "llama-bpe": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    "qwen2": ("<|im_end|>", "<|endoftext|>"),
}

# Metadata that would change the model, under the family's prefix, and the value at which
# they don't.
_NEUTRAL: Mapping[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "use_parallel_residual": False,
    "rope.scale_linear": 1.0,
    "rope.scaling.factor": 1.0,
    "rope.scaling.type": "none",
}


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFCheckpoint:
    """A GGUF file, opened. See `Checkpoint`."""

    file: GGUFFile
    architecture: Architecture
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    format: str = "gguf"
    folder: None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All metadata of the file."""
        return self.file.metadata

    @functools.cached_property
    def fingerprint(self) -> str:
        """Over the whole header (metadata, tensor index) and samples of the data.

        See `fingerprint.fingerprint` for what that does and doesn't tell apart.
        """
        return fingerprint([(self.file.path, self.file.header_bytes)])

    def read(self, name: str, layer: int | None = None, index: Index | None = None) -> np.ndarray:
        """Dequantise one tensor to float32. Only the rows (outputs) asked for are touched."""
        tensor = NAMES[name].format(layer=layer)
        shape = self.file.tensors[tensor].shape
        if is_stored_transposed(name):
            columns, rows = index or (slice(None), slice(None))
        else:
            rows, columns = (*(index or ()), slice(None), slice(None))[:2]
        if heads := self._permuted_heads(name):
            values = self.file.dequantise(tensor, _half_split_rows(shape[0], heads)[rows])
        else:
            values = self.file.dequantise(tensor, rows)
        if values.ndim == 1:
            return values
        values = values[:, columns]
        return values.T if is_stored_transposed(name) else values

    def _permuted_heads(self, name: str) -> int:
        """How many heads the rows are permuted in; 0 if they aren't."""
        if self.architecture.family != "llama":
            return 0
        if name.startswith("layers.q_proj."):
            return self.architecture.num_heads
        return self.architecture.num_kv_heads if name.startswith("layers.k_proj.") else 0


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Open a GGUF file. Raises WeightsError; see `open_checkpoint`."""
    file = read_index(path)
    architecture = _architecture(file)
    shapes = {name: entry.shape for name, entry in file.tensors.items()}
    check_tensors(path, architecture, NAMES, shapes, _is_harmless)
    return GGUFCheckpoint(
        file,
        architecture,
        eos_token_ids=_end_tokens(file, architecture.vocab_size),
        bos_token_id=_token_id(file, "tokenizer.ggml.bos_token_id", architecture.vocab_size),
    )


def _is_harmless(tensor: str) -> bool:
    # llama3's factors: `_rope_scaling` has turned them into the architecture's, or raised.
    if tensor == ROPE_FACTORS:
        return True
    # Old converters wrote each layer's rotary frequencies; they follow from the metadata.
    return re.fullmatch(r"blk\.\d+\.attn_rot_embd\.weight", tensor) is not None


def _half_split_rows(num_rows: int, num_heads: int) -> np.ndarray:
    """Which stored row is each native row, int[num_rows].

    llama.cpp's converter takes the two halves of a head's rows in turns (`permute` in
    convert_hf_to_gguf.py), so that rotary pairs are neighbours; here they are half a head apart.
    """
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _architecture(file: GGUFFile) -> Architecture:
    metadata, path = file.metadata, file.path
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise WeightsError(
            path,
            f"general.architecture is {family!r:.60}; this engine has {', '.join(FAMILIES)}",
        )
    if _integer(file, "split.count", 1, default=1) > 1:
        raise WeightsError(
            path, "is one part of a split model; join them with llama-gguf-split --merge"
        )

    def integer(key: str, default: int | None = None) -> int:
        return _integer(file, f"{family}.{key}", 1, default=default)

    def real(key: str, default: float | None = None) -> float:
        return _real(file, f"{family}.{key}", default)

    embedding = file.tensors.get(NAMES["embed.weight"])
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(path, "is missing or not a matrix", tensor=NAMES["embed.weight"])
    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    rotary = integer("rope.dimension_count", max(hidden // heads, 1))
    head_dim = integer("attention.key_length", rotary)
    for key, value in (
        ("rope.dimension_count", rotary),
        ("attention.value_length", integer("attention.value_length", head_dim)),
    ):
        if value != head_dim:
            raise WeightsError(
                path,
                f"{family}.{key} is {value}, but heads have {head_dim} dimensions; partial "
                "rotary positions and values of another size are not implemented",
            )
    context = integer("context_length")
    _refuse_unknown_maths(file, family, context)
    theta = real("rope.freq_base", 10_000.0)
    try:
        return Architecture(
            family=family,
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=integer("feed_forward_length"),
            num_layers=integer("block_count"),
            num_heads=heads,
            num_kv_heads=integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position=context,
            rope_theta=theta,
            rope_scaling=_rope_scaling(file, family, theta, head_dim),
            rms_norm_eps=real("attention.layer_norm_rms_epsilon"),
            # llama.cpp leaves out the head when it is the embedding.
            tie_embeddings=NAMES["lm_head.kernel"] not in file.tensors,
            qkv_bias=family == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
            qk_norm=family == "qwen3",
        )
    except ConfigError as error:
        raise WeightsError(path, f"metadata describe no possible model: {error}") from None


def _refuse_unknown_maths(file: GGUFFile, family: str, context: int) -> None:
    for key, neutral in _NEUTRAL.items():
        value = file.metadata.get(f"{family}.{key}", neutral)
        # A window that is never left is none.
        if key == "attention.sliding_window" and isinstance(value, int) and value >= context:
            continue
        if value != neutral:
            raise WeightsError(
                file.path,
                f"{family}.{key} is {value!r:.60}; only {neutral!r} is implemented",
            )


def _rope_scaling(file: GGUFFile, family: str, theta: float, head_dim: int) -> RopeScaling | None:
    """Find the llama3 scaling that gives the file's rope factors.

    llama.cpp's converter keeps the divisor of each frequency, `head_dim / 2` of them, and drops
    the four numbers they came from. All published models have low and high factors of 1 and
    4, so the scaling factor (the largest divisor) and the original context are to be found;
    contexts that give the same divisors are the same rotation.
    """
    if ROPE_FACTORS not in file.tensors:
        return None
    if file.tensors[ROPE_FACTORS].shape != (head_dim // 2,):
        raise WeightsError(
            file.path,
            f"has shape {list(file.tensors[ROPE_FACTORS].shape)}, but there are {head_dim // 2} "
            "rotary frequencies",
            tensor=ROPE_FACTORS,
        )
    stored = file.dequantise(ROPE_FACTORS).astype(np.float64)
    if np.all(stored == 1.0):
        return None
    factor = float(stored.max())
    if not math.isfinite(factor) or factor <= 0:
        raise WeightsError(file.path, "holds no usable factors", tensor=ROPE_FACTORS)
    context = _integer(file, f"{family}.rope.scaling.original_context_length", 1, default=8192)
    for original in (context, *(2**bits for bits in range(5, 21))):
        scaling = RopeScaling(
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=original,
        )
        # float32 on the way to the file costs a few parts in ten million.
        if np.allclose(llama3_rope_factors(scaling, theta, head_dim), stored, rtol=1e-5, atol=0):
            return scaling
    raise WeightsError(
        file.path,
        "the rope factors are not those of llama3's scaling with low and high frequency factors "
        "of 1 and 4; use the model's safetensors, where the scaling is written out",
        tensor=ROPE_FACTORS,
    )


def llama3_rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What llama3's scaling divides each rotary frequency by, float64[head_dim / 2].

    Source: transformers' `_compute_llama3_parameters`.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    with np.errstate(all="ignore"):  # the factor may be a corrupt file's
        return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)


def _end_tokens(file: GGUFFile, vocab_size: int) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [_token_id(file, f"tokenizer.ggml.{key}", vocab_size) for key in keys]
    names = _END_TOKENS.get(str(file.metadata.get("tokenizer.ggml.pre")), ())
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if names and isinstance(tokens, list):
        # Those in the vocabulary; special tokens come once, and last.
        found += [i for i, token in enumerate(tokens[:vocab_size]) if token in names]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _token_id(file: GGUFFile, key: str, vocab_size: int) -> int | None:
    if key not in file.metadata:
        return None
    token = _integer(file, key, 0)
    if token >= vocab_size:
        raise WeightsError(file.path, f"{key} is {token}, but the vocabulary has {vocab_size}")
    return token


def _integer(file: GGUFFile, key: str, low: int, default: int | None = None) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or not low <= value < 2**31:
        raise WeightsError(
            file.path,
            f"metadata {key} is {value!r:.60}; one whole number in [{low}, 2^31) is needed",
        )
    return value


def _real(file: GGUFFile, key: str, default: float | None) -> float:
    value = file.metadata.get(key, default)
    if type(value) is not float or not math.isfinite(value) or value <= 0:
        raise WeightsError(
            file.path, f"metadata {key} is {value!r:.60}; a positive number is needed"
        )
    # Stored as float32: take the shortest decimal that means the same, 1e-05 for 9.99999e-06.
    with np.errstate(all="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value
