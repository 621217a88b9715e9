"""Record what transformers' beam search finds on the tiny checkpoints, as data for the tests.

Needs transformers 5.19.0 and torch 2.13.0, which are no part of this project's environment:
``python scripts/record_beams.py tests/data/tiny tests/data/beams.json``.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

MODELS = ("llama", "qwen3")
WIDTHS = (2, 4, 7)
PENALTIES = (1.0, 0.0, -0.5)
MAX_TOKENS = 10


def main(folder: Path, output: Path) -> None:
    """Search with each combination, and write the outputs that were found with their scores."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(1)  # the models are too small for more
    cases = []
    for name in MODELS:
        reference = load_file(folder / name / "reference.safetensors")
        prompt = reference["greedy_prompt"].tolist()
        searches = []
        for dtype in (torch.float32, torch.float64):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder / name, dtype=dtype, attn_implementation="eager"
            )
            searches.append(search(model.eval(), prompt))
        # Where more digits change the outcome, ours may differ for the same reason.
        for single, double in zip(*searches, strict=True):
            if [each["token_ids"] for each in single["found"]] == [
                each["token_ids"] for each in double["found"]
            ]:
                cases.append({"model": name, "prompt_ids": prompt, **single})
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = ",\n".join(json.dumps(case) for case in cases)
    output.write_text(f'{{"made_by": {json.dumps(made_by)}, "cases": [\n{lines}\n]}}\n')


def search(model: Any, prompt: list[int]) -> list[dict[str, Any]]:
    """Every combination on one model; first without, then with tokens that end an output."""
    free = generate(model, prompt, [], 8, 1.0, early_stopping=False)
    # Tokens that the search comes by: one soon and one late.
    stops = [free[0]["token_ids"][2], free[1]["token_ids"][7]]
    cases = []
    for width, penalty, early, stop_ids in itertools.product(
        WIDTHS, PENALTIES, (False, True), ([], stops[:1], sorted(set(stops)))
    ):
        if early and not stop_ids:
            continue
        found = generate(model, prompt, stop_ids, width, penalty, early_stopping=early)
        cases.append(
            {
                "stop_ids": stop_ids,
                "beam_width": width,
                "length_penalty": penalty,
                "early_stopping": early,
                "max_tokens": MAX_TOKENS,
                "found": found,
            }
        )
    return cases


def generate(
    model: Any,
    prompt: list[int],
    stop_ids: list[int],
    width: int,
    penalty: float,
    *,
    early_stopping: bool,
) -> list[dict[str, Any]]:
    """All outputs of one search, best first, each up to and with the token that ended it."""
    torch: Any = importlib.import_module("torch")
    config = model.generation_config
    config.eos_token_id = stop_ids or None
    config.pad_token_id = None if not stop_ids else stop_ids[0]
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=penalty,
        early_stopping=early_stopping,
        max_new_tokens=MAX_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    for sequence, score in zip(result.sequences, result.sequences_scores, strict=True):
        tokens = sequence[len(prompt) :].tolist()
        ends = [index for index, token in enumerate(tokens) if token in stop_ids]
        found.append(
            {"token_ids": tokens[: ends[0] + 1] if ends else tokens, "score": score.item()}
        )
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
