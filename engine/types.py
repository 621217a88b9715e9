"""The vocabulary: what a request is, what a step is, what comes back.

Everything that crosses a boundary between the files of the engine is defined here, and
nothing here imports anything of ours. The values are frozen: whoever holds one may keep it.

Shape legend, used in comments and as suffixes of array names (``q_TNH``):

    T  tokens of one step, padded to a bucket      L  decoder layers
    S  sequences (rows) of one step, padded        D  model width (hidden size)
    P  width of a block table, in blocks           F  feed-forward width
    B  tokens in one block                         V  vocabulary
    N  query heads     K  KV heads                 H  head dim
    R  slots: rows of the per-sequence device state, max_num_seqs + 1 (the last is a sink)
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import NamedTuple

import numpy as np


class InvalidRequest(ValueError):
    """A request that can't be served as given.

    Args:
      field: the name of the offending field, as a client would write it.
      message: what was given, the limit, and the way out.
    """

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class QueueFull(RuntimeError):
    """The engine's waiting queue is at its limit; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token, the end of sequence, or a stop string
    LENGTH = "length"  # max_tokens, or the model's context
    ABORT = "abort"  # the client asked, or went away
    DEADLINE = "deadline"  # the request's time was up
    ERROR = "error"  # the step that carried it failed


@dataclasses.dataclass(frozen=True, slots=True)
class Domain:
    """Who may share cached blocks with whom: a block's key starts from its domain.

    `tenant` is set by the server from who is authenticated. `salt` comes from the client and
    can only narrow the sharing: two requests share blocks if both parts are equal.
    """

    tenant: str = "default"
    salt: str = ""


