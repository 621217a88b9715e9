"""The tests can fail: each of these mistakes in the XLA kernel, and in what stands before every
kernel, is caught by the oracle. `make mutants` runs them.

A mutant is the source itself with one piece replaced. Should a piece no longer occur
exactly once, the test says so: then write the mutant anew.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import xla
from tests.paged_attention.oracle import Case, Expected, check, expect, make_case, run

pytestmark = pytest.mark.mutants

SOURCE, ENTRY = (Path(module.__file__ or "").read_text() for module in (xla, pa))
SMALL = {"DECODE_GROUP": 2, "QUERY_TILE": 4, "DECODE_CHUNK": 16, "PREFILL_CHUNK": 16}

MUTANTS = {
    "a decode sees one position too many": (
        "positions < lens[:, None]",
        "positions <= lens[:, None]",
    ),
    "a decode misses its own position": (
        "positions < lens[:, None]",
        "positions < lens[:, None] - 1",
    ),
    "a prompt sees one position ahead": ("<= seen[:, None]", "<= seen[:, None] + 1"),
    "a prompt misses its own position": ("<= seen[:, None]", "< seen[:, None]"),
    "decodes read the first layer": (
        "first_block + blocks), visible[:, None, None]",
        "blocks), visible[:, None, None]",
    ),
    "prompts read the first layer": (
        "_gather(kv_pool, first_block + blocks),\n",
        "_gather(kv_pool, blocks),\n",
    ),
    "the first layer is written": ("first_block + work.write_blocks", "work.write_blocks"),
    "NaN of blocks that nobody wrote gets in": (
        "kv = jnp.where(jnp.any(visible, axis=-2)[..., None], kv, jnp.zeros((), kv.dtype))",
        "pass",
    ),
    "a tile runs on into the next row": (
        "is_real = tokens < ragged.query_starts[row + 1]",
        "is_real = tokens < num_tokens",
    ),
    "padding is written": ("jnp.where(is_real, write_blocks, -1)", "write_blocks"),
    "a token is written one place on": (
        "write_offsets=ragged.positions % block_size",
        "write_offsets=(ragged.positions + 1) % block_size",
    ),
    "the longest decodes come last": (
        "jnp.argsort(-decode_lens)",
        "jnp.argsort(decode_lens)",
    ),
    "the last group of decodes is left out": (
        "num_groups=-(-num_decodes // group)",
        "num_groups=num_decodes // group",
    ),
    "the last chunk of a decode is left out": ("-(-lens // chunk) -", "lens // chunk -"),
    "the last chunk of a prompt is left out": (
        "jnp.max(seen) // chunk + 1 -",
        "jnp.max(seen) // chunk -",
    ),
    "the last tile of a row is left out": ("-(-query_lens // tile)", "query_lens // tile"),
    "all tiles start at the row": ("(index - (tile_stops - tiles)[tile_rows]) * tile", "0 * index"),
    "tiles belong to the next row": ('side="right"', 'side="left"'),
    "the table ends before its last chunk": (
        "jnp.pad(ragged.block_tables, ((0, 0), (0, padding_blocks)))",
        "ragged.block_tables",
    ),
    "earlier chunks keep their weight": ("total = total * shrink +", "total = total +"),
    "earlier chunks keep their sum": ("acc * shrink + new", "acc + new"),
    "the scale is left out": ("(batch, batch))) * scale", "(batch, batch)))"),
    "keys are taken for values": ("acc[..., width // 2 :]", "acc[..., : width // 2]"),
    "heads of a block change places": (
        "blocks[..., None, :] * num_kv_heads + heads",
        "blocks[..., None, :] * num_kv_heads + (num_kv_heads - 1 - heads)",
    ),
}

FEATURE_MUTANTS = {
    "the window is one too wide": (
        "maximum(lens - options.window, 0)",
        "maximum(lens - options.window - 1, 0)",
    ),
    "the window is one too narrow": (
        "maximum(lens - options.window, 0)",
        "maximum(lens - options.window + 1, 0)",
    ),
    "decodes see before their window": (
        """            visible = positions < lens[:, None]
            if options.window is not None:""",
        """            visible = positions < lens[:, None]
            if False:""",
    ),
    "prompts see before their window": (
        """            visible = positions <= seen[:, None]  # [tile, C]
            if options.window is not None:""",
        """            visible = positions <= seen[:, None]  # [tile, C]
            if False:""",
    ),
    "a tile's window is that of its last token": ("start[0] // chunk", "start.max() // chunk"),
    "decodes skip one chunk too many": ("= start // chunk  #", "= start // chunk + 1  #"),
    "prompts skip one chunk too many": ("start[0] // chunk  #", "start[0] // chunk + 1  #"),
    "decodes take the first row's window": (
        "= start // chunk  #",
        "= 0 * start + start[0] // chunk  #",
    ),
    "the number of chunks is the first row's": (
        "num_chunks = jnp.max(-(-lens // chunk) - first_chunk)",
        "num_chunks = (-(-lens // chunk) - first_chunk)[0]",
    ),
    "skipped chunks are counted twice": (
        "num_chunks = jnp.max(seen) // chunk + 1 - first_chunk",
        "num_chunks = jnp.max(seen) // chunk + 1 - 2 * first_chunk",
    ),
    "the soft cap is left out": ("if options.softcap is not None:", "if False:"),
    "the soft cap does not scale back": ("options.softcap * jnp.tanh", "jnp.tanh"),
    "sinks are left out": ("if options.sinks is None:", "if True:"),
    "sinks weigh nothing": (
        "total = jnp.ones((*lead, 1), jnp.float32)",
        "total = jnp.zeros((*lead, 1), jnp.float32)",
    ),
    "sinks of a KV head change places": (
        "(num_kv_heads, 1, -1))",
        "(num_kv_heads, 1, -1))[..., ::-1]",
    ),
    "a tile's sinks go by token instead of by head": (
        "(*lead[:-1], repeats, sinks.shape[-1])).reshape(*lead, 1)",
        "(*lead[:-1], repeats, sinks.shape[-1])).swapaxes(-1, -2).reshape(*lead, 1)",
    ),
    "the scale of keys is left out": ("if options.k_scales is not None:", "if False:"),
    "the scale of values is left out": ("if options.v_scales is None", "if True"),
    "keys take the scale of values": (
        "by_kv_head(options.k_scales)",
        "by_kv_head(options.v_scales)",
    ),
    "values take the scale of keys": (
        "by_kv_head(options.v_scales)",
        "by_kv_head(options.k_scales)",
    ),
    "the bits of float8 are read as numbers": ("from_bits(kv).astype", "kv.astype"),
    "queries are rounded to 8 bits": (
        "q.astype(product_dtype(kv_pool.dtype))",
        "q.astype(kv_pool.dtype).astype(product_dtype(kv_pool.dtype))",
    ),
}

# Mistakes in the entry that all backends share.
ENTRY_MUTANTS = {
    "keys are not scaled": (
        "quantise(k_TKH, cache_dtype, k_scales)",
        "quantise(k_TKH, cache_dtype)",
    ),
    "values are not scaled": (
        "quantise(v_TKH, cache_dtype, v_scales)",
        "quantise(v_TKH, cache_dtype)",
    ),
    "values are scaled as keys": (
        "quantise(v_TKH, cache_dtype, v_scales)",
        "quantise(v_TKH, cache_dtype, k_scales)",
    ),
    "scales multiply instead of dividing": ("(1.0 / scales_K)", "scales_K"),
    "nothing is clipped": ("x = jnp.clip(x, float(limits.min), float(limits.max))", "pass"),
    "int8 cuts off instead of rounding": ("jnp.round(x)", "jnp.trunc(x)"),
    "int8 rounds up": ("jnp.round(x)", "jnp.ceil(x)"),
    "the bits of float8 are taken for numbers": (
        "kv_new = jax.lax.bitcast_convert_type(kv_new, kv_pool.dtype)",
        "kv_new = kv_new.astype(kv_pool.dtype)",
    ),
    "the scales change places": (
        "k_scales, v_scales = (None, None)",
        "v_scales, k_scales = (None, None)",
    ),
}

# Rows that cross tiles, groups, chunks and blocks, in a layer that is not the first.
ROWS = [
    [(1, 37), (6, 10), (1, 0), (9, 15), (1, 16), (5, 0)],
    [(3, 0), (1, 1), (1, 15), (1, 66)],
    [(13, 20)],
]
FEATURES: list[dict[str, Any]] = [
    {"window": 5, "softcap": 1.5, "sinks": True},
    {"window": 17},
    {"pool_dtype": "int8", "sinks": True},
    {"pool_dtype": "float8_e4m3fn", "kv_scales": True},
]


def make(rows: list[tuple[int, int]], seed: int, **options: Any) -> tuple[Case, Expected]:
    case = make_case(
        rows, num_tokens=26, num_seqs=7, table_width=9, num_blocks=24, seed=seed, **options
    )
    return case, expect(case)


@pytest.fixture(scope="module")
def plain_cases() -> list[tuple[Case, Expected]]:
    return [make(rows, seed) for seed, rows in enumerate(ROWS)]


@pytest.fixture(scope="module")
def feature_cases() -> list[tuple[Case, Expected]]:
    return [make(ROWS[0], seed, **options) for seed, options in enumerate(FEATURES)]


@pytest.fixture
def kernel() -> Iterator[types.ModuleType]:
    """A copy of the kernel that stands in for it, to be executed by the test."""
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("mutant")
        patch.setitem(sys.modules, xla.__name__, module)
        yield module


def execute(source: str, module: types.ModuleType) -> None:
    exec(compile(source, "mutant of xla.py", "exec"), module.__dict__)
    module.__dict__.update(SMALL)


def mutate(source: str, right: str, wrong: str) -> str:
    assert source.count(right) == 1, f"{right!r} is not in the source once; renew this mutant"
    return source.replace(right, wrong)


def check_all(cases: list[tuple[Case, Expected]]) -> None:
    for case, expected in cases:
        check(case, *run(case, "xla"), expected)


def test_the_kernel_itself_passes(
    plain_cases: list[tuple[Case, Expected]],
    feature_cases: list[tuple[Case, Expected]],
    kernel: types.ModuleType,
) -> None:
    execute(SOURCE, kernel)
    check_all(plain_cases + feature_cases)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_caught(
    name: str, plain_cases: list[tuple[Case, Expected]], kernel: types.ModuleType
) -> None:
    execute(mutate(SOURCE, *MUTANTS[name]), kernel)
    with pytest.raises(AssertionError):
        check_all(plain_cases)


@pytest.mark.parametrize("name", FEATURE_MUTANTS)
def test_a_mistake_in_a_feature_is_caught(
    name: str, feature_cases: list[tuple[Case, Expected]], kernel: types.ModuleType
) -> None:
    execute(mutate(SOURCE, *FEATURE_MUTANTS[name]), kernel)
    with pytest.raises(AssertionError):
        check_all(feature_cases)


@pytest.mark.parametrize("name", ["no mistake", *ENTRY_MUTANTS])
def test_a_mistake_before_the_kernel_is_caught(
    name: str, feature_cases: list[tuple[Case, Expected]], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = types.ModuleType(pa.__name__)
    source = mutate(ENTRY, *ENTRY_MUTANTS[name]) if name in ENTRY_MUTANTS else ENTRY
    exec(compile(source, "mutant of __init__.py", "exec"), entry.__dict__)
    monkeypatch.setattr(pa, "paged_attention", entry.paged_attention)
    narrow = [pair for pair in feature_cases if pair[0].kv_scales is not None]
    if name == "no mistake":
        check_all(narrow)
        return
    with pytest.raises(AssertionError):
        check_all(narrow)
