"""The statistics against hand-worked values, brute force, and their promised error rates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from engine.leakcheck import statistics


def _brute_force_auc(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    pairs = itertools.product(positives.ravel(), negatives.ravel())
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
    return sum(wins) / len(wins)


def _scores(positives: list[float], negatives: list[float]) -> NDArray[np.float64]:
    """One probe of each arm a block, and one figure: float64[B, 2, 1, 1]."""
    return np.array([positives, negatives]).T[:, :, None, None]


def _noise(
    rng: np.random.Generator, blocks: int, shift: float = 0.0, figures: int = 1
) -> NDArray[np.float64]:
    scores_BARF = rng.standard_normal((blocks, 2, 2, figures))
    scores_BARF[:, 0] += shift
    return scores_BARF


def test_the_auc_counts_pairs_and_half_of_ties() -> None:
    # Of nine pairs, 1 ties with 1; 2 is above 1 and ties with 2; 3 is above all.
    scores = _scores([1.0, 2.0, 3.0], [1.0, 2.5, 2.0])
    assert statistics.auc(scores) == pytest.approx([(0.5 + 1.5 + 3) / 9])


@pytest.mark.parametrize(("shift", "expected"), [(100.0, 1.0), (-100.0, 0.0)])
def test_arms_that_do_not_overlap_have_an_auc_of_one_or_zero(shift: float, expected: float) -> None:
    scores = _noise(np.random.default_rng(0), 10, shift)
    assert statistics.auc(scores) == pytest.approx([expected])


@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 6), st.just(2), st.integers(1, 3), st.integers(1, 3)),
        elements=st.integers(-3, 3).map(float),  # few values, so that ties are common
    )
)
def test_the_auc_is_that_of_all_pairs(scores_BARF: NDArray[np.float64]) -> None:
    expected = [
        _brute_force_auc(scores_BARF[:, 0, :, figure], scores_BARF[:, 1, :, figure])
        for figure in range(scores_BARF.shape[-1])
    ]
    assert statistics.auc(scores_BARF) == pytest.approx(expected)


def test_the_p_value_is_the_share_of_orders_that_are_as_extreme() -> None:
    scores_BARF = _noise(np.random.default_rng(3), 7, shift=0.8, figures=2)
    swapped = [np.flip(scores_BARF[block : block + 1], axis=1) for block in range(7)]

    def largest(order: tuple[bool, ...]) -> float:
        blocks = [swapped[b] if swap else scores_BARF[b : b + 1] for b, swap in enumerate(order)]
        array = np.concatenate(blocks)
        return max(
            abs(_brute_force_auc(array[:, 0, :, f], array[:, 1, :, f]) - 0.5) for f in range(2)
        )

    every = [largest(order) for order in itertools.product((False, True), repeat=7)]
    exact = np.mean([each >= every[0] - 1e-9 for each in every])
    assert 0.02 < exact < 0.5  # neither end would tell a right answer from a wrong one
    estimate = statistics.permutation_p_value(scores_BARF, np.random.default_rng(0), 20_000)
    assert estimate == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))


def test_the_p_value_is_never_zero() -> None:
    scores = _noise(np.random.default_rng(0), 40, 100.0)
    assert statistics.permutation_p_value(scores, np.random.default_rng(0), 99) == 1 / 100


def test_scores_that_are_all_equal_are_no_evidence() -> None:
    scores = np.zeros((10, 2, 2, 3))
    assert statistics.auc(scores) == pytest.approx([0.5] * 3)
    assert statistics.permutation_p_value(scores, np.random.default_rng(0), 99) == 1.0


@pytest.mark.parametrize("figures", [1, 20])
def test_false_alarms_are_as_rare_as_promised(figures: int) -> None:
    rng = np.random.default_rng(1)
    runs = 400
    p_values = [
        statistics.permutation_p_value(_noise(rng, 10, figures=figures), rng, 199)
        for _ in range(runs)
    ]
    for alpha in (0.05, 0.2):
        alarms = np.mean([p <= alpha for p in p_values])
        assert alarms == pytest.approx(alpha, abs=4 * np.sqrt(alpha * (1 - alpha) / runs))


def test_a_drift_of_the_server_is_no_leak() -> None:
    """Probes in the order of ABBA by coin, on a server that gets slower and slower."""
    rng = np.random.default_rng(2)
    runs, alarms = 300, 0
    for _ in range(runs):
        times = 0.1 * np.arange(48) + 0.05 * rng.standard_normal(48)
        quartets = times.reshape(12, 4)
        ab = np.stack([quartets[:, [0, 3]], quartets[:, [1, 2]]], axis=1)
        coins = rng.integers(0, 2, 12).astype(bool)
        ab[coins] = ab[coins][:, ::-1]
        alarms += statistics.permutation_p_value(ab[..., None], rng, 199) <= 0.05
    assert alarms / runs <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_interval_covers_the_truth_as_often_as_it_says(shift: float) -> None:
    truth = float(np.mean(np.random.default_rng(0).normal(shift, np.sqrt(2), 400_000) > 0))
    rng = np.random.default_rng(4)
    runs, covered = 300, 0
    for _ in range(runs):
        low, high = statistics.bootstrap_interval(_noise(rng, 25, shift)[..., 0], rng, 0.9, 400)
        covered += low <= truth <= high
    assert 0.83 <= covered / runs <= 0.96  # the percentile interval is a little too short


def test_the_interval_resamples_whole_blocks() -> None:
    """Blocks that agree within themselves are fewer observations than their probes."""
    rng = np.random.default_rng(5)
    apart = rng.standard_normal((40, 2, 1))
    together = np.repeat(apart[:20], 2, axis=2)
    low, high = statistics.bootstrap_interval(apart, rng, 0.9)
    wide_low, wide_high = statistics.bootstrap_interval(together, rng, 0.9)
    assert wide_high - wide_low > 1.2 * (high - low)


def test_the_interval_of_a_count_that_never_differed_is_not_a_point() -> None:
    low, high = statistics.bootstrap_interval(np.zeros((10, 2, 2)), np.random.default_rng(0), 0.9)
    # What happens to 1 probe in 7.2 stays unseen in 20 of them with a chance of 5%.
    unseen = 1 - 0.05 ** (1 / 20)
    assert (low, high) == pytest.approx((0.5 - unseen / 2, 0.5 + unseen / 2))


def test_the_interval_stays_within_zero_and_one() -> None:
    scores = _noise(np.random.default_rng(0), 10, 100.0)[..., 0]
    low, high = statistics.bootstrap_interval(scores, np.random.default_rng(0), 0.9)
    assert 0.9 < low < high == 1.0


def test_holm_corrects_as_in_a_worked_example() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("alpha", "tests"), [(0.05, 1), (0.01, 5), (0.001, 3)])
def test_the_fewest_blocks_are_those_that_can_be_significant(alpha: float, tests: int) -> None:
    blocks = statistics.least_blocks(alpha, tests)
    assert tests * 2 / 2**blocks < alpha <= tests * 2 / 2 ** (blocks - 1)
