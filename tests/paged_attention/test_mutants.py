"""The tests can fail: each of these mistakes in the XLA kernel is caught by the oracle.

A mutant is the kernel's own source with one piece replaced. Should a piece no longer occur
exactly once, the test says so: then write the mutant anew.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import xla
from tests.paged_attention.oracle import Case, Expected, check, expect, make_case, run

SOURCE = Path(xla.__file__).read_text()
SMALL = {"DECODE_GROUP": 2, "QUERY_TILE": 4, "DECODE_CHUNK": 16, "PREFILL_CHUNK": 16}

MUTANTS = {
    "a decode sees one position too many": (
        "arange(chunk)[None] < lens",
        "arange(chunk)[None] <= lens",
    ),
    "a decode misses its own position": (
        "arange(chunk)[None] < lens[:, None]",
        "arange(chunk)[None] < lens[:, None] - 1",
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
    "the shortest decode sets the length of its group": (
        "jnp.argsort(-decode_lens)",
        "jnp.argsort(decode_lens)",
    ),
    "the last group of decodes is left out": (
        "num_groups=-(-num_decodes // group)",
        "num_groups=num_decodes // group",
    ),
    "the last chunk of a decode is left out": ("-(-lens[0] // chunk)", "lens[0] // chunk"),
    "the last chunk of a prompt is left out": (
        "jnp.max(seen) // chunk + 1",
        "jnp.max(seen) // chunk",
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

# Rows that cross tiles, groups, chunks and blocks, in a layer that is not the first.
ROWS = [
    [(1, 37), (6, 10), (1, 0), (9, 15), (1, 16), (5, 0)],
    [(3, 0), (1, 1), (1, 15), (1, 66)],
    [(13, 20)],
]


@pytest.fixture(scope="module")
def cases() -> list[tuple[Case, Expected]]:
    made = [
        make_case(rows, num_tokens=26, num_seqs=7, table_width=9, num_blocks=24, seed=seed)
        for seed, rows in enumerate(ROWS)
    ]
    return [(case, expect(case)) for case in made]


@pytest.fixture
def kernel() -> Iterator[types.ModuleType]:
    """A copy of the kernel that stands in for it, to be executed by the test."""
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("mutant")
        patch.setitem(pa._BACKENDS, "xla", module)
        yield module


def execute(source: str, module: types.ModuleType) -> None:
    exec(compile(source, "mutant of xla.py", "exec"), module.__dict__)
    module.__dict__.update(SMALL)


def check_all(cases: list[tuple[Case, Expected]]) -> None:
    for case, expected in cases:
        check(case, *run(case, "xla"), expected)


def test_the_kernel_itself_passes(
    cases: list[tuple[Case, Expected]], kernel: types.ModuleType
) -> None:
    execute(SOURCE, kernel)
    check_all(cases)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_caught(
    name: str, cases: list[tuple[Case, Expected]], kernel: types.ModuleType
) -> None:
    right, wrong = MUTANTS[name]
    assert SOURCE.count(right) == 1, f"{right!r} is not in the kernel once; renew this mutant"
    execute(SOURCE.replace(right, wrong), kernel)
    with pytest.raises(AssertionError):
        check_all(cases)
