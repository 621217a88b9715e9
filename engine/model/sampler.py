"""From logits to tokens, on the device, row by row.

Every row has its best token already. Only *special* rows get more: a loop whose trip count is their
number edits logits, filters and draws, so a row that asks for nothing pays for nothing, and
nobody pays for a sort over the vocabulary: thresholds are found by bisection instead.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engine.core.batching import Array, SamplingBatch
from engine.sampling import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGPROBS

MAX_STOP_IDS = 32  # a request's stop tokens and the model's own
BANNED = -1e30  # finite, so that a row whose every token is banned still has a softmax
NOT_ALLOWED = -1e33  # below BANNED: where all that is allowed is banned, it is chosen from
EXCLUDED = -1e36  # by a mask: no bias, no penalty and no ban brings another token this low


class SamplerState(NamedTuple):
    """What the sampler remembers of each slot; R slots, the last takes what padding writes.

    `recent` holds for every slot; the others only for slots whose request edits logits.
    """

    recent: jax.Array  # int32[R, MAX_BAD_WORD_TOKENS]: the last tokens generated, -1 before
    output_counts: jax.Array  # int32[R, V]: how often each token was generated
    in_prompt: jax.Array  # bool[R, V]
    bias: jax.Array  # float32[R, V]: logit bias; NOT_ALLOWED where a token isn't
    bad_words: jax.Array  # int32[R, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS]: right-aligned, -1 padded
    stop_ids: jax.Array  # int32[R, MAX_STOP_IDS]: V pads


class SlotState(NamedTuple):
    """One slot's row of a `SamplerState`, as the host sets it when a request gets the slot."""

    recent: Array
    output_counts: Array
    in_prompt: Array
    bias: Array
    bad_words: Array
    stop_ids: Array


class Sampled(NamedTuple):
    """What a step gives back to the host; K = MAX_LOGPROBS."""

    token_ids: jax.Array  # int32[S]
    logprobs: jax.Array  # float32[S]: of the chosen tokens
    top_ids: jax.Array  # int32[S, K]: likeliest first
    top_logprobs: jax.Array  # float32[S, K]


