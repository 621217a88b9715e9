"""How much a tenant may ask for: token buckets for requests and tokens, and calls at once.

Everything here runs on one event loop, and costs a call a few additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import grpc

from engine.serve.errors import Refused

MINUTE = 60 * 10**9  # nanoseconds
BUSY_SECONDS = 1.0  # after which a call is worth another try where as many run as may


class Rate(NamedTuple):
    """The limits of one tenant; None is no limit.

    Attributes:
      requests_per_minute: calls that begin; as many may begin at once after a minute without.
      tokens_per_minute: tokens of prompts and answers together.
      max_concurrent: calls in progress.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


class TokenBucket:
    """Holds at most what flows in within a minute, and may be overdrawn.

    All numbers are integers in units of 1/60e9, in which a nanosecond brings `per_minute`: so
    nothing is rounded, and who waits as long as told is served.

    Args:
      per_minute: what flows in; at least 1. The bucket is full at first.
      now: nanoseconds on a clock that never goes back, here and below.
    """

    def __init__(self, per_minute: int, now: int):
        self._per_minute = per_minute
        self._level = per_minute * MINUTE
        self._then = now

    def wait(self, now: int, amount: int = 0) -> int:
        """Nanoseconds until `amount`, at most `per_minute`, can be taken without a debt."""
        self._fill(now)
        missing = amount * MINUTE - self._level
        return max(0, -(-missing // self._per_minute))

    def take(self, now: int, amount: int) -> None:
        """Take an amount, of which more may be missing than is there."""
        self._fill(now)
        self._level -= amount * MINUTE

    def change(self, now: int, per_minute: int) -> None:
        """Go on at another rate. What was taken stays taken: of a higher rate all the rest is there
        at once, also for a debt."""
        self._fill(now)
        self._level += max(0, per_minute - self._per_minute) * MINUTE
        self._per_minute = per_minute  # and the next `_fill` spills what doesn't fit any more

    def _fill(self, now: int) -> None:
        most = self._per_minute * MINUTE
        self._level = min(most, self._level + (now - self._then) * self._per_minute)
        self._then = now


class Meter:
    """What a tenant's calls have used up, and whether one more may begin.

    Args:
      rate: the limits.
      clock: nanoseconds; never goes back.
    """

    def __init__(self, rate: Rate, clock: Callable[[], int]):
        self.num_in_progress = 0
        self._clock = clock
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self.change(rate)

    def change(self, rate: Rate) -> None:
        """Go by other limits; what was used up stays used up."""
        now = self._clock()
        self._rate = rate
        self._requests = _bucket(self._requests, rate.requests_per_minute, now)
        self._tokens = _bucket(self._tokens, rate.tokens_per_minute, now)

    def begin(self, count: int = 1) -> None:
        """Count so many calls, all or none; as many of `end` must follow. What is refused costs
        nothing.

        Raises:
          Refused: RESOURCE_EXHAUSTED, with the time after which they would have been taken; or
            INVALID_ARGUMENT, they never would.
        """
        rate, now = self._rate, self._clock()
        check_count(count, rate.max_concurrent, "your tenant may have {} at once")
        check_count(count, rate.requests_per_minute, "your tenant may make {} a minute")
        running = self.num_in_progress
        if rate.max_concurrent is not None and running + count > rate.max_concurrent:
            raise _exhausted(
                f"{running} calls of your tenant are in progress, and it may have "
                f"{rate.max_concurrent} at once; wait for one to end",
                BUSY_SECONDS,
            )
        if self._tokens and (wait := self._tokens.wait(now)):
            raise _exhausted(
                f"your tenant has used more than its {rate.tokens_per_minute} tokens a minute; "
                f"try again in {wait / 1e9:.3g} s",
                wait / 1e9,
            )
        if self._requests:
            if wait := self._requests.wait(now, count):
                raise _exhausted(
                    f"your tenant has made its {rate.requests_per_minute} requests a minute; "
                    f"try again in {wait / 1e9:.3g} s",
                    wait / 1e9,
                )
            self._requests.take(now, count)
        self.num_in_progress += count

    def hold(self) -> None:
        """Count one more that was let in, and has cost what it costs; `end` must follow."""
        self.num_in_progress += 1

    def end(self, count: int = 1) -> None:
        """So many calls have ended."""
        self.num_in_progress -= count

    def spend(self, tokens: int) -> None:
        """Tokens of a prompt or an answer became known. Nothing that runs is stopped by it."""
        if self._tokens:
            self._tokens.take(self._clock(), tokens)


def check_count(count: int, most: int | None, limit: str) -> None:
    """Refuse so many calls at once if there can never be as many.

    Args:
      count: of one request, which makes one for each of its prompts.
      most: that are taken; None: any number.
      limit: says that, with {} for it.

    Raises:
      Refused: INVALID_ARGUMENT.
    """
    if most is not None and count > most:
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"each of the {count} prompts counts as a call, and {limit.format(most)}; send them in "
            "several requests",
        )


def _bucket(bucket: TokenBucket | None, per_minute: int | None, now: int) -> TokenBucket | None:
    """The bucket for a rate; one that is there goes on."""
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now)
    bucket.change(now, per_minute)
    return bucket


def _exhausted(message: str, retry_after: float) -> Refused:
    return Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after=retry_after)
