"""From a config to a warm runner: what is settled, what is refused, and in which order."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import backends, loading
from engine.backends import check_attention, describe, resolve_attention, resolve_products
from engine.config import Backend, ConfigError, MatmulConfig, MeshConfig, Quantization
from engine.config_file import from_tree
from engine.core.block_keys import child_key, root_key
from engine.core.limits import Limits
from engine.loading import load_engine, make_limits, use_compile_cache
from engine.reload import read_again
from engine.runtime.runner import Runner
from engine.sampling import MAX_STOP_TOKENS
from engine.text import TokenizerError
from engine.types import Domain
from engine.weights import WeightsError
from engine.weights.kv_scales import encode_scales
from pallas_kernels import native
from tests.runtime import tiny
from tests.weights.checkpoints import LLAMA, random_tensors, write_folder

# The tiny model, of the sizes that native products take.
NATIVE_ARCH = dataclasses.replace(tiny.ARCH, vocab_size=272)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


class Reached(Exception):
    """Loading came as far as the weights."""


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading stops before anything slow."""

    def load_params(*_: Any, **__: Any) -> Any:
        raise Reached

    monkeypatch.setattr(loading, "load_params", load_params)


def limits_of(
    *,
    weights: str = "weights",
    backend: Backend = "xla",
    scales: np.ndarray | None = None,
    **changes: Any,
) -> Limits:
    config = from_tree(tiny.config_tree(Path("x"), **changes))
    return make_limits(config, tiny.ARCH, weights, backend=backend, scales=scales)


def test_limits_come_from_the_config_and_the_model() -> None:
    limits = limits_of()
    assert (limits.num_blocks, limits.block_size) == (64, 16)
    assert (limits.max_num_seqs, limits.max_step_tokens, limits.max_waiting) == (8, 64, 64)
    assert limits.max_model_len == 512
    assert limits.prefix_reuse
    unlimited = {"model.max_model_len": None, "cache.num_blocks": 200}
    assert limits_of(**unlimited).max_model_len == 2048
    by_memory = {"cache.num_blocks": None, "cache.memory": "1MiB"}
    # A token takes K and V of 2 layers x 2 heads x 16 floats.
    assert limits_of(**by_memory).num_blocks == 2**20 // (16 * 2 * 2 * 2 * 16 * 4)
    assert limits_of(backend="tpu", **by_memory).num_blocks == 2**20 // (16 * 2 * 2 * 2 * 64 * 4)
    assert limits.host_blocks == 0
    on_host = {"cache.host_memory": "1MiB"}
    assert limits_of(**on_host).host_blocks == 2**20 // (16 * 2 * 2 * 2 * 16 * 4)
    assert limits_of(backend="tpu", **on_host).host_blocks == 2**20 // (16 * 2 * 2 * 2 * 64 * 4)


def test_where_hits_must_not_show_blocks_are_merged_instead_of_looked_up() -> None:
    limits = limits_of(**{"cache.observability": "constant"})
    assert (limits.prefix_reuse, limits.merge_blocks) == (False, True)
    assert not limits_of().merge_blocks


@pytest.mark.parametrize("also", [{"cache.prefix_reuse": False}, {"cache.host_memory": "1MiB"}])
def test_what_constant_observability_would_leave_without_effect_is_refused(also: Any) -> None:
    with pytest.raises(ConfigError, match="leave one of the two out"):
        limits_of(**also | {"cache.observability": "constant"})


