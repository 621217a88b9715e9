"""`octavo simulate`: allocators side by side on one stream of requests.

No device and no model is needed, and nothing heavier than NumPy is loaded.
"""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from engine.config_file import parse_size
from engine.core.limits import Allocator, Limits
from engine.dashboard.page import single_file
from engine.dashboard.recording import Recording
from engine.progress import ProgressBar
from engine.simulate.cost import DEVICES, CostModel
from engine.simulate.report import Figures, figures, render, summary
from engine.simulate.run import ALLOCATORS, run
from engine.simulate.stream import Stream, sharegpt_like
from engine.simulate.trace import read_trace


def simulate(
    *,
    trace: Path | None = None,
    allocator: Annotated[Sequence[str], Parameter(negative=())] = ALLOCATORS,
    requests: int = 5000,
    rate: float | None = None,
    turns: float = 1.0,
    think_s: float = 10.0,
    system_share: float = 0.0,
    system_tokens: int = 512,
    system_prompts: int = 8,
    seed: int = 0,
    device: str = "v6e",
    num_blocks: int | None = None,
    memory: str | int | None = None,
    block_size: int = 16,
    max_num_seqs: int = 512,
    max_step_tokens: int = 2048,
    max_model_len: int = 2048,
    max_tokens: int | None = None,
    prefix_reuse: bool = True,
    host_memory: str | int | None = None,
    json: bool = False,
    html: Path | None = None,
    console: Annotated[Console | None, Parameter(parse=False)] = None,
) -> list[Figures]:
    """Run allocators under the real scheduler on one stream, print a report, and return it.

    Args:
      trace: JSON lines with `arrival` (seconds), `prompt_tokens`, `output_tokens` and perhaps a
        `conversation`; without it, a stream like ShareGPT is drawn.
      allocator: names, with commas between them or given several times; each is a column.
      requests: how many.
      rate: requests a second; None: all at once.
      turns: of a conversation on average; each repeats what was said before. Where requests have
        a beginning in common, `paged` reuses it.
      think_s: mean seconds between an answer and the next turn.
      system_share: part of the conversations that begin with one of `system_prompts` prompts of
        `system_tokens` tokens.
      seed: of the stream.
      device: whose published peaks a step's time is estimated from: v6e or h100.
      num_blocks: of the pool, by default what fits beside the weights.
      memory: the pool's in bytes instead, or as text such as 8GiB.
      block_size: tokens in a block.
      max_num_seqs, max_step_tokens: of the scheduler.
      max_model_len: prompt and answer at their longest, in tokens.
      max_tokens: what each client gives; None: answers may be as long as the model's context,
        and slabs are sized for that.
      prefix_reuse: off to compare with; every prompt is then computed whole.
      host_memory: bytes of the tier below the pool, or text such as 8GiB; none by default.
      json: print JSON instead of a table.
      html: also write a page here that shows the pools side by side over time; one file, which
        opens from a disk.
      console: where to print.

    Raises:
      ValueError: an option is out of range, or the trace is wrong.
      OSError: the trace can't be read.
    """
    names = _allocators(allocator)
    if device not in DEVICES:
        raise ValueError(f"device {device!r:.80} is not known; take one of {', '.join(DEVICES)}")
    cost = DEVICES[device]
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    if host_memory is not None and not prefix_reuse:
        raise ValueError("host_memory keeps blocks for reuse, which no-prefix-reuse turns off")
    if html is not None and not html.parent.is_dir():
        raise ValueError(f"html is {html}, but there is no folder {html.parent}; make it first")
    blocks = _blocks(cost, num_blocks, memory, block_size)
    host_blocks = 0 if host_memory is None else cost.blocks_in(parse_size(host_memory), block_size)
    if trace is None:
        stream = sharegpt_like(
            requests,
            rate=rate,
            turns=turns,
            think_s=think_s,
            system_share=system_share,
            system_tokens=system_tokens,
            num_system_prompts=system_prompts,
            seed=seed,
        )
        source = f"{requests:,} requests like ShareGPT's (seed {seed}), "
        source += "all at once" if rate is None else f"{rate:g} a second"
    else:
        stream = read_trace(trace)
        source = f"{len(stream):,} requests of {trace.name}"
    limits = Limits(
        num_blocks=blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_step_tokens,
        max_model_len=max_model_len,
        prefix_reuse=prefix_reuse and stream.has_shared_prefixes,
        host_blocks=host_blocks,
    )
    recordings = [Recording(name) for name in names] if html else []
    reports = _run_all(stream, limits, cost, names, max_tokens, recordings)
    if not any(report.finished for report in reports):
        raise ValueError(
            f"none of the {len(stream):,} requests fits in a context of {max_model_len:,} tokens "
            f"and {blocks:,} blocks of {block_size}; give more of either"
        )
    console = console or Console()
    if json:
        document = {
            "stream": source,
            "cost": cost.name,
            "num_blocks": blocks,
            "block_size": block_size,
            "max_model_len": max_model_len,
            "max_tokens": max_tokens,
            "summary": summary(reports, block_size),
            "allocators": [report.as_dict() for report in reports],
        }
        console.file.write(json_module.dumps(document) + "\n")
    else:
        context = f"context of {max_model_len:,}"
        replies = "" if max_tokens is None else f", replies of at most {max_tokens:,}"
        title = f"{source}; {context}{replies}\n{blocks:,} blocks of {block_size}; {cost.name}"
        console.print(render(title, reports, block_size))
    if html is not None:
        html.write_text(_page(source, limits, cost, reports, recordings), encoding="utf-8")
        frames = " and ".join(f"{len(recording)}" for recording in recordings)
        print(f"wrote {html}, with {frames} moments", file=sys.stderr)
    return reports


