"""Matrix products of every backend, and of every set of instructions, against float64."""

from __future__ import annotations

import importlib
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


def of(backend: str) -> tuple[Any, dict[str, Any]]:
    """A backend's name and options: "cpu avx2" is native code with no more than AVX2."""
    name, _, instructions = backend.partition(" ")
    if not instructions:
        return name, {}
    most = native.INSTRUCTIONS.index(instructions)
    if most > native.INSTRUCTIONS.index(native.instructions()):
        pytest.skip(f"this processor has no {instructions}")
    return name, {"instructions": instructions}


def call(name: str, backend: str, *arguments: Any) -> Any:
    """What a backend's own function makes of them."""
    module, options = of(backend)
    function = getattr(importlib.import_module(f"pallas_kernels.matmul.{module}"), name)
    arrays = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
    return jax.tree.map(np.asarray, function(*arrays, **options))


def packed(backend: str, *stacks: np.ndarray) -> list[jax.Array]:
    return [mm.pack(jnp.asarray(stack), of(backend)[0]) for stack in stacks]


def multiply(
    backend: str, x: np.ndarray, stacks: list[np.ndarray], layer: int, dtype: Any
) -> list[np.ndarray]:
    """What a backend makes of it, by the op's own entry point where no instructions are named."""
    name, options = of(backend)

    @jax.jit
    def run(x, layer, *stacks):
        if options:
            return cpu.matmul(x, stacks, layer, jnp.dtype(dtype), **options)
        return mm.matmul(x, stacks, layer, backend=name, dtype=dtype)

    return [np.asarray(y) for y in run(x, jnp.int32(layer), *packed(backend, *stacks))]


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


def exact_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    size = np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=1, keepdims=True) + epsilon)
    return x / size * scale.astype(np.float64)


def exact_feed_forward(x: np.ndarray, norm: mm.Norm, layer: int, *stacks: np.ndarray) -> np.ndarray:
    """In float64, rounded to bfloat16 where the op says so."""
    gate, up, down = (stack[layer].astype(np.float64) for stack in stacks)
    scales = np.asarray(norm.scales_LD)
    normed = exact_norm(x, scales[layer], norm.epsilon).astype(ml_dtypes.bfloat16).astype(float)
    gated = normed @ gate
    hidden = (gated / (1 + np.exp(-gated)) * (normed @ up)).astype(ml_dtypes.bfloat16)
    return x + hidden.astype(np.float64) @ down


def norm_of(layers: int, width: int) -> mm.Norm:
    return mm.Norm(jnp.asarray(random(layers, width, seed=7)), 1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_goes_before_a_product(backend: str, rows: int) -> None:
    """The norm rounds to bfloat16 once, up or down as float32 happens to lie."""
    x, norm = random(rows, 96, dtype=np.float32), norm_of(3, 96)
    stacks = [random(3, 96, columns, seed=columns) for columns in (48, 16)]
    for layer in (0, 2):
        found = call(
            "matmul", backend, x, packed(backend, *stacks), jnp.int32(layer), jnp.float32, norm
        )
        normed = exact_norm(x, np.asarray(norm.scales_LD)[layer], norm.epsilon)
        for y, stack in zip(found, stacks, strict=True):
            matrix = stack[layer].astype(np.float64)
            allowed = 1.01 * U16 * np.abs(normed) @ np.abs(matrix)
            assert (np.abs(y - normed @ matrix) <= allowed).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_is_added_to_a_sum(backend: str, rows: int) -> None:
    x, stack, add = random(rows, 96), random(2, 96, 144), random(rows, 144, dtype=np.float32)
    arguments = (x, packed(backend, stack), jnp.int32(1), jnp.float32, None, add)
    (y,) = call("matmul", backend, *arguments)
    product = x.astype(np.float64) @ stack[1].astype(np.float64)
    rounds = U16 if backend == "xla" else 0.0  # as it may
    sizes = np.abs(x.astype(np.float64)) @ np.abs(stack[1].astype(np.float64)) + np.abs(add)
    assert y.dtype == np.float32
    assert (np.abs(y - (add + product)) <= rounds * np.abs(product) + 98 * U32 * sizes).all()


@pytest.mark.parametrize("rows", [*ROWS, 128, 129, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_feed_forward(backend: str, rows: int) -> None:
    """More rows than a chunk has, and columns that are no multiple of a chunk's."""
    x, norm = random(rows, 96, dtype=np.float32), norm_of(2, 96)
    stacks = [
        random(2, *shape, seed=i) for i, shape in enumerate([(96, 160), (96, 160), (160, 96)])
    ]
    y = call("feed_forward", backend, x, norm, *packed(backend, *stacks), jnp.int32(1))
    exact = exact_feed_forward(x, norm, 1, *stacks)
    assert y.dtype == np.float32
    # Roundings of a norm and of what is between, to one side or the other; xla has two more.
    error = np.abs(y - exact).max() / np.abs(exact - x).max()
    assert error <= (3 if backend == "xla" else 1) * U16


@pytest.mark.parametrize("backend", BACKENDS)
def test_feed_forward_far_from_zero(backend: str) -> None:
    """Where silu is 0 or its argument, and where something is no number."""
    x, norm = np.eye(64, 64, dtype=np.float32)[:5] * 8, mm.Norm(jnp.ones((1, 64), jnp.bfloat16), 0)
    gate, up, down = (np.zeros((1, 64, 64), ml_dtypes.bfloat16) for _ in range(3))
    gate[0, :4, 0] = -40, -1e4, 40, 1e30  # the norm of x is 8 at one place
    up[0, :5, 0], down[0, 0, 0] = 2, 1
    x[4, 9] = np.nan
    y = call("feed_forward", backend, x, norm, *packed(backend, gate, up, down), jnp.int32(0))
    np.testing.assert_allclose(y[:3, 0] - x[:3, 0], [0, 0, 320 * 16], rtol=0.01, atol=1e-30)
    assert y[3, 0] > 1e31
    assert np.isnan(y[4]).all()


@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_gives_rows_and_scores_and_the_best(backend: str, rows: int) -> None:
    """Of 63 blocks of columns, which chunks don't divide evenly."""
    table, x = random(1008, 64), random(rows, 64, seed=1)
    table[1000] = table[77]  # with the same scores, the first is the best
    x[-1] = table[77] * 4
    name, _ = of(backend)
    of_table = mm.pack_table(jnp.asarray(table), name)
    ids = jnp.array([0, 1, 15, 16, 17, 1007, 1007])
    assert np.asarray(mm.embed(of_table, ids, name)).tobytes() == table[ids].tobytes()
    matrix = mm.pack(jnp.asarray(table.T.copy()), name)
    for weights, is_table in ((of_table, True), (matrix, False)):
        scores, best = call("scores", backend, x, weights, is_table)
        check(scores, x, table.T, jnp.float32)
        assert best.dtype == np.int32
        np.testing.assert_array_equal(best, np.argmax(scores, axis=1))
        assert best[-1] == 77


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_token_is_always_in_the_vocabulary(backend: str) -> None:
    table, x = random(304, 64), random(3, 64, seed=1)
    x[0], x[1, 3], table[:, 0] = 0, np.nan, 1
    x[2, :2], table[17, 0], table[250, 0] = (np.inf, 0), -1, -1
    name, _ = of(backend)
    scores, best = call("scores", backend, x, mm.pack_table(jnp.asarray(table), name), True)
    assert np.isnan(scores[1]).all()
    assert best[0] == 0
    assert ((best >= 0) & (best < 304)).all()


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
