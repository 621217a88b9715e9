"""Products in int8, of every backend and set of instructions: against integers in NumPy."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
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


def scaled(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Ratios to the largest, from -127 to 127, and float32 scales, by the rule of int8.py."""
    wide = values.astype(F32)
    most = np.abs(wide).max(axis=axis, keepdims=True)
    return wide * (F32(127) / most), most * F32(1 / 127)


def on(backend: str) -> tuple[Any, dict[str, str]]:
    """A backend's module, and its options: "cpu avx2" is native code with no more than AVX2."""
    name, _, instructions = backend.partition(" ")
    if not instructions:
        return importlib.import_module(f"pallas_kernels.matmul.{name}"), {}
    most = native.INSTRUCTIONS.index(instructions)
    if most > native.INSTRUCTIONS.index(native.instructions()):
        pytest.skip(f"this processor has no {instructions}")
    return cpu, {"instructions": instructions}


def packed(module: Any, stacks: Sequence[Quantised]) -> list[Quantised]:
    return [Quantised(module.pack(stack.values), stack.scales) for stack in stacks]


def multiply(
    backend: str,
    x: np.ndarray,
    stacks: list[Quantised],
    layer: int,
    dtype: Any,
    norm: mm.Norm | None = None,
    add: np.ndarray | None = None,
) -> list[np.ndarray]:
    module, options = on(backend)

    @jax.jit
    def run(x, layer, add, *stacks):
        given = packed(module, stacks)
        return module.matmul(x, given, layer, jnp.dtype(dtype), norm, add, **options)

    return [np.asarray(y) for y in run(x, jnp.int32(layer), add, *stacks)]


def feed_forward(
    backend: str, x: np.ndarray, norm: mm.Norm, stacks: list[Quantised], layer: int
) -> np.ndarray:
    module, options = on(backend)

    @jax.jit
    def run(x, layer, *stacks):
        return module.feed_forward(x, norm, *packed(module, stacks), layer, **options)

    return np.asarray(run(x, jnp.int32(layer), *stacks))


def check(y: np.ndarray, x: np.ndarray, matrix: np.ndarray, dtype: Any, *, sums: bool) -> None:
    """Exact sums, scaled in float32 and rounded to the dtype. `sums`: they were float32 too."""
    (of_x, x_scales), (of_w, w_scales) = scaled(x, -1), scaled(matrix, -2)
    # Whatever side a half goes to, the rest makes up for it.
    steps = of_x.astype(np.float64) * 254
    entries, weights = np.rint(steps) / 254, np.rint(of_w).astype(np.float64)
    is_close = np.abs(steps - np.floor(steps) - 0.5) < 0.01  # in float32 it may be either
    scales = x_scales.astype(np.float64) * w_scales
    exact = entries @ weights * scales
    bound = 8 * U32 * (np.abs(np.rint(of_x) @ weights) + len(matrix) / 2 * 127) * scales
    bound += is_close @ np.abs(weights) / 254 * scales
    if sums:
        bound += 2 * len(matrix) * U32 * (np.abs(entries) @ np.abs(weights)) * scales
    if dtype == jnp.bfloat16:
        bound += U16 * (np.abs(exact) + bound)
    assert y.dtype == dtype
    assert (np.abs(y.astype(np.float64) - exact) <= bound).all()
    # And whatever the rule of rounding: as near as half a step of either side allows.
    wide, halves = (x.astype(np.float64), matrix.astype(np.float64)), (x_scales / 508, w_scales / 2)
    error = np.abs(wide[0]) @ np.ones_like(wide[1]) * halves[1]
    error += halves[0] * (np.ones_like(wide[0]) @ (np.abs(wide[1]) + halves[1]))
    assert (np.abs(exact - wide[0] @ wide[1]) <= error * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_one_layer_of_each_stack(backend: str, rows: int, dtype: Any) -> None:
    """More columns than a chunk, fewer than a tile's four blocks, and an odd number of blocks."""
    x = random(rows, 192)
    stacks = [random(3, 192, columns, seed=columns) for columns in (16, 48, 1552)]
    held = [mm.quantise(jnp.asarray(stack)) for stack in stacks]
    for layer in (0, 2):
        for y, stack in zip(multiply(backend, x, held, layer, dtype), stacks, strict=True):
            check(y, x, stack[layer], dtype, sums=backend == "reference")


@needs_native
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS)
def test_every_set_of_instructions_gives_the_same_bits(rows: int, dtype: Any) -> None:
    x, stack = random(rows, 320), mm.quantise(jnp.asarray(random(1, 320, 176)))
    (expected,) = multiply("cpu portable", x, [stack], 0, dtype)
    have = native.INSTRUCTIONS[: native.INSTRUCTIONS.index(native.instructions()) + 1]
    for instructions in have[1:]:
        (y,) = multiply(f"cpu {instructions}", x, [stack], 0, dtype)
        assert y.tobytes() == expected.tobytes(), instructions


@needs_native
@pytest.mark.parametrize("instructions", native.INSTRUCTIONS)
def test_a_row_s_result_does_not_depend_on_how_many_there_are(instructions: str) -> None:
    x, stack = random(100, 192), mm.quantise(jnp.asarray(random(1, 192, 176)))
    backend = f"cpu {instructions}"
    (whole,) = multiply(backend, x, [stack], 0, jnp.float32)
    for rows in ROWS:
        (some,) = multiply(backend, x[:rows], [stack], 0, jnp.float32)
        assert some.tobytes() == whole[:rows].tobytes()


