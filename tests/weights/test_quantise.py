"""Matrices in int8 from checkpoints: of whole columns, whatever is read of them and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engine.weights import Checkpoint, WeightsError, load_params, native_shapes, open_checkpoint
from engine.weights.load import with_kv_copies
from pallas_kernels import matmul
from tests.weights.checkpoints import LLAMA, random_tensors, read_all, write_folder
from tests.weights.test_load import FORMATS, Recorder, open_as


def is_matrix(name: str, checkpoint: Checkpoint) -> bool:
    is_tied = checkpoint.architecture.tie_embeddings
    return name.endswith(".kernel") or (name == "embed.weight" and is_tied)


def wanted(checkpoint: Checkpoint, copies: int = 1, **shardings: Any) -> dict[str, Any]:
    """Abstract parameters, matrices in int8; shardings by name, dots as underscores."""
    abstract = {}
    shapes = native_shapes(with_kv_copies(checkpoint.architecture, copies))
    for name, shape in shapes.items():
        sharding = shardings.get(name.replace(".", "_"))
        if not is_matrix(name, checkpoint):
            abstract[name] = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding)
            continue
        abstract[name] = jax.ShapeDtypeStruct(shape, "int8", sharding=sharding)
        of_columns = shape[:-1] if name == "embed.weight" else (*shape[:-2], shape[-1])
        sharding = shardings.get(f"{name}_scale".replace(".", "_"))
        abstract[f"{name}_scale"] = jax.ShapeDtypeStruct(of_columns, "float32", sharding=sharding)
    return abstract


@pytest.fixture(params=FORMATS)
def checkpoint(request: Any, tiny_models: Path, tmp_path: Path) -> Checkpoint:
    """The tiny tied llama, as each format."""
    return open_as(request.param, tiny_models / "llama_tied", tmp_path)


def test_matrices_are_what_the_kernels_make_of_the_file_s_values(checkpoint: Checkpoint) -> None:
    params = load_params(checkpoint, wanted(checkpoint))
    for name, values in read_all(checkpoint).items():
        if not is_matrix(name, checkpoint):
            assert params[name].dtype == "bfloat16"
            continue
        axis = -1 if name == "embed.weight" else -2
        expected = matmul.quantise(jnp.asarray(values, jnp.float32), axis)
        np.testing.assert_array_equal(params[name], expected.values, err_msg=name)
        np.testing.assert_array_equal(params[f"{name}_scale"], expected.scales, err_msg=name)
        assert params[name].dtype == "int8"


def test_any_placement_holds_the_values_of_the_unsharded(checkpoint: Checkpoint) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def over(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    abstract = wanted(
        checkpoint,
        embed_weight=over("x", "y"),
        embed_weight_scale=over("x"),
        layers_q_proj_kernel=over(None, None, ("x", "y")),
        layers_q_proj_kernel_scale=over(None, ("x", "y")),
        layers_o_proj_kernel=over(None, ("x", "y"), None),
        layers_gate_proj_kernel=over("x", None, "y"),
        layers_gate_proj_kernel_scale=over("x", None),  # other columns than the kernel's shards
        layers_down_proj_kernel=over(None, "y", "x"),
        layers_down_proj_kernel_scale=over(None, "x"),
    )
    whole, placed = (load_params(checkpoint, wanted(checkpoint)), load_params(checkpoint, abstract))
    for name, array in placed.items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


@pytest.mark.parametrize("format_", FORMATS)
def test_copies_of_kv_heads_have_copies_of_their_scales(
    tiny_models: Path, tmp_path: Path, format_: str
) -> None:
    checkpoint = open_as(format_, tiny_models / "qwen2", tmp_path)
    head_dim = checkpoint.architecture.head_dim
    whole = load_params(checkpoint, wanted(checkpoint))
    copied = load_params(checkpoint, wanted(checkpoint, 2), kv_copies=2)
    for name in ("layers.k_proj.kernel", "layers.v_proj.kernel_scale"):
        heads = np.split(np.asarray(whole[name]), whole[name].shape[-1] // head_dim, axis=-1)
        expected = np.concatenate([head for head in heads for _ in range(2)], axis=-1)
        np.testing.assert_array_equal(copied[name], expected)


def test_a_matrix_is_read_once_and_one_cut_by_rows_twice_at_most(tiny_models: Path) -> None:
    recorder = Recorder(open_checkpoint(tiny_models / "llama"))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    columns = NamedSharding(mesh, PartitionSpec(None, None, "x"))
    rows = NamedSharding(mesh, PartitionSpec(None, "x", None))
    load_params(
        recorder,
        wanted(
            recorder,
            layers_gate_proj_kernel=columns,
            layers_gate_proj_kernel_scale=NamedSharding(mesh, PartitionSpec(None, "x")),
            layers_down_proj_kernel=rows,
        ),
    )

    def entries(name: str) -> int:
        sizes = [[part.stop - part.start for part in i] for n, _, i in recorder.reads if n == name]
        return sum(np.prod(size) for size in sizes)

    shapes = native_shapes(recorder.architecture)
    for name in ("layers.gate_proj.kernel", "layers.up_proj.kernel"):
        assert entries(name) == np.prod(shapes[name])
    down = np.prod(shapes["layers.down_proj.kernel"])
    assert down < entries("layers.down_proj.kernel") < 2 * down


def test_what_is_not_finite_gives_its_column_no_scale(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 5] = np.inf  # [out, in] in the file
    tensors["model.layers.1.mlp.up_proj.weight"][4] = 0
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", LLAMA, tensors))
    params = load_params(checkpoint, wanted(checkpoint))
    gate, up = (np.asarray(params[f"layers.{n}_proj.kernel_scale"]) for n in ("gate", "up"))
    assert np.argwhere(np.isnan(gate)).tolist() == [[1, 3]]
    assert np.argwhere(up == 0).tolist() == [[1, 4]]
    assert (np.asarray(params["layers.gate_proj.kernel"])[1, :, 3] == 0).all()


def test_a_matrix_in_int8_without_a_place_for_its_scales_is_refused(tiny_models: Path) -> None:
    checkpoint = open_checkpoint(tiny_models / "llama")
    abstract = wanted(checkpoint)
    del abstract["layers.up_proj.kernel_scale"]
    with pytest.raises(WeightsError, match=r"up_proj\.kernel_scale: .*no place for it"):
        load_params(checkpoint, abstract)
