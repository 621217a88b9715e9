"""The vocabulary: what a request is, what a step is, what comes back.

Everything that crosses a boundary between the files of the engine is defined here, or in
`sampling` if a client asks for it. The values are frozen: whoever holds one may keep it.

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
from typing import NamedTuple

import numpy as np

from engine.sampling import Matcher, SamplingParams


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
    constrained: bool
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
      cache_ttl: milliseconds after which what it leaves in the cache is erased if nobody uses it;
        0: it stays until its place is needed.
      is_private: it uses nothing that others left, and nothing of it is kept: its blocks have no
        names, and are erased when it gives them up.
      is_public: an operator's prompt, whose blocks are kept for every domain.
      deadline: time.monotonic() seconds at which the loop aborts it, or None. The scheduler
        has no clock and doesn't read it.
      forks: further sequences that part from this one where the prompt ends, and share its
        blocks. They don't ask for the prompt's log-probabilities, which are this one's. With
        beams, there are beam_width - 1.
      matchers: of a constraint, one for each of its sequences, at the beginning; the step loop
        takes them over. The scheduler doesn't read them.
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
    cache_ttl: int = 0
    is_private: bool = False
    is_public: bool = False
    forks: tuple[Fork, ...] = ()
    matchers: tuple[Matcher, ...] = dataclasses.field(default=(), repr=False, compare=False)
    sampler_row: SamplerRow | None = dataclasses.field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Work out once what the request asks of the sampler in every step."""
        sampling = self.sampling
        if (
            sampling.is_greedy
            and not sampling.edits_logits
            and self.num_logprobs is None
            and sampling.prompt_logprobs is None
            and sampling.constraint is None
        ):
            return
        row = SamplerRow(
            temperature=0.0 if sampling.is_greedy else sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            edits=sampling.edits_logits,
            min_tokens=sampling.min_tokens,
            wants_logprobs=self.num_logprobs is not None,
            constrained=sampling.constraint is not None,
            seed_low=self.seed & 0xFFFFFFFF,
            seed_high=self.seed >> 32,
        )
        object.__setattr__(self, "sampler_row", row)

    @property
    def names(self) -> tuple[str, ...]:
        """The ids of all its sequences, its own first."""
        return (self.request_id, *(fork.request_id for fork in self.forks))

    @property
    def replies(self) -> tuple[str, ...]:
        """The ids that news come under: each sequence's, or of beams one for each that is asked
        for."""
        sampling = self.sampling
        return self.names[: sampling.n] if sampling.beam_width > 1 else self.names

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens the host gets with each choice; None for no
        log-probabilities at all. A beam goes on with any of beam_width that don't end it."""
        sampling = self.sampling
        if sampling.beam_width > 1:
            return sampling.beam_width + len(self.stop_ids)
        return sampling.logprobs

    def fork(self, fork: Fork) -> Request:
        """One of `forks` as a request of its own."""
        return dataclasses.replace(
            self,
            request_id=fork.request_id,
            seed=fork.seed,
            sampling=dataclasses.replace(self.sampling, prompt_logprobs=None),
            forks=(),
            matchers=(),
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
    expires: int = 0  # milliseconds on the scheduler's clock until which they may stay; 0: no limit
    domain: Domain | None = Domain()  # whose they are; None if they are public


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
        (admitted, or resumed after a preemption) and its device state must be set. No beam's
        slot is set again: it needs none, as its tokens are always given.
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
      swap_outs, swap_ins: between pool and host tier, before the step.
      erased_blocks, erased_slots: of pool and host tier, to be filled with zeros: after this
        plan's swaps out, copies and reads, and before its swaps in and its step.
    """

    step: int
    rows: tuple[PlanRow, ...]
    block_copies: tuple[BlockCopy, ...] = ()
    preempted: tuple[str, ...] = ()
    swap_outs: tuple[SwapOut, ...] = ()
    swap_ins: tuple[SwapIn, ...] = ()
    erased_blocks: tuple[int, ...] = ()
    erased_slots: tuple[int, ...] = ()

    @property
    def moves_blocks(self) -> bool:
        """Whether there is something to do besides computing."""
        moves = (self.block_copies, self.swap_outs, self.swap_ins)
        return any((*moves, self.erased_blocks, self.erased_slots))

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


class Held(NamedTuple):
    """For how many steps, and seconds, something held the head of the queue back."""

    steps: int
    seconds: float


class Waited(NamedTuple):
    """A sequence's time in the queue: before it first ran, and after each preemption.

    Attributes:
      seconds: all of it, from when the step loop took the request.
      held: what held the head of the queue back meanwhile, be it this sequence or one before it:
        by reason (`engine.core.core.Holding`), the longest first; "disk" is this one's alone, the
        wait for blocks before it joined the queue.
    """

    seconds: float
    held: dict[str, Held]


class BeamScore(NamedTuple):
    """How likely an output of beam search is: its log-probability, and that for its length."""

    logprob: float
    score: float


class StepOutput(NamedTuple):
    """News of one request after a step.

    Attributes:
      request_id: whose.
      token_ids: tokens generated since the last output (none or one); all of them, if beam
        search found them.
      finish_reason: None while it goes on.
      num_prompt_tokens, num_cached_tokens: how many prompt tokens there are, and how many of
        them came from the cache when the request first ran.
      logprobs: one a token, if asked for.
      prompt_logprobs: with the first token, if asked for: one a prompt token after the first.
      waited: its time in the queue so far, where that is news; from the step loop, which has a
        clock.
      beam: of an output of beam search.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    waited: Waited | None = None
    beam: BeamScore | None = None
