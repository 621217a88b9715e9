"""config.json of a Hugging Face folder as an `Architecture`, or the reason why not.

A key that would change the model and isn't implemented is refused by name; defaults are those
of transformers' config classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config import Architecture, ConfigError, RopeScaling
from engine.weights.checkpoint import WeightsError

# model_type -> family. A Mistral without a sliding window is a llama.
FAMILIES: Mapping[str, Literal["llama", "qwen2", "qwen3"]] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

# No JSON file of a model comes near it (the largest indexes are a few MiB).
_MAX_JSON_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises WeightsError: unreadable, too large, or not an object."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise WeightsError(path, f"has {size} bytes; at most {_MAX_JSON_BYTES} are read")
        tree = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(path, "is missing; the folder is incomplete") from None
    except OSError as error:
        raise WeightsError(path, f"can't be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(path, f"is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise WeightsError(path, f"must hold an object, but holds a {type(tree).__name__}")
    return tree


def read_architecture(path: Path, config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Args:
      path: of the file, named in errors.
      config: what it holds.

    Raises:
      WeightsError: names the key, its value and what is supported.
    """
    keys = _Keys(path, config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise keys.refusal("model_type", f"one of {', '.join(FAMILIES)}")
    _refuse_unimplemented(keys, model_type)
    theta, scaling = _rope(keys)
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    # Qwen3 is the only one whose default isn't hidden / heads.
    head_dim = keys.integer("head_dim", 128 if model_type == "qwen3" else max(hidden // heads, 1))
    try:
        return Architecture(
            family=FAMILIES[model_type],
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=keys.integer("intermediate_size"),
            num_layers=keys.integer("num_hidden_layers"),
            num_heads=heads,
            # Llama 1 and 2 have no such key; for the others its default varies.
            num_kv_heads=keys.integer(
                "num_key_value_heads", heads if model_type == "llama" else None
            ),
            head_dim=head_dim,
            max_position=keys.integer("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=keys.real("rms_norm_eps"),
            tie_embeddings=keys.flag("tie_word_embeddings"),
            # Qwen2 has them without saying so. Where `attention_bias` is set, transformers
            # puts a bias on o_proj too: the check of the tensors refuses that one by name.
            qkv_bias=model_type == "qwen2" or keys.flag("attention_bias"),
            qk_norm=model_type == "qwen3",
        )
    except ConfigError as error:
        raise WeightsError(path, f"describes no possible model: {error}") from None


def read_token_ids(path: Path, config: Mapping[str, Any], key: str, vocab: int) -> tuple[int, ...]:
    """Token ids under a key: a number, a list of them, or null. Raises WeightsError."""
    value = config.get(key)
    if value is None:
        return ()
    tokens = value if isinstance(value, list) else [value]
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab:
            raise WeightsError(
                path, f"{key} has {token!r:.60}; token ids are from 0 to {vocab - 1}"
            )
    return tuple(dict.fromkeys(tokens))


class _Keys:
    """Typed access to a config's keys."""

    def __init__(self, path: Path, tree: Mapping[str, Any], prefix: str = ""):
        self.path, self.tree, self.prefix = path, tree, prefix

    def refusal(self, key: str, supported: str) -> WeightsError:
        given = f"is {self.tree[key]!r:.80}" if key in self.tree else "is missing"
        return WeightsError(self.path, f"{self.prefix}{key} {given}; supported: {supported}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.tree.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.refusal(key, "a whole number in [1, 2^31)")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.tree.get(key)
        value = default if value is None else value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise self.refusal(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.tree.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return bool(value)

    def section(self, key: str) -> _Keys | None:
        value = self.tree.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refusal(key, "an object, or null")
        return _Keys(self.path, value, f"{self.prefix}{key}.")


def _refuse_unimplemented(keys: _Keys, model_type: str) -> None:
    tree = keys.tree
    if tree.get("quantization_config") is not None:
        raise keys.refusal("quantization_config", "unquantised safetensors, or the model as GGUF")
    if tree.get("hidden_act", "silu") != "silu":
        raise keys.refusal("hidden_act", "silu")
    if keys.flag("mlp_bias"):
        raise keys.refusal("mlp_bias", "false")
    if tree.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise keys.refusal("partial_rotary_factor", "1")
    layer_types = tree.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types)
    ):
        raise keys.refusal("layer_types", "full_attention in every layer")
    if model_type in ("qwen2", "qwen3"):
        # These name a window and say in another key whether it is used.
        if keys.flag("use_sliding_window"):
            raise keys.refusal("use_sliding_window", "false")
    elif tree.get("sliding_window") is not None and (
        # A window that is never left is none.
        keys.integer("sliding_window") < keys.integer("max_position_embeddings")
    ):
        raise keys.refusal("sliding_window", "null, or at least max_position_embeddings")


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or the older two keys."""
    default_theta = keys.real("rope_theta", 10_000.0)
    rope = keys.section("rope_parameters") or keys.section("rope_scaling")
    if rope is None:
        return default_theta, None
    theta = rope.real("rope_theta", default_theta)
    key = "type" if "type" in rope.tree and "rope_type" not in rope.tree else "rope_type"
    kind = rope.tree.get(key)
    if kind == "default" or (kind is None and set(rope.tree) <= {"rope_theta", key}):
        return theta, None
    if kind != "llama3":
        raise rope.refusal(key, "default and llama3")
    if rope.tree.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.refusal("partial_rotary_factor", "1")
    low, high = rope.real("low_freq_factor"), rope.real("high_freq_factor")
    if low >= high:
        raise rope.refusal("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    return theta, RopeScaling(
        factor=rope.real("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=rope.integer("original_max_position_embeddings"),
    )
