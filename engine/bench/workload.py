"""What a benchmark asks for: requests from a file or drawn from a seed, and when they arrive.

A file has the lines that `octavo generate` takes. Drawn requests are the same on every machine.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.sampling import SamplingParams

if TYPE_CHECKING:
    from engine.llm import AnyPrompt

_MAX_BAD_LINES_SHOWN = 5


class WorkloadError(ValueError):
    """A workload that can't be run: says which line or option, and what is wrong with it."""


class Item(NamedTuple):
    """One request of a workload."""

    prompt: AnyPrompt
    sampling: SamplingParams

    @property
    def required_tokens(self) -> int | None:
        """How many tokens must come back, if nothing but the count can end the answer."""
        sampling = self.sampling
        if sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids:
            return sampling.max_tokens
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Requests of random tokens, all of one length, generated greedily to their full length.

    Attributes:
      num_requests: how many requests.
      input_len: tokens of each prompt, the shared ones included.
      output_len: tokens of each answer.
      shared_prefix: tokens that all prompts begin with.
      seed: of prompts and arrivals, below 2**32; equal seeds give equal ones anywhere.
    """

    num_requests: int = 64
    input_len: int = 256
    output_len: int = 128
    shared_prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_requests", 1),
            ("input_len", 1),
            ("output_len", 1),
            ("shared_prefix", 0),
            ("seed", 0),
        ):
            if (value := getattr(self, name)) < least:
                option = name.replace("_", "-")
                raise WorkloadError(f"--{option} is {value}; it must be at least {least}")
        if self.seed >= 2**32:
            raise WorkloadError(f"--seed is {self.seed}; it must be below 2**32")
        if self.shared_prefix >= self.input_len:
            raise WorkloadError(
                f"--shared-prefix is {self.shared_prefix}, but prompts have {self.input_len} "
                "tokens and need one of their own; lower it or raise --input-len"
            )

    def items(self, vocab_size: int) -> tuple[Item, ...]:
        """The requests, with token ids from 0 to vocab_size - 1."""
        draw = np.random.RandomState(self.seed)  # legacy, and so frozen for good (NEP 19)
        prefix = draw.randint(0, vocab_size, self.shared_prefix).tolist()
        own_len = self.input_len - self.shared_prefix
        own = draw.randint(0, vocab_size, (self.num_requests, own_len)).tolist()
        sampling = SamplingParams(max_tokens=self.output_len, temperature=0.0, ignore_eos=True)
        return tuple(Item((*prefix, *tokens), sampling) for tokens in own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """When requests are sent: all at once unless one of the two is given.

    Attributes:
      concurrency: closed loop: so many are under way; the next is sent when one ends.
      request_rate: open loop: requests a second, with the gaps of a Poisson process.
      seed: of those gaps.
    """

    concurrency: int | None = None
    request_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.request_rate is not None:
            raise WorkloadError(
                "--concurrency and --request-rate exclude each other: requests come when others "
                "end, or when they come; give one of the two"
            )
        if self.concurrency is not None and self.concurrency < 1:
            raise WorkloadError(f"--concurrency is {self.concurrency}; it must be at least 1")
        rate = self.request_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise WorkloadError(f"--request-rate is {rate}; it must be above zero")

    def arrivals(self, num_requests: int) -> list[float] | None:
        """Seconds after the start at which each request arrives; None without a rate."""
        if self.request_rate is None:
            return None
        draw = np.random.RandomState((self.seed, 1))  # not the stream of the prompts
        return np.cumsum(draw.exponential(1 / self.request_rate, num_requests)).tolist()

    def __str__(self) -> str:
        if self.request_rate is not None:
            return f"{self.request_rate:g} requests/s"
        return "all at once" if self.concurrency is None else f"concurrency {self.concurrency}"


def read_workload(path: Path) -> tuple[Item, ...]:
    """Read the requests of a file, in its order.

    Args:
      path: JSON lines with the fields of `octavo generate`.

    Raises:
      WorkloadError: there is no request, or lines are wrong; their numbers are given.
      OSError: the file can't be read.
    """
    from engine.generate import parse_line

    items: list[Item] = []
    bad: list[str] = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = parse_line(text, number, len(items))
        except (ValueError, TypeError) as error:
            bad.append(f"{path}:{number}: {error}")
        else:
            items.append(Item(line.prompt, line.sampling))
    if bad:
        more = len(bad) - _MAX_BAD_LINES_SHOWN
        shown = bad[:_MAX_BAD_LINES_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise WorkloadError("\n".join(shown))
    if not items:
        raise WorkloadError(f"{path} has no requests; write one JSON object a line")
    return tuple(items)
