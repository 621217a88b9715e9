"""Native attention with each set of instructions: what is not a number, what is out of range, and
contexts that several threads share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels import paged_attention as pa
from tests.paged_attention.oracle import NATIVE, Case, bits, check, compiled, make_case, run

needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)
BACKENDS = NATIVE or (pytest.param("cpu", marks=needs_native),)

# A token alone, two tiles of a prompt, and a token whose context is split.
ROWS = [(1, 40), (20, 13), (1, 1100), (3, 600)]
DECODE, PROMPT, LONG, SHORT = 0, 5, 21, 23  # a token of each


def nan_query(case: Case) -> None:
    case.q[[DECODE, PROMPT, LONG, SHORT], 1, 3] = np.nan


def nan_new_key(case: Case) -> None:
    case.k[[DECODE, PROMPT, LONG, SHORT], 0, 3] = np.nan


def nan_old_key(case: Case) -> None:
    for row, position in enumerate((39, 0, 700, 100)):
        block, offset = case.place(row, position)
        case.pool[block, 1, offset, 2] = np.nan


def scores_that_overflow(case: Case) -> None:
    case.q[[DECODE, PROMPT, LONG, SHORT], 1] = 3e38
    case.k[[DECODE, PROMPT, LONG, SHORT], 0] = 10.0


def scores_that_overflow_downwards(case: Case) -> None:
    case.q[[DECODE, PROMPT, LONG, SHORT], 1] = 3e38
    case.k[[DECODE, PROMPT, LONG, SHORT], 0] = -10.0


def nan_new_value(case: Case) -> None:
    case.v[[DECODE, PROMPT, LONG, SHORT], 0, 3] = np.nan


def nan_sink(case: Case) -> None:
    if case.sinks is not None:
        case.sinks[1] = np.nan


SPOILED: list[Callable[[Case], None]] = [
    nan_query,
    nan_new_key,
    nan_old_key,
    nan_new_value,
    scores_that_overflow,
    scores_that_overflow_downwards,
    nan_sink,
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_comes_out_where_the_definition_has_it(
    backend: str, spoil: Callable[[Case], None], softcap: float | None, dtype: str
) -> None:
    """Never a plausible number, and nowhere else: token by token and in tiles."""
    case = make_case(
        ROWS,
        head_dim=32,
        block_size=16,
        dtype=dtype,
        softcap=softcap,
        sinks=spoil is nan_sink,
    )
    if spoil in (scores_that_overflow, scores_that_overflow_downwards):
        # In float32 a sum that has overflown one way and goes on the other depends on its order.
        held = case.held(after=False)[:, None, :, None]
        case.pool[...] = np.where(held, np.abs(case.pool), case.pool)
        case.k[...] = np.abs(case.k)
    spoil(case)
    expected, _ = run(case, "reference")
    out, _ = run(case, backend)
    assert (np.isnan(expected).any()) == (softcap is None or "overflow" not in spoil.__name__)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    finite = ~np.isnan(expected)
    # In bfloat16, of weights and of the output, for sums of up to 4.
    atol = 1e-4 if dtype == "float32" else 2 * 4 * 2.0**-8
    np.testing.assert_allclose(
        out[finite].astype(np.float32), expected[finite].astype(np.float32), rtol=0, atol=atol
    )


@pytest.mark.parametrize("features", [{}, {"sinks": True, "softcap": 2.0, "window": 900}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_contexts_that_are_split_match_the_oracle(backend: str, features: dict[str, Any]) -> None:
    rows = [(1, 511), (1, 512), (1, 1600), (4, 509), (16, 1010), (17, 1010)]
    case = make_case(rows, head_dim=16, ratio=3, block_size=16, num_tokens=45, **features)
    check(case, *run(case, backend))


@pytest.mark.parametrize(
    "features",
    [{}, {"window": 37}, {"sinks": True}, {"softcap": 2.0, "sinks": True, "window": 150}],
    ids=str,
)
@pytest.mark.parametrize(
    ("num_kv_heads", "ratio"), [(3, 1), (2, 2), (3, 3), (5, 4), (2, 7), (2, 8)]
)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_matches_the_oracle_wherever_a_context_ends(
    backend: str, head_dim: int, num_kv_heads: int, ratio: int, features: dict[str, Any]
) -> None:
    """On a tile's edge, a chunk's and a block's, and beside each; in tiles full and not."""
    rows = [(1, 15), (1, 16), (1, 31), (1, 64), (2, 61), (1, 600), (5, 43), (17, 0), (64, 70)]
    case = make_case(
        rows,
        head_dim=head_dim,
        ratio=ratio,
        num_kv_heads=num_kv_heads,
        block_size=32 if head_dim == 96 else 16,
        dtype="bfloat16",
        num_tokens=95,
        **features,
    )
    check(case, *run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_context_gives_the_same_bits_each_time(backend: str) -> None:
    case = make_case([(1, 1600), (2, 3000)], head_dim=16)
    program = compiled(backend)
    first, _ = run(case, backend, program)
    for _ in range(5):
        assert bits(run(case, backend, program)[0]) == bits(first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool_dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 8, 11, 60])