def _page(
    source: str,
    limits: Limits,
    cost: CostModel,
    reports: list[Figures],
    recordings: list[Recording],
) -> str:
    pool = f"{limits.num_blocks:,} blocks of {limits.block_size} tokens"
    return single_file(
        f"{source} · {pool} · {cost.name}",
        [recording.as_dict() for recording in recordings],
        unit="s",
        summary=summary(reports, limits.block_size),
        figures=[
            ("useful", *(f"{r.owned.held + r.owned.coming:.1%}" for r in reports)),
            ("sequences at once", *(f"{r.running:,.1f}" for r in reports)),
            ("output tokens/s", *(f"{r.output_tokens_per_s:,.0f}" for r in reports)),
            ("preemptions", *(f"{r.preemptions:,}" for r in reports)),
            ("finished after", *(f"{r.duration_s:,.1f} s" for r in reports)),
        ],
    )


def _allocators(given: Sequence[str]) -> tuple[Allocator, ...]:
    given = [name for part in given for name in part.split(",")]
    names = tuple(name for name in ALLOCATORS if name in given)
    unknown = [name for name in given if name not in ALLOCATORS]
    if unknown or not names:
        raise ValueError(
            f"allocator {', '.join(unknown) or 'list'!r:.80} is "
            f"{'not known' if unknown else 'empty'}; take some of {', '.join(ALLOCATORS)}"
        )
    return names


def _blocks(
    cost: CostModel, num_blocks: int | None, memory: str | int | None, block_size: int
) -> int:
    if num_blocks is not None and memory is not None:
        raise ValueError("num_blocks and memory both give the size of the pool; leave one out")
    if num_blocks is not None:
        return num_blocks
    if memory is None:
        blocks, room = cost.blocks_beside_weights(block_size), cost.name
    else:
        blocks, room = cost.blocks_in(parse_size(memory), block_size), f"memory {memory}"
    if blocks < 1:
        raise ValueError(f"not one block of {block_size} tokens fits in {room}; give more memory")
    return blocks


def _run_all(
    stream: Stream,
    limits: Limits,
    cost: CostModel,
    names: tuple[Allocator, ...],
    max_tokens: int | None,
    recordings: Sequence[Recording],
) -> list[Figures]:
    reports = []
    with ProgressBar() as progress:
        for name, recording in zip_longest(names, recordings):
            outcome = run(
                stream,
                limits,
                cost,
                name,
                max_tokens=max_tokens,
                progress=lambda done, name=name: progress(name, done, len(stream)),
                recording=recording,
            )
            reports.append(figures(outcome, stream.prompt_tokens))
    return reports
