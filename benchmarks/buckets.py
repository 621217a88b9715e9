"""Sets of buckets for a config: what they pad on a workload, and what their programs cost to have.

Which plans a workload leads to does not depend on the buckets, so the scheduler runs once, on a
device that takes no time, and every set is asked for the bucket of each plan. What a shape costs is
the time of a step of padding alone: all but attention, which padding has none of.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.engine import WORKLOADS
from engine import config_file
from engine.bench import machine
from engine.bench.figures import padding_waste
from engine.bench.workload import Item, WorkloadError, read_workload
from engine.config import BucketConfig, Config
from engine.core import scheduler
from engine.core.batching import choose_bucket
from engine.core.buckets import Bucket, bucket_set
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.types import Request, StepPlan, StepTokens

IN_FLIGHT = 2  # a step is planned before the one before it is committed
REPEATS = 5  # of each shape, in turn


class Padding(NamedTuple):
    """What a set of buckets pads on a workload's steps: positions, and rows."""

    tokens: int
    padded_tokens: int
    rows: int
    padded_rows: int

    @property
    def waste(self) -> float | None:
        """Share of the positions that fill shapes."""
        return padding_waste(self.tokens, self.padded_tokens)

    @property
    def waste_of_rows(self) -> float | None:
        """Share of the rows that do: each costs its logits."""
        return padding_waste(self.rows, self.padded_rows)


class Compiling(NamedTuple):
    """Seconds to have all programs of a set: compiled, and found in the compile cache."""

    programs: int
    compiled: float
    found: float


