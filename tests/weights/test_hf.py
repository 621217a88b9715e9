"""Hugging Face folders: what is read, and what is refused and why."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from engine.config import RopeScaling
from engine.text import Tokenizer
from engine.weights import WeightsError, hub, native_shapes, open_checkpoint
from engine.weights.checkpoint import TOKENIZER_FILES
from tests.conftest import TINY_MODELS
from tests.weights.checkpoints import (
    LLAMA,
    Tensors,
    native,
    random_tensors,
    read_all,
    read_folder,
    write_folder,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_shards(folder: Path, config: dict[str, Any], tensors: Tensors, count: int) -> Path:
    """A folder with an index, the tensors dealt out to `count` files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::count]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama(folder: Path, changes: dict[str, Any] | None = None, **tensors: np.ndarray) -> Path:
    """A small llama's folder, with keys of config.json and tensors changed or added."""
    return write_folder(folder, LLAMA | (changes or {}), random_tensors(LLAMA) | tensors)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_every_native_parameter_is_the_transposed_and_stacked_tensor(tiny_models, model):
    config, tensors = read_folder(tiny_models / model)
    checkpoint = open_checkpoint(tiny_models / model)
    expected = native(tensors, config["num_hidden_layers"])
    found = read_all(checkpoint)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    shapes = {name: values.shape for name, values in expected.items()}
    assert native_shapes(checkpoint.architecture) == shapes


def test_the_architecture_is_what_config_json_says(tiny_models):
    a = open_checkpoint(tiny_models / "llama3_rope").architecture
    assert (a.family, a.vocab_size, a.hidden_size, a.intermediate_size) == ("llama", 128, 32, 48)
    assert (a.num_layers, a.num_heads, a.num_kv_heads, a.head_dim) == (2, 4, 2, 8)
    assert (a.max_position, a.rope_theta, a.rms_norm_eps) == (512, 5e5, 1e-5)
    assert a.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
    )
    assert (a.tie_embeddings, a.qkv_bias, a.qk_norm) == (False, False, False)
    qwen2 = open_checkpoint(tiny_models / "qwen2").architecture
    assert (qwen2.family, qwen2.qkv_bias, qwen2.head_dim) == ("qwen2", True, 8)
    qwen3 = open_checkpoint(tiny_models / "qwen3").architecture
    assert (qwen3.family, qwen3.qk_norm, qwen3.head_dim) == ("qwen3", True, 16)
    tied = open_checkpoint(tiny_models / "llama_tied").architecture
    assert (tied.tie_embeddings, tied.head_dim) == (True, 16)


def test_old_and_new_rope_keys_mean_the_same(tmp_path):
    old = llama(tmp_path / "old", {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE})
    new = llama(tmp_path / "new", {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}})
    first, second = (open_checkpoint(folder).architecture for folder in (old, new))
    assert first == second
    assert first.rope_theta == 5e5
    assert first.rope_scaling is not None
    assert first.rope_scaling.original_max_position == 8192


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    changes = {"model_type": "mistral", "sliding_window": None}
    assert open_checkpoint(llama(tmp_path / "m", changes)).architecture.family == "llama"


def test_sharded_files_equal_a_single_one(tiny_models, tmp_path):
    config, tensors = read_folder(tiny_models / "qwen3")
    sharded = read_all(open_checkpoint(write_shards(tmp_path / "s", config, tensors, 3)))
    for name, values in native(tensors, config["num_hidden_layers"]).items():
        np.testing.assert_array_equal(sharded[name], values, err_msg=name)


