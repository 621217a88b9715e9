"""A tiny random llama with a long context, as a folder that the engine loads.

The tokenizer is bytes: token i is byte i, then come `<s>`, `</s>` and two chat marks; `<s>` is
not put before texts. The model has a few more ids than the tokenizer, as real ones do.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.config import Architecture, BucketConfig, MeshConfig, SchedulerConfig
from engine.core.buckets import bucket_set
from engine.model.attention import Attention
from engine.model.decoder import Decoder, Weight, abstract_decoder
from engine.runtime.mesh import make_mesh, weight_shardings
from engine.runtime.runner import Runner, RunnerShape
from tests import compile_cache
from tests.weights.checkpoints import LLAMA, write_folder

BOS, EOS, TURN, TURN_END = 256, 257, 258, 259
VOCAB_SIZE = 264
ARCH = Architecture(
    family="llama",
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=2048,
    rope_theta=1e4,
)
CHAT = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + ':' + m['content'] + '</turn>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant:' }}{% endif %}"
)


@functools.cache
def weights() -> dict[str, np.ndarray]:
    """Native parameters in float32. Large embeddings make the output depend on the context."""
    model = Decoder(ARCH, jnp.float32, nnx.Rngs(0))
    named = {
        ".".join(map(str, path)): np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(model, Weight))
    }
    named["embed.weight"] = named["embed.weight"] * 50
    return named


def random_ids(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids of random bytes."""
    return tuple(np.random.default_rng([seed, length]).integers(0, 256, length).tolist())


def make_runner(
    *,
    num_blocks: int = 32,
    max_model_len: int = 512,
    scheduler: SchedulerConfig | None = None,
    buckets: BucketConfig | None = None,
    tensor: int = 1,
) -> Runner:
    """A runner of the tiny model, not warmed up; blocks of 16 tokens, float32."""
    mesh = make_mesh(MeshConfig(tensor=tensor), ARCH)
    scheduler = scheduler or SchedulerConfig(max_num_seqs=8, max_step_tokens=64)
    model = abstract_decoder(ARCH, jnp.float32)
    placed = {
        name: jax.device_put(weights()[name], wanted.sharding)
        for name, wanted in weight_shardings(model, mesh).items()
    }
    shape = RunnerShape(
        num_blocks=num_blocks,
        block_size=16,
        max_num_seqs=scheduler.max_num_seqs,
        cache_dtype=jnp.float32,
        buckets=bucket_set(buckets or BucketConfig(), scheduler, max_model_len // 16),
    )
    return Runner(model, placed, mesh, Attention("xla", mesh), shape)


def write_model(folder: Path) -> Path:
    """A folder in the Hugging Face layout with the weights above and the byte tokenizer."""
    config = LLAMA | {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": ARCH.hidden_size,
        "intermediate_size": ARCH.intermediate_size,
        "num_hidden_layers": ARCH.num_layers,
        "num_attention_heads": ARCH.num_heads,
        "num_key_value_heads": ARCH.num_kv_heads,
        "head_dim": ARCH.head_dim,
        "max_position_embeddings": ARCH.max_position,
        "rms_norm_eps": ARCH.rms_norm_eps,
        "rope_theta": ARCH.rope_theta,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
    }
    write_folder(folder, config, _hugging_face_tensors())
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """The byte tokenizer alone."""
    # The byte-level alphabet, in the order of the bytes that it stands for.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    vocabulary = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ("<s>", "</s>", "<turn>", "</turn>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def config_tree(model: Path, **changes: Any) -> dict[str, Any]:
    """A config for the folder that compiles two small programs; changes have dotted names."""
    tree: dict[str, Any] = {
        "model": {"source": str(model), "dtype": "float32", "max_model_len": 512},
        "cache": {"num_blocks": 64},
        "scheduler": {"max_num_seqs": 8, "max_step_tokens": 64, "max_waiting": 64},
        "buckets": {"decode_seqs": [8], "prefill_tokens": [64], "prefill_seqs": [8]},
        "compile_cache": str(compile_cache.FOLDER),
    }
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return tree


def write_config(path: Path, model: Path, **changes: Any) -> Path:
    """The same as a YAML file."""
    path.write_bytes(msgspec.yaml.encode(config_tree(model, **changes)))
    return path


def _hugging_face_tensors() -> dict[str, np.ndarray]:
    native = weights()
    tensors = {
        "model.embed_tokens.weight": native["embed.weight"],
        "model.norm.weight": native["final_norm.scale"],
        "lm_head.weight": np.ascontiguousarray(native["lm_head.kernel"].T),
    }
    names = {
        "attn_norm.scale": "input_layernorm",
        "mlp_norm.scale": "post_attention_layernorm",
        **{f"{p}_proj.kernel": f"self_attn.{p}_proj" for p in "qkvo"},
        **{f"{p}_proj.kernel": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
    }
    for ours, theirs in names.items():
        for layer, values in enumerate(native[f"layers.{ours}"]):
            tensors[f"model.layers.{layer}.{theirs}.weight"] = np.ascontiguousarray(values.T)
    return tensors
