"""The tiny models' reference logits and tokens, and the engine's answers to the same inputs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.conftest import DATA
from tests.engines import Result, make_request, small_engine

# Two float32 forwards that sum in different orders; the logits are of size ten.
GOLDEN_TOLERANCE = 2e-4


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """What transformers computed with the tiny model of that name."""
    return load_file(DATA / "tiny" / name / "reference.safetensors")


def through_engine(source: Path, name: str, **options: Any) -> tuple[np.ndarray, list[Result]]:
    """The golden sequences through scheduler and runner, and the greedy prompt beside them.

    Returns log-probabilities [2, 48, 20] of the likeliest tokens after each position of the
    two sequences, as dense rows over the vocabulary with NaN elsewhere, and the results.
    """
    reference = golden(name)
    engine = small_engine(source, **options)
    requests = [
        make_request(f"row {i}", ids, 1, logprobs=20, prompt_logprobs=20)
        for i, ids in enumerate(reference["input_ids"])
    ]
    requests.append(make_request("greedy", reference["greedy_prompt"], 24))
    results = list(engine.run(requests).values())
    dense = np.full(reference["logits"].shape, np.nan, np.float32)
    for row, result in enumerate(results[:2]):
        for position, entry in enumerate(result.prompt_logprobs + result.logprobs):
            for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
                dense[row, position, token] = logprob
    assert (np.isfinite(dense).sum(axis=-1) >= 20).all()
    return dense, results
