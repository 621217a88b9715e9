"""Random ragged batches of one static shape, so that one program serves them all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from pallas_kernels.paged_attention import xla
from tests.paged_attention.oracle import Case, make_case

MAX_SEQS, MAX_TOKENS, WIDTH, NUM_BLOCKS, BLOCK_SIZE = 6, 24, 5, 40, 8
MAX_LENGTH = WIDTH * BLOCK_SIZE


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Rows of (new tokens, context before), empty ones among them, that fit the shapes."""
    rows, left = [], MAX_TOKENS
    for _ in range(draw(st.integers(0, MAX_SEQS))):
        new = draw(st.one_of(st.just(min(1, left)), st.integers(0, left)))
        rows.append((new, draw(st.integers(0, MAX_LENGTH - new)) if new else 0))
        left -= new
    return rows


def random_case(rows: list[tuple[int, int]], seed: int, layer: int = 1, **options: Any) -> Case:
    """The case of a random batch; options as of `make_case`."""
    return make_case(
        rows,
        block_size=BLOCK_SIZE,
        num_tokens=MAX_TOKENS,
        num_seqs=MAX_SEQS,
        num_blocks=NUM_BLOCKS,
        table_width=WIDTH,
        num_layers=2,
        layer=layer,
        seed=seed,
        **options,
    )


def shrink_tiles(patch: pytest.MonkeyPatch) -> None:
    """Groups, tiles and chunks so small that a random batch crosses many of their edges."""
    patch.setattr(xla, "DECODE_GROUP", 2)
    patch.setattr(xla, "QUERY_TILE", 4)
    patch.setattr(xla, "DECODE_CHUNK", 16)
    patch.setattr(xla, "PREFILL_CHUNK", 8)
