"""A bench for the sampler: rows of requests in, sampled tokens and the new state out.

Rows go in as a plan's rows do, through core/batching and the runner's slot state, so that
what a request says and what the device reads are tested as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.core import batching
from engine.core.buckets import Bucket
from engine.model import sampler
from engine.runtime.slots import slot_state
from engine.types import PlanRow, Request, StepPlan
from tests.engines import make_request

NUM_SLOTS = 8  # without the sink


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a step: a request that has generated `history` so far."""

    request: Request
    history: tuple[int, ...] = ()
    slot: int | None = None
    samples: bool = True
    is_new: bool = True  # whether the slot must be set
    allowed: tuple[int, ...] | None = None  # by the row's mask; None if every bit of it is set


@jax.jit
def sample(logits, batch, state, masks):
    best = jnp.argmax(logits, axis=1).astype(jnp.int32)
    return sampler.sample(logits, best, batch.slots, batch.samples, batch.sampling, state, masks)


set_slot = jax.jit(sampler.set_slot)


def choose(
    logits: np.ndarray,
    rows: Sequence[Row],
    *,
    num_seqs: int | None = None,
    num_slots: int = NUM_SLOTS,
    state: sampler.SamplerState | None = None,
) -> tuple[sampler.Sampled, sampler.SamplerState]:
    """Sample a step of one token a row; logits [rows, V] are padded with NaN to `num_seqs`."""
    num_seqs, vocab = num_seqs or len(rows), logits.shape[-1]
    state = state or sampler.initial_state(num_slots + 1, vocab)
    plan_rows = []
    for index, row in enumerate(rows):
        slot = index if row.slot is None else row.slot
        if row.is_new and row.request.sampling.edits_logits:
            new = slot_state(row.request, row.history, vocab)
            state = set_slot(state, np.int32(slot), new)
        plan_rows.append(
            PlanRow(
                row.request,
                slot,
                0,
                1,
                (0,),
                np.zeros(1, np.int32),
                row.samples,
                len(row.history),
                row.history if row.is_new else None,
            )
        )
    plan = StepPlan(0, tuple(plan_rows))
    batch = batching.build(plan, (Bucket(num_seqs, num_seqs, 1),), num_slots)
    padded = np.full((num_seqs, vocab), np.nan, np.float32)
    padded[: len(rows)] = logits
    masks = batching.masks(num_seqs, vocab)
    for mask, row in zip(masks, rows, strict=False):
        if row.allowed is not None:
            bits = np.zeros(32 * mask.size, np.bool_)
            bits[list(row.allowed)] = True
            mask[:] = np.packbits(bits, bitorder="little").view(np.int32)
    sampled, state = sample(padded, batch, state, masks)
    return jax.tree.map(np.asarray, sampled), state


def tokens(logits: np.ndarray, rows: Sequence[Row], **options: Any) -> list[int]:
    """The sampled token of each row."""
    sampled, _ = choose(logits, rows, **options)
    return sampled.token_ids[: len(rows)].tolist()


def random_logits(rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def request(**fields: Any) -> Request:
    """A request with a prompt of tokens 0 to 2, unless `prompt_ids` says otherwise."""
    return make_request("r", fields.pop("prompt_ids", (0, 1, 2)), **fields)
