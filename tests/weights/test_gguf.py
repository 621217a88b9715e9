"""GGUF files: what is read, dequantised and un-permuted, and what is refused and why."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from engine.config import Architecture
from engine.weights import WeightsError, native_shapes, open_checkpoint
from tests.conftest import TINY_MODELS
from tests.weights.checkpoints import (
    LLAMA,
    native,
    random_tensors,
    read_all,
    read_folder,
    write_folder,
    write_gguf,
)

# Every row is whole blocks of every type (256 values at most).
WIDE = LLAMA | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
QUANTISED = ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
READ_ONLY = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")
READ_ONLY += ("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")


@pytest.mark.parametrize("model", TINY_MODELS)
def test_a_gguf_file_gives_the_native_parameters_of_the_safetensors(tiny_models, tmp_path, model):
    config, tensors = read_folder(tiny_models / model)
    metadata = {}
    if model == "llama3_rope":
        # Four frequencies are too few to tell its context from others with the same factors.
        metadata["llama.rope.scaling.original_context_length"] = 64
    path = write_gguf(tmp_path / "m.gguf", config, tensors, metadata=metadata)
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == open_checkpoint(tiny_models / model).architecture
    expected = native(tensors, config["num_hidden_layers"])
    found = read_all(checkpoint)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_q_and_k_of_a_llama_are_permuted_in_the_file_so_the_test_above_can_fail(tmp_path):
    tensors = random_tensors(LLAMA)
    path = write_gguf(tmp_path / "m.gguf", LLAMA, tensors)
    stored = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    for p in "qk":
        expected = tensors[f"model.layers.0.self_attn.{p}_proj.weight"]
        assert not np.array_equal(stored[f"blk.0.attn_{p}.weight"], expected)


def test_biases_of_a_llama_are_permuted_like_their_rows(tmp_path):
    rng = np.random.default_rng(1)
    sizes = {"q": 32, "k": 16, "v": 16}
    biases = {
        f"model.layers.{layer}.self_attn.{p}_proj.bias": rng.standard_normal(n, np.float32)
        for layer in range(2)
        for p, n in sizes.items()
    }
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA) | biases)
    )
    assert checkpoint.architecture.qkv_bias
    for p in sizes:
        np.testing.assert_array_equal(
            checkpoint.read(f"layers.{p}_proj.bias", 1),
            biases[f"model.layers.1.self_attn.{p}_proj.bias"],
        )


def test_smollm2_opens_with_the_architecture_it_has(smollm2_gguf):
    checkpoint = open_checkpoint(smollm2_gguf)
    assert checkpoint.architecture == Architecture(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position=8192,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
    )
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id) == ((2,), 1)
    assert checkpoint.folder is None
    assert checkpoint.metadata is not None
    assert checkpoint.metadata["tokenizer.ggml.tokens"][2] == "<|im_end|>"
    assert len(checkpoint.metadata["tokenizer.ggml.merges"]) == 48900


def test_smollm2_tensors_equal_what_the_gguf_package_reads(smollm2_gguf):
    checkpoint = open_checkpoint(smollm2_gguf)
    wanted = {"blk.7.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"}
    reader = gguf.GGUFReader(smollm2_gguf)
    stored = {
        t.name: quants.dequantize(t.data, t.tensor_type) for t in reader.tensors if t.name in wanted
    }
    # Interleaved rotary pairs in the file: row 2i is i, row 2i + 1 is half a head further.
    rows = stored["blk.7.attn_q.weight"].reshape(9, 32, 2, 576)
    query = np.concatenate([rows[:, :, 0], rows[:, :, 1]], axis=1).reshape(576, 576)
    np.testing.assert_array_equal(checkpoint.read("layers.q_proj.kernel", 7), query.T)
    np.testing.assert_array_equal(
        checkpoint.read("layers.down_proj.kernel", 29), stored["blk.29.ffn_down.weight"].T
    )
    np.testing.assert_array_equal(checkpoint.read("final_norm.scale"), stored["output_norm.weight"])


@pytest.mark.parametrize("quant", ["F32", "F16", *QUANTISED])
def test_each_type_that_can_be_quantised_is_read_back(tmp_path, quant):
    kind = GGMLQuantizationType[quant]
    tensors = random_tensors(WIDE)
    path = write_gguf(tmp_path / "m.gguf", WIDE, tensors, kind)
    rounded = {
        name: quants.dequantize(quants.quantize(values, kind), kind) if values.ndim > 1 else values
        for name, values in tensors.items()
    }
    found = read_all(open_checkpoint(path))
    for name, values in native(rounded, 1).items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("quant", READ_ONLY)
def test_each_type_that_can_only_be_read_equals_the_package_row_by_row(tmp_path, quant):
    kind = GGMLQuantizationType[quant]
    values, num_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(2).integers(0, 256, (16, 256 // values * num_bytes), np.uint8)
    tensors = random_tensors(WIDE)
    path = write_gguf(
        tmp_path / "m.gguf", WIDE, tensors, replace={"token_embd.weight": (raw, kind)}
    )
    with np.errstate(all="ignore"):  # random scales overflow
        expected = np.concatenate([quants.dequantize(row[None], kind) for row in raw])
    checkpoint = open_checkpoint(path)
    np.testing.assert_array_equal(checkpoint.read("embed.weight"), expected)
    part = checkpoint.read("embed.weight", None, (slice(3, 9), slice(10, 200)))
    np.testing.assert_array_equal(part, expected[3:9, 10:200])


@pytest.mark.parametrize("quant", ["Q8_K", "I8", "F64"])
def test_a_type_that_can_not_be_dequantised_is_named_with_its_tensor(tmp_path, quant):
    kind = GGMLQuantizationType[quant]
    values, num_bytes = GGML_QUANT_SIZES[kind]
    raw = np.zeros((16, 256 // values * num_bytes), np.uint8)
    path = write_gguf(
        tmp_path / "m.gguf", WIDE, random_tensors(WIDE), replace={"token_embd.weight": (raw, kind)}
    )
    with pytest.raises(WeightsError, match=f"token_embd.weight: has the type {quant}"):
        open_checkpoint(path)


@pytest.mark.parametrize("file_format", ["gguf", "safetensors"])
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_a_part_of_a_tensor_is_the_same_part_of_the_whole(
    tiny_models, tmp_path, model, file_format
):
    source = tiny_models / model
    if file_format == "gguf":
        source = write_gguf(tmp_path / "m.gguf", *read_folder(source))
    checkpoint = open_checkpoint(source)
    for name, shape in native_shapes(checkpoint.architecture).items():
        layer, shape = (1, shape[1:]) if name.startswith("layers.") else (None, shape)
        whole = checkpoint.read(name, layer)
        index = tuple(slice(size // 4, size // 2 + 1) for size in shape)
        np.testing.assert_array_equal(checkpoint.read(name, layer, index), whole[index], name)


@pytest.mark.parametrize(
    ("factor", "context", "head_dim", "theta"),
    [
        (8.0, 8192, 128, 5e5),  # Llama 3.1 and 3.3
        (32.0, 8192, 64, 5e5),  # Llama 3.2 1B
        (32.0, 8192, 128, 5e5),  # Llama 3.2 3B
        (8.0, 4096, 128, 1e6),
    ],
)
def test_llama3_rope_scaling_is_recovered_from_its_factors(
    tmp_path, factor, context, head_dim, theta
):
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
    config = LLAMA | {"head_dim": head_dim, "rope_parameters": rope}
    tensors = random_tensors(config)
    found = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors)).architecture
    expected = open_checkpoint(write_folder(tmp_path / "m", config, tensors)).architecture
    assert found.rope_scaling == expected.rope_scaling
    assert found == expected


@pytest.mark.parametrize("low_high", [(1.0, 8.0), (2.0, 4.0)])
def test_rope_factors_of_another_scaling_are_refused(tmp_path, low_high):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    rope |= {"low_freq_factor": low_high[0], "high_freq_factor": low_high[1]}
    rope |= {"original_max_position_embeddings": 8192}
    config = LLAMA | {"head_dim": 128, "rope_parameters": rope}
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    with pytest.raises(WeightsError, match=r"rope_freqs\.weight: the rope factors are not"):
        open_checkpoint(path)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_rope_factors_that_make_no_sense_are_refused(tmp_path, bad):
    extra = {"rope_freqs.weight": np.full(8, bad, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA) | extra)
    with pytest.raises(WeightsError, match=r"rope_freqs\.weight"):
        open_checkpoint(path)


def test_rope_factors_of_one_are_no_scaling(tmp_path):
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA) | extra)
    assert open_checkpoint(path).architecture.rope_scaling is None


def test_end_tokens_that_gguf_has_no_key_for_are_found_by_name(tmp_path):
    tokens = [f"<{i}>" for i in range(13)] + ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.eos_token_id": 15,
    }
    path = write_gguf(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA), metadata=metadata)
    assert open_checkpoint(path).eos_token_ids == (15, 13, 14)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"general.architecture": "gemma3"}, r"'gemma3'; this engine has llama, qwen2, qwen3"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8; only 0"),
        ({"llama.attention.sliding_window": 32}, r"sliding_window is 32"),
        ({"llama.attention.causal": False}, r"attention\.causal is False"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type is 'yarn'"),
        ({"llama.rope.scaling.factor": 2.0}, r"rope\.scaling\.factor is 2\.0"),
        ({"llama.rope.dimension_count": 8}, "partial rotary positions"),
        ({"llama.attention.value_length": 8}, r"attention\.value_length is 8"),
        ({"llama.attention.head_count": [2, 2]}, r"head_count is \[2, 2\]; one whole number"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.key_length": 15}, "15"),
        ({"llama.embedding_length": 64}, r"token_embd\.weight: has shape"),
        ({"llama.context_length": "long"}, r"context_length is 'long'"),
        ({"llama.rope.freq_base": -1.0}, r"freq_base is -1\.0; a positive number"),
        ({"llama.rope.freq_base": float("nan")}, r"freq_base is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "epsilon is 0"),
        ({"llama.block_count": 2**31 - 1}, r"blk\.2\.attn_norm\.weight: is missing"),
        ({"llama.block_count": 1}, r"blk\.1\.\w+\.weight: is not part of"),
        ({"tokenizer.ggml.eos_token_id": 16}, "eos_token_id is 16, but the vocabulary has 16"),
        ({"general.alignment": 3}, r"general\.alignment is 3"),
    ],
)
def test_metadata_of_another_model_are_refused_by_key_and_value(tmp_path, metadata, reason):
    path = write_gguf(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA), metadata=metadata)
    with pytest.raises(WeightsError, match=reason):
        open_checkpoint(path)


def test_an_extra_bias_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path):
    tensors = random_tensors(LLAMA)
    bias = {"model.layers.1.self_attn.o_proj.bias": np.ones(32, np.float32)}
    with pytest.raises(WeightsError, match=r"blk\.1\.attn_output\.bias: is not part of"):
        open_checkpoint(write_gguf(tmp_path / "bias.gguf", LLAMA, tensors | bias))
    missing = {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(WeightsError, match=r"blk\.1\.ffn_up\.weight: is missing"):
        open_checkpoint(write_gguf(tmp_path / "missing.gguf", LLAMA, missing))
    wrong = {"model.layers.0.mlp.up_proj.weight": np.ones((32, 48), np.float32)}
    with pytest.raises(WeightsError, match=r"blk\.0\.ffn_up\.weight: has shape \[32, 48\]"):
        open_checkpoint(write_gguf(tmp_path / "wrong.gguf", LLAMA, tensors | wrong))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(num_tensors: int = 0, num_metadata: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_metadata)


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    fields = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return text(name) + fields


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"GG", "not a GGUF file"),
        (b"\x00" * 64, "not a GGUF file"),
        (b"GGUF", "the version needs 4 bytes"),
        (header(version=1), "GGUF version 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        (header(num_tensors=2**63), "the number of tensors is 9223372036854775808"),
        (header(num_tensors=2**20), r"the number of tensors is 1048576, more than fit"),
        (header(num_metadata=2**16), "metadata entries is 65536, more than fit"),
        (header(num_metadata=1) + struct.pack("<Q", 2**62) + b"x" * 64, "needs 46116860184273879"),
        (header(num_metadata=1) + text("k") + struct.pack("<I", 13) + b"x" * 8, "value type 13"),
        (
            header(num_metadata=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**24),
            "length of metadata k is 16777216, more than fit",
        ),
        (
            header(num_metadata=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**60),
            "above the limit of 16777216",
        ),
        (
            header(num_metadata=1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 2**50) + b"x" * 9,
            "metadata k needs 1125899906842624 bytes",
        ),
        (
            header(num_metadata=1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + b"x" * 99,
            "array of arrays",
        ),
        (
            header(num_metadata=2) + 2 * (text("k") + struct.pack("<I?", 7, True)),
            "metadata key k is there twice",
        ),
        (
            header(num_metadata=1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<I?", 7, True),
            "not UTF-8",
        ),
        (header(1) + tensor("t", (1,) * 5, 0, 0), "t: has 5 dimensions"),
        (header(1) + tensor("t", (), 0, 0) + b"x" * 16, "t: has 0 dimensions"),
        (header(1) + tensor("t", (4, 0), 0, 0), r"t: has shape \[0, 4\]"),
        (header(1) + tensor("t", (33,), 8, 0), "rows of Q8_0 come in blocks of 32"),
        (header(1) + tensor("t", (32,), 77, 0), "the type number 77"),
        (header(1) + tensor("t", (2**62, 2**62), 0, 0), "t: needs bytes"),
        (header(1) + tensor("t", (8,), 0, 2**64 - 32) + b"x" * 99, "t: needs bytes"),
        (header(1) + tensor("t", (8,), 0, 8) + b"x" * 99, "not a multiple of the file's alignment"),
        (
            header(2) + tensor("t", (8,), 0, 0) + tensor("u", (8,), 0, 0) + b"x" * 99,
            "u: overlaps",
        ),
        (
            header(2) + tensor("t", (8,), 0, 0) + tensor("t", (8,), 0, 32) + b"x" * 99,
            "t: is in the index twice",
        ),
    ],
)
def test_a_corrupt_index_is_refused_with_the_reason(tmp_path, content, reason):
    path = Path(tmp_path / "m.gguf")
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=reason) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_fingerprint_follows_metadata_and_weights_and_not_the_folder(tmp_path):
    tensors = random_tensors(LLAMA)
    paths = []
    for place, config, weights in [
        ("a", LLAMA, tensors),
        ("b", LLAMA, tensors),
        ("c", LLAMA | {"rope_theta": 20000.0}, tensors),
        ("d", LLAMA, random_tensors(LLAMA, seed=1)),
    ]:
        (tmp_path / place).mkdir()
        paths.append(write_gguf(tmp_path / place / "m.gguf", config, weights))
    prints = [open_checkpoint(path).fingerprint for path in paths]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_metadata_survive_a_trip_through_json(smollm2_gguf):
    metadata = open_checkpoint(smollm2_gguf).metadata
    assert json.loads(json.dumps(metadata)) == metadata