def test_bfloat16_is_read_as_it_is_stored(tmp_path):
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in random_tensors(LLAMA).items()}
    found = read_all(open_checkpoint(write_folder(tmp_path / "bf16", LLAMA, tensors)))
    for name, values in native(tensors, 2).items():
        assert found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_end_tokens_come_from_the_generation_config_first(tmp_path):
    folder = llama(tmp_path / "a")
    assert open_checkpoint(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5, 7]}')
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id) == ((7, 5), 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": 16}')
    with pytest.raises(WeightsError, match=r"generation_config.*eos_token_id has 16.*0 to 15"):
        open_checkpoint(folder)


def test_a_fingerprint_follows_the_weights_and_not_the_place(tmp_path):
    first = llama(tmp_path / "a")
    copy = Path(shutil.copytree(first, tmp_path / "b"))
    norm = random_tensors(LLAMA)["model.norm.weight"]
    changed = llama(tmp_path / "c", {}, **{"model.norm.weight": norm + 1})
    theta = llama(tmp_path / "d", {"rope_theta": 20000.0})
    prints = [open_checkpoint(folder).fingerprint for folder in (first, copy, changed, theta)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert all(len(bytes.fromhex(text)) == 32 for text in prints)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt_oss"}, r"model_type is 'gpt_oss'.*llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, r"model_type is None"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; supported: silu"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config.*unquantised"),
        ({"mlp_bias": True}, r"mlp_bias is True"),
        ({"sliding_window": 16}, r"sliding_window is 16"),
        ({"model_type": "qwen2", "use_sliding_window": True}, r"use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters\.rope_type is 'yarn'"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, r"rope_type is missing"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"low_freq_factor is missing"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, r"above low_freq_factor"),
        ({"hidden_size": "32"}, r"hidden_size is '32'; supported: a whole number"),
        ({"num_hidden_layers": 2**40}, r"num_hidden_layers is 1099511627776"),
        ({"num_hidden_layers": True}, r"num_hidden_layers is True"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps is 0; supported: a positive number"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings is 'yes'"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, r"3 query heads"),
        ({"head_dim": 15}, r"head_dim is 15"),
    ],
)
def test_what_is_not_implemented_is_refused_by_key_and_value(tmp_path, changes, reason):
    folder = llama(tmp_path / "m", changes)
    with pytest.raises(WeightsError, match=reason) as caught:
        open_checkpoint(folder)
    assert "config.json" in caught.value.file


