"""Log-probabilities of the prompt's own tokens, for the few requests that ask for them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engine.core.batching import Batch
from engine.model import sampler
from engine.model.decoder import Decoder
from engine.sampling import MAX_LOGPROBS

ROWS = 16  # prompt positions whose logits are computed at a time


class PromptLogprobs(NamedTuple):
    """Entry i belongs to the batch's prompt_indices[i]; K = MAX_LOGPROBS."""

    logprobs: jax.Array  # float32[T]: of the prompt's next tokens
    top_ids: jax.Array  # int32[T, K]: likeliest first
    top_logprobs: jax.Array  # float32[T, K]


def prompt_logprobs(model: Decoder, hidden_TD: jax.Array, batch: Batch) -> PromptLogprobs:
    """Log-probabilities of prompt tokens, a few positions at a time; free if nobody asked."""
    num_tokens = hidden_TD.shape[0]
    rows = min(ROWS, num_tokens)
    padding = -num_tokens % rows
    indices = jnp.pad(batch.prompt_indices, (0, padding))
    targets = jnp.pad(batch.prompt_targets, (0, padding))

    def some_rows(step, out):
        start = step * rows
        index = jax.lax.dynamic_slice_in_dim(indices, start, rows)
        target = jax.lax.dynamic_slice_in_dim(targets, start, rows)
        new = sampler.token_logprobs(model.logits(hidden_TD[index])[0], target)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(array, part, start, 0)
            for array, part in zip(out, new, strict=True)
        )

    out = (
        jnp.zeros(num_tokens + padding, jnp.float32),
        jnp.zeros((num_tokens + padding, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((num_tokens + padding, MAX_LOGPROBS), jnp.float32),
    )
    steps = -(-batch.num_prompt_logprobs // rows)
    # The condition keeps XLA from moving the logits in front of the loop; see sampler.sample.
    out = jax.lax.cond(
        steps > 0,
        lambda out: jax.lax.fori_loop(0, steps, some_rows, out),
        lambda out: out,
        out,
    )
    return PromptLogprobs(*(array[:num_tokens] for array in out))
