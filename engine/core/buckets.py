"""The closed set of static shapes that steps may have, known before the first of them."""

from __future__ import annotations

from typing import NamedTuple

from engine.config import BucketConfig, SchedulerConfig


class Bucket(NamedTuple):
    """The static shape of a compiled step: T tokens, S sequences, P block-table columns."""

    num_tokens: int
    num_seqs: int
    num_blocks: int


def bucket_set(
    buckets: BucketConfig, scheduler: SchedulerConfig, num_blocks: int
) -> tuple[Bucket, ...]:
    """Every shape that a step can take, the cheapest first.

    A decode bucket has as many tokens as sequences, and its program may count on one token a
    row. A prefill bucket has more tokens than sequences: of the sizes asked for, those that do.

    Args:
      buckets: sizes as configured; where it is empty, powers of four up to the limits.
      scheduler: the limits.
      num_blocks: width of the block tables, which is that of the longest sequence.
    """
    max_seqs, max_tokens = scheduler.max_num_seqs, scheduler.max_step_tokens
    decode_seqs = buckets.decode_seqs or _powers_of_four(1, max_seqs)
    prefill_tokens = buckets.prefill_tokens or _powers_of_four(32, max_tokens)
    prefill_seqs = buckets.prefill_seqs or _powers_of_four(16, max_seqs)
    decode = {Bucket(seqs, seqs, num_blocks) for seqs in decode_seqs}
    prefill = {
        Bucket(tokens, seqs, num_blocks)
        for tokens in prefill_tokens
        for seqs in prefill_seqs
        if tokens > seqs
    }
    # A step of single tokens fits the largest decode bucket, as decode_seqs ends at
    # max_num_seqs. Any other fits this one, which has a token more than sequences, lest it be a
    # decode bucket.
    if max_tokens > 1:
        prefill.add(Bucket(max(max_tokens, max_seqs + 1), max_seqs, num_blocks))
    return tuple(sorted(decode | prefill))


def _powers_of_four(first: int, last: int) -> tuple[int, ...]:
    """first, 4 x first, …, last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 4
    return (*sizes, last)