@pytest.mark.parametrize("layers", [1, 3, 2**30])
def test_a_wrong_number_of_layers_is_named_before_anything_is_allocated(tmp_path, layers):
    folder = llama(tmp_path / "m", {"num_hidden_layers": layers})
    with pytest.raises(WeightsError, match=r"model\.layers\.[12]\."):
        open_checkpoint(folder)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = random_tensors(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(WeightsError, match="is missing") as caught:
        open_checkpoint(write_folder(tmp_path / "m", LLAMA, tensors))
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"


def test_a_wrong_shape_names_the_tensor_and_both_shapes(tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    folder = llama(tmp_path / "m", {}, **{name: np.zeros((32, 16), np.float32)})
    with pytest.raises(WeightsError, match=r"k_proj\.weight: has shape \[32, 16\].*\[16, 32\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize("extra", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "gate"])
def test_a_tensor_that_would_be_dropped_is_refused(tmp_path, extra):
    name = f"model.layers.0.{extra}"
    folder = llama(tmp_path / "m", {}, **{name: np.ones(32, np.float32)})
    with pytest.raises(WeightsError, match="would change the model") as caught:
        open_checkpoint(folder)
    assert caught.value.tensor == name


def test_biases_are_taken_on_q_k_and_v_but_not_on_o(tmp_path):
    sizes = {"q": 32, "k": 16, "v": 16}
    biases = {
        f"model.layers.{i}.self_attn.{p}_proj.bias": np.full(size, i + 1, np.float32)
        for i in range(2)
        for p, size in sizes.items()
    }
    folder = llama(tmp_path / "qkv", {"attention_bias": True}, **biases)
    np.testing.assert_array_equal(open_checkpoint(folder).read("layers.k_proj.bias", 1), 2.0)
    biases["model.layers.0.self_attn.o_proj.bias"] = np.ones(32, np.float32)
    folder = llama(tmp_path / "qkvo", {"attention_bias": True}, **biases)
    with pytest.raises(WeightsError, match=r"o_proj\.bias.*biases are taken on q, k and v only"):
        open_checkpoint(folder)


def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    open_checkpoint(llama(tmp_path / "m", {}, **{name: np.ones(8, np.float32)}))


def test_the_head_of_a_tied_model_must_be_its_embedding(tmp_path):
    embedding = random_tensors(LLAMA)["model.embed_tokens.weight"]
    open_checkpoint(llama(tmp_path / "same", {}, **{"lm_head.weight": embedding.copy()}))
    other = embedding.copy()
    other[-1, -1] += 1
    with pytest.raises(WeightsError, match=r"lm_head\.weight: differs from the embedding"):
        open_checkpoint(llama(tmp_path / "other", {}, **{"lm_head.weight": other}))


def test_tensors_that_are_not_floats_are_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = llama(tmp_path / "m", {}, **{name: np.zeros((48, 32), np.int8)})
    with pytest.raises(WeightsError, match=r"up_proj\.weight: has dtype I8"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named_with_a_tensor_it_holds(tiny_models, tmp_path):
    config, tensors = read_folder(tiny_models / "llama")
    folder = write_shards(tmp_path / "m", config, tensors, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002.*tensor .* is missing"):
        open_checkpoint(folder)


def test_an_index_that_promises_too_much_is_refused(tiny_models, tmp_path):
    config, tensors = read_folder(tiny_models / "llama")
    folder = write_shards(tmp_path / "m", config, tensors, 2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="doesn't hold it, although"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", 3])
def test_an_index_can_not_lead_out_of_its_folder(tiny_models, tmp_path, file):
    config, tensors = read_folder(tiny_models / "llama")
    folder = write_shards(tmp_path / "m", config, tensors, 2)
    index = {"weight_map": {"model.norm.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight: names"):
        open_checkpoint(folder)


def test_pickles_are_not_read(tmp_path):
    folder = llama(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(WeightsError, match="pickles"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ("[1]", "must hold an object"),
        ('{"hidden_size": NaN}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": "\\ud800"}', "not valid JSON"),
    ],
)
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, text, reason):
    folder = llama(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=reason):
        open_checkpoint(folder)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(WeightsError, match="there is no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"neither config\.json .* nor octavo\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"not a \.gguf file"):
        open_checkpoint(tmp_path / "model.bin")


def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["", "@main", "@" + "c" * 40])
def test_a_hub_model_in_the_cache_opens_offline(tmp_path, monkeypatch, revision):
    model = hub_cache(tmp_path, monkeypatch) / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("c" * 40)
    (model / "snapshots").mkdir()
    folder = llama(model / "snapshots" / ("c" * 40))
    checkpoint = open_checkpoint(f"hf:org/name{revision}")
    assert checkpoint.folder == folder
    np.testing.assert_array_equal(
        checkpoint.read("final_norm.scale"), random_tensors(LLAMA)["model.norm.weight"]
    )


def test_what_the_tokenizer_reads_is_what_is_fetched_and_copied(tmp_path, monkeypatch):
    """Weights and text don't import each other, so the tokenizer is watched as it reads."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read_text, read = Path.read_text, set()

    def watched(self: Path, *args: Any, **kwargs: Any) -> str:
        read.add(self.name)
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", watched)
    Tokenizer.from_folder(tmp_path)
    assert "chat_template.json" in read
    assert read == set(TOKENIZER_FILES)
    assert set(hub.PATTERNS) >= read


def test_a_hub_model_that_is_not_cached_says_what_to_do_offline(tmp_path, monkeypatch):
    hub_cache(tmp_path, monkeypatch)
    with pytest.raises(WeightsError, match=r"hf:org/name: .*go online once, or copy"):
        open_checkpoint("hf:org/name")


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:a/b/c", "hf:../x", "hf:a/b@"])
def test_a_malformed_hub_name_is_refused(source):
    with pytest.raises(WeightsError, match=r"not of the form hf:org/name|Repo id must"):
        open_checkpoint(source)
