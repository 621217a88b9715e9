"""Products in int8, of every backend and set of instructions: against integers in NumPy."""

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
from pallas_kernels.matmul.int8 import MAX_DEPTH, Quantised
from tests.matmul.test_matmul import BACKENDS, ROWS, U16, U32, needs_native, random

F32 = np.float32


def quantised(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(integers, float32 scales), by the rule that pallas_kernels/matmul/int8.py states."""
    wide = values.astype(F32)
    most = np.abs(wide).max(axis=axis, keepdims=True)
    scales = np.where(most < 1e-30, 0, most * F32(1 / 127)).astype(F32)
    with np.errstate(all="ignore"):
        integers = np.rint(wide * np.where(most < 1e-30, 0, F32(127) / most).astype(F32))
    return integers.astype(np.int64), scales


def multiply(
    backend: str, x: np.ndarray, stacks: list[Quantised], layer: int, dtype: Any
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
        packed = [Quantised(mm.pack(stack.values, name), stack.scales) for stack in stacks]
        if instructions:
            return cpu.matmul(x, packed, layer, jnp.dtype(dtype), instructions)
        return mm.matmul(x, packed, layer, backend=name, dtype=dtype)

    return [np.asarray(y) for y in run(x, jnp.int32(layer), *stacks)]


def check(y: np.ndarray, x: np.ndarray, matrix: np.ndarray, dtype: Any, *, sums: bool) -> None:
    """Exact sums, scaled in float32 and rounded to the dtype. `sums`: they were float32 too."""
    (of_x, x_scales), (of_w, w_scales) = quantised(x, -1), quantised(matrix, -2)
    scales = x_scales.astype(np.float64) * w_scales
    exact = (of_x @ of_w) * scales
    bound = 8 * U32 * np.abs(exact)
    if sums:
        bound += 2 * len(matrix) * U32 * (np.abs(of_x) @ np.abs(of_w)) * scales
    if dtype == jnp.bfloat16:
        bound += U16 * (np.abs(exact) + bound)
    assert y.dtype == dtype
    assert (np.abs(y.astype(np.float64) - exact) <= bound).all()
    # And whatever the rule of rounding: as near as half a step of either side allows.
    wide, steps = (x.astype(np.float64), matrix.astype(np.float64)), (x_scales / 2, w_scales / 2)
    error = np.abs(wide[0]) @ np.ones_like(wide[1]) * steps[1]
    error += steps[0] * (np.ones_like(wide[0]) @ (np.abs(wide[1]) + steps[1]))
    assert (np.abs(exact - wide[0] @ wide[1]) <= error * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_one_layer_of_each_stack(backend: str, rows: int, dtype: Any) -> None:
    """More columns than a chunk, fewer than a tile's four blocks, and an odd number of blocks."""
    x = random(rows, 192, dtype=dtype)
    stacks = [random(3, 192, columns, seed=columns) for columns in (16, 48, 1552)]
    held = [mm.quantise(jnp.asarray(stack)) for stack in stacks]
    for layer in (0, 2):
        for y, stack in zip(multiply(backend, x, held, layer, dtype), stacks, strict=True):
            check(y, x, stack[layer], dtype, sums=backend == "reference")


@needs_native
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS)
def test_every_set_of_instructions_gives_the_same_bits(rows: int, dtype: Any) -> None:
    x, stack = random(rows, 320, dtype=dtype), mm.quantise(jnp.asarray(random(1, 320, 176)))
    (expected,) = multiply("cpu portable", x, [stack], 0, dtype)
    have = native.INSTRUCTIONS[: native.INSTRUCTIONS.index(native.instructions()) + 1]
    for instructions in have[1:]:
        (y,) = multiply(f"cpu {instructions}", x, [stack], 0, dtype)
        assert y.tobytes() == expected.tobytes(), instructions


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_sum_of_the_deepest_product_does_not_overflow(
    backend: str, rows: int, sign: int
) -> None:
    depth = MAX_DEPTH // 64 * 64
    values = np.full((1, depth, 16), 127 * sign, np.int8)
    stack = Quantised(jnp.asarray(values), jnp.full((1, 16), 1 / 127))
    x = np.full((rows, depth), 2, ml_dtypes.bfloat16)
    (y,) = multiply(backend, x, [stack], 0, jnp.float32)
    np.testing.assert_allclose(y, 2.0 * sign * depth, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_so_and_zeros_stay_zeros(backend: str) -> None:
    x, matrix = random(20, 64), random(1, 64, 32)
    x[7, 3], x[8, 60], x[9, 0] = np.nan, np.inf, -np.inf
    x[10], x[11], x[12] = 0, 1e-38, 1e30
    matrix[:, 5, 30], matrix[:, :, 31] = np.inf, 0
    (y,) = multiply(backend, x, [mm.quantise(jnp.asarray(matrix))], 0, jnp.float32)
    assert np.isnan(y[7:10]).all()
    assert np.isnan(y[:, 30]).all()
    assert (y[10:12, :30] == 0).all()
    assert (np.delete(y, [7, 8, 9], axis=0)[:, 31] == 0).all()
    assert np.isfinite(np.delete(y, [7, 8, 9], axis=0)[:, :30]).all()


def test_values_and_scales_are_those_of_the_rule() -> None:
    matrix = random(3, 64, 48)
    values, scales = mm.quantise(jnp.asarray(matrix))
    expected, of_columns = quantised(matrix, -2)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(scales, of_columns[:, 0])
    assert (np.abs(expected).max(axis=1) == 127).all()


@pytest.mark.parametrize("backend", ["reference", "xla", pytest.param("cpu", marks=needs_native)])
def test_a_table_gives_rows_and_scores(backend: mm.Backend) -> None:
    table, x = random(320, 64), random(3, 64, seed=1)
    values, scales = mm.quantise(jnp.asarray(table), axis=-1)
    packed = Quantised(mm.pack_table(values, backend), scales)
    ids = np.array([0, 1, 15, 16, 17, 319, 319])
    integers, of_rows = quantised(table, -1)
    rows = mm.embed(packed, jnp.asarray(ids), backend)
    np.testing.assert_array_equal(rows, (integers * of_rows)[ids].astype(F32))
    y = np.asarray(mm.scores(jnp.asarray(x), packed, backend))
    check(y, x, table.T, jnp.float32, sums=backend == "reference")


@needs_native
@pytest.mark.parametrize(
    ("x", "stack", "scales", "problem"),
    [
        ((3, 64), (2, 2, 32, 16, 2), (2, 32), "a stack must be"),
        ((3, 64), (2, 2, 16, 16, 4), (2, 16), "scales must be"),
        ((3, 96), (2, 2, 24, 16, 4), (2, 32), "in int8 64"),
    ],
)
def test_what_does_not_fit_is_refused(x: Any, stack: Any, scales: Any, problem: str) -> None:
    held = Quantised(jnp.zeros(stack, jnp.int8), jnp.zeros(scales))
    with pytest.raises(jax.errors.JaxRuntimeError, match=problem):
        jax.block_until_ready(mm.matmul(jnp.zeros(x, jnp.bfloat16), [held], 0, backend="cpu"))


@needs_native
def test_float32_rows_are_for_int8_weights_alone() -> None:
    stack = jnp.zeros((1, 2, 32, 16, 2), jnp.bfloat16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="x must be bfloat16, or with int8"):
        jax.block_until_ready(mm.matmul(jnp.zeros((3, 64)), [stack], 0, backend="cpu"))


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_a_matrix_whose_sums_may_not_fit_is_refused_by_every_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{MAX_DEPTH + 1} rows"):
        mm.resolve_backend(backend, "cpu", dtype="int8", shapes=[(MAX_DEPTH + 1, 32)])
