"""From what a client gives to what the scheduler takes: token ids, limits, defaults, checks.

Whatever passes here can be served; everything else is an `InvalidRequest` that names its field.
Cheap checks come first, so that a prompt that is too long costs no more than its tokenisation.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import TypeGuard, cast

from engine.config import CacheConfig
from engine.core.limits import Limits
from engine.sampling import (
    MAX_LOGPROBS,
    InvalidRequest,
    Matcher,
    PromptTooLong,
    SamplingParams,
)
from engine.text import Grammars, Message, Tokenizer, bad_word_ids
from engine.types import Domain, Fork, Request

Prompt = str | tuple[int, ...] | tuple[Message, ...]

# Texts up to this many characters are tokenised where they arrive, in about a millisecond;
# longer ones belong on a thread, because streams must not wait for them.
QUICK_CHARS = 8192


@dataclasses.dataclass(frozen=True)
class Resolver:
    """Makes requests for one model."""

    tokenizer: Tokenizer
    limits: Limits
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    cache: CacheConfig
    grammars: Grammars

    def resolve(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        domain: Domain,
        priority: int,
        deadline: float | None,
        is_private: bool = False,
    ) -> Request:
        """Turn what the client gave into what the scheduler takes. Any thread may call it.

        Sample (or beam) i above 0 is named `request_id` with a dot and i.

        Raises:
          InvalidRequest: it can't be served as given.
        """
        _check_priority(priority)
        _check_domain(domain)
        prompt_ids = self._prompt_ids(prompt)
        self._check_ids("prompt_ids", prompt_ids)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("logit_bias", [token for token, _ in sampling.logit_bias])
        allowed = sampling.allowed_token_ids or ()
        if len(allowed) > self.vocab_size:
            raise InvalidRequest(
                "allowed_token_ids",
                f"has {len(allowed)} entries, but the model has {self.vocab_size} tokens; give "
                "each once",
            )
        self._check_ids("allowed_token_ids", allowed)
        stop_ids = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_ids.update(self.eos_token_ids)
        num_forks = sampling.n - 1
        if sampling.beam_width > 1:
            self._check_beams(sampling.beam_width, len(stop_ids))
            num_forks = sampling.beam_width - 1
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        matchers: tuple[Matcher, ...] = ()
        if sampling.constraint is not None:
            matchers = self.grammars.matchers(sampling.constraint, domain, sampling.n)
        room = self.limits.max_model_len - len(prompt_ids)
        return Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            max_tokens=min(room, sampling.max_tokens or room),
            seed=seed,
            stop_ids=frozenset(stop_ids),
            bad_word_ids=bad_word_ids(self.tokenizer, sampling.bad_words),
            domain=domain,
            priority=priority,
            deadline=deadline,
            is_private=is_private,
            cache_ttl=self.cache.milliseconds_to_live(domain.tenant),
            forks=tuple(
                Fork(f"{request_id}.{index}", (seed + index) % 2**64)
                for index in range(1, num_forks + 1)
            ),
            matchers=matchers,
        )

    def _check_beams(self, width: int, num_stops: int) -> None:
        """Each beam must be able to go on with any of `width` tokens that don't end it."""
        most = min(MAX_LOGPROBS, self.vocab_size)
        if width + num_stops > most:
            raise InvalidRequest(
                "beam_width",
                f"{width} beams and {num_stops} tokens that end them are more than the {most} "
                "likeliest tokens that are looked at; lower beam_width, or set ignore_eos",
            )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, as many as the model takes."""
        field = "prompt"
        ids: Sequence[int]
        if _is_chat(prompt):
            if not all(isinstance(item, Message) for item in prompt):
                raise InvalidRequest("messages", "mixes messages with something else")
            field, ids = "messages", self.tokenizer.apply_chat_template(prompt)
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = cast("tuple[int, ...]", prompt)
        if not ids:
            raise InvalidRequest(field, "is empty; give at least one token")
        most = self.limits.max_model_len - 1
        if len(ids) > most:
            raise PromptTooLong(field, len(ids), most)
        return tuple(ids)

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise InvalidRequest(
                    field,
                    f"{_shown(token)} is not a token id; the model has ids 0 to "
                    f"{self.vocab_size - 1}",
                )


def is_quick(prompt: Prompt, sampling: SamplingParams) -> bool:
    """Whether to resolve it takes about a millisecond at most."""
    if _is_chat(prompt) or sampling.constraint is not None:
        return False
    num_chars = len(prompt) if isinstance(prompt, str) else 0
    return num_chars + sum(map(len, sampling.bad_words)) <= QUICK_CHARS


def deadline_after(timeout: float | None, since: float) -> float | None:
    """The moment `timeout` seconds after `since`. Raises InvalidRequest."""
    if timeout is None or timeout == math.inf:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or math.isnan(timeout):
        raise InvalidRequest("timeout", f"{_shown(timeout)} is not a number of seconds")
    return since + timeout


def _is_chat(prompt: Prompt) -> TypeGuard[tuple[Message, ...]]:
    return not isinstance(prompt, str) and any(isinstance(item, Message) for item in prompt[:1])


def _check_priority(priority: int) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InvalidRequest("priority", f"{_shown(priority)} is not a whole number")


def _check_domain(domain: Domain) -> None:
    for field in ("tenant", "salt"):
        if not isinstance(getattr(domain, field), str):
            raise InvalidRequest(f"domain.{field}", "is not a text")


def _shown(value: object) -> str:
    try:
        return f"{value!r:.40}"
    except ValueError:  # Python refuses to write out a number of thousands of digits
        return "a huge number"
