"""Octavo's own checkpoints: complete in themselves, written whole or not at all."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from engine.config import Dtype
from engine.weights import (
    WeightsError,
    convert,
    load_params,
    native,
    native_shapes,
    open_checkpoint,
    save,
    with_kv_copies,
)
from tests.weights.checkpoints import LLAMA, random_tensors, read_all, write_folder, write_gguf


def abstract(checkpoint: Any, dtype: str = "float32") -> dict[str, jax.ShapeDtypeStruct]:
    shapes = native_shapes(checkpoint.architecture)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder with a tokenizer's files."""
    path = write_folder(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    (path / "tokenizer.json").write_text('{"model": {}}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    (path / "README.md").write_text("not needed")
    return path


@pytest.fixture
def converted(folder, tmp_path) -> Path:
    convert(folder, tmp_path / "native", "float32")
    return tmp_path / "native"


def test_a_converted_folder_has_all_that_the_source_had(folder, converted):
    source, checkpoint = open_checkpoint(folder), open_checkpoint(converted)
    assert checkpoint.format == "octavo"
    assert checkpoint.architecture == source.architecture
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id) == ((7, 5), 1)
    assert (checkpoint.folder, checkpoint.metadata) == (converted, None)
    templates = ("chat_template.jinja", "chat_template.json")
    for name in ("tokenizer.json", "generation_config.json", *templates):
        assert (converted / name).read_bytes() == (folder / name).read_bytes()
    assert not (converted / "README.md").exists()
    shutil.rmtree(folder)  # it doesn't need its source any more
    assert read_all(open_checkpoint(converted)).keys() == native_shapes(source.architecture).keys()


def test_a_converted_gguf_file_brings_its_tokenizer_along(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA))
    convert(source, tmp_path / "native")
    checkpoint, gguf = open_checkpoint(tmp_path / "native"), open_checkpoint(source)
    assert checkpoint.folder is None
    assert checkpoint.metadata is not None
    assert gguf.metadata is not None
    assert checkpoint.metadata == {
        key: value for key, value in gguf.metadata.items() if key.startswith("tokenizer.")
    }
    assert checkpoint.eos_token_ids == gguf.eos_token_ids == (2,)


def test_single_reads_equal_the_source_and_its_parts(folder, converted):
    source, checkpoint = open_checkpoint(folder), open_checkpoint(converted)
    expected, found = read_all(source), read_all(checkpoint)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    index = (slice(3, 9), slice(1, 5))
    np.testing.assert_array_equal(
        checkpoint.read("layers.k_proj.kernel", 1, index),
        source.read("layers.k_proj.kernel", 1, index),
    )


def test_only_repeated_heads_need_the_cpu_as_a_jax_device(converted, monkeypatch):
    """JAX_PLATFORMS=tpu leaves it out, and then jax raises what is raised here."""

    def only_tpus(*, backend: str) -> Any:
        raise RuntimeError(f"Unknown backend {backend}")

    checkpoint = open_checkpoint(converted)
    expected = read_all(checkpoint)
    monkeypatch.setattr(jax, "local_devices", only_tpus)
    params = load_params(checkpoint, abstract(checkpoint))
    for name, values in params.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    twice = native_shapes(with_kv_copies(checkpoint.architecture, 2))
    wanted = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in twice.items()}
    for load in (
        lambda: load_params(checkpoint, wanted, kv_copies=2),
        lambda: checkpoint.read("final_norm.scale"),
    ):
        with pytest.raises(WeightsError, match=r"add cpu to JAX_PLATFORMS, such as tpu,cpu"):
            load()


def test_the_dtype_written_is_the_one_asked_for(folder, tmp_path):
    convert(folder, tmp_path / "native", "bfloat16")
    assert open_checkpoint(tmp_path / "native").read("final_norm.scale").dtype == "bfloat16"


def test_progress_of_a_conversion_ends_at_its_total(folder, tmp_path):
    calls: list[tuple[int, int]] = []
    convert(folder, tmp_path / "native", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 0


def test_equal_parameters_have_equal_fingerprints_wherever_they_came_from(folder, tmp_path):
    gguf = write_gguf(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA))
    other = write_folder(tmp_path / "other", LLAMA, random_tensors(LLAMA, seed=1))
    prints = []
    cases: list[tuple[Path, Dtype]] = [
        (folder, "float32"),
        (gguf, "float32"),
        (folder, "bfloat16"),
        (other, "float32"),
    ]
    for number, (source, dtype) in enumerate(cases):
        convert(source, tmp_path / str(number), dtype)
        prints.append(open_checkpoint(tmp_path / str(number)).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("changed", [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-6}])
