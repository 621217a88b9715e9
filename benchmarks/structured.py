"""Structured output: do outputs validate, and what do masks and grammars cost?

Requests for JSON of twenty schemas are mixed with as many without a constraint, and compared with
the same requests without any constraint, each with as many tokens as its twin had.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.structured_schemas import SCHEMAS
from engine import config_file
from engine.bench import machine
from engine.frontend import Engine
from engine.sampling import Constraint, SamplingParams
from engine.text import Message
from engine.types import FinishReason

FREE_TOKENS = 48  # of a request without a constraint
MAX_TOKENS = 400  # no schema asks for so many


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request: its prompt and sampling, and what the output must validate against."""

    prompt: str
    sampling: SamplingParams
    schema: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of it."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run of all requests."""

    name: str
    seconds: float
    tokens: int
    steps: int
    tokens_per_second: float


def mixed(count: int) -> list[Asked]:
    """So many requests with a schema, each followed by one without."""
    asked = []
    for number in range(count):
        what, schema = list(SCHEMAS.items())[number % len(SCHEMAS)]
        constraint = Constraint("json_schema", json.dumps(schema))
        free = SamplingParams(max_tokens=FREE_TOKENS, seed=number, ignore_eos=True)
        asked += [
            Asked(
                f"Give me an example of {what}, as JSON.",
                SamplingParams(
                    max_tokens=MAX_TOKENS, temperature=0.7, seed=number, constraint=constraint
                ),
                schema,
            ),
            Asked(f"Tell me about {what}.", free),
        ]
    return asked


def without_constraints(asked: Sequence[Asked], answers: Sequence[Answer]) -> list[Asked]:
    """The same, free to say anything, and as long as they were."""
    return [
        dataclasses.replace(
            each,
            sampling=dataclasses.replace(
                each.sampling, constraint=None, ignore_eos=True, max_tokens=answer.num_tokens
            ),
            schema=None,
        )
        for each, answer in zip(asked, answers, strict=True)
    ]


async def answers_of(engine: Engine, asked: Sequence[Asked]) -> list[Answer]:
    """All at once, as far as the engine's queue takes them."""
    places = asyncio.Semaphore(engine.config.scheduler.max_waiting // 2)

    async def one(each: Asked) -> Answer:
        text, num_tokens, reason = "", 0, None
        prompt = (Message("user", each.prompt),)
        async with places:
            async for delta in engine.generate(prompt, each.sampling):
                text += delta.text
                num_tokens = delta.usage.completion_tokens
                reason = delta.finish_reason
        return Answer(text, num_tokens, reason)

    return await asyncio.gather(*map(one, asked))


def invalid(asked: Sequence[Asked], answers: Sequence[Answer]) -> list[str]:
    """What is wrong with each answer that isn't what its schema asked for, or that was cut off."""
    wrong = []
    for each, answer in zip(asked, answers, strict=True):
        if each.schema is None:
            continue
        if answer.finish_reason is not FinishReason.STOP:
            wrong.append(f"{each.prompt} ended with {answer.finish_reason}: {answer.text!r:.200}")
            continue
        try:
            jsonschema.validate(json.loads(answer.text), each.schema)
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append(f"{each.prompt} {error!s:.200}: {answer.text!r:.200}")
    return wrong


@contextlib.contextmanager
def timed(target: Any, name: str, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Seconds that each call of a method takes, on a clock."""
    seconds: list[float] = []
    original: Callable[..., Any] = getattr(target, name)

    def call(*arguments: Any) -> Any:
        begin = clock()
        try:
            return original(*arguments)
        finally:
            seconds.append(clock() - begin)

    setattr(target, name, call)
    try:
        yield seconds
    finally:
        delattr(target, name)


def run(
    config: Path, overrides: tuple[str, ...], *, requests: int, rounds: int, folder: Path
) -> int:
    """Ask, validate, compare and report; returns 1 if an output doesn't validate.

    Args:
      config, overrides: of the engine.
      requests: with a constraint, and as many without.
      rounds: of both arms, one after the other.
      folder: for the JSON.
    """
    asked = mixed(requests)
    engine = Engine.from_config(config_file.load(config, overrides))
    arms: list[Arm] = []
    wrong: list[str] = []

    def measure(name: str, these: Sequence[Asked]) -> list[Answer]:
        steps = engine.stats().steps
        begin = time.perf_counter()
        answers = asyncio.run(answers_of(engine, these))
        seconds = time.perf_counter() - begin
        tokens = sum(answer.num_tokens for answer in answers)
        arms.append(Arm(name, seconds, tokens, engine.stats().steps - steps, tokens / seconds))
        print(arms[-1], flush=True)
        return answers

    grammars, constraints = engine._loaded.grammars, engine._loop._constraints
    try:
        with (
            timed(grammars, "_compile", time.perf_counter) as compiles,
            timed(constraints, "fill", time.thread_time) as masks,
        ):
            for _ in range(rounds):
                answers = measure("constrained", asked)
                wrong += invalid(asked, answers)
                measure("free", without_constraints(asked, answers))
        compiled_late = engine.stats().compiles_after_warmup
    finally:
        engine.close()
    _report(arms, masks, compiles, wrong, requests, folder)
    for problem in wrong[:10]:
        print(problem)
    if compiled_late:
        print(f"{compiled_late} programs were compiled after the warm-up")
    return 1 if wrong or compiled_late else 0


def _report(
    arms: Sequence[Arm],
    masks: Sequence[float],
    compiles: Sequence[float],
    wrong: Sequence[str],
    requests: int,
    folder: Path,
) -> None:
    rates = {
        name: [arm.tokens_per_second for arm in arms if arm.name == name]
        for name in ("constrained", "free")
    }
    cost = 1 - statistics.median(rates["constrained"]) / statistics.median(rates["free"])
    table = Table(title=f"{requests} requests with a schema, {requests} without")
    for column in ("", "value"):
        table.add_column(column, justify="right" if column else "left")
    rounds = len(rates["free"])
    rows = {
        "outputs that validate": f"{requests * rounds - len(wrong)} of {requests * rounds}",
        "tokens/s, half of them constrained": _each(rates["constrained"]),
        "tokens/s, none of them": _each(rates["free"]),
        "cost": f"{cost:.1%}",
        "processor time of a step's masks, p50": f"{1e3 * np.percentile(masks, 50):.2f} ms",
        "processor time of a step's masks, p99": f"{1e3 * np.percentile(masks, 99):.2f} ms",
        "grammars compiled": str(len(compiles)),
        "compile, p50": f"{1e3 * np.percentile(compiles, 50):.1f} ms",
        "compile, longest": f"{1e3 * max(compiles):.1f} ms",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"structured-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    tree = {
        "hardware": machine.hardware(),
        "git": machine.git_state(),
        "command": machine.command_line(),
        "figures": rows,
        "arms": arms,
        "invalid": wrong,
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(tree), indent=1))
    print(f"wrote {path}")


def _each(values: Sequence[float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)
