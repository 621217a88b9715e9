"""Rates: a token bucket against a naive one in fractions, and limits on a clock by hand."""

from __future__ import annotations

from fractions import Fraction

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.serve.errors import Refused
from engine.serve.rates import MINUTE, Meter, Rate, TokenBucket

SECOND = 10**9


class NaiveBucket:
    """Looks at all that ever happened, one event after the other, in exact fractions."""

    def __init__(self, per_minute: int):
        self.events: list[tuple[int, str, int]] = [(0, "rate", per_minute)]

    def level(self, now: int) -> Fraction:
        level, then, rate = None, 0, 0
        for when, what, number in [*self.events, (now, "take", 0)]:
            if level is not None:
                level = min(Fraction(rate), level + Fraction(rate * (when - then), MINUTE))
            if what == "rate":
                raised = max(0, number - rate)
                rate = number
                level = min((level or Fraction(0)) + raised, Fraction(rate))  # full at first
            else:
                assert level is not None
                level -= number
            then = when
        assert level is not None
        return level

    def rate(self) -> int:
        return [number for _, what, number in self.events if what == "rate"][-1]


steps = st.lists(
    st.tuples(
        st.integers(0, 3 * MINUTE) | st.integers(0, 50),
        st.sampled_from(["take", "take", "rate"]),
        st.integers(1, 1000),
    ),
    max_size=12,
)


@given(st.integers(1, 1000), steps, st.integers(0, 1000))
def test_a_bucket_holds_what_a_naive_one_does_and_tells_the_exact_wait(
    per_minute: int, steps: list[tuple[int, str, int]], wanted: int
) -> None:
    now = 7  # clocks start anywhere
    bucket, naive = TokenBucket(per_minute, now), NaiveBucket(per_minute)
    for passed, what, number in steps:
        now += passed
        naive.events.append((now - 7, what, number))
        if what == "take":
            bucket.take(now, number)
        else:
            bucket.change(now, number)
    wanted = min(wanted, naive.rate())
    wait = bucket.wait(now, wanted)
    assert naive.level(now - 7 + wait) >= wanted
    assert wait == 0 or naive.level(now - 7 + wait - 1) < wanted
    assert bucket.wait(now + wait, wanted) == 0  # who waits as long as told is served


class Clock:
    def __init__(self) -> None:
        self.now = 12345

    def __call__(self) -> int:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(meter: Meter, count: int = 1) -> Refused:
    with pytest.raises(Refused) as raised:
        meter.begin(count)
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    return raised.value


def test_requests_are_taken_at_their_rate_and_refused_ones_cost_nothing(clock: Clock) -> None:
    meter = Meter(Rate(requests_per_minute=3), clock)
    for _ in range(3):
        meter.begin()
    for _ in range(5):
        assert refused(meter).retry_after == 20.0
    clock.pass_seconds(19.0)
    assert refused(meter).retry_after == 1.0
    clock.pass_seconds(1.0)
    meter.begin()
    assert refused(meter).retry_after == 20.0


def test_tokens_are_paid_when_known_and_a_debt_is_waited_out(clock: Clock) -> None:
    meter = Meter(Rate(tokens_per_minute=600), clock)
    meter.begin()
    meter.spend(100)
    meter.begin()  # nothing is owed yet
    meter.spend(1000)
    error = refused(meter)
    assert error.retry_after == 50.0
    assert "600 tokens a minute" in str(error)
    clock.pass_seconds(50.0)
    meter.begin()


def test_a_tenant_has_so_many_calls_at_once(clock: Clock) -> None:
    meter = Meter(Rate(max_concurrent=2), clock)
    meter.begin()
    meter.begin()
    assert "may have 2 at once" in str(refused(meter))
    meter.end()
    meter.begin()
    assert meter.num_in_progress == 2


def test_several_calls_begin_together_or_not_at_all(clock: Clock) -> None:
    meter = Meter(Rate(requests_per_minute=60, max_concurrent=50), clock)
    meter.begin(40)
    assert "40 calls of your tenant are in progress" in str(refused(meter, 11))
    meter.end(40)
    assert refused(meter, 30).retry_after == 10.0  # what was refused has cost nothing
    clock.pass_seconds(10.0)
    meter.begin(30)
    assert meter.num_in_progress == 30


@pytest.mark.parametrize(
    ("rate", "limit"),
    [
        (Rate(requests_per_minute=63), "may make 63 a minute"),
        (Rate(requests_per_minute=64, max_concurrent=63), "may have 63 at once"),
    ],
)
def test_more_calls_than_a_limit_are_not_told_to_wait(rate: Rate, limit: str, clock: Clock) -> None:
    meter = Meter(rate, clock)
    with pytest.raises(Refused, match=limit) as raised:
        meter.begin(64)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.retry_after is None
    meter.begin(63)


def test_other_limits_keep_what_was_used_up(clock: Clock) -> None:
    meter = Meter(Rate(tokens_per_minute=60, max_concurrent=5), clock)
    meter.begin()
    meter.spend(160)
    meter.change(Rate(tokens_per_minute=120, max_concurrent=1))
    assert "at once" in str(refused(meter))
    meter.end()
    assert refused(meter).retry_after == 20.0  # 160 are 40 more than 120
    meter.change(Rate(tokens_per_minute=60))
    assert refused(meter).retry_after == 40.0
    meter.change(Rate())
    meter.begin()


def test_under_a_raised_limit_what_was_made_before_counts_and_no_more(clock: Clock) -> None:
    meter = Meter(Rate(requests_per_minute=3), clock)
    meter.begin(3)
    assert refused(meter).retry_after == 20.0
    meter.change(Rate(requests_per_minute=600))
    meter.begin(597)
    assert "made its 600 requests" in str(refused(meter))
