"""SmolLM2-135M as it is served: greedy tokens in float32, and what bfloat16 changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.config import BucketConfig, CacheDtype, Dtype, SchedulerConfig
from engine.weights import open_checkpoint
from tests.conftest import DATA
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.model import numpy_llama
from tests.model.quantised import EIGHT_BITS, hold, largest_values, write_scales
from tests.model.sampler_oracle import log_softmax
from tests.weights.checkpoints import read_all

GOLDENS: list[dict[str, Any]] = json.loads((DATA / "smollm2_greedy.json").read_text())
NUM_STEPS = 48
TIE = 0.001  # a smaller margin on the way may be lost to the order of a sum
NUM_PLAYED_BACK = 4  # prompts that the NumPy model goes through: it takes its time


def engine(path: Path, dtype: Dtype, **cache: Any) -> SmallEngine:
    """Shapes for twelve prompts at once: two programs."""
    return small_engine(
        path,
        dtype=dtype,
        **cache,
        num_blocks=96,
        block_size=16,
        config=SchedulerConfig(max_num_seqs=12, max_step_tokens=256),
        buckets=BucketConfig(decode_seqs=(12,), prefill_tokens=(256,), prefill_seqs=(12,)),
    )


@pytest.fixture(scope="module")
def generated(smollm2_gguf: Path) -> list[Result]:
    """The goldens' prompts, continued greedily in float32, all at once."""
    requests = [
        make_request(f"{index:02}", case["prompt_ids"], NUM_STEPS, logprobs=5)
        for index, case in enumerate(GOLDENS)
    ]
    return list(engine(smollm2_gguf, "float32").run(requests).values())


def test_float32_gives_the_references_tokens(generated: list[Result]) -> None:
    assert len(GOLDENS) == 12
    for case, result in zip(GOLDENS, generated, strict=True):
        expected = case["output_ids"]
        assert len(expected) == NUM_STEPS
        if case["min_top1_margin"] >= TIE:
            assert list(result.token_ids) == expected, case["text"]
            continue
        same = [ours == theirs for ours, theirs in zip(result.token_ids, expected, strict=True)]
        if not all(same):
            parting = result.logprobs[same.index(False)]
            (_, first), (token, second), *_ = parting.top
            assert first - second < TIE, case["text"]
            assert token == expected[same.index(False)]


def test_float32_gives_the_references_first_logprobs(generated: list[Result]) -> None:
    for case, result in zip(GOLDENS, generated, strict=True):
        top = dict(result.logprobs[0].top)
        for token, logprob in case["top5_logprobs"][0]:
            assert top[token] == pytest.approx(logprob, abs=1e-3), case["text"]