# Limits of what one request may ask for. The sampler's device state is sized by them.
MAX_SAMPLES = 128  # sequences of one prompt
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 16
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_BAD_WORDS = 64  # token sequences, after tokenisation
MAX_BAD_WORD_TOKENS = 8
MAX_LOGIT_BIAS = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Every field is validated on construction.

    Attributes:
      max_tokens: most tokens to generate; None means up to the model's context.
      min_tokens: stop tokens are suppressed until this many tokens were generated.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: keep the k most likely tokens (and ties with the k-th); 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches top_p.
      min_p: keep tokens at least min_p times as likely as the most likely one.
      repetition_penalty: divides positive and multiplies negative logits of tokens in the
        prompt or the output (Keskar et al., 2019); 1 is off.
      presence_penalty: subtracted from logits of tokens already generated.
      frequency_penalty: subtracted once for each time a token was generated.
      logit_bias: (token id, bias) pairs added to the logits; at most MAX_LOGIT_BIAS.
      allowed_token_ids: if given, only these tokens can be chosen.
      bad_words: texts that must not be generated.
      stop: texts that end the generation; they are not part of the output.
      stop_token_ids: token ids that end the generation, besides the model's own.
      ignore_eos: the model's own end-of-sequence tokens don't end the generation.
      seed: names the draw; None lets the engine choose one.
      logprobs: None for none; otherwise the chosen token's log-probability and that many of
        the most likely tokens (0 to MAX_LOGPROBS), before penalties and temperature.
      prompt_logprobs: the same for each prompt token.
      skip_special_tokens: leave tokens such as <|im_end|> out of the text.
      n: independent sequences from the prompt, which share its cache (1 to MAX_SAMPLES). The
        i-th draws with seed + i.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    n: int = 1

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest(
                    "min_tokens", f"{self.min_tokens} is above max_tokens ({self.max_tokens})"
                )
        for field in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(value := getattr(self, field), bool):
                raise InvalidRequest(field, f"{value!r:.80} is neither true nor false")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        for field in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, field)) is not None:
                _check_int(field, value, 0, MAX_LOGPROBS)
        _check_count("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequest(
                    "stop",
                    f"{text!r:.80} must be a text of 1 to {MAX_STOP_STRING_CHARS} characters",
                )
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1)
        _check_count("bad_words", self.bad_words, MAX_BAD_WORDS)
        for text in self.bad_words:
            if not isinstance(text, str) or not text:
                raise InvalidRequest("bad_words", "each must be a text that is not empty")
        _check_count("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for entry in self.logit_bias:
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise InvalidRequest("logit_bias", f"{entry!r:.80} is not a (token id, bias) pair")
            _check_int("logit_bias", entry[0], 0, 2**31 - 1)
            _check_range(f"logit_bias[{entry[0]}]", entry[1], -100.0, 100.0)
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidRequest("logit_bias", "names a token twice; give each token once")
        if self.allowed_token_ids is not None and not isinstance(self.allowed_token_ids, tuple):
            raise InvalidRequest("allowed_token_ids", "must be a tuple of token ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest(
                "allowed_token_ids", "is empty, so no token could be chosen; leave it out"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken (temperature 0)."""
        return self.temperature == 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether logits change before the choice, so that even a greedy row needs a pass."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.min_tokens > 0
            or bool(self.logit_bias or self.bad_words)
            or self.allowed_token_ids is not None
        )


def _check_range(
    field: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not (low < value if low_open else low <= value) or value > high:
        brackets = f"{'(' if low_open else '['}{low:g}, {high:g}]"
        raise InvalidRequest(field, f"{value!r} is not a number in {brackets}")


def _check_int(field: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(field, f"{value!r} is not a whole number in [{low}, {high}]")


def _check_count(field: str, values: tuple, limit: int) -> None:
    if not isinstance(values, tuple):
        raise InvalidRequest(field, f"must be a tuple, but is a {type(values).__name__}")
    if len(values) > limit:
        raise InvalidRequest(field, f"has {len(values)} entries, but at most {limit} are taken")


class SamplerRow(NamedTuple):
    """A request's numbers for the sampler; every one of them is exact as a float64."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    edits: bool
    min_tokens: int
    wants_logprobs: bool
    seed_low: int
    seed_high: int


class Fork(NamedTuple):
    """Another sequence from the same prompt: a name like a request's, and a draw of its own."""

    request_id: str
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate, as the scheduler takes it: everything is resolved.

    Attributes:
      request_id: unique among the requests in the engine.
      prompt_ids: token ids, at least one.
      sampling: as the client gave it.
      max_tokens: most tokens to generate, the model's context taken into account.
      seed: the draw; chosen by the frontend if the client gave none.
      stop_ids: token ids that end the sequence (the model's own and the request's).
      bad_word_ids: token sequences that must not be generated.
      domain: who may share blocks with it.
      priority: lower runs first; ties go by arrival.
      deadline: time.monotonic() seconds at which the loop aborts it, or None. The scheduler
        has no clock and doesn't read it.
      forks: further sequences that part from this one where the prompt ends, and share its
        blocks. They don't ask for the prompt's log-probabilities, which are this one's.
      sampler_row: follows from the rest; None if an argmax is all it takes.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    domain: Domain = Domain()
    priority: int = 0
    deadline: float | None = None
    forks: tuple[Fork, ...] = ()
    sampler_row: SamplerRow | None = dataclasses.field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Work out once what the request asks of the sampler in every step."""
        sampling = self.sampling
        if (
            sampling.is_greedy
            and not sampling.edits_logits
            and sampling.logprobs is None
            and sampling.prompt_logprobs is None
        ):
            return
        row = SamplerRow(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            edits=sampling.edits_logits,
            min_tokens=sampling.min_tokens,
            wants_logprobs=sampling.logprobs is not None,
            seed_low=self.seed & 0xFFFFFFFF,
            seed_high=self.seed >> 32,
        )
        object.__setattr__(self, "sampler_row", row)

    @property
    def names(self) -> tuple[str, ...]:
        """The ids of all its sequences, its own first."""
        return (self.request_id, *(fork.request_id for fork in self.forks))

    def fork(self, fork: Fork) -> Request:
        """One of `forks` as a request of its own."""
        return dataclasses.replace(
            self,
            request_id=fork.request_id,
            seed=fork.seed,
            sampling=dataclasses.replace(self.sampling, prompt_logprobs=None),
            forks=(),
        )


class BlockCopy(NamedTuple):
    """Copy one physical block onto another, in every layer, before the step writes."""

    source: int
    destination: int


class SwapOut(NamedTuple):
    """Copy a block to a slot of the host tier, before anything is written to the block."""

    block: int
    slot: int
    key: bytes  # names the contents


class SwapIn(NamedTuple):
    """Copy a slot of the host tier to a block; before the same plan's swaps out fill the slot."""

    slot: int
    block: int


class PlanRow(NamedTuple):
    """What one sequence does in one step: `num_tokens` positions from `start` on.

    A sequence that parts from another has none yet: it only samples, from the other's logits.

    Attributes:
      request: the request, for its sampling parameters.
      slot: the sequence's row in the device state.
      start: first position computed in this step; those before it are in the cache.
      num_tokens: positions computed, at least one unless it has just parted from another.
      token_ids: their token ids; empty if the only token is the one this slot sampled last,
        which the host may not know yet.
      block_ids: int32[n], read-only: the physical blocks that hold positions
        0 … start + num_tokens - 1.
      samples: whether the last position's logits choose a token.
      output_position: how many tokens were generated before the one sampled here.
      history: None, or the token ids generated so far: the slot is new to the sequence
        (admitted, or resumed after a preemption) and its device state must be set.
      logits_of: None, or the index of the row in whose last position's logits it samples.
    """

    request: Request
    slot: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_ids: np.ndarray
    samples: bool
    output_position: int
    history: tuple[int, ...] | None
    logits_of: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, decided: pure data, the same for the same events before it.

    Attributes:
      step: counts the plans of this scheduler, from 0.
      rows: decodes first, then chunks of prompts, then sequences that part from those.
        Empty: nothing can run now.
      block_copies: to be done before the step's writes, all of them at once (copy-on-write).
      preempted: ids of requests that lost their blocks in this step.
      swap_outs, swap_ins: between pool and host tier, before the step and its copies.
    """

    step: int
    rows: tuple[PlanRow, ...]
    block_copies: tuple[BlockCopy, ...] = ()
    preempted: tuple[str, ...] = ()
    swap_outs: tuple[SwapOut, ...] = ()
    swap_ins: tuple[SwapIn, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions computed in this step, without padding."""
        return sum(row.num_tokens for row in self.rows)


class TokenLogprobs(NamedTuple):
    """A token's log-probability and the most likely tokens with theirs, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step computed, on the host. Row i belongs to row i of the plan.

    Attributes:
      token_ids: the sampled token of each row; rows that don't sample hold anything.
      logprobs: by row, for rows that asked for log-probabilities.
      prompt_logprobs: by row, one entry a position of the row's chunk: that of the *next*
        prompt token. The last chunk of a prompt has one entry less than positions.
    """

    token_ids: tuple[int, ...]
    logprobs: dict[int, TokenLogprobs] = dataclasses.field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = dataclasses.field(default_factory=dict)


class StepOutput(NamedTuple):
    """News of one request after a step.

    Attributes:
      request_id: whose.
      token_ids: tokens generated since the last output (none or one).
      finish_reason: None while it goes on.
      num_prompt_tokens, num_cached_tokens: how many prompt tokens there are, and how many of
        them came from the cache when the request first ran.
      logprobs: one a token, if asked for.
      prompt_logprobs: with the first token, if asked for: one a prompt token after the first.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
