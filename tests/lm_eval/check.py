"""lm-eval against a server of ours: each score must be that of a direct computation in NumPy.

`make lm-eval` runs it. lm-eval has an environment of its own, and asks the server for everything:
tokens, log-likelihoods of answers, and those of whole texts in windows of the model's context.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.text import Tokenizer
from engine.weights import open_checkpoint
from tests.conftest import ROOT
from tests.model import numpy_llama
from tests.serve.process import http_server
from tests.weights.checkpoints import read_all

CONFIG = ROOT / "configs" / "smollm2-135m-cpu.yaml"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# Float32, so that rounding explains no difference; few shapes, as compiling takes longest.
OVERRIDES = (
    *("model.dtype=float32", "model.max_model_len=512", "cache.memory=null"),
    *("cache.num_blocks=256", "scheduler.max_num_seqs=8", "scheduler.max_step_tokens=256"),
    *("buckets.decode_seqs=[8]", "buckets.prefill_tokens=[256]", "buckets.prefill_seqs=[8]"),
)
TASKS = ("octavo_choice", "octavo_perplexity")
MAX_LENGTH = 101  # of prompt and output, as lm-eval is told: the longest text takes windows
TOLERANCE = 1e-5  # of a log-likelihood, relative: float32 sums in another order


class Direct:
    """Log-likelihoods by a NumPy model that shares nothing with the engine but its weights."""

    def __init__(self, path: Path):
        checkpoint = open_checkpoint(path)
        assert checkpoint.metadata is not None
        self._architecture = checkpoint.architecture
        self._params = read_all(checkpoint)
        self.tokenizer = Tokenizer.from_gguf(checkpoint.metadata)

    def score(self, ids: list[int], num_given: int) -> tuple[float, bool]:
        """Log-likelihood of what follows the first tokens, and whether each is the likeliest."""
        inputs, targets = np.array(ids[:-1]), np.array(ids[1:])
        logits = numpy_llama.forward(self._architecture, self._params, inputs).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        scored = slice(num_given - 1, None)
        chosen = logprobs[np.arange(len(targets)), targets][scored]
        is_greedy = (logprobs.argmax(axis=-1) == targets)[scored]
        return float(chosen.sum()), bool(is_greedy.all())

    def continuation(self, context: str, text: str) -> tuple[float, bool]:
        """Of a text after another."""
        whole = self.tokenizer.encode(context + text, add_special_tokens=False)
        given = self.tokenizer.encode(context, add_special_tokens=False)
        assert whole[: len(given)] == given
        return self.score(whole, len(given))

    def rolling(self, text: str, width: int) -> float:
        """Of a whole text, in windows of `width` tokens: each token once, the first after the
        model's first token, and the last window as full as the others."""
        first = self.tokenizer.bos_token_id
        assert first is not None
        ids = [first, *self.tokenizer.encode(text, add_special_tokens=False)]
        total = 0.0
        for start in range(1, len(ids), width):
            end = min(start + width, len(ids))
            begin = max(0, end - width - 1)
            total += self.score(ids[begin:end], start - begin)[0]
        return total


def main() -> int:
    """Run lm-eval, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lm_eval", type=Path, help="lm-eval's own command")
    command = parser.parse_args().lm_eval
    direct = Direct(MODEL)
    with tempfile.TemporaryDirectory() as folder, http_server(CONFIG, OVERRIDES) as url:
        _run(command, url, Path(folder))
        results, samples = _read(Path(folder))
    worst = max(
        _check_choices(direct, results["octavo_choice"], samples["octavo_choice"]),
        _check_texts(direct, results["octavo_perplexity"], samples["octavo_perplexity"]),
    )
    for task, scores in results.items():
        shown = (f"{name.partition(',')[0]} {value:.6g}" for name, value in sorted(scores.items()))
        print(f"{task}: {', '.join(shown)}")
    print(
        f"All scores are those of a direct computation; the log-likelihood that is furthest off "
        f"differs by {worst:.1e} of it (at most {TOLERANCE:g})"
    )
    return 0


def _run(command: Path, url: str, folder: Path) -> None:
    arguments = {
        "model": "smollm2-135m-instruct",
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "remote",
        "num_concurrent": 4,
        "max_length": MAX_LENGTH,
    }
    model_args = ",".join(f"{name}={value}" for name, value in arguments.items())
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    subprocess.run(
        [
            *(command, "run", "--model", "local-completions", "--model_args", model_args),
            *("--tasks", ",".join(TASKS), "--batch_size", "4"),
            *("--include_path", "tests/lm_eval/tasks", "--log_samples"),
            *("--output_path", folder / "out"),
        ],
        cwd=ROOT,
        env=os.environ | offline,
        check=True,
    )


def _read(folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """By task: the scores, and what each question got."""
    (file,) = folder.rglob("results_*.json")
    results = {
        task: {name: value for name, value in scores.items() if isinstance(value, float)}
        for task, scores in json.loads(file.read_text())["results"].items()
    }
    samples = {
        task: [json.loads(line) for line in file.read_text().splitlines()]
        for task in results
        for file in folder.rglob(f"samples_{task}_*.jsonl")
    }
    return results, samples


def _check_choices(
    direct: Direct, scores: dict[str, float], samples: list[dict[str, Any]]
) -> float:
    worst, right, right_by_length = 0.0, [], []
    for sample in samples:
        found = []
        for arguments, answer in zip(
            sample["arguments"].values(), sample["filtered_resps"], strict=True
        ):
            logprob, is_greedy = direct.continuation(arguments["arg_0"], arguments["arg_1"])
            worst = max(worst, _differ(float(answer[0]), logprob))
            assert str(answer[1]) == str(is_greedy), sample
            found.append(logprob)
        lengths = [len(choice) for choice in sample["doc"]["choices"]]
        right.append(np.argmax(found) == sample["doc"]["answer"])
        right_by_length.append(np.argmax(np.divide(found, lengths)) == sample["doc"]["answer"])
    assert scores["acc,none"] == np.mean(right)
    assert scores["acc_norm,none"] == np.mean(right_by_length)
    return worst


def _check_texts(direct: Direct, scores: dict[str, float], samples: list[dict[str, Any]]) -> float:
    worst = total = 0.0
    num_words = num_bytes = 0
    for sample in samples:
        text = sample["doc"]["text"]
        # One of the most that lm-eval is told is for the output, and one for what is before.
        logprob = direct.rolling(text, MAX_LENGTH - 2)
        worst = max(worst, _differ(float(sample["filtered_resps"][0]), logprob))
        total += logprob
        num_words += len(re.split(r"\s+", text))
        num_bytes += len(text.encode())
    expected = {
        "word_perplexity": math.exp(-total / num_words),
        "byte_perplexity": math.exp(-total / num_bytes),
        "bits_per_byte": -total / num_bytes / math.log(2),
    }
    for name, value in expected.items():
        _differ(scores[f"{name},none"], value)
    return worst


def _differ(found: float, expected: float) -> float:
    """By which part of it; an error if that is too much."""
    part = abs(found - expected) / abs(expected)
    assert part <= TOLERANCE, f"lm-eval has {found}, and it is {expected}"
    return part


if __name__ == "__main__":
    sys.exit(main())