def test_block_keys_tell_weights_dtypes_and_scales_apart() -> None:
    def first_key(fingerprint: str) -> bytes:
        return child_key(root_key(Domain(), fingerprint), range(16))

    variants = [
        limits_of(),
        limits_of(**{"model.dtype": "bfloat16"}),
        limits_of(**{"cache.dtype": "bfloat16"}),
        limits_of(**{"model.dtype": "bfloat16", "cache.dtype": "float32"}),
        limits_of(weights="other weights"),
        limits_of(**{"model.quantization": "int8"}),
        limits_of(**{"model.quantization": "int8", "model.dtype": "bfloat16"}),
        limits_of(**{"cache.dtype": "float8_e4m3fn"}),
        limits_of(scales=np.ones((2, 2, 2), np.float32), **{"cache.dtype": "float8_e4m3fn"}),
        limits_of(scales=np.ones((2, 2, 2), np.float32), **{"cache.dtype": "int8"}),
        limits_of(scales=np.full((2, 2, 2), 2, np.float32), **{"cache.dtype": "int8"}),
    ]
    assert len({first_key(limits.fingerprint) for limits in variants}) == len(variants) == 11
    assert limits_of(**{"cache.dtype": "float32"}).fingerprint == limits_of().fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.max_model_len": 4096}, "max_model_len is 4096, .* made for at most 2048 tokens"),
        ({"cache.num_blocks": 31}, "whole cache holds sequences of at most 497 tokens"),
        ({"cache.num_blocks": 2**29}, r"536870912 blocks, but of this model at most 536870911"),
    ],
)
def test_limits_beyond_the_model_or_the_device_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        limits_of(**changes)


def test_a_small_cache_limits_the_length_that_nobody_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = limits_of(**{"model.max_model_len": None})
    assert limits.max_model_len == 64 * 16 + 1  # the last token takes no place
    assert "sequences are limited to 1025 tokens" in caplog.text


def test_every_token_that_some_file_names_as_an_end_stops(folder: Path, no_weights: None) -> None:
    checkpoint = loading.open_checkpoint(folder)

    class Named:
        eos_token_ids = frozenset([tiny.TURN_END, tiny.EOS, tiny.VOCAB_SIZE, -3, 2**40, "x", True])

    ids = loading.eos_token_ids_of(checkpoint, Named())  # type: ignore[bad-argument-type]
    assert ids == (tiny.EOS, tiny.TURN_END)  # the main one first


def test_a_model_with_more_ends_than_fit_is_refused(folder: Path) -> None:
    class Named:
        eos_token_ids = frozenset(range(MAX_STOP_TOKENS + 1))

    with pytest.raises(ConfigError, match="name 18 end-of-sequence tokens, but at most 16"):
        loading.eos_token_ids_of(loading.open_checkpoint(folder), Named())  # type: ignore[bad-argument-type]


def test_what_is_wrong_with_the_files_shows_before_the_weights_are_read(
    folder: Path, tmp_path: Path, no_weights: None
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Reached):
        load_engine(from_tree(tiny.config_tree(copy)))
    stated = json.loads((copy / "config.json").read_text())
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"model.source": str(tmp_path / "none")}, WeightsError, "no such file or folder"),
        ({"model.max_model_len": 9999}, ConfigError, "at most 2048 tokens"),
        ({"mesh.tensor": 64}, ConfigError, "there are 4 devices"),
        (
            {"model.architecture": _as_tree(hidden_size=65)},
            ConfigError,
            r"architecture.hidden_size is 65 in the config, but 64 in the model's files",
        ),
    )
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            load_engine(from_tree(tiny.config_tree(copy, **changes)))
    with pytest.raises(Reached):
        load_engine(from_tree(tiny.config_tree(copy, **{"model.architecture": _as_tree()})))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        load_engine(from_tree(tiny.config_tree(copy)))
    (copy / "config.json").write_text(json.dumps(stated | {"hidden_size": 32}))
    with pytest.raises(WeightsError, match="has shape"):
        load_engine(from_tree(tiny.config_tree(copy)))


def _as_tree(**changes: Any) -> dict[str, Any]:
    names = tiny.ARCH.__dataclass_fields__
    tree = {name: getattr(tiny.ARCH, name) for name in names}
    return {**tree, **changes}


