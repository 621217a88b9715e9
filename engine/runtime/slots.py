"""What the sampler's device state holds for one request that edits logits, as the host sets it."""

from __future__ import annotations

import numpy as np

from engine.model import sampler
from engine.sampling import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from engine.types import Request


def slot_state(
    request: Request | None, history: tuple[int, ...], vocab_size: int
) -> sampler.SlotState:
    """The sampler's row for a request that has generated `history` so far."""
    recent = np.full(MAX_BAD_WORD_TOKENS, -1, np.int32)
    counts = np.zeros(vocab_size, np.int32)
    in_prompt = np.zeros(vocab_size, np.bool_)
    bias = np.zeros(vocab_size, np.float32)
    bad_words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    stop_ids = np.full(sampler.MAX_STOP_IDS, vocab_size, np.int32)
    if request is not None:
        tail = history[-MAX_BAD_WORD_TOKENS:]
        recent[len(recent) - len(tail) :] = tail
        np.add.at(counts, np.array(history, np.int32), 1)
        in_prompt[list(request.prompt_ids)] = True
        sampling = request.sampling
        if sampling.allowed_token_ids is not None:
            bias[:] = sampler.NOT_ALLOWED
            bias[list(sampling.allowed_token_ids)] = 0.0
        for token, value in sampling.logit_bias:
            bias[token] += value
        for index, word in enumerate(request.bad_word_ids):
            bad_words[index, MAX_BAD_WORD_TOKENS - len(word) :] = word
        stop_ids[: len(request.stop_ids)] = sorted(request.stop_ids)
    return sampler.SlotState(recent, counts, in_prompt, bias, bad_words, stop_ids)