def initial_state(num_slots: int, vocab_size: int) -> SamplerState:
    """The state before any request; `num_slots` counts the sink."""
    return SamplerState(
        recent=jnp.full((num_slots, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
        output_counts=jnp.zeros((num_slots, vocab_size), jnp.int32),
        in_prompt=jnp.zeros((num_slots, vocab_size), jnp.bool_),
        bias=jnp.zeros((num_slots, vocab_size), jnp.float32),
        bad_words=jnp.full((num_slots, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
        stop_ids=jnp.full((num_slots, MAX_STOP_IDS), vocab_size, jnp.int32),
    )


def set_slot(state: SamplerState, slot: jax.Array, row: SlotState) -> SamplerState:
    """Set one slot; donate the state."""
    return SamplerState(*(array.at[slot].set(new) for array, new in zip(state, row, strict=True)))


def sample(
    logits_SV: jax.Array,
    best: jax.Array,
    slots: jax.Array,
    samples: jax.Array,
    batch: SamplingBatch,
    state: SamplerState,
    masks: jax.Array,
) -> tuple[Sampled, SamplerState]:
    """Choose a token for every row and remember it in the row's slot.

    Args:
      logits_SV: float32[S, V].
      best: int32[S], each row's best token, which plain rows take.
      slots: int32[S].
      samples: bool[S]; other rows' tokens are not remembered.
      batch: how each row chooses.
      state: donate it.
      masks: int32[S, ceil(V / 32)]: what constrained rows may choose from; see `Matcher.fill`.

    Returns:
      The tokens, with log-probabilities where asked for.
    """
    num_seqs = logits_SV.shape[0]
    result = Sampled(
        token_ids=best,
        logprobs=jnp.zeros(num_seqs, jnp.float32),
        top_ids=jnp.zeros((num_seqs, MAX_LOGPROBS), jnp.int32),
        top_logprobs=jnp.zeros((num_seqs, MAX_LOGPROBS), jnp.float32),
    )

    def one_row(index, result: Sampled) -> Sampled:
        row = batch.special_rows[index]
        raw = logits_SV[row]
        logits = jax.lax.cond(
            batch.edits[row],
            lambda: _edit(raw, row, slots[row], batch, state),
            lambda: raw,
        )
        logits = jax.lax.cond(
            batch.constrained[row],
            lambda: jnp.where(_allowed(masks[row], raw.size), logits, EXCLUDED),
            lambda: logits,
        )
        token = jax.lax.cond(
            batch.temperature[row] > 0.0,
            lambda: _draw(logits, row, batch),
            lambda: jnp.argmax(logits).astype(jnp.int32),
        )
        result = result._replace(token_ids=result.token_ids.at[row].set(token))

        def with_logprobs(result: Sampled) -> Sampled:
            chosen, top_ids, top = token_logprobs(raw[None], token[None])
            return result._replace(
                logprobs=result.logprobs.at[row].set(chosen[0]),
                top_ids=result.top_ids.at[row].set(top_ids[0]),
                top_logprobs=result.top_logprobs.at[row].set(top[0]),
            )

        return jax.lax.cond(batch.wants_logprobs[row], with_logprobs, lambda r: r, result)

    # Without the condition, XLA moves what doesn't depend on the loop's index in front of the
    # loop, and with a single row that is everything: plain rows would pay for it.
    result = jax.lax.cond(
        batch.num_special > 0,
        lambda result: jax.lax.fori_loop(0, batch.num_special, one_row, result),
        lambda result: result,
        result,
    )
    return result, _remember(state, slots, samples, result.token_ids)


def token_logprobs(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of each row's target and of its likeliest tokens.

    Args:
      logits: float32[rows, V].
      targets: int32[rows].

    Returns:
      float32[rows], int32[rows, MAX_LOGPROBS] and float32[rows, MAX_LOGPROBS].
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    num_top = min(MAX_LOGPROBS, logits.shape[-1])
    top, top_ids = jax.lax.top_k(logits, num_top)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1) - total
    widen = ((0, 0), (0, MAX_LOGPROBS - num_top))
    return (
        chosen[:, 0],
        jnp.pad(top_ids.astype(jnp.int32), widen),
        jnp.pad(top - total, widen, constant_values=-jnp.inf),
    )


def _allowed(mask: jax.Array, vocab_size: int) -> jax.Array:
    """A packed mask as bool[V]."""
    bits = jnp.right_shift(mask[:, None], jnp.arange(32, dtype=jnp.int32)[None]) & 1
    return bits.reshape(-1)[:vocab_size] == 1


def _edit(logits, row, slot, batch: SamplingBatch, state: SamplerState) -> jax.Array:
    """Penalties, bias and bans of one row, float32[V]."""
    counts = state.output_counts[slot]
    seen = state.in_prompt[slot] | (counts > 0)
    penalty = batch.repetition_penalty[row]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
    logits = logits - batch.presence_penalty[row] * (counts > 0).astype(jnp.float32)
    logits = logits - batch.frequency_penalty[row] * counts.astype(jnp.float32)
    logits = logits + state.bias[slot]

    # A bad word bans its last token where the tokens before it were just generated. Words are
    # right-aligned, so all but the last column lies over the end of the output.
    words = state.bad_words[slot]
    before, last = words[:, :-1], words[:, -1]
    recent = state.recent[slot][None, 1:]
    matches = jnp.all((before < 0) | (before == recent), axis=-1) & (last >= 0)
    vocab_size = logits.shape[0]
    logits = logits.at[jnp.where(matches, last, vocab_size)].min(BANNED, mode="drop")
    stops = jnp.where(batch.bans_stops[row], state.stop_ids[slot], vocab_size)
    return logits.at[stops].min(BANNED, mode="drop")


def _draw(logits, row, batch: SamplingBatch) -> jax.Array:
    """Filter one row and draw from what is left, int32[]."""
    weights = jnp.exp((logits - jnp.max(logits)) / batch.temperature[row])  # the best has 1
    weights = jnp.where(weights >= batch.min_p[row], weights, 0.0)
    top_k = batch.top_k[row]
    weights = jax.lax.cond(
        top_k > 0,
        lambda w: _keep(w, lambda kept: jnp.sum(kept > 0, dtype=jnp.int32) >= top_k),
        lambda w: w,
        weights,
    )
    top_p = batch.top_p[row]
    weights = jax.lax.cond(
        top_p < 1.0,
        lambda w: _keep(w, lambda kept: jnp.sum(kept) >= top_p * jnp.sum(w)),
        lambda w: w,
        weights,
    )
    key = jax.random.wrap_key_data(batch.seeds[row], impl="threefry2x32")
    key = jax.random.fold_in(key, batch.output_positions[row])
    return _pick(weights, jax.random.uniform(key))


def _keep(weights, is_enough) -> jax.Array:
    """The weights not below the highest threshold that keeps enough of them; others are 0.

    Non-negative floats order as their bits do, so 31 halvings find the threshold exactly.
    Weights equal to it are all kept. `is_enough` takes the kept weights.
    """

    def try_bit(index, threshold):
        candidate = threshold | jnp.left_shift(jnp.int32(1), 30 - index)
        value = jax.lax.bitcast_convert_type(candidate, jnp.float32)
        kept = jnp.where(weights >= value, weights, 0.0)
        return jnp.where(is_enough(kept), candidate, threshold)

    threshold = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros((), jnp.int32))
    value = jax.lax.bitcast_convert_type(threshold, jnp.float32)
    return jnp.where(weights >= value, weights, 0.0)


def _pick(weights, uniform) -> jax.Array:
    """The index at which the running sum of weights passes uniform * total, int32[].

    Sums go in two levels, which is faster than one long scan and loses less precision.
    """
    width = 128
    table = jnp.pad(weights, (0, -weights.shape[0] % width)).reshape(-1, width)
    row_sums = jnp.cumsum(jnp.sum(table, axis=1))
    target = uniform * row_sums[-1]
    row = jnp.sum(row_sums <= target, dtype=jnp.int32)
    row = jnp.minimum(row, row_sums.shape[0] - 1)
    before = jnp.where(row > 0, row_sums[row - 1], 0.0)
    sums = before + jnp.cumsum(table[row])
    column = jnp.sum(sums <= target, dtype=jnp.int32)
    token = jnp.minimum(row * width + column, weights.shape[0] - 1)
    # Sums round, so in rare cases the running sum passes the target beside a token's weight.
    return jnp.where(weights[token] > 0, token, jnp.argmax(weights).astype(jnp.int32))


def _remember(state: SamplerState, slots, samples, token_ids) -> SamplerState:
    """Append each sampling row's token to its slot's history."""
    sink = state.recent.shape[0] - 1
    slots = jnp.where(samples, slots, sink)
    recent = jnp.concatenate((state.recent[slots][:, 1:], token_ids[:, None]), axis=1)
    return state._replace(
        recent=state.recent.at[slots].set(recent),
        output_counts=state.output_counts.at[slots, token_ids].add(1),
    )
