"""From a plan to a padded batch, in one of the shapes of `buckets`.

The only file that pads. Everything is NumPy; a batch depends on its plan alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from engine.core.buckets import Bucket
from engine.types import PlanRow, SamplerRow, StepPlan

Array = Any  # of a batch: numpy.ndarray on the host, jax.Array inside a compiled step

UNKNOWN_TOKEN = -1  # in Batch.token_ids: the token that the row's slot sampled last


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each row of a batch chooses its token. Rows not in `special_rows` are greedy.

    Arrays: S rows; padded ones hold neutral values.
    """

    special_rows: Array  # int32[S]: rows that need more than an argmax, then padding
    num_special: Array  # int32[]: how many of them count
    temperature: Array  # float32[S]: 0 is greedy
    top_k: Array  # int32[S]: 0 is off
    top_p: Array  # float32[S]
    min_p: Array  # float32[S]
    repetition_penalty: Array  # float32[S]
    presence_penalty: Array  # float32[S]
    frequency_penalty: Array  # float32[S]
    edits: Array  # bool[S]: penalties, bias and bad words of the slot apply
    bans_stops: Array  # bool[S]: the slot's stop tokens can't be chosen yet
    wants_logprobs: Array  # bool[S]
    constrained: Array  # bool[S]: the row's mask says which tokens can be chosen
    seeds: Array  # uint32[S, 2]: low and high word
    output_positions: Array  # int32[S]: tokens generated before this one, if any row is special


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One step in static shapes, ready for the device: NumPy on the host, jax inside jit.

    Rows are sequences; their tokens lie one after the other. Padded tokens belong to row S,
    padded rows have no tokens and no context, and use the sink slot R - 1. Rows that only
    sample come after those with tokens, and have none and no context either.
    """

    token_ids: Array  # int32[T]; -1: what the row's slot sampled last
    positions: Array  # int32[T]: position in the sequence
    token_rows: Array  # int32[T]
    query_starts: Array  # int32[S + 1]: row i has tokens query_starts[i : i + 2]
    kv_lens: Array  # int32[S]: context after this step's writes, 0 for padding
    block_tables: Array  # int32[S, P]: physical blocks, 0 beyond the context
    slots: Array  # int32[S]
    samples: Array  # bool[S]: whether the row chooses a new token
    logits_tokens: Array  # int32[S]: which of the T tokens' logits it chooses from
    prompt_indices: Array  # int32[T]: which of the T tokens want prompt log-probabilities
    prompt_targets: Array  # int32[T]: the prompt token after each of them
    num_prompt_logprobs: Array  # int32[]: how many entries of the two count
    sampling: SamplingBatch


def choose_bucket(plan: StepPlan, buckets: tuple[Bucket, ...]) -> Bucket:
    """The first bucket that holds the plan; a decode bucket only takes single tokens."""
    lengths, num_seqs = [row.num_tokens for row in plan.rows], len(plan.rows)
    num_tokens, decodes_only = sum(lengths), max(lengths) <= 1
    for bucket in buckets:
        fits = bucket.num_tokens >= num_tokens and bucket.num_seqs >= num_seqs
        if fits and (decodes_only or bucket.num_tokens > bucket.num_seqs):
            return bucket
    raise AssertionError(f"{num_tokens} tokens of {num_seqs} sequences fit none of {buckets}")


def bucket_of(batch: Batch) -> Bucket:
    """The bucket that a batch was laid out in."""
    return Bucket(batch.token_ids.size, batch.slots.size, batch.block_tables.shape[1])


def build(plan: StepPlan, buckets: tuple[Bucket, ...], sink_slot: int) -> Batch:
    """Lay a plan out in the smallest bucket that holds it.

    Args:
      plan: at least one row.
      buckets: as from `bucket_set`.
      sink_slot: the device state's last row, where padded rows write.
    """
    bucket = choose_bucket(plan, buckets)
    batch = empty(bucket, sink_slot)
    rows, num_rows = plan.rows, len(plan.rows)
    columns = zip(*rows, strict=True)
    _, slots, row_starts, lengths, chunks, tables, samples, positions, _, logits_of = columns
    start = np.array(row_starts, np.int32)
    length = np.array(lengths, np.int32)

    starts = batch.query_starts
    np.cumsum(length, out=starts[1 : num_rows + 1])
    total = int(starts[num_rows])
    starts[num_rows + 1 :] = total
    batch.token_rows[:total] = np.repeat(np.arange(num_rows, dtype=np.int32), length)
    first_position = np.repeat(start - starts[:num_rows], length)
    batch.positions[:total] = np.arange(total, dtype=np.int32) + first_position
    batch.token_ids[:total] = UNKNOWN_TOKEN
    for index, chunk in enumerate(chunks):
        if chunk:
            batch.token_ids[starts[index] : starts[index] + len(chunk)] = chunk
    batch.kv_lens[:num_rows] = np.where(length > 0, start + length, 0)
    sizes = np.array([table.size for table in tables])  # one store for all, as each has its price
    firsts = np.arange(num_rows) * bucket.num_blocks - np.cumsum(sizes) + sizes
    places = np.arange(sizes.sum()) + np.repeat(firsts, sizes)
    batch.block_tables.reshape(-1)[places] = np.concatenate(tables)
    batch.slots[:num_rows] = slots
    batch.samples[:num_rows] = samples
    last = starts[1:] - 1
    batch.logits_tokens[:num_rows] = last[:num_rows]
    if logits_of[-1] is not None:  # rows that part from others come last
        sources = [index if of is None else of for index, of in enumerate(logits_of)]
        batch.logits_tokens[:num_rows] = last[sources]
    return _fill_sampling(batch, rows, starts, positions)


def empty(bucket: Bucket, sink_slot: int) -> Batch:
    """A batch of padding only, for compiling and warming up."""
    num_tokens, num_seqs, num_blocks = bucket
    return Batch(
        token_ids=np.zeros(num_tokens, np.int32),
        positions=np.zeros(num_tokens, np.int32),
        token_rows=np.full(num_tokens, num_seqs, np.int32),
        query_starts=np.zeros(num_seqs + 1, np.int32),
        kv_lens=np.zeros(num_seqs, np.int32),
        block_tables=np.zeros((num_seqs, num_blocks), np.int32),
        slots=np.full(num_seqs, sink_slot, np.int32),
        samples=np.zeros(num_seqs, np.bool_),
        logits_tokens=np.zeros(num_seqs, np.int32),
        prompt_indices=np.zeros(num_tokens, np.int32),
        prompt_targets=np.zeros(num_tokens, np.int32),
        num_prompt_logprobs=np.zeros((), np.int32),
        sampling=neutral_sampling(num_seqs),
    )


def masks(num_seqs: int, vocab_size: int) -> np.ndarray:
    """int32[S, ceil(V / 32)]: one bit for each token that a row may choose, all of them set."""
    return np.full((num_seqs, -(-vocab_size // 32)), -1, np.int32)


def _fill_sampling(
    batch: Batch, rows: tuple[PlanRow, ...], starts: np.ndarray, positions: tuple[int, ...]
) -> Batch:
    """What the rows ask of the sampler; those that need no more than an argmax cost nothing."""
    asking = [index for index, row in enumerate(rows) if row.request.sampler_row is not None]
    for index in asking:
        if rows[index].request.sampling.prompt_logprobs is not None:
            _add_prompt_targets(batch, rows[index], int(starts[index]))
    special = np.array([index for index in asking if rows[index].samples], np.intp)
    if not special.size:
        return batch
    fields = dataclasses.fields(SamplingBatch)
    sampling = SamplingBatch(*(np.array(getattr(batch.sampling, each.name)) for each in fields))
    sampling.output_positions[: len(rows)] = positions
    sampling.special_rows[: special.size] = special
    sampling.num_special[...] = special.size
    # One array for all rows, then by column: stores of single numbers would cost more.
    sampler_rows = [rows[index].request.sampler_row or () for index in special]
    numbers = np.fromiter(itertools.chain.from_iterable(sampler_rows), np.float64)
    by_field = dict(zip(SamplerRow._fields, numbers.reshape(special.size, -1).T, strict=True))
    for name, values in by_field.items():
        match name:
            case "min_tokens":
                sampling.bans_stops[special] = sampling.output_positions[special] < values
            case "seed_low":
                sampling.seeds[special, 0] = values
            case "seed_high":
                sampling.seeds[special, 1] = values
            case _:
                getattr(sampling, name)[special] = values
    return dataclasses.replace(batch, sampling=sampling)


def _add_prompt_targets(batch: Batch, row: PlanRow, first_index: int) -> None:
    """List the row's positions whose next token belongs to the prompt."""
    targets = row.request.prompt_ids[row.start + 1 : row.start + row.num_tokens + 1]
    done = int(batch.num_prompt_logprobs)
    stop = done + len(targets)
    batch.prompt_indices[done:stop] = np.arange(first_index, first_index + len(targets))
    batch.prompt_targets[done:stop] = targets
    batch.num_prompt_logprobs[...] = stop


@functools.cache
def neutral_sampling(num_seqs: int) -> SamplingBatch:
    """Every row greedy, nothing asked for: the same object for all such batches, read-only."""
    sampling = SamplingBatch(
        special_rows=np.full(num_seqs, num_seqs - 1, np.int32),
        num_special=np.zeros((), np.int32),
        temperature=np.zeros(num_seqs, np.float32),
        top_k=np.zeros(num_seqs, np.int32),
        top_p=np.ones(num_seqs, np.float32),
        min_p=np.zeros(num_seqs, np.float32),
        repetition_penalty=np.ones(num_seqs, np.float32),
        presence_penalty=np.zeros(num_seqs, np.float32),
        frequency_penalty=np.zeros(num_seqs, np.float32),
        edits=np.zeros(num_seqs, np.bool_),
        bans_stops=np.zeros(num_seqs, np.bool_),
        wants_logprobs=np.zeros(num_seqs, np.bool_),
        constrained=np.zeros(num_seqs, np.bool_),
        seeds=np.zeros((num_seqs, 2), np.uint32),
        output_positions=np.zeros(num_seqs, np.int32),
    )
    for field in dataclasses.fields(sampling):
        getattr(sampling, field.name).flags.writeable = False
    return sampling
