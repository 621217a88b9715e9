"""The arguments that all backends share: the pool's shape and the ragged batch."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Ragged(NamedTuple):
    """Which token belongs to which sequence, and where its context lies.

    Tokens of a row lie one after the other. Padded tokens have row S; padded rows have
    kv_lens 0 and no tokens. Entries of block_tables beyond a row's context may be anything
    in range.
    """

    token_rows: jax.Array  # int32[T]
    positions: jax.Array  # int32[T]: position in the sequence, 0 …
    query_starts: jax.Array  # int32[S + 1]
    kv_lens: jax.Array  # int32[S]: context, this step's tokens included
    block_tables: jax.Array  # int32[S, P]: blocks of one layer


def kv_pool_shape(
    *, num_layers: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int
) -> tuple[int, int, int, int]:
    """Shape of the flat pool that holds every layer's blocks."""
    return (num_layers * num_blocks, num_kv_heads, block_size, 2 * head_dim)
