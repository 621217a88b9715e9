"""The arithmetic of `octavo plan`, against published figures, real files and brute force."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open

from engine import memory_plan
from engine.config import Architecture, Config, ConfigError, ModelConfig
from engine.config_file import from_tree, load
from engine.memory_plan import kv_bytes_per_token, num_parameters, plan
from engine.plan_tables import render
from engine.plan_weights import weights
from tests.architectures import CONFIGS, LLAMA_8B, LLAMA_70B, QWEN3_8B, SMOLLM2_135M

GIB = 2**30


def _config(**sections: Any) -> Config:
    return from_tree({"model": {"source": "hf:org/name"}, "cache": {"num_blocks": 64}, **sections})


def _tiny(folder: Path) -> Architecture:
    """The architecture of a checkpoint, by its own config.json."""
    raw = json.loads((folder / "config.json").read_text())
    return Architecture(
        family=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        max_position=raw["max_position_embeddings"],
        rope_theta=raw["rope_parameters"]["rope_theta"],
        tie_embeddings=raw["tie_word_embeddings"],
        qkv_bias=raw["model_type"] == "qwen2",
        qk_norm=raw["model_type"] == "qwen3",
    )


@pytest.mark.parametrize("name", ["llama", "llama3_rope", "llama_tied", "qwen2", "qwen3"])
def test_parameters_are_those_in_the_checkpoint_tensor_by_tensor(
    name: str, tiny_models: Path
) -> None:
    counts: dict[str, int] = {}
    with safe_open(tiny_models / name / "model.safetensors", "numpy") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            *_, module, leaf = key.split(".")
            kind = module if leaf == "weight" else f"{module}.{leaf}"
            size = math.prod(file.get_slice(key).get_shape())
            counts[kind] = counts.get(kind, 0) + size
    planned = {w.name: w.num_parameters for w in weights(_tiny(tiny_models / name))}
    assert planned == counts


@pytest.mark.parametrize(
    ("architecture", "published"),
    [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496), (QWEN3_8B, 8_190_735_360)],
    ids=["llama-8b", "llama-70b", "qwen3-8b"],
)
def test_parameters_are_those_that_the_model_card_gives(
    architecture: Architecture, published: int
) -> None:
    assert num_parameters(architecture) == published


def test_parameters_of_smollm2_are_those_in_its_gguf(smollm2_gguf: Path) -> None:
    in_file = sum(math.prod(shape) for shape in _gguf_shapes(smollm2_gguf))
    assert num_parameters(SMOLLM2_135M) == in_file == 134_515_008


@pytest.mark.parametrize(
    ("architecture", "kibibytes"), [(LLAMA_8B, 128), (LLAMA_70B, 320), (QWEN3_8B, 144)]
)
def test_a_token_takes_the_published_bytes_of_cache(
    architecture: Architecture, kibibytes: int
) -> None:
    assert kv_bytes_per_token(architecture, "bfloat16") == kibibytes * 1024
    assert kv_bytes_per_token(architecture, "float32") == 2 * kibibytes * 1024


def test_chips_beyond_the_kv_heads_hold_copies_of_them() -> None:
    made = plan(_config(mesh={"tensor": 16}), LLAMA_8B)
    assert made.kv_copies == 2
    assert made.kv_bytes_per_token_per_chip == 128 * 1024 // 8
    assert plan(_config(mesh={"tensor": 8}), LLAMA_8B).kv_bytes_per_token_per_chip == 16 * 1024


def test_a_cache_of_8_bits_takes_half_the_bytes_of_bfloat16() -> None:
    for dtype in ("int8", "float8_e4m3fn"):
        made = plan(_config(cache={"memory": "1GiB", "dtype": dtype}), LLAMA_8B)
        assert made.kv_bytes_per_token == 64 * 1024
        assert made.config_blocks == 1024


def test_padded_heads_are_counted_and_shown() -> None:
    """Head dim 80: the TPU's kernels take 128, the GPU's too, and `auto` may be either."""
    arch = dataclasses.replace(LLAMA_8B, head_dim=80)
    for backend, width in (("auto", 128), ("tpu", 128), ("gpu", 128), ("xla", 80)):
        config = _config(cache={"memory": "1GiB"}, attention={"backend": backend})
        made = plan(config, arch)
        assert made.kv_bytes_per_token == 2 * 32 * 8 * 80 * 2
        assert made.kv_bytes_per_token_per_chip == 2 * 32 * 8 * width * 2
        assert made.config_blocks == 2**30 // (16 * made.kv_bytes_per_token_per_chip)
        words = " ".join(_shown(made).split())
        assert ("padded from 80 to 128" in words) == (width == 128)


def test_cut_weights_add_up_to_the_whole_and_the_copies() -> None:
    eight = plan(_config(mesh={"tensor": 8}), LLAMA_8B)
    norms = (2 * 32 + 1) * 4096  # parameters that every chip holds
    assert 8 * eight.weight_bytes_per_chip == eight.weight_bytes + 7 * norms * 2
    sixteen = plan(_config(mesh={"tensor": 16}), LLAMA_8B)
    keys_and_values = 2 * 32 * 4096 * 8 * 128  # held twice by sixteen chips
    copies = 15 * norms + keys_and_values
    assert 16 * sixteen.weight_bytes_per_chip == sixteen.weight_bytes + copies * 2


def test_a_vocabulary_that_does_not_divide_is_counted_with_its_padding() -> None:
    odd = Architecture(
        family="llama",
        vocab_size=101,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=2,
        max_position=64,
        rope_theta=1e4,
    )
    embedding = weights(odd)[0]
    assert embedding.bytes_per_chip(ModelConfig(source="x"), 4) == 2 * 26 * 8


def test_the_sampler_s_state_has_a_sink_and_is_whole_on_every_chip() -> None:
    for tensor in (1, 8):
        config = _config(scheduler={"max_num_seqs": 255}, mesh={"tensor": tensor})
        assert plan(config, LLAMA_8B).sampler_bytes_per_chip == 256 * 128_256 * 9


def test_cache_memory_is_over_all_chips_of_a_replica() -> None:
    # 1 GiB at 16 tokens x 128 KiB a block, wherever the heads are cut, unless they're copied.
    for mesh, blocks in (({"tensor": 1}, 512), ({"tensor": 8}, 512), ({"tensor": 16}, 256)):
        config = _config(cache={"memory": "1GiB"}, mesh=mesh)
        assert memory_plan.config_blocks(config, LLAMA_8B) == blocks


def test_a_cache_smaller_than_a_block_is_refused() -> None:
    config = _config(cache={"memory": "1MiB"})
    with pytest.raises(ConfigError, match=r"is 1048576 bytes, but one block .* takes 2097152"):
        plan(config, LLAMA_8B)


def test_the_cache_dtype_counts_where_it_differs_from_the_model_s() -> None:
    config = _config(cache={"num_blocks": 8, "dtype": "float32"})
    made = plan(config, LLAMA_8B)
    assert (made.dtype, made.cache_dtype) == ("bfloat16", "float32")
    assert made.block_bytes_per_chip == 16 * 256 * 1024


def test_what_fits_in_a_chip_fits_and_one_block_more_does_not() -> None:
    config = _config(mesh={"tensor": 8})
    made = plan(config, LLAMA_8B, hbm=16 * GIB)
    used = made.weight_bytes_per_chip + made.sampler_bytes_per_chip + made.headroom_bytes_per_chip
    assert made.headroom_bytes_per_chip == int(1.6 * GIB)
    assert used + made.num_blocks * made.block_bytes_per_chip <= 16 * GIB
    assert used + (made.num_blocks + 1) * made.block_bytes_per_chip > 16 * GIB
    assert made.num_tokens == 16 * made.num_blocks


def test_weights_that_do_not_fit_say_by_how_much() -> None:
    made = plan(_config(mesh={"tensor": 8}), LLAMA_70B, hbm=16 * GIB)
    assert not made.fits
    assert made.num_blocks == 0
    missing = (
        made.weight_bytes_per_chip
        + made.sampler_bytes_per_chip
        + made.headroom_bytes_per_chip
        + made.block_bytes_per_chip
        - 16 * GIB
    )
    assert f"{missing / GIB:.2f} GiB more than its 16.00 GiB" in made.problems[0]
    assert "raise mesh.tensor" in made.problems[0]


def test_a_pool_that_does_not_fit_says_by_how_much_and_what_would() -> None:
    config = _config(cache={"memory": "120GiB"}, mesh={"tensor": 8})
    made = plan(config, LLAMA_8B, hbm=16 * GIB)
    assert made.available_bytes_per_chip is not None
    over = made.config_pool_bytes_per_chip - made.available_bytes_per_chip
    assert made.problems == (
        f"the config's pool of 61440 blocks takes 15.00 GiB a chip, {over / GIB:.2f} GiB more "
        f"than is left; ask for at most {made.num_blocks} blocks",
    )


def test_a_pool_too_small_for_one_sequence_is_a_problem() -> None:
    config = _config(model={"source": "hf:org/name", "max_model_len": 4096})
    (problem,) = plan(config, LLAMA_8B).problems
    assert "holds 1024 tokens, 3072 too few" in problem


def test_sequences_that_fit_are_those_a_loop_can_place() -> None:
    config = _config(
        model={"source": "hf:org/name", "max_model_len": 100}, cache={"num_blocks": 41}
    )
    made = plan(config, LLAMA_8B, lengths=(1, 16, 17, 64, 99), mean_length=30)
    assert [fit.length for fit in made.lengths] == [1, 16, 17, 64, 99, 100]
    for fit in made.lengths:
        free, placed = 41, 0
        while free * 16 >= fit.length:
            free -= math.ceil(fit.length / 16)
            placed += free >= 0
        assert fit.paged == placed
        assert fit.contiguous == 41 * 16 // 100
    # Mean 30: uniformly placed ends waste 7.5 tokens of a 16-token block.
    assert made.paged_at_mean == math.floor(41 * 16 / 37.5)


@settings(deadline=None)
@given(
    blocks=st.integers(1, 5000),
    block_size=st.sampled_from([8, 16, 64]),
    limit=st.integers(1, 20_000),
    length=st.integers(1, 20_000),
)
def test_paged_never_holds_fewer_than_contiguous_of_whole_blocks(
    blocks: int, block_size: int, limit: int, length: int
) -> None:
    config = _config(
        model={"source": "hf:org/name", "max_model_len": limit},
        cache={"num_blocks": blocks, "block_size": block_size},
    )
    made = plan(config, LLAMA_8B, lengths=(min(length, limit),))
    for fit in made.lengths:
        assert fit.paged * fit.length <= made.num_tokens
        assert fit.paged >= blocks // math.ceil(limit / block_size)


def test_an_unknown_architecture_says_what_it_takes() -> None:
    with pytest.raises(ConfigError, match="state the architecture"):
        plan(_config())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (3, "which can't cut 32 query heads evenly"),
        (64, "which can't cut 32 query heads evenly"),
    ],
)
def test_a_mesh_that_does_not_divide_the_heads_is_refused(tensor: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(_config(mesh={"tensor": tensor}), LLAMA_8B)


def test_kv_heads_must_divide_or_be_divided() -> None:
    uneven = dataclasses.replace(LLAMA_8B, num_heads=36, num_kv_heads=6, intermediate_size=16)
    with pytest.raises(ConfigError, match="neither divides 6 KV heads nor is a multiple"):
        plan(_config(mesh={"tensor": 4}), uneven)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hbm": 0}, "such as 16GiB"),
        ({"hbm": GIB, "headroom": 1.0}, "from 0 to below 1"),
        ({"hbm": GIB, "headroom": -0.1}, "from 0 to below 1"),
        ({"lengths": (0,)}, "must be at least 1"),
        ({"mean_length": 0}, "must be at least 1"),
        ({"mean_length": 200_000}, "no sequence is longer than 131072"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(_config(), LLAMA_8B, **arguments)


def test_the_json_has_every_field_and_reads_back() -> None:
    made = plan(_config(mesh={"tensor": 8}), LLAMA_8B, hbm=16 * GIB)
    tree = json.loads(made.as_json())
    assert tree["kv_bytes_per_token"] == 128 * 1024
    assert tree["lengths"][0] == {
        "length": 128,
        "blocks": 8,
        "paged": made.lengths[0].paged,
        "contiguous": made.lengths[0].contiguous,
    }
    assert tree["fits"] is False  # 64 blocks don't hold a sequence of 131072 tokens
    assert set(type(made).__dataclass_fields__) | {"fits"} == set(tree)


def _shown(made: memory_plan.MemoryPlan) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render(made))
    return console.export_text()


def test_the_tables_show_both_allocators_and_whether_the_pool_fits() -> None:
    made = plan(load(CONFIGS / "llama3-8b-v5e-8.yaml"), hbm=16 * GIB)
    shown = _shown(made)
    assert (
        "8,030,261,248 parameters in bfloat16, cache in bfloat16, attention auto, 8 chips" in shown
    )
    assert "128.00 KiB in the model" in shown
    assert "what fits in 16.00 GiB: 6,273 blocks, 802,944 tokens" in shown
    words = [line.split() for line in shown.splitlines()]
    assert ["512", "4", "1,568", "24", "65.3x"] in words
    assert "pool of 6,144 blocks fits and leaves" in shown
    assert "does not fit" not in shown


def test_the_tables_show_the_problems_of_a_plan() -> None:
    made = plan(_config(mesh={"tensor": 8}), LLAMA_70B, hbm=16 * GIB)
    shown = _shown(made)
    assert shown.count("does not fit:") == len(made.problems) == 2
    assert "fits and leaves" not in shown


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (-GIB, "-1.00 GiB"),
        (3 * 2**40, "3.00 TiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_below_them(count: int, text: str) -> None:
    assert memory_plan.format_bytes(count) == text


def _gguf_shapes(path: Path) -> list[tuple[int, ...]]:
    """Shapes of a GGUF file's tensors, read apart from the engine's own reader."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    with path.open("rb") as file:

        def number(code: str) -> int:
            return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]

        def skip_value(kind: int) -> None:
            if kind == 8:  # a string
                file.seek(number("Q"), 1)
            elif kind == 9:  # an array
                inner, count = number("I"), number("Q")
                for _ in range(count):
                    skip_value(inner)
            else:
                file.seek(widths[kind], 1)

        assert file.read(4) == b"GGUF"
        assert number("I") == 3
        num_tensors, num_keys = number("Q"), number("Q")
        for _ in range(num_keys):
            file.seek(number("Q"), 1)
            skip_value(number("I"))
        shapes = []
        for _ in range(num_tensors):
            file.seek(number("Q"), 1)
            shapes.append(tuple(number("Q") for _ in range(number("I"))))
            file.seek(12, 1)  # type and offset
        return shapes