def test_any_number_of_queries_a_head_matches_the_oracle(
    ratio: int, pool_dtype: str, backend: str
) -> None:
    """More than go together, more than a tile has, and what is left over."""
    case = make_case(
        [(1, 40), (5, 3)], head_dim=48, ratio=ratio, num_kv_heads=1, pool_dtype=pool_dtype
    )
    check(case, *run(case, backend))


# Which argument of the call, and what it becomes.
Arguments = dict[str, Any]


def arguments(case: Case) -> Arguments:
    """The call's own arguments, as cpu.attend gives them."""
    ragged = case.ragged()
    return {
        "q": case.q,
        "kv_new": np.concatenate((case.k, case.v), axis=-1),
        "pool": case.pool,
        "token_rows": np.asarray(ragged.token_rows),
        "positions": np.asarray(ragged.positions),
        "query_starts": np.asarray(ragged.query_starts),
        "block_tables": case.block_tables.copy(),
        "first_block": np.int32(case.first_block),
        "window": np.int32(2**31 - 1),
        "sinks": np.zeros(0, np.float32),
        "k_scales": np.zeros(0, np.float32),
        "v_scales": np.zeros(0, np.float32),
    }


def call(given: Arguments, out: Any = None, pool_out: Any = None) -> list[np.ndarray]:
    native.load()
    results = [
        jax.ShapeDtypeStruct(*((array.shape, array.dtype) if other is None else other))
        for array, other in ((given["q"], out), (given["pool"], pool_out))
    ]
    aliases = {2: 1} if pool_out is None else {}
    program = jax.ffi.ffi_call("octavo_attention", results, input_output_aliases=aliases)
    options = {"scale": np.float32(1), "softcap": np.float32(0), "most": np.int32(3)}
    return jax.block_until_ready(program(*map(jnp.asarray, given.values()), **options))


def small() -> Case:
    return make_case([(1, 20), (9, 8)], head_dim=16, num_tokens=12)


@needs_native
@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("q", (12, 4), "other ranks"),
        ("q", (12, 3, 16), "multiple of KV heads"),
        ("q", (12, 0, 16), "multiple of KV heads"),
        ("q", (12, 4, 24), "multiple of 16"),
        ("q", (12, 4, 0), "multiple of 16"),
        ("q", (12, 4, 272), "at most 256"),
        ("q", (11, 4, 16), "new keys and values"),
        ("kv_new", (11, 2, 32), "new keys and values"),
        ("kv_new", (12, 1, 32), "new keys and values"),
        ("kv_new", (12, 2, 16), "new keys and values"),
        ("pool", (12, 2, 0, 32), "blocks hold a token"),
        ("pool", (12, 0, 8, 32), "multiple of KV heads"),
        ("pool", (12, 2, 8, 16), "new keys and values"),
        ("token_rows", (11,), "token_rows and positions"),
        ("positions", (11,), "token_rows and positions"),
        ("query_starts", (2,), "token_rows and positions"),
        ("block_tables", (2,), "other ranks"),
        ("first_block", (0,), "must be scalars"),
        ("window", (2,), "must be scalars"),
        ("sinks", (3,), "sinks must be"),
        ("k_scales", (1,), "sinks must be"),
        ("v_scales", (1,), "sinks must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    name: str, shape: tuple[int, ...], problem: str
) -> None:
    given = arguments(small())
    given[name] = np.zeros(shape, given[name].dtype)
    with pytest.raises(jax.errors.JaxRuntimeError, match=problem):
        call(given)


