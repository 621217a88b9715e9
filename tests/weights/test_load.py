"""From checkpoints to arrays: every placement holds the same values, and reads only its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engine.weights import (
    Checkpoint,
    WeightsError,
    load_params,
    native_shapes,
    open_checkpoint,
    save,
)
from engine.weights.checkpoint import Index
from engine.weights.load import with_kv_copies
from tests.conftest import TINY_MODELS
from tests.weights.checkpoints import native, read_folder, write_gguf

FORMATS = ("safetensors", "gguf", "octavo")


def wanted(checkpoint: Checkpoint, dtype: str, **shardings: Any) -> dict[str, Any]:
    """Abstract parameters, with a sharding for each name given (dots as underscores)."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings.get(name.replace(".", "_")))
        for name, shape in native_shapes(checkpoint.architecture).items()
    }


def open_as(format_: str, source: Path, folder: Path) -> Checkpoint:
    """A Hugging Face folder's model in another format, written to `folder` and opened."""
    if format_ == "gguf":
        source = write_gguf(folder / "m.gguf", *read_folder(source))
    checkpoint = open_checkpoint(source)
    if format_ == "octavo":
        params = load_params(checkpoint, wanted(checkpoint, "float32"))
        save(folder / "native", params, checkpoint.architecture)
        checkpoint = open_checkpoint(folder / "native")
    assert checkpoint.format == format_
    return checkpoint


@pytest.fixture(params=FORMATS)
def qwen3(request, tiny_models, tmp_path) -> Checkpoint:
    """The tiny qwen3, as each format."""
    return open_as(request.param, tiny_models / "qwen3", tmp_path)


def sharded(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Every kind of placement: columns, rows, layers, two axes, replicas, one device, none."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def over(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    return wanted(
        checkpoint,
        dtype,
        embed_weight=over("x", "y"),
        layers_q_proj_kernel=over(None, None, ("x", "y")),
        layers_k_proj_kernel=over(None, None, "y"),
        layers_o_proj_kernel=over(None, ("x", "y"), None),
        layers_gate_proj_kernel=over("x", None, "y"),
        layers_down_proj_kernel=over(None, "y", "x"),
        layers_q_norm_scale=over(None, "x"),
        layers_attn_norm_scale=over("x", None),
        final_norm_scale=over(),
        lm_head_kernel=over(None, ("y", "x")),
        layers_up_proj_kernel=jax.sharding.SingleDeviceSharding(jax.devices()[3]),
    )


