"""Matrix products of every backend, and of every set of instructions, against float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import matmul as mm
from pallas_kernels import native
from pallas_kernels.matmul import cpu

needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)
U16, U32 = 2.0**-8, 2.0**-24  # half of what bfloat16 and float32 round to
BACKENDS = [
    "reference",
    "xla",
    *(pytest.param(f"cpu {name}", marks=needs_native) for name in native.INSTRUCTIONS),
]
ROWS = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 63, 100)


def random(*shape: int, seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def multiply(
    backend: str, x: np.ndarray, stacks: list[np.ndarray], layer: int, dtype: Any
) -> list[np.ndarray]:
    """What a backend makes of it: "cpu avx2" is native code with no more than AVX2."""
    given, _, instructions = backend.partition(" ")
    name: Any = given
    if instructions:
        most = native.INSTRUCTIONS.index(instructions)
        if most > native.INSTRUCTIONS.index(native.instructions()):
            pytest.skip(f"this processor has no {instructions}")

    @jax.jit
    def run(x, layer, *stacks):
        packed = [mm.pack(stack, name) for stack in stacks]
        if instructions:
            return cpu.matmul(x, packed, layer, jnp.dtype(dtype), instructions=instructions)
        return mm.matmul(x, packed, layer, backend=name, dtype=dtype)

    return [np.asarray(y) for y in run(x, jnp.int32(layer), *stacks)]


def check(y: np.ndarray, x: np.ndarray, matrix: np.ndarray, dtype: Any) -> None:
    """Sums of exact products, each step rounded to float32, and the result to its dtype."""
    wide = x.astype(np.float64), matrix.astype(np.float64)
    exact = wide[0] @ wide[1]
    bound = len(matrix) * U32 * (np.abs(wide[0]) @ np.abs(wide[1]))
    if dtype == jnp.bfloat16:
        bound += U16 * (np.abs(exact) + bound)
    assert y.dtype == dtype
    assert (np.abs(y.astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_one_layer_of_each_stack(backend: str, rows: int, dtype: Any) -> None:
    """More columns than a chunk, fewer than a tile's four blocks, and an odd number of blocks."""
    x = random(rows, 96)
    stacks = [random(3, 96, columns, seed=columns) for columns in (16, 48, 1552)]
    for layer in (0, 2):
        for y, stack in zip(multiply(backend, x, stacks, layer, dtype), stacks, strict=True):
            check(y, x, stack[layer], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deep_product(backend: str) -> None:
    x, stack = random(19, 8192), random(1, 8192, 32)
    check(multiply(backend, x, [stack], 0, jnp.float32)[0], x, stack[0], jnp.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_stays_none_and_where_it_is(backend: str) -> None:
    x, stack = random(20, 64), random(1, 64, 32)
    x[7, 3] = np.nan
    (y,) = multiply(backend, x, [stack], 0, jnp.bfloat16)
    assert np.isnan(y[7]).all()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


@needs_native
@pytest.mark.parametrize("instructions", native.INSTRUCTIONS)
def test_a_row_s_result_does_not_depend_on_how_many_there_are(instructions: str) -> None:
    x, stack = random(100, 96), random(1, 96, 1552)
    backend = f"cpu {instructions}"
    (whole,) = multiply(backend, x, [stack], 0, jnp.float32)
    for rows in ROWS:
        (some,) = multiply(backend, x[:rows], [stack], 0, jnp.float32)
        assert some.tobytes() == whole[:rows].tobytes()


@pytest.mark.parametrize("backend", ["reference", "xla", pytest.param("cpu", marks=needs_native)])
def test_a_table_gives_rows_and_scores(backend: mm.Backend) -> None:
    table, x = random(320, 64), random(3, 64, seed=1)
    packed = mm.pack_table(jnp.asarray(table), backend)
    ids = jnp.array([0, 1, 15, 16, 17, 319, 319])
    assert np.asarray(mm.embed(packed, ids, backend)).tobytes() == table[ids].tobytes()
    check(np.asarray(mm.scores(jnp.asarray(x), packed, backend)), x, table.T, jnp.float32)


@needs_native
def test_packing_copies_each_weight_to_its_place() -> None:
    matrix = random(2, 64, 32)
    packed = np.asarray(mm.pack(jnp.asarray(matrix), "cpu"))
    assert packed.shape == (2, 2, 32, 16, 2)
    for layer, row, column in ((0, 0, 0), (1, 63, 31), (0, 5, 17), (1, 8, 3)):
        there = packed[layer, column // 16, row // 2, column % 16, row % 2]
        assert there == matrix[layer, row, column]


@needs_native
@pytest.mark.parametrize(
    ("x", "stack", "layer", "problem"),
    [
        ((3, 64), (2, 2, 16, 16, 2), 0, "a stack must be"),
        ((3, 64), (2, 2, 32, 16, 2), 2, "no such layer"),
        ((3, 64), (2, 2, 32, 16, 2), -1, "no such layer"),
    ],
)
def test_what_does_not_fit_is_refused(x: Any, stack: Any, layer: int, problem: str) -> None:
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in (x, stack)]
    with pytest.raises(jax.errors.JaxRuntimeError, match=problem):
        jax.block_until_ready(mm.matmul(arrays[0], [arrays[1]], layer, backend="cpu"))


@needs_native
def test_native_code_runs_where_it_is_asked_for() -> None:
    found = mm.resolve_backend("cpu", "cpu", shapes=[(64, 32)])
    assert found == ("cpu", native.instructions(), False)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"platform": "tpu"}, "the device is a tpu"),
        ({"num_devices": 2}, "split over 2 devices"),
        pytest.param({"dtype": "float32"}, "models in bfloat16", marks=needs_native),
        pytest.param({"shapes": [(64, 32), (60, 32)]}, "60 by 32", marks=needs_native),
        pytest.param({"shapes": [(64, 24)]}, "64 by 24", marks=needs_native),
    ],
    ids=str,
)
def test_where_native_code_can_t_run_it_is_refused(given: dict[str, Any], reason: str) -> None:
    given = {"platform": "cpu", **given}
    for name in ("auto", "xla"):
        assert mm.resolve_backend(name, **given).backend == "xla"
    with pytest.raises(ValueError, match=reason):
        mm.resolve_backend("cpu", **given)


def test_without_a_library_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "missing.so")
    with pytest.raises(ValueError, match="native code was not compiled"):
        mm.resolve_backend("cpu", "cpu")


def test_a_library_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "_octavo.so").write_text("not a library")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_octavo.so")
    monkeypatch.setattr(native, "load", native.load.__wrapped__)  # as if for the first time
    with pytest.raises(ValueError, match=r"_octavo\.so can't be loaded"):
        mm.resolve_backend("cpu", "cpu")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'tpu' is not one of auto, reference, xla, cpu"):
        mm.resolve_backend("tpu", "tpu")