def test_a_pool_that_does_not_fit_into_memory_is_a_config_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runner(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(loading, "Runner", runner)
    with pytest.raises(ConfigError, match=r"64 blocks of 16 tokens doesn't fit .* lower cache"):
        load_engine(from_tree(tiny.config_tree(folder)))


def test_a_program_that_does_not_fit_into_memory_is_a_config_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warm_up(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(Runner, "warm_up", warm_up)
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM: 16G of 15G.\nSee https://openxla.org"
    expected = r"16G of 15G\.\); lower scheduler\.max_step_tokens or .*, or cache\.memory or"
    with pytest.raises(ConfigError, match=expected) as caught:
        load_engine(from_tree(tiny.config_tree(folder)))
    assert "\n" not in str(caught.value)
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        load_engine(from_tree(tiny.config_tree(folder)))


def test_weights_that_do_not_fit_into_memory_are_a_config_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_params(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(loading, "load_params", load_params)
    with pytest.raises(ConfigError, match=r"weights don't fit .* raise mesh\.tensor or"):
        load_engine(from_tree(tiny.config_tree(folder)))


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("gpu", {"cache.block_size": 8}, "'gpu': .*16, 32, 64, 128 or 256, not 8; .*xla"),
        ("gpu", {"model.dtype": "float32"}, "'gpu': .*bfloat16, .* or int8, not float32.*xla"),
        ("tpu", {"cache.block_size": 8}, "'tpu': .*blocks of 8 tokens.*16, 32, 64, 128.*xla"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_before_the_weights_are_read(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_weights: None,
    backend: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    devices = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v6 lite"}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(backends, "device_kind", lambda: devices[backend])
    good = {"model.dtype": "bfloat16", "cache.block_size": 16}
    with pytest.raises(Reached):
        load_engine(from_tree(tiny.config_tree(folder, **good)))
    with pytest.raises(ConfigError, match=message):
        load_engine(from_tree(tiny.config_tree(folder, **{**good, **changes})))


def test_xla_is_only_recommended_where_it_takes_what_was_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three query heads can't share two KV heads in any backend, but xla takes blocks of 8."""
    monkeypatch.setattr(backends, "device_kind", lambda: "TPU v6 lite")
    config = from_tree(tiny.config_tree(Path("x"), **{"cache.block_size": 8}))
    with pytest.raises(ConfigError, match=r"blocks of 8 tokens.*set attention.backend to xla"):
        check_attention(config, tiny.ARCH, "tpu")
    uneven = dataclasses.replace(tiny.ARCH)
    object.__setattr__(uneven, "num_heads", 3)  # an architecture itself refuses them
    for backend in ("tpu", "xla"):
        with pytest.raises(ConfigError, match="3 query heads can't share 2") as caught:
            check_attention(config, uneven, backend)
        assert "xla" not in str(caught.value)


def test_what_cache_scales_ask_for_is_settled_before_the_weights_are_read(
    folder: Path, tmp_path: Path, no_weights: None
) -> None:
    file = tmp_path / "scales.safetensors"
    cache = {"cache.dtype": "int8", "cache.scales": str(file)}
    with pytest.raises(ConfigError, match=f"cache.scales: {file}: there is no such file"):
        load_engine(from_tree(tiny.config_tree(folder, **cache)))
    file.write_bytes(encode_scales(np.ones((2, 2, 3), np.float32), "int8"))
    with pytest.raises(ConfigError, match=r"kv_scales is F32 \[2, 2, 3\], .* F32 \[2, 2, 2\]"):
        load_engine(from_tree(tiny.config_tree(folder, **cache)))
    file.write_bytes(encode_scales(np.ones((2, 2, 2), np.float32), "int8"))
    with pytest.raises(Reached):
        load_engine(from_tree(tiny.config_tree(folder, **cache)))
    with pytest.raises(ConfigError, match=r"int8, which needs cache\.scales"):
        load_engine(from_tree(tiny.config_tree(folder, **{"cache.dtype": "int8"})))


@pytest.mark.parametrize(
    ("asked", "platform", "kind", "shown"),
    [
        ("xla", "cpu", "cpu", "xla"),
        ("reference", "cpu", "cpu", "reference"),
        ("auto", "gpu", "NVIDIA H100 80GB HBM3", "gpu"),
        (
            "auto",
            "gpu",
            "NVIDIA A100-SXM4-80GB",
            "xla, as NVIDIA A100-SXM4-80GB is not a Hopper GPU",
        ),
        ("xla", "gpu", "NVIDIA A100-SXM4-80GB", "xla"),
        ("auto", "tpu", "TPU v6 lite", "tpu"),
    ],
)
def test_the_kernels_are_named_with_the_reason_where_it_may_surprise(
    monkeypatch: pytest.MonkeyPatch, asked: Backend, platform: str, kind: str, shown: str
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(backends, "device_kind", lambda: kind)
    config = from_tree(tiny.config_tree(Path("x"), **{"attention.backend": asked}))
    described = describe(resolve_attention(config), asked)
    assert described.startswith(shown)
    assert ("," in described) == ("," in shown)


def test_native_code_runs_on_a_cpu_that_takes_it_and_its_absence_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = from_tree(tiny.config_tree(Path("x"), **{"model.dtype": "bfloat16"}))
    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setattr(native, "instructions", lambda: "avx2")
    for resolved in (resolve_attention(config), resolve_products(config, NATIVE_ARCH)):
        assert resolved == ("cpu", "avx2", False)
        assert describe(resolved, "auto") == "cpu"
    wide = dataclasses.replace(config.model, dtype="float32")
    in_float32 = resolve_products(dataclasses.replace(config, model=wide), NATIVE_ARCH)
    assert describe(in_float32, "auto").startswith("xla, as native products are for models in")
    in_int8 = dataclasses.replace(
        config, model=dataclasses.replace(config.model, quantization="int8")
    )
    assert describe(resolve_products(in_int8, NATIVE_ARCH), "auto").startswith(
        "xla, as a matrix is"
    )
    even = dataclasses.replace(NATIVE_ARCH, intermediate_size=128)
    assert resolve_products(in_int8, even) == ("cpu", "avx2", False)
    split = dataclasses.replace(config, mesh=MeshConfig(tensor=2))
    over_two = describe(resolve_products(split, NATIVE_ARCH), "auto")
    assert over_two == "xla, as weights are split over 2 devices"
    monkeypatch.setattr(native, "unavailable", lambda: "native code was not compiled")
    for resolved in (resolve_attention(config), resolve_products(config, NATIVE_ARCH)):
        assert describe(resolved, "auto") == "xla, as native code was not compiled"
    forced = dataclasses.replace(config, matmul=MatmulConfig(backend="cpu"))
    with pytest.raises(ConfigError, match=r"matmul.backend: .*was not compiled; take auto, or xla"):
        resolve_products(forced, NATIVE_ARCH)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_products_on_an_accelerator_are_the_compiler_s_and_nothing_surprises(
    monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(backends, "device_kind", lambda: "TPU v6 lite")
    config = from_tree(tiny.config_tree(Path("x")))
    assert describe(resolve_products(config, tiny.ARCH), "auto") == "xla"
    forced = dataclasses.replace(config, matmul=MatmulConfig(backend="cpu"))
    with pytest.raises(ConfigError, match=f"matmul.backend: .*the device is a {platform}"):
        resolve_products(forced, tiny.ARCH)


def test_the_engine_says_which_kernels_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = tiny.config_tree(folder, **{"attention.backend": "xla", "matmul.backend": "xla"})
    with caplog.at_level(logging.INFO, "engine.loading"):
        loaded = load_engine(from_tree(tree))
    assert (loaded.attention, loaded.products) == ("xla", "xla")
    assert "attention xla (as asked for), products xla (as asked for) on cpu" in caplog.text
    assert "blocks of 16 tokens in float32" in caplog.text


def test_a_replica_of_more_chips_than_kv_heads_serves_the_model_s_own_architecture(
    folder: Path,
) -> None:
    loaded = load_engine(from_tree(tiny.config_tree(folder, **{"mesh.tensor": 4})))
    assert loaded.architecture == tiny.ARCH
    assert loaded.runner.kv_pool.shape == (2 * 64, 4, 16, 32)


@pytest.mark.parametrize(
    ("source", "name"),
    [("Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("Llama-3.2.gguf", "Llama-3.2"), ("a/b.c/", "b.c")],
)
def test_a_model_is_named_after_the_last_part_of_its_source(source: str, name: str) -> None:
    config = from_tree(tiny.config_tree(Path("x"), **{"model.source": source}))
    assert loading._name(config) == name
    given = from_tree(tiny.config_tree(Path("x"), **{"model.source": source, "model.name": "n"}))
    assert loading._name(given) == "n"


@pytest.fixture
def compile_cache(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Leaves jax's settings as they were."""
    yield
    use_compile_cache("")


def compile_something(constant: float) -> None:
    jax.jit(lambda x: x * constant)(jnp.ones(3)).block_until_ready()


def test_compiled_programs_are_kept_in_the_folder_that_is_named_last(
    tmp_path: Path, compile_cache: None
) -> None:
    for number, name in enumerate(("first/deep", "second")):
        use_compile_cache(str(tmp_path / name))
        compile_something(1.5 + number)
        files = [path.name for path in (tmp_path / name).iterdir()]
        assert any(name.endswith("-cache") for name in files)
        assert not any(name.startswith(".probe") for name in files)
    use_compile_cache("")
    before = sorted((tmp_path / "second").iterdir())
    compile_something(9.5)
    assert sorted((tmp_path / "second").iterdir()) == before


def test_a_folder_that_can_not_be_written_costs_a_warning_and_nothing_else(
    tmp_path: Path,
    compile_cache: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    cases = [(str(file), "File exists"), (str(file / "below"), "Not a directory")]
    if Path("/proc/self").exists():
        cases.append(("/proc/self/compiled", "No such file or directory"))
    cases.append(("~nobody-of-that-name/compiled", "home directory"))
    for number, (folder, reason) in enumerate(cases):
        caplog.clear()
        use_compile_cache(folder)
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert folder in record.getMessage()
        assert reason in record.getMessage()
        compile_something(20.5 + number)


def test_a_full_disk_is_noticed_and_left_clean(
    tmp_path: Path,
    compile_cache: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write_bytes(path, data[:10])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    use_compile_cache(str(tmp_path))
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []
    compile_something(30.5)


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_an_engine_on_native_code_packs_weights_when_it_loads_and_when_it_reloads(
    tmp_path: Path, is_tied: bool, quantization: Quantization
) -> None:
    config = LLAMA | {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": is_tied,
    }

    def write(name: str, seed: int) -> Path:
        folder = write_folder(tmp_path / name, config, random_tensors(config, seed))
        return tiny.write_tokenizer(folder)

    def load(folder: Path) -> loading.LoadedEngine:
        model = {"model.dtype": "bfloat16", "model.quantization": quantization}
        return load_engine(from_tree(tiny.config_tree(folder, **model)))

    served, other = load(write("served", 0)), load(write("other", 1))
    assert served.attention == "cpu"
    kernel = "embed.weight" if is_tied else "lm_head.kernel"
    packed = (17, 16, 16, 4) if quantization == "int8" else (17, 32, 16, 2)
    assert served.runner.weights[kernel].shape == packed
    assert (f"{kernel}_scale" in served.runner.weights) == (quantization == "int8")
    assert served.products == ("cpu, with weights in int8" if quantization == "int8" else "cpu")
    assert read_again(served) is None
    write("served", 1)
    ready = read_again(served)
    assert ready is not None
    assert ready.fingerprint == other.weights_fingerprint
    assert ready.limits.fingerprint == other.limits.fingerprint
    assert ready.weights.keys() == served.runner.weights.keys()
    for name, array in ready.weights.items():
        np.testing.assert_array_equal(
            np.asarray(array, np.float32), np.asarray(other.runner.weights[name], np.float32)
        )
        assert array.sharding == served.runner.weights[name].sharding