@pytest.mark.parametrize("model", TINY_MODELS)
def test_all_formats_load_the_same_parameters(tiny_models, tmp_path, model):
    config, tensors = read_folder(tiny_models / model)
    expected = native(tensors, config["num_hidden_layers"])
    folder = open_checkpoint(tiny_models / model)
    params = load_params(folder, wanted(folder, "float32"))
    save(tmp_path / "native", params, folder.architecture)
    sources = [write_gguf(tmp_path / "m.gguf", config, tensors), tmp_path / "native"]
    for checkpoint in (folder, *map(open_checkpoint, sources)):
        loaded = load_params(checkpoint, wanted(checkpoint, "float32"))
        assert loaded.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(loaded[name], values, f"{checkpoint.format} {name}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_placement_holds_the_values_of_the_unsharded(qwen3, dtype):
    whole = load_params(qwen3, wanted(qwen3, dtype))
    abstract = sharded(qwen3, dtype)
    placed = load_params(qwen3, abstract)
    for name, array in placed.items():
        assert array.dtype == dtype
        if abstract[name].sharding is not None:
            assert array.sharding.is_equivalent_to(abstract[name].sharding, array.ndim)
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


@pytest.mark.parametrize("model", ["qwen2", "qwen3"])  # with biases, and without
@pytest.mark.parametrize("format_", FORMATS)
def test_chips_beyond_the_kv_heads_hold_copies_of_one_each(
    tiny_models: Path, tmp_path: Path, model: str, format_: str
) -> None:
    """Two heads on four chips: the first two chips have the first head, the others the second."""
    checkpoint = open_as(format_, tiny_models / model, tmp_path)
    arch = checkpoint.architecture
    assert arch.num_kv_heads == 2
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    columns = NamedSharding(mesh, PartitionSpec(None, None, "x"))
    abstract = {
        name: jax.ShapeDtypeStruct(
            shape,
            "bfloat16",
            # The kernels are cut by head, the biases are on every chip whole.
            sharding=columns if name.endswith("_proj.kernel") else None,
        )
        for name, shape in native_shapes(with_kv_copies(arch, 2)).items()
    }
    whole = load_params(checkpoint, wanted(checkpoint, "bfloat16"))
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    copied = load_params(checkpoint, abstract, progress, kv_copies=2)
    assert calls[-1] == (sum(array.nbytes for array in copied.values()),) * 2
    for name, array in copied.items():
        expected = np.asarray(whole[name])
        if name.startswith(("layers.k_proj", "layers.v_proj")):
            first, second = np.split(expected, 2, axis=-1)
            expected = np.concatenate((first, first, second, second), axis=-1)
        np.testing.assert_array_equal(array, expected, err_msg=name)
    [head] = {shard.data.shape[-1] for shard in copied["layers.k_proj.kernel"].addressable_shards}
    assert head == arch.head_dim
    with pytest.raises(WeightsError, match=r"k_proj\.kernel: has shape"):
        load_params(checkpoint, abstract)


def test_bfloat16_is_the_nearest_value_ties_to_even(qwen3):
    exact = load_params(qwen3, wanted(qwen3, "float32"))
    rounded = load_params(qwen3, wanted(qwen3, "bfloat16"))
    for name, values in exact.items():
        bits = np.asarray(values).view(np.uint32).astype(np.uint64)
        expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        np.testing.assert_array_equal(np.asarray(rounded[name]).view(np.uint16), expected, name)


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A checkpoint that notes what is read."""

    inner: Checkpoint
    reads: list[tuple[str, int | None, Index]] = dataclasses.field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read(self, name: str, layer: int | None = None, index: Index | None = None) -> np.ndarray:
        assert index is not None
        self.reads.append((name, layer, index))
        return self.inner.read(name, layer, index)


def test_each_value_is_read_once_however_many_devices_hold_it(tiny_models):
    checkpoint = open_checkpoint(tiny_models / "llama")
    recorder = Recorder(checkpoint)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    columns = NamedSharding(mesh, PartitionSpec(None, None, "x"))  # twice, along y
    load_params(recorder, wanted(checkpoint, "float32", layers_gate_proj_kernel=columns))
    gate = [read[1:] for read in recorder.reads if read[0] == "layers.gate_proj.kernel"]
    halves = [(slice(0, 32, 1), slice(0, 24, 1)), (slice(0, 32, 1), slice(24, 48, 1))]
    assert sorted(gate, key=str) == sorted(((i, h) for i in range(2) for h in halves), key=str)
    norms = [read for read in recorder.reads if read[0] == "final_norm.scale"]
    assert len(norms) == 1


def test_progress_counts_wanted_bytes_up_to_all_of_them(qwen3):
    calls: list[tuple[int, int]] = []
    abstract = wanted(qwen3, "bfloat16")
    params = load_params(qwen3, abstract, lambda done, total: calls.append((done, total)))
    num_bytes = sum(array.nbytes for array in params.values())
    assert calls[-1] == (num_bytes, num_bytes)
    assert calls == sorted(calls)
    assert {call[1] for call in calls} == {num_bytes}


def test_a_shape_the_model_does_not_have_is_named_with_both_shapes(qwen3):
    abstract = wanted(qwen3, "float32")
    abstract["layers.q_proj.kernel"] = jax.ShapeDtypeStruct((2, 32, 32), "float32")
    with pytest.raises(WeightsError, match=r"q_proj\.kernel: has shape \[2, 32, 64\].*\[2, 32, 32"):
        load_params(qwen3, abstract)


def test_parameters_must_be_the_same_on_both_sides(qwen3):
    abstract = wanted(qwen3, "float32")
    bias = {"layers.q_proj.bias": jax.ShapeDtypeStruct((2, 64), "float32")}
    with pytest.raises(WeightsError, match=r"q_proj\.bias: the model wants it"):
        load_params(qwen3, abstract | bias)
    del abstract["layers.q_norm.scale"]
    with pytest.raises(WeightsError, match=r"q_norm\.scale: is in the checkpoint, but the model"):
        load_params(qwen3, abstract)


def test_values_beyond_the_wanted_dtype_become_infinite_without_a_warning(tiny_models):
    @dataclasses.dataclass(frozen=True)
    class Large(Recorder):
        def read(self, name: str, layer: int | None = None, index: Index | None = None) -> Any:
            return np.full_like(self.inner.read(name, layer, index), 3.4e38)

    checkpoint = Large(open_checkpoint(tiny_models / "llama"))
    params = load_params(checkpoint, wanted(checkpoint.inner, "bfloat16"))
    assert np.all(np.asarray(params["final_norm.scale"]) == ml_dtypes.bfloat16("inf"))
