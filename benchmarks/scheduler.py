"""What a step costs the host: schedule + build + commit, pipelined as the step loop does it.

No model and no jax: tokens are drawn. DESIGN.md asks for a median under 1 ms at 256 running
sequences and a pool of 100,000 blocks, and for no growth with the pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from engine.bench import machine
from engine.bench.report import BUSY_CORES
from engine.config import BucketConfig, SchedulerConfig
from engine.core import batching, scheduler, upkeep
from engine.core.buckets import bucket_set
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.runtime.recorder import Recorder
from engine.sampling import SamplingParams
from engine.types import Domain, Fork, Request, StepPlan, StepTokens

BLOCK_SIZE = 16
VOCAB_SIZE = 32_000
MAX_MODEL_LEN = 4096
MAX_STEP_TOKENS = 8192
PROMPT_LIMIT = 256  # tokens; prompts have half of it on average
WARM_STEPS = 20  # steps of each round that don't count, once every sequence runs
STEP_MS = 10  # of the clock, where there is one
TIME_TO_LIVE_MS = 1_000
AGAIN = 320  # requests later a prompt is sent again, when the device may have evicted it
PUBLIC = tuple(range(128))
MEAN_OUTPUT = 128  # tokens; in the case where sequences end


@dataclasses.dataclass(frozen=True)
class Case:
    """What the sequences are like.

    Attributes:
      greedy: whether an argmax is all they ask of the sampler.
      turnover: whether they end, after MEAN_OUTPUT tokens on average, and others start in
        their place: their blocks are cached, evicted and matched. Else all run on.
      recorded: whether the event log is written, to nowhere; its time is in schedule and commit.
      everything: whether there are a host tier, a public prefix, several domains, times to live
        with a clock that moves in each step, requests for several samples, with copy-on-write,
        and prompts that come again.
      blocks_each: of the pool, blocks for each sequence; those beyond are the host tier's, where
        blocks go to and come back from. 0: all are the pool's.
    """

    name: str
    greedy: bool
    turnover: bool
    recorded: bool = False
    everything: bool = False
    blocks_each: int = 0


CASES = (
    Case("greedy", greedy=True, turnover=False),
    Case("sampled", greedy=False, turnover=False),
    Case("turnover", greedy=True, turnover=True),
    Case("recorded", greedy=True, turnover=True, recorded=True),
    Case("everything", greedy=True, turnover=True, everything=True, blocks_each=20),
    Case("crowded", greedy=True, turnover=True, everything=True, blocks_each=16),
)


class Sample(NamedTuple):
    """One step: seconds by phase, and what it was made of."""

    schedule: float
    build: float
    commit: float
    rows: int
    tokens: int
    preempted: int
    moved: int
    swapped_in: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one phase over the measured steps."""

    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Sum up the samples of a phase."""
        return cls(statistics.median(seconds), float(np.percentile(seconds, 99)), max(seconds))


@dataclasses.dataclass(frozen=True)
class Collections:
    """Garbage collections within the measured steps, whose times include them."""

    count: int
    seconds: float
    longest: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table. `total` is the sum of the phases, step by step."""

    case: str
    num_blocks: int
    sequences: int
    steps: int
    mean_rows: float
    mean_tokens: float
    preempted: int
    moved: int
    swapped_in: int
    schedule: Timing
    build: Timing
    commit: Timing
    total: Timing
    collections: Collections


def run(*, sequences: int, steps: int, rounds: int, pools: Sequence[int], folder: Path) -> int:
    """Measure every case over every pool; print a table, write `scheduler.json`.

    Args:
      sequences: how many run at once.
      steps: measured steps of a round, which starts with an empty pool.
      rounds: of each case and pool.
      pools: sizes of the block pool, in blocks; the smallest must hold the sequences.
      folder: where the JSON goes.
    """
    if min(sequences, steps, rounds) < 1:
        raise ValueError(f"{sequences=}, {steps=}, {rounds=}: each must be at least 1")
    longest = PROMPT_LIMIT + _steady_output(sequences, steps)
    if longest > MAX_MODEL_LEN:
        raise ValueError(
            f"{steps} steps make sequences of {longest} tokens, above {MAX_MODEL_LEN}; ask for "
            "fewer steps and more rounds"
        )
    needed = blocks_needed(sequences, steps)
    if min(pools, default=0) < needed:
        raise ValueError(
            f"{sequences} sequences over {steps} steps may need {needed:,} blocks, and the pools "
            f"are {list(pools)}; ask for larger pools, fewer sequences or fewer steps"
        )
    folder.mkdir(parents=True, exist_ok=True)
    meter = machine.Meter()
    meter.start()
    results = [
        measure(case, blocks, sequences, steps, rounds) for case in CASES for blocks in pools
    ]
    load = meter.stop()
    report = {
        **machine.provenance("scheduler"),
        "machine": load,
        "results": results,
    }
    path = folder / "scheduler.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    console = Console()
    console.print(_table(results))
    if load.foreign_cores is not None:
        style = "bold red" if load.foreign_cores > BUSY_CORES else ""
        console.print(f"foreign CPU load: {load.foreign_cores:.3f} cores", style=style)
    console.print(f"wrote {path}")
    return 0