@pytest.mark.parametrize("rows", [1, 2, 17, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_goes_before_and_after_a_product_goes_with_it(backend: str, rows: int) -> None:
    """The norm of x, and a sum: as the product alone gives them, but for float32's roundings."""
    x, add = random(rows, 64, dtype=F32), random(rows, 176, seed=1, dtype=F32)
    norm = mm.Norm(jnp.asarray(random(2, 64, seed=2)), 1e-5)
    stack = mm.quantise(jnp.asarray(random(2, 64, 176, seed=3)))
    (y,) = multiply(backend, x, [stack], 1, jnp.float32, norm=norm, add=add)
    normed = np.asarray(norm(jnp.asarray(x), jnp.int32(1)))
    (product,) = multiply("reference", normed, [stack], 1, jnp.float32)
    # A norm that is rounded to bfloat16 the other way, and a product that is rounded to it.
    magnitude = np.abs(normed.astype(F32)) @ np.abs(
        np.asarray(stack.values[1], F32) * np.asarray(stack.scales[1])
    )
    assert y.dtype == F32
    assert (np.abs(y - add - product) <= U16 * (magnitude + np.abs(product)) + 4 * U32).all()


@pytest.mark.parametrize("rows", [1, 2, 17, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_feed_forward_in_int8_is_its_parts(backend: str, rows: int) -> None:
    x, norm = random(rows, 64, dtype=F32), mm.Norm(jnp.asarray(random(2, 64, seed=1)), 1e-5)
    shapes = ((2, 64, 192), (2, 64, 192), (2, 192, 64))
    stacks = [
        mm.quantise(jnp.asarray(random(*shape, seed=2 + index) * 0.1))
        for index, shape in enumerate(shapes)
    ]
    y = feed_forward(backend, x, norm, stacks, 1)
    normed = np.asarray(norm(jnp.asarray(x), jnp.int32(1)))
    gate, up = multiply("reference", normed, stacks[:2], 1, jnp.float32)
    wide = gate / (1 + np.exp(-gate)) * up
    hidden = wide.astype(ml_dtypes.bfloat16)
    (down,) = multiply("reference", hidden, stacks[2:], 1, jnp.float32)
    # Roundings to bfloat16 of the norm, of gate and up, of what they give and of down: each of 2 **
    # -8 at most, and over rows and columns independent, so that four of them are less than three.
    error = np.sqrt(np.mean(np.square(y - x - down)) / np.mean(np.square(down)))
    assert y.dtype == F32
    assert error < 3 * 2.0**-8


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
    expected, of_columns = scaled(matrix, -2)
    np.testing.assert_array_equal(values, np.rint(expected))
    np.testing.assert_array_equal(scales, of_columns[:, 0])
    assert (np.abs(np.asarray(values)).max(axis=1) == 127).all()


@pytest.mark.parametrize("backend", ["reference", "xla", pytest.param("cpu", marks=needs_native)])
def test_a_table_gives_rows_and_scores(backend: mm.Backend) -> None:
    table, x = random(320, 64), random(3, 64, seed=1)
    values, scales = mm.quantise(jnp.asarray(table), axis=-1)
    given = Quantised(mm.pack_table(values, backend), scales)
    ids = np.array([0, 1, 15, 16, 17, 319, 319])
    ratios, of_rows = scaled(table, -1)
    rows = mm.embed(given, jnp.asarray(ids), backend)
    np.testing.assert_array_equal(rows, (np.rint(ratios) * of_rows)[ids])
    y, best = mm.scores(jnp.asarray(x), given, backend, is_table=True)
    check(np.asarray(y), x, table.T, jnp.float32, sums=backend == "reference")
    np.testing.assert_array_equal(best, np.argmax(y, axis=1))
    matrix = Quantised(mm.pack(values.T, backend), scales)
    as_matrix, _ = mm.scores(jnp.asarray(x), matrix, backend, is_table=False)
    np.testing.assert_array_equal(as_matrix, y)


@needs_native
@pytest.mark.parametrize(
    ("x", "stack", "scales", "problem"),
    [
        ((3, 64), (2, 2, 32, 16, 2), (2, 32), "a stack must be"),
        ((3, 64), (2, 2, 16, 16, 4), (2, 16), "comes with scales"),
        ((3, 96), (2, 2, 24, 16, 4), (2, 32), "in int8 64"),
    ],
)
def test_what_does_not_fit_is_refused(x: Any, stack: Any, scales: Any, problem: str) -> None:
    held = Quantised(jnp.zeros(stack, jnp.int8), jnp.zeros(scales))
    with pytest.raises(jax.errors.JaxRuntimeError, match=problem):
        jax.block_until_ready(mm.matmul(jnp.zeros(x, jnp.bfloat16), [held], 0, backend="cpu"))


@needs_native
def test_stacks_of_two_dtypes_are_refused() -> None:
    bfloat16 = jnp.zeros((2, 2, 32, 16, 2), jnp.bfloat16)
    int8 = Quantised(jnp.zeros((2, 2, 16, 16, 4), jnp.int8), jnp.zeros((2, 32)))
    x, both = jnp.zeros((3, 64), jnp.bfloat16), [bfloat16, int8]
    for stacks in (both, both[::-1]):
        with pytest.raises(jax.errors.JaxRuntimeError, match="of one dtype"):
            jax.block_until_ready(mm.matmul(x, stacks, 0, backend="cpu"))


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_a_matrix_whose_sums_may_not_fit_is_refused_by_every_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{MAX_DEPTH + 1} rows"):
        mm.resolve_backend(backend, "cpu", in_int8=True, shapes=[(MAX_DEPTH + 1, 32)])
