"""Brings the log-probabilities that a step's requests asked for to the host, and no others."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from engine.model.prompt_logprobs import PromptLogprobs
from engine.model.sampler import Sampled
from engine.types import PlanRow, TokenLogprobs


def of_choices(
    rows: Sequence[PlanRow], token_ids: Sequence[int], sampled: Sampled
) -> dict[int, TokenLogprobs]:
    """By row, those of the token that was chosen and of the likeliest."""
    if all(row.request.num_logprobs is None for row in rows):
        return {}
    values = jax.device_get((sampled.logprobs, sampled.top_ids, sampled.top_logprobs))
    return {
        index: _token_logprobs(token_ids[index], index, count, *values)
        for index, row in enumerate(rows)
        if row.samples and (count := row.request.num_logprobs) is not None
    }


def of_prompts(
    rows: Sequence[PlanRow], computed: PromptLogprobs
) -> dict[int, tuple[TokenLogprobs, ...]]:
    """By row, those of the prompt tokens after the row's positions."""
    if all(row.request.sampling.prompt_logprobs is None for row in rows):
        return {}
    values = jax.device_get(computed)
    found: dict[int, tuple[TokenLogprobs, ...]] = {}
    entry = 0
    for index, row in enumerate(rows):
        count = row.request.sampling.prompt_logprobs
        if count is None:
            continue
        targets = row.request.prompt_ids[row.start + 1 : row.start + row.num_tokens + 1]
        found[index] = tuple(
            _token_logprobs(token, entry + offset, count, *values)
            for offset, token in enumerate(targets)
        )
        entry += len(targets)
    return found


def _token_logprobs(
    token: int,
    index: int,
    count: int,
    chosen: np.ndarray,
    top_ids: np.ndarray,
    top_logprobs: np.ndarray,
) -> TokenLogprobs:
    top = zip(top_ids[index, :count].tolist(), top_logprobs[index, :count].tolist(), strict=True)
    # A vocabulary of fewer tokens than MAX_LOGPROBS is filled up with impossible ones.
    return TokenLogprobs(token, float(chosen[index]), tuple(e for e in top if e[1] > -np.inf))