def blocks_needed(sequences: int, steps: int) -> int:
    """The most blocks that can be owned at once, with one to grow for each sequence."""
    longest = PROMPT_LIMIT + max(_steady_output(sequences, steps), 2 * MEAN_OUTPUT)
    return sequences * (-(-longest // BLOCK_SIZE) + 1)


def _steady_output(sequences: int, steps: int) -> int:
    """Tokens that a sequence must ask for to run through a whole round."""
    prefill_steps = -(-sequences * PROMPT_LIMIT // MAX_STEP_TOKENS)
    return prefill_steps + WARM_STEPS + steps + 8  # and some, as decodes take of the budget too


def measure(case: Case, num_blocks: int, sequences: int, steps: int, rounds: int) -> Result:
    """Time the steps of some rounds; the arguments are as in `run`."""
    pool = sequences * case.blocks_each or num_blocks
    limits = Limits(
        num_blocks=pool,
        block_size=BLOCK_SIZE,
        max_num_seqs=sequences,
        max_step_tokens=max(MAX_STEP_TOKENS, sequences),
        max_model_len=MAX_MODEL_LEN,
        host_blocks=num_blocks - pool,
    )
    draw = np.random.RandomState(0)
    samples: list[Sample] = []
    with _Watch() as watch:
        for _ in range(rounds):
            gc.collect()
            output_len = _steady_output(sequences, steps)
            with contextlib.closing(Recorder(os.devnull, limits)) as recorder:
                used = recorder if case.recorded else None
                samples += itertools.islice(
                    _steps(case, limits, draw, watch, output_len, used), steps
                )
    return Result(
        case=case.name,
        num_blocks=num_blocks,
        sequences=sequences,
        steps=len(samples),
        mean_rows=statistics.fmean(sample.rows for sample in samples),
        mean_tokens=statistics.fmean(sample.tokens for sample in samples),
        preempted=sum(sample.preempted for sample in samples),
        moved=sum(sample.moved for sample in samples),
        swapped_in=sum(sample.swapped_in for sample in samples),
        schedule=Timing.of([sample.schedule for sample in samples]),
        build=Timing.of([sample.build for sample in samples]),
        commit=Timing.of([sample.commit for sample in samples]),
        total=Timing.of([sample.schedule + sample.build + sample.commit for sample in samples]),
        collections=watch.collections(),
    )


def _steps(
    case: Case,
    limits: Limits,
    draw: np.random.RandomState,
    watch: _Watch,
    output_len: int,
    recorder: Recorder | None,
) -> Iterator[Sample]:
    """The steps of a scheduler that starts empty, from WARM_STEPS after all sequences run.

    A step is committed after the next one is scheduled and built, as in the step loop.
    """
    buckets = bucket_set(
        BucketConfig(),
        SchedulerConfig(max_num_seqs=limits.max_num_seqs, max_step_tokens=limits.max_step_tokens),
        limits.max_model_len // limits.block_size,
    )
    requests = _requests(case, draw, output_len)
    state = SchedulerState.initial(limits)
    in_flight: tuple[StepPlan, StepTokens] | None = None
    steps_since_full = -1
    now = 0
    if case.everything:
        state = _with_public_prefix(state, limits)
    while True:
        while state.num_running + state.num_waiting < limits.max_num_seqs:
            request = next(requests)
            state = scheduler.admit(state, limits, request)
            if recorder:
                recorder.admit(request)
        if steps_since_full >= 0 or state.num_running == limits.max_num_seqs:
            steps_since_full += 1
        counts = watch.counts = steps_since_full > WARM_STEPS
        begin = time.perf_counter()
        if case.everything:
            now += STEP_MS
            state = upkeep.tick(state, now)
        state, plan = scheduler.schedule(state, limits)
        if recorder:
            recorder.schedule(plan)
        scheduled = time.perf_counter()
        batching.build(plan, buckets, limits.max_num_seqs)
        built = time.perf_counter()
        watch.counts = False
        tokens = StepTokens(tuple(draw.randint(0, VOCAB_SIZE, len(plan.rows)).tolist()))
        watch.counts = counts
        commit_begin = time.perf_counter()
        if in_flight is not None:
            if recorder:
                recorder.commit(*in_flight)
            state, _ = scheduler.commit(state, *in_flight, limits)
        commit = time.perf_counter() - commit_begin
        watch.counts = False
        in_flight = plan, tokens
        if counts:
            yield Sample(
                schedule=scheduled - begin,
                build=built - scheduled,
                commit=commit,
                rows=len(plan.rows),
                tokens=plan.num_tokens,
                preempted=len(plan.preempted),
                moved=len(plan.block_copies)
                + len(plan.swap_outs)
                + len(plan.swap_ins)
                + len(plan.erased_blocks)
                + len(plan.erased_slots),
                swapped_in=len(plan.swap_ins),
            )


class _Watch:
    """Notes the garbage collections that happen while `counts` is set."""

    def __init__(self) -> None:
        self.counts = False
        self._pauses: list[float] = []
        self._begin = 0.0

    def __enter__(self) -> _Watch:
        gc.callbacks.append(self._on_collection)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._on_collection)

    def _on_collection(self, phase: str, _: dict[str, Any]) -> None:
        if phase == "start":
            self._begin = time.perf_counter()
        elif self.counts:
            self._pauses.append(time.perf_counter() - self._begin)

    def collections(self) -> Collections:
        """What was noted."""
        pauses = self._pauses
        return Collections(len(pauses), sum(pauses), max(pauses, default=0.0))


def _requests(case: Case, draw: np.random.RandomState, output_len: int) -> Iterator[Request]:
    """Requests without end: of `output_len` tokens each, or of MEAN_OUTPUT on average.

    Half of those that turn over begin with a prefix that others have.
    """
    sampling = SamplingParams(temperature=0.0 if case.greedy else 1.0)
    prefixes = [draw.randint(0, VOCAB_SIZE, 64).tolist() for _ in range(8)]
    earlier: deque[list[int]] = deque(maxlen=AGAIN)
    number = 0
    while True:
        num_prompt = int(draw.randint(1, PROMPT_LIMIT))
        prompt = draw.randint(0, VOCAB_SIZE, num_prompt).tolist()
        max_tokens = output_len
        more: dict[str, Any] = {}
        if case.everything:
            more["domain"] = Domain(f"tenant {number % 16}")
            more["cache_ttl"] = TIME_TO_LIVE_MS if number % 3 else 0
            if number % 8 == 0:
                more["forks"] = (Fork(f"{number}.1", 1), Fork(f"{number}.2", 2))
            if number % 4 == 1:
                prompt = [*PUBLIC, *prompt][:PROMPT_LIMIT]
            if number % 4 == 3 and len(earlier) == AGAIN:
                prompt = earlier[0]
            earlier.append(prompt)
        if case.turnover:
            if number % 2 and not case.everything:
                prompt[:64] = prefixes[number // 2 % len(prefixes)][:num_prompt]
            max_tokens = int(draw.randint(1, 2 * MEAN_OUTPUT))
        yield Request(f"{number}", tuple(prompt), sampling, max_tokens, **more)
        number += 1


def _with_public_prefix(state: SchedulerState, limits: Limits) -> SchedulerState:
    greedy = SamplingParams(temperature=0.0)
    state = scheduler.admit(
        state, limits, Request("public", PUBLIC, greedy, max_tokens=1, is_public=True)
    )
    state, plan = scheduler.schedule(state, limits)
    return scheduler.commit(state, plan, StepTokens((0,)), limits).state


def _table(results: Sequence[Result]) -> Table:
    first = results[0]
    table = Table(
        title=f"schedule + build + commit, {first.sequences} running sequences, "
        f"{first.steps} steps a row, µs",
        title_justify="left",
        caption="GC: garbage collections within the measured steps, and the longest",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("case")
    headings = ("blocks", "schedule", "build", "commit", "total", "p99", "max", "GC")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.case,
            f"{result.num_blocks:,}",
            _micro(result.schedule.median),
            _micro(result.build.median),
            _micro(result.commit.median),
            _micro(result.total.median),
            _micro(result.total.p99),
            _micro(result.total.max),
            f"{result.collections.count} · {_micro(result.collections.longest)}",
        )
    return table


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}"