def test_equal_weights_of_different_architectures_have_different_fingerprints(
    changed, folder, converted, tmp_path
):
    other = write_folder(tmp_path / "other", LLAMA | changed, random_tensors(LLAMA))
    (other / "generation_config.json").write_bytes((folder / "generation_config.json").read_bytes())
    convert(other, tmp_path / "converted", "float32")
    one, two = open_checkpoint(converted), open_checkpoint(tmp_path / "converted")
    values = read_all(two)
    for name, expected in read_all(one).items():
        np.testing.assert_array_equal(values[name], expected)
    assert one.fingerprint != two.fingerprint


def test_a_folder_that_is_not_empty_is_left_alone(folder, converted):
    before = sorted(converted.rglob("*"))
    with pytest.raises(WeightsError, match="exists and is not an empty folder"):
        convert(folder, converted)
    assert sorted(converted.rglob("*")) == before


def test_a_save_that_fails_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(folder)
    params = load_params(checkpoint, abstract(checkpoint))

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "content_hash", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "out" / "native", params, checkpoint.architecture)
    assert list((tmp_path / "out").iterdir()) == []


def test_parameters_of_another_architecture_are_not_saved(folder, tmp_path):
    checkpoint = open_checkpoint(folder)
    params = load_params(checkpoint, abstract(checkpoint))
    del params["layers.up_proj.kernel"]
    with pytest.raises(WeightsError, match=r"up_proj\.kernel: has shape None"):
        save(tmp_path / "native", params, checkpoint.architecture)
    assert not (tmp_path / "native").exists()


def change(folder: Path, **changes: Any) -> None:
    path = folder / "octavo.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 2}, "format_version is 2; this engine reads 1"),
        ({"architecture": {"family": "gpt"}}, "architecture is not valid"),
        ({"architecture": None}, "architecture is not valid"),
        ({"fingerprint": "abc"}, "fingerprint is 'abc'"),
        ({"eos_token_ids": [99]}, r"eos_token_ids has 99; token ids are from 0 to 15"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(converted, changes, reason):
    change(converted, **changes)
    with pytest.raises(WeightsError, match=reason):
        open_checkpoint(converted)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_layers", 3, r"attn_norm\.scale: has shape \[2, 32\].*\[3, 32\]"),
        ("qkv_bias", True, r"layers\.\w_proj\.bias: is missing from"),
        ("tie_embeddings", False, r"lm_head\.kernel: is missing from"),
    ],
)
def test_parameters_that_are_not_the_manifests_are_named(converted, key, value, reason):
    architecture = json.loads((converted / "octavo.json").read_text())["architecture"]
    change(converted, architecture=architecture | {key: value})
    with pytest.raises(WeightsError, match=reason):
        open_checkpoint(converted)


def test_parameters_the_architecture_does_not_have_are_refused(tmp_path):
    untied = LLAMA | {"tie_word_embeddings": False}
    source = write_folder(tmp_path / "hf", untied, random_tensors(untied))
    convert(source, tmp_path / "native")
    architecture = json.loads((tmp_path / "native/octavo.json").read_text())["architecture"]
    change(tmp_path / "native", architecture=architecture | {"tie_embeddings": True})
    with pytest.raises(WeightsError, match=r"lm_head\.kernel: is not expected in"):
        open_checkpoint(tmp_path / "native")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "params").rglob("*") if path.stat().st_size > 0)


# Orbax drops its other reads when one fails, and each complains as it goes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_lost_or_cut_off_file_gives_an_error_or_the_same_values(converted, tmp_path):
    expected = read_all(open_checkpoint(converted))
    refused = 0
    for number, file in enumerate(p for p in files_of(converted) if p.is_file()):
        for keep in (None, 0, 0.5):
            copy = Path(shutil.copytree(converted, tmp_path / f"{number}-{keep}"))
            damaged = copy / file.relative_to(converted)
            if keep is None:
                damaged.unlink()
            else:
                damaged.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
            try:
                checkpoint = open_checkpoint(copy)
                found = load_params(checkpoint, abstract(checkpoint))
            except WeightsError as error:
                assert str(copy) in str(error)  # noqa: PT017
                refused += 1
                continue
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values, err_msg=f"{file} {name}")
    gc.collect()  # those complaints, while this test is there to take them
    assert refused >= 6  # at least the index and the data, in each way
