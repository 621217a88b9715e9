"""Buckets against NumPy and against prometheus_client's own histogram."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference

from engine.observe.histogram import Buckets, Histogram
from engine.observe.requests import BOUNDS

VALUES = st.lists(st.floats(0, 20, allow_nan=False), max_size=50)
SOME = (0.5, 1.0, 2.0, 10.0)


def filled(values: list[float]) -> Histogram:
    histogram = Histogram(SOME)
    for value in values:
        histogram.observe(value)
    return histogram


@given(VALUES)
def test_a_value_is_counted_where_prometheus_counts_it(values: list[float]) -> None:
    reference = Reference("h", "text", buckets=SOME, registry=CollectorRegistry())
    for value in values:
        reference.observe(value)
    (family,) = reference.collect()
    expected = [sample.value for sample in family.samples if sample.name == "h_bucket"]
    read = filled(values).read()
    assert list(itertools.accumulate(read.counts)) == expected
    assert read.count == len(values)
    assert read.sum == pytest.approx(sum(values))


@given(VALUES, VALUES)
def test_the_time_between_two_readings_has_what_came_in_it(
    before: list[float], after: list[float]
) -> None:
    histogram = filled(before)
    earlier = histogram.read()
    for value in after:
        histogram.observe(value)
    between = histogram.read().since(earlier)
    assert between.counts == filled(after).read().counts
    assert between.sum == pytest.approx(sum(after), abs=1e-9)


@given(st.lists(st.floats(0, 10, allow_nan=False), min_size=1), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_of_the_value_that_numpy_finds(
    values: list[float], share: float
) -> None:
    exact = np.quantile(values, share, method="inverted_cdf")
    found = filled(values).read().quantile(share)
    assert found is not None
    bounds = (0.0, *SOME)
    index = int(np.searchsorted(SOME, exact))
    assert bounds[index] <= found <= bounds[index + 1]


def test_quantiles_are_linear_in_a_bucket_as_in_prometheus() -> None:
    buckets = Buckets((1.0, 2.0), (10, 10, 0), 0.0)
    assert buckets.quantile(0.5) == 1.0
    assert buckets.quantile(0.75) == 1.5
    assert Buckets((1.0, 2.0), (0, 0, 3), 30.0).quantile(0.5) == 2.0  # the highest that is known
    assert Buckets((1.0,), (0, 0), 0.0).quantile(0.5) is None


def test_several_tokens_of_one_delta_count_one_each() -> None:
    histogram = Histogram(SOME)
    histogram.observe(0.75, 4)
    assert histogram.read() == Buckets(SOME, (0, 4, 0, 0, 0), 3.0)


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_rise_strictly(name: str) -> None:
    assert list(BOUNDS[name]) == sorted(set(BOUNDS[name]))
