"""Bounds that more than one front end holds requests to, before anything of them is copied.

A message of 4 MiB may have millions of entries, and every stream would wait while Python makes
objects of them. The engine checks the same, but takes tuples.
"""

from __future__ import annotations

from engine.sampling import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    InvalidRequest,
    PromptTooLong,
)

# Of the lists of sampling parameters.
MAX_ENTRIES = {
    "stop": MAX_STOP_STRINGS,
    "stop_token_ids": MAX_STOP_TOKENS,
    "bad_words": MAX_BAD_WORDS,
    "logit_bias": MAX_LOGIT_BIAS,
}
# Positions with log-probabilities in one message of a stream: a few hundred bytes each, so that it
# stays far under the 4 MiB that gRPC clients accept unless told otherwise.
MAX_LOGPROB_POSITIONS = 1024


def check_entries(field: str, count: int, most: int) -> None:
    """Raise InvalidRequest if a list has more than `most` entries."""
    if count > most:
        raise InvalidRequest(field, f"has {count} entries, but at most {most} are taken")


def check_prompt(num_tokens: int, max_model_len: int) -> None:
    """Raise PromptTooLong if the model has no room for a prompt and one token of output."""
    if num_tokens >= max_model_len:
        raise PromptTooLong("prompt", num_tokens, max_model_len - 1)


def check_messages(count: int, max_model_len: int) -> None:
    """Raise InvalidRequest if a chat has so many messages that the model has no room: each is a
    token at least."""
    if count >= max_model_len:
        raise InvalidRequest(
            "messages",
            f"has {count} messages, but with one token of output the model takes at most "
            f"{max_model_len - 1} tokens; leave old ones out or raise model.max_model_len",
        )
