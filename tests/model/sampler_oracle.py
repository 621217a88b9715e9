"""Sampling by the book, in float64 NumPy and plain loops: one row, one request at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np

from engine.types import Request


def edit(logits: np.ndarray, request: Request, history: tuple[int, ...]) -> np.ndarray:
    """Penalties, bias and bans on one row of logits; what must not be chosen is -inf."""
    params = request.sampling
    scores = logits.astype(np.float64)
    counts = Counter(history)
    for token in set(request.prompt_ids) | set(history):
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in counts.items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias:
        scores[token] += bias
    if params.allowed_token_ids is not None:
        for token in range(len(scores)):
            if token not in params.allowed_token_ids:
                scores[token] = -np.inf
    for *before, last in request.bad_word_ids:
        if not before or list(history[-len(before) :]) == before:
            scores[last] = -np.inf
    if len(history) < params.min_tokens:
        for token in request.stop_ids:
            scores[token] = -np.inf
    return scores


def distribution(scores: np.ndarray, request: Request) -> np.ndarray:
    """The probabilities that a token is drawn with, after temperature and filters."""
    params = request.sampling
    if params.temperature == 0:
        chosen = np.zeros_like(scores)
        chosen[np.argmax(scores)] = 1.0
        return chosen
    kept = np.exp((scores - scores.max()) / params.temperature)
    kept[kept < params.min_p] = 0.0
    if params.top_k and params.top_k < np.count_nonzero(kept):
        kept[kept < sorted(kept, reverse=True)[params.top_k - 1]] = 0.0
    total, running = kept.sum(), 0.0
    for weight in sorted(kept, reverse=True):
        running += weight
        if running >= params.top_p * total:
            kept[kept < weight] = 0.0
            break
    return kept / kept.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
