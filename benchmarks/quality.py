"""What a narrower dtype costs: perplexity on a fixed text, and greedy tokens that stay the same.

The text is chapters I to III of Lewis Carroll's Alice's Adventures in Wonderland (1865), which is
in the public domain. Every variant reads it in the same windows, each from an empty context, and
continues the prompts of the named workloads greedily; the first variant is what the others are
compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.engine import WORKLOADS
from engine import LLM, SamplingParams
from engine.bench import WorkloadError, machine
from engine.progress import ProgressBar

TEXT = Path(__file__).resolve().parent / "texts" / "alice.txt"
# A dtype, and how its matrices are held.
VARIANTS = ("float32", "bfloat16", "bfloat16+int8")


class Answers(NamedTuple):
    """What one variant made of the text and of the prompts.

    Attributes:
      logprobs: float64 [N], of the text's tokens but for the first of each window.
      likeliest: int64 [N], the token that had the highest probability in each of these places.
      greedy: token ids of each prompt's continuation.
    """

    logprobs: np.ndarray
    likeliest: np.ndarray
    greedy: list[tuple[int, ...]]


class Quality(NamedTuple):
    """One variant, compared with the first.

    Attributes:
      variant: its dtype, and how its matrices are held.
      perplexity: of the text.
      mean_difference: of log-probabilities of the text's tokens, absolute, in nats.
      same_likeliest: share of the text's places where the likeliest token is the same.
      same_greedy: mean share of a continuation up to the first token that differs.
      identical: continuations that are the same to the end.
    """

    variant: str
    perplexity: float
    mean_difference: float
    same_likeliest: float
    same_greedy: float
    identical: int


def run(
    config: Path,
    overrides: tuple[str, ...],
    *,
    variants: Sequence[str],
    workloads: Sequence[str],
    tokens: int,
    window: int,
    folder: Path,
) -> int:
    """Measure all variants, print a table and keep everything as JSON.

    Args:
      config, overrides: as `octavo generate` takes them; dtype and quantization are set here.
      variants: a dtype each, or a dtype, a plus and a quantization; the first is the yardstick.
      workloads: names of files in `WORKLOADS`, whose prompts are continued.
      tokens: of each continuation.
      window: tokens of the text that are read at once.
      folder: for the JSON.

    Raises:
      WorkloadError: a workload isn't known.
      ValueError: nothing to compare, or to compare with.
    """
    if not variants or tokens < 1 or window < 2:
        raise ValueError(f"{variants=} must not be empty, {tokens=} at least 1, {window=} 2")
    prompts = _prompts(workloads)
    folder.mkdir(parents=True, exist_ok=True)
    text = TEXT.read_text()
    answers = {
        variant: _ask(config, overrides, variant, text, prompts, tokens, window)
        for variant in variants
    }
    first = answers[variants[0]]
    results = [_compare(variant, given, first, tokens) for variant, given in answers.items()]
    num_tokens = len(first.logprobs)
    report = {
        **machine.provenance("quality", machine.jax_device()),
        "text": TEXT.name,
        "num_tokens": num_tokens,
        "window": window,
        "workloads": list(workloads),
        "num_prompts": len(prompts),
        "continuation": tokens,
        "results": [result._asdict() for result in results],
    }
    path = folder / "quality.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    console = Console()
    console.print(_table(results, num_tokens, len(prompts), tokens))
    console.print(f"wrote {path}")
    return 0


def _prompts(workloads: Sequence[str]) -> list[list[int]]:
    prompts = []
    for name in workloads:
        file = WORKLOADS / f"{name}.jsonl"
        if not file.exists():
            known = ", ".join(sorted(path.stem for path in WORKLOADS.glob("*.jsonl")))
            raise WorkloadError(f"there is no workload {name!r}; known: {known}")
        prompts += [msgspec.json.decode(line)["prompt_ids"] for line in file.open()]
    return prompts


def _ask(
    config: Path,
    overrides: tuple[str, ...],
    variant: str,
    text: str,
    prompts: list[list[int]],
    tokens: int,
    window: int,
) -> Answers:
    """Load a variant, and have it read the text and continue the prompts."""
    dtype, _, quantization = variant.partition("+")
    model = (f"model.dtype={dtype}", f"model.quantization={quantization or 'none'}")
    with ProgressBar() as progress:

        def show(what: str, done: int, total: int) -> None:
            progress(f"{variant}: {what}", done, total)

        llm = LLM.from_config(config, overrides=(*overrides, *model), progress=show)
        try:
            ids = llm.engine.tokenizer.encode(text)
            windows = [ids[start : start + window] for start in range(0, len(ids), window)]
            reading = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
            writing = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            requests = [(tuple(ids), reading) for ids in windows if len(ids) > 1]
            num_windows = len(requests)
            requests += [(tuple(ids), writing) for ids in prompts]
            done = {}
            for index, completion in llm.generate_each(requests):
                if isinstance(completion, Exception):
                    raise completion
                done[index] = completion
                show("Reading and writing", len(done), len(requests))
        finally:
            llm.close()
    entries = [entry for index in range(num_windows) for entry in done[index].prompt_logprobs]
    return Answers(
        np.array([entry.logprob for entry in entries]),
        np.array([entry.top[0][0] for entry in entries]),
        [done[index].token_ids for index in range(num_windows, len(requests))],
    )


def _compare(variant: str, ours: Answers, first: Answers, tokens: int) -> Quality:
    prefixes = [_same(a, b) for a, b in zip(ours.greedy, first.greedy, strict=True)]
    return Quality(
        variant=variant,
        perplexity=math.exp(-ours.logprobs.mean()),
        mean_difference=float(np.abs(ours.logprobs - first.logprobs).mean()),
        same_likeliest=float((ours.likeliest == first.likeliest).mean()),
        same_greedy=float(np.mean(prefixes)) / tokens,
        identical=sum(prefix == tokens for prefix in prefixes),
    )


def _same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    differs = [a != b for a, b in zip(ours, theirs, strict=True)]
    return differs.index(True) if True in differs else len(differs)


def _table(results: Sequence[Quality], num_tokens: int, num_prompts: int, tokens: int) -> Table:
    table = Table(
        title=f"{num_tokens:,} tokens of text; {num_prompts} prompts, {tokens} tokens each",
        title_justify="left",
        caption="differences from the first row; log-probabilities in nats",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("variant")
    headings = ("perplexity", "", "|Δ logprob|", "same likeliest", "same greedy", "identical")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        change = result.perplexity / results[0].perplexity - 1
        table.add_row(
            result.variant,
            f"{result.perplexity:.3f}",
            f"{100 * change:+.2f} %",
            f"{result.mean_difference:.4f}",
            f"{100 * result.same_likeliest:.1f} %",
            f"{100 * result.same_greedy:.1f} %",
            f"{result.identical} of {num_prompts}",
        )
    return table