def play_back(small: SmallEngine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the first prompts with the reference's answers, all tokens given.

    Returns, a row for each position: the likeliest token, how far its log-probability is
    ahead of the second, and the log-probability of the token that follows.
    """
    requests = [
        make_request(f"{index:02}", case["prompt_ids"] + case["output_ids"], 1, prompt_logprobs=2)
        for index, case in enumerate(GOLDENS[:NUM_PLAYED_BACK])
    ]
    entries = [entry for result in small.run(requests).values() for entry in result.prompt_logprobs]
    best = np.array([entry.top[0][0] for entry in entries])
    margin = np.array([entry.top[0][1] - entry.top[1][1] for entry in entries])
    return best, margin, np.array([entry.logprob for entry in entries])


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_the_numpy_model_gives_the_references_logits(name: str) -> None:
    folder = DATA / "tiny" / name
    checkpoint, reference = open_checkpoint(folder), load_file(folder / "reference.safetensors")
    for ids, logits in zip(reference["input_ids"], reference["logits"], strict=True):
        ours = numpy_llama.forward(checkpoint.architecture, read_all(checkpoint), ids)
        np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-4)


def rounding_errors(path: Path, logprobs: np.ndarray) -> list[np.ndarray]:
    """By how much the NumPy model's rounded log-probabilities differ from these, twice.

    The second time, values move by far less than a rounding step before they are rounded. That
    turns roundings that are close over, as a sum in another order does, and from there on the
    errors are another draw from the same distribution.
    """
    checkpoint = open_checkpoint(path)
    rounded = numpy_llama.round_bfloat16
    params = {name: rounded(array) for name, array in read_all(checkpoint).items()}
    rng = np.random.default_rng(0)

    def shaken(array: np.ndarray) -> np.ndarray:
        return rounded(array * (1 + 1e-6 * rng.standard_normal(array.shape, np.float32)))

    draws = []
    for rounding in (rounded, shaken):
        parts = []
        for case in GOLDENS[:NUM_PLAYED_BACK]:
            ids = np.array(case["prompt_ids"] + case["output_ids"])
            logits = numpy_llama.forward(checkpoint.architecture, params, ids, rounding)
            parts.append(log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]])
        draws.append(np.abs(np.concatenate(parts) - logprobs))
    return draws


def test_bfloat16_differs_from_float32_by_what_rounding_explains(smollm2_gguf: Path) -> None:
    """Held against a NumPy model whose sums are float32 and that rounds to bfloat16 in between.

    Errors of independent roundings add like a random walk: an engine that rounded four times
    as often as the NumPy model would be off by twice as much, and one that summed in bfloat16
    by more. The means of two draws of the same errors differ by a fifth or so.

    Then the argmax: float32 is ahead by some margin, and bfloat16 may lose it only where the
    errors of two log-probabilities make it up: twice the largest error that rounding explains.
    """
    best, margin, logprobs = play_back(engine(smollm2_gguf, "float32"))
    best_16, _, logprobs_16 = play_back(engine(smollm2_gguf, "bfloat16"))
    errors = np.abs(logprobs_16 - logprobs)
    explained = np.stack(rounding_errors(smollm2_gguf, logprobs))
    assert explained.mean() > 2.0**-8  # the NumPy model did round
    assert errors.mean() <= 2 * explained.mean()

    clear = margin > 2 * explained.max()
    assert clear.mean() > 0.25, "the bound says too little"
    assert (best_16[clear] == best[clear]).all()


@pytest.fixture(scope="module")
def largest(smollm2_gguf: Path) -> np.ndarray:
    """The largest keys and values on the prompts that are played back."""
    checkpoint = open_checkpoint(smollm2_gguf)
    sequences = (np.array(c["prompt_ids"] + c["output_ids"]) for c in GOLDENS[:NUM_PLAYED_BACK])
    return largest_values(checkpoint.architecture, read_all(checkpoint), sequences)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_an_8_bit_cache_differs_from_a_float32_one_by_what_its_rounding_explains(
    smollm2_gguf: Path, largest: np.ndarray, dtype: CacheDtype, tmp_path: Path
) -> None:
    """Held against a NumPy model that reads keys and values rounded by the same rule.

    The means of two draws of the same errors differ by a fifth or so; where float32 is ahead by
    more than twice the largest error that the rule explains, the argmax must stay.
    """
    file = tmp_path / "scales.safetensors"
    held = hold(dtype, write_scales(file, largest, dtype))
    best, margin, logprobs = play_back(engine(smollm2_gguf, "float32"))
    small = engine(smollm2_gguf, "float32", cache_dtype=dtype, scales=file)
    best_8, _, logprobs_8 = play_back(small)
    checkpoint, parts = open_checkpoint(smollm2_gguf), []
    params = read_all(checkpoint)
    for case in GOLDENS[:NUM_PLAYED_BACK]:
        ids = np.array(case["prompt_ids"] + case["output_ids"])
        logits = numpy_llama.forward(checkpoint.architecture, params, ids, held=held)
        parts.append(log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]])
    explained = np.abs(np.concatenate(parts) - logprobs)
    errors = np.abs(logprobs_8 - logprobs)
    assert explained.mean() > 0.01  # the NumPy model did round
    assert errors.mean() <= 1.5 * explained.mean()
    clear = margin > 2 * explained.max()
    assert clear.mean() > 0.25, "the bound says too little"
    assert (best_8[clear] == best[clear]).all()