@needs_native
@pytest.mark.parametrize(
    "out", [((12, 4, 32), jnp.float32), ((12, 4, 16), jnp.bfloat16), ((11, 4, 16), jnp.float32)]
)
def test_an_output_that_does_not_fit_is_refused(out: Any) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="results must have the shapes"):
        call(arguments(small()), out=out)


@needs_native
def test_a_pool_that_is_not_written_in_place_is_refused() -> None:
    given = arguments(small())
    with pytest.raises(jax.errors.JaxRuntimeError, match="written in place"):
        call(given, pool_out=(given["pool"].shape, given["pool"].dtype))


@needs_native
@pytest.mark.parametrize("value", [-1, 10**6, -(2**31), 2**31 - 1])
@pytest.mark.parametrize(
    ("name", "place", "problem"),
    [
        ("block_tables", (0, 0), "block lies outside of the pool"),  # read
        ("block_tables", (0, 2), "block lies outside of the pool"),  # written
        ("block_tables", (1, 1), "block lies outside of the pool"),
        ("first_block", (), "block lies outside of the pool"),
        ("positions", (0,), "position lies outside"),
        ("positions", (9,), "position lies outside"),
        ("token_rows", (0,), "differ about a token's row"),
        ("token_rows", (11,), "differ about a token's row"),  # padding
        ("query_starts", (0,), "must begin with 0"),
        ("query_starts", (1,), "row's tokens lie outside"),
        ("query_starts", (2,), "row's tokens lie outside"),
    ],
)
def test_values_that_are_out_of_range_fail_the_call_before_anything_is_written(
    name: str, place: tuple[int, ...], problem: str, value: int
) -> None:
    given = arguments(small())
    given[name] = given[name].copy()
    if name == "first_block" and value == -1:
        value = -len(given["pool"])
    if (name, place) == ("token_rows", (11,)) and value > 0:
        pytest.skip("any row beyond the last is padding")
    given[name] = np.asarray(given[name])
    given[name][place] = value
    with pytest.raises(jax.errors.JaxRuntimeError, match=problem):
        call(given)


@needs_native
@pytest.mark.parametrize("window", [0, -1, -(2**31)])
def test_a_window_of_nothing_is_refused(window: int) -> None:
    given = arguments(small()) | {"window": np.int32(window)}
    with pytest.raises(jax.errors.JaxRuntimeError, match="window must be at least 1"):
        call(given)


@needs_native
def test_entries_of_a_table_that_no_token_sees_may_be_anything() -> None:
    case = dataclasses.replace(make_case([(1, 40), (3, 37)], head_dim=16, window=9), softcap=None)
    expected, pool = run(case, "cpu")
    tables = case.block_tables.copy()
    tables[:, :3] = -(2**31)  # before the windows, which begin in the fourth block
    given = arguments(case) | {"block_tables": tables, "window": np.int32(9)}
    out, pool_out = call(given | {"q": case.q * np.float32(case.scale)})
    np.testing.assert_allclose(np.asarray(out)[:4], expected[:4], rtol=0, atol=1e-6)
    assert bits(np.asarray(pool_out)) == bits(pool)


@needs_native
def test_instructions_are_for_native_code_alone() -> None:
    case = small()
    work = pa.prepare(case.ragged(), block_size=8, max_query_len=9, backend="cpu")
    q, k, v, pool = map(jnp.asarray, (case.q, case.k, case.v, case.pool))
    for backend, instructions in (("xla", "avx2"), ("cpu", "sse9")):
        chosen: Any = backend
        with pytest.raises(ValueError, match="must be one of portable, avx2, avx512, amx"):
            pa.paged_attention(
                q,
                k,
                v,
                pool,
                work,
                first_block=jnp.int32(0),
                scale=1.0,
                backend=chosen,
                instructions=instructions,
            )
