"""Weights in int8: the engine computes what the rule says, and it costs what that explains.

The rule is written again in NumPy, for a Llama in NumPy. What products of it are is tested beside
the kernels, in tests/matmul.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from engine.weights import open_checkpoint
from tests.conftest import DATA
from tests.model import numpy_llama
from tests.model.goldens import GOLDEN_TOLERANCE, golden, through_engine
from tests.model.sampler_oracle import log_softmax
from tests.weights.checkpoints import read_all

MODELS = ("llama", "llama_tied")


def in_8_bits(array: np.ndarray, axis: int) -> np.ndarray:
    """Integers from -127 to 127 times the largest over 127, along an axis; as float64."""
    wide = array.astype(np.float64)
    step = np.abs(wide).max(axis=axis, keepdims=True) / 127
    return np.rint(wide / np.where(step == 0, 1, step)) * step


def product(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Of rows in 8 bits and what that leaves in 8 more, of steps a 254th as long."""
    wide = x.astype(np.float64)
    step = np.abs(wide).max(axis=-1, keepdims=True) / 127
    step = np.where(step == 0, 1, step)
    first = np.rint(wide / step)
    row = (first + np.rint((wide / step - first) * 254) / 254) * step
    return (row @ in_8_bits(matrix, -2)).astype(np.float32)


@functools.cache
def in_numpy(name: str) -> np.ndarray:
    """Log-probabilities [2, 48, V] of the golden sequences, every product with weights in int8."""
    checkpoint = open_checkpoint(DATA / "tiny" / name)
    params: Mapping[str, np.ndarray] = read_all(checkpoint)
    if checkpoint.architecture.tie_embeddings:  # looked up as it is held
        table = in_8_bits(params["embed.weight"], -1).astype(np.float32)
        params = {**params, "embed.weight": table}
    rows = [
        numpy_llama.forward(checkpoint.architecture, params, ids, product=product)
        for ids in golden(name)["input_ids"]
    ]
    return np.stack([log_softmax(row) for row in rows])


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean over all that the engine was asked."""
    return float(np.nanmean(np.abs(ours - theirs)))


def in_engine(name: str, **options: Any) -> np.ndarray:
    return through_engine(DATA / "tiny" / name, name, quantization="int8", **options)[0]


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_computes_what_the_rule_says(name: str, tensor: int) -> None:
    """In float32, whose sums in another order may turn a rounding over: then an entry of a row is
    off by one of 127 steps, and so is what comes after. Most rows see none of that."""
    ours, theirs = in_engine(name, tensor=tensor), in_numpy(name)
    exact = log_softmax(golden(name)["logits"])
    explained = error(np.where(np.isnan(ours), np.nan, theirs), exact)
    assert explained > 10 * GOLDEN_TOLERANCE, "the NumPy model did not quantise"
    assert np.median(np.nanmax(np.abs(ours - theirs), axis=-1)) < GOLDEN_TOLERANCE
    assert error(ours, theirs) < explained / 4
    assert error(ours, exact) < 1.25 * explained


def test_sums_are_the_same_on_any_number_of_chips() -> None:
    """Only norms and attention may round otherwise."""
    one, four = in_engine("llama"), in_engine("llama", tensor=4)
    both = np.isfinite(one) & np.isfinite(four)
    np.testing.assert_allclose(one[both], four[both], rtol=0, atol=GOLDEN_TOLERANCE)
