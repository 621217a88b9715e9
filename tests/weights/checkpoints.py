"""Checkpoints for the tests of weights: tiny ones in every format, written independently.

The GGUF writer follows llama.cpp's convert_hf_to_gguf.py and uses the gguf package's own name
tables, so that it shares nothing with the reader under test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants
from safetensors.numpy import load_file, save_file

from engine.weights import Checkpoint, native_shapes

Tensors = dict[str, np.ndarray]

ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def read_folder(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """config.json and all tensors of a folder."""
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors")


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """A llama's tensors, Hugging Face names and shapes, for a config like `LLAMA`."""
    c, rng = config, np.random.default_rng(seed)
    width, ffn = c["hidden_size"], c["intermediate_size"]
    query, keys = (c[f"num_{n}_heads"] * c["head_dim"] for n in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], width), "model.norm.weight": (width,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], width)
    for layer in range(c["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (width,),
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, query),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def native(tensors: Tensors, num_layers: int) -> Tensors:
    """The native parameters that Hugging Face tensors stand for."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([tensors[f"model.layers.{i}.{name}"] for i in range(num_layers)])

    params = {
        "embed.weight": tensors["model.embed_tokens.weight"],
        "final_norm.scale": tensors["model.norm.weight"],
        "layers.attn_norm.scale": stacked("input_layernorm.weight"),
        "layers.mlp_norm.scale": stacked("post_attention_layernorm.weight"),
    }
    for part, projections in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for p in projections:
            kernel = stacked(f"{part}.{p}_proj.weight")
            params[f"layers.{p}_proj.kernel"] = kernel.swapaxes(1, 2)
    for p in "qkv":
        if f"model.layers.0.self_attn.{p}_proj.bias" in tensors:
            params[f"layers.{p}_proj.bias"] = stacked(f"self_attn.{p}_proj.bias")
    for p in "qk":
        if f"model.layers.0.self_attn.{p}_norm.weight" in tensors:
            params[f"layers.{p}_norm.scale"] = stacked(f"self_attn.{p}_norm.weight")
    if "lm_head.weight" in tensors:
        params["lm_head.kernel"] = tensors["lm_head.weight"].T
    return params


def read_all(checkpoint: Checkpoint) -> Tensors:
    """Every native parameter of an open checkpoint, stacked from single reads."""
    layers = range(checkpoint.architecture.num_layers)
    return {
        name: np.stack([checkpoint.read(name, layer) for layer in layers])
        if name.startswith("layers.")
        else checkpoint.read(name)
        for name in native_shapes(checkpoint.architecture)
    }


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py: rotary halves to neighbours."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def rope_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """`LlamaModel.generate_extra_tensors` of convert_hf_to_gguf.py."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            factors.append(1)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    quant: GGMLQuantizationType | None = None,
    metadata: Mapping[str, Any] | None = None,
    replace: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
) -> Path:
    """A GGUF file of a Hugging Face model.

    Args:
      path: of the new file.
      config: config.json.
      tensors: Hugging Face names and orientation.
      quant: type of all matrices; None keeps each tensor's dtype.
      metadata: more keys, or other values; floats are written as float32.
      replace: the file's name of a tensor -> its raw bytes by row and their type.
    """
    family = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(path, family)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    if config.get("eos_token_id") is not None:
        writer.add_eos_token_id(config["eos_token_id"])
        writer.add_bos_token_id(config["bos_token_id"])
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(rope, rope["rope_theta"], head_dim))
    for key, value in (metadata or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        writer.kv_data[-1].pop(key, None)
        add[type(value)](key, value)
    names = gguf.get_tensor_name_map(ARCHS[family], config["num_hidden_layers"])
    for name, values in tensors.items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permute(values, heads if "q_proj" in name else kv_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if replace and stored in replace:
            raw, kind = replace[stored]
            writer.add_tensor(stored, raw, raw_dtype=kind)
        elif quant is not None and values.ndim > 1:
            writer.add_tensor(stored, quants.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