def run(
    config: Path,
    overrides: Sequence[str],
    *,
    sets: Sequence[str],
    workload: str,
    timed: bool,
    folder: Path,
) -> int:
    """Print a row for each set, the config's own first; write `buckets.json`.

    Args:
      config, overrides: as `octavo bench throughput` takes them.
      sets: as `parse` takes them.
      workload: of a file in `WORKLOADS`.
      timed: compile each set's programs, and time each shape: a minute or two.
      folder: where the report goes.

    Raises:
      WorkloadError: a set is none.
    """
    loaded = config_file.load(config, tuple(overrides))
    configs = [loaded.buckets, *map(parse, sets)]
    items = read_workload(WORKLOADS / f"{workload}.jsonl")
    limits = _limits(loaded)
    plans = plans_of(items, limits)
    shapes = [buckets_of(loaded, asked, limits) for asked in configs]
    costs = step_seconds(loaded, shapes) if timed else {}
    rows = []
    for asked, buckets in zip(configs, shapes, strict=True):
        each: dict[str, Any] = {
            "set": asked,
            "buckets": [bucket[:2] for bucket in buckets],
            "padding": padding_of(plans, buckets)._asdict(),
        }
        if timed:
            each["seconds"] = sum(costs[choose_bucket(plan, buckets)] for plan in plans)
            each["compiling"] = compile_all(loaded, buckets)._asdict()
        rows.append(each)
    report = {
        **machine.provenance("buckets"),
        "workload": workload,
        "steps": len(plans),
        "sets": rows,
        "step_seconds": [(*bucket[:2], seconds) for bucket, seconds in costs.items()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "buckets.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    console = Console(width=max(Console().width, 140))
    console.print(_table(workload, len(plans), rows))
    console.print(f"wrote {path}")
    return 0


def parse(text: str) -> BucketConfig:
    """A set from `DECODE_SEQS/PREFILL_TOKENS/PREFILL_SEQS`, numbers with commas between them.

    Raises:
      WorkloadError: it is not of that form.
    """
    try:
        decode, tokens, seqs = (tuple(map(int, part.split(","))) for part in text.split("/"))
    except ValueError:
        raise WorkloadError(
            f"the set {text!r} is not like 1,4,16,64/64,256,512/16,64: sequences of decode "
            "buckets, tokens and sequences of prefill buckets"
        ) from None
    return BucketConfig(decode_seqs=decode, prefill_tokens=tokens, prefill_seqs=seqs)


def plans_of(items: Sequence[Item], limits: Limits) -> list[StepPlan]:
    """The plans of a workload whose requests all come at once, each answered to its full length.

    Raises:
      WorkloadError: it doesn't say how long prompts and answers are.
    """
    state = SchedulerState.initial(limits)
    for number, item in enumerate(items):
        state = scheduler.admit(state, limits, _request(number, item))
    plans: list[StepPlan] = []
    flying: list[StepPlan] = []
    while not state.is_idle or flying:
        state, plan = scheduler.schedule(state, limits)
        if plan.rows:
            plans.append(plan)
            flying.append(plan)
        if len(flying) == IN_FLIGHT or not plan.rows:
            done = flying.pop(0)
            state, _ = scheduler.commit(state, done, StepTokens((0,) * len(done.rows)), limits)
    return plans


def padding_of(plans: Iterable[StepPlan], buckets: tuple[Bucket, ...]) -> Padding:
    """What the buckets add to the plans."""
    tokens = padded_tokens = rows = padded_rows = 0
    for plan in plans:
        bucket = choose_bucket(plan, buckets)
        tokens += plan.num_tokens
        padded_tokens += bucket.num_tokens
        rows += len(plan.rows)
        padded_rows += bucket.num_seqs
    return Padding(tokens, padded_tokens, rows, padded_rows)


def buckets_of(config: Config, asked: BucketConfig, limits: Limits) -> tuple[Bucket, ...]:
    """The shapes of a set under a config's limits."""
    return bucket_set(asked, config.scheduler, -(-limits.max_model_len // limits.block_size))


def step_seconds(config: Config, shapes: Sequence[tuple[Bucket, ...]]) -> Mapping[Bucket, float]:
    """Median seconds of a step of padding, in each bucket of any of the sets."""
    from engine.core import batching
    from engine.loading import load_engine

    wanted = {bucket for buckets in shapes for bucket in buckets}
    runner = load_engine(dataclasses.replace(config, buckets=union(wanted))).runner
    plan = StepPlan(step=-1, rows=())
    taken: dict[Bucket, list[float]] = {bucket: [] for bucket in sorted(wanted)}
    for _ in range(REPEATS):
        for bucket, seconds in taken.items():
            batch = batching.empty(bucket, runner.sink_slot)
            begin = time.perf_counter()
            runner.launch(plan, batch).wait()
            seconds.append(time.perf_counter() - begin)
    return {bucket: statistics.median(seconds) for bucket, seconds in taken.items()}


def union(buckets: Iterable[Bucket]) -> BucketConfig:
    """A set that has all of these buckets, and perhaps more."""
    decode = {each.num_seqs for each in buckets if each.num_tokens == each.num_seqs}
    prefill = [each for each in buckets if each.num_tokens > each.num_seqs]
    return BucketConfig(
        decode_seqs=tuple(sorted(decode)),
        prefill_tokens=tuple(sorted({each.num_tokens for each in prefill})),
        prefill_seqs=tuple(sorted({each.num_seqs for each in prefill})),
    )


def compile_all(config: Config, buckets: tuple[Bucket, ...]) -> Compiling:
    """Compile a set's programs with an empty cache, then anew with what that left there."""
    from engine.loading import use_compile_cache

    with tempfile.TemporaryDirectory() as cache:
        use_compile_cache(cache)
        compiled, found = (_seconds_to_compile(config, buckets) for _ in range(2))
    return Compiling(len(buckets) + len({bucket.num_seqs for bucket in buckets}), compiled, found)


def _seconds_to_compile(config: Config, buckets: tuple[Bucket, ...]) -> float:
    import jax

    from engine.aot.programs import step_of
    from engine.runtime.programs import Programs

    step, _ = step_of(config, jax.devices())
    begin = time.perf_counter()
    with Programs(step) as programs:
        programs.begin(buckets)
        for bucket in buckets:
            programs.forward(bucket)
            programs.choose(bucket.num_seqs)
    return time.perf_counter() - begin


def _limits(config: Config) -> Limits:
    from engine.backends import resolve_attention
    from engine.config import resolve_source
    from engine.loading import make_limits
    from engine.weights import open_checkpoint

    arch = open_checkpoint(resolve_source(config)).architecture
    return make_limits(config, arch, "", backend=resolve_attention(config).backend)


def _request(number: int, item: Item) -> Request:
    if isinstance(item.prompt, str) or item.required_tokens is None:
        raise WorkloadError("buckets are asked for with prompt_ids, and lengths that are known")
    prompt = tuple(int(token) for token in item.prompt)  # type: ignore[arg-type]
    sampling = dataclasses.replace(item.sampling, temperature=0.0)
    return Request(f"r{number}", prompt, sampling, max_tokens=item.required_tokens)


def _table(workload: str, steps: int, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{workload}: {steps} steps, by set of buckets", title_justify="left")
    table.add_column("decode / prefill tokens / prefill sequences")
    columns = ("buckets", "padding", "padded rows", "steps without attention, s")
    for name in (*columns, "programs", "compile, s", "find, s"):
        table.add_column(name, justify="right")
    for each in rows:
        asked: BucketConfig = each["set"]
        parts = (asked.decode_seqs, asked.prefill_tokens, asked.prefill_seqs)
        name = " / ".join(",".join(map(str, part)) or "by default" for part in parts)
        padding = Padding(**each["padding"])
        cells = [str(len(each["buckets"])), f"{padding.waste:.1%}", f"{padding.waste_of_rows:.1%}"]
        if "compiling" in each:
            took = Compiling(**each["compiling"])
            cells += [f"{each['seconds']:.2f}", str(took.programs)]
            cells += [f"{took.compiled:.1f}", f"{took.found:.1f}"]
        table.add_row(name, *cells)
    return table
