"""A server at capacity for as long as one likes, with failures, whose every token is compared.

Requests of many kinds, whose outputs are computed beforehand by the same engine alone, are sent by
clients that read, dawdle, leave, abort and set deadlines, while steps fail and hang. What comes is
compared token by token; what the server holds is noted every second. Each figure has a bound below,
and a run in which one doesn't hold fails.

The model is the tests' own: tiny, in float32, so that the same request has the same tokens in any
batch, and a step takes a millisecond or two: half an hour has as many steps as a large model's day.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from engine.bench import machine
from engine.client import AsyncClient, ServiceError
from engine.llm import LLM
from engine.sampling import Constraint, SamplingParams
from engine.types import FinishReason, TokenLogprobs
from tests.runtime import tiny
from tests.survival.process import SPARE_THREADS, ServerProcess

CLIENTS = 20  # for eight sequences that run at once: there is always a queue
TENANTS = 5  # by cache salt
FAIL_SECONDS = 5.0  # between steps that fail,
HANG_SECONDS = 60.0  # and between those that hang
HUNG_SECONDS = 4.0
LOST_SECONDS = 120.0  # an answer that takes longer is lost
# What a run has to keep to.
WARMUP_MINUTES = 5.0  # allocators and caches fill so long; memory is not judged before
MAX_RISE_MIB = 8.0  # of the line through memory after the warm-up, from its start to its end
SPARE_DESCRIPTORS = 4  # of processes that try grammars: two each
WHOLE_A_MINUTE = 1  # whole answers of each case, compared
# Log-probabilities are of float32 sums, whose order differs with what else is in a batch.
LOGPROB_TOLERANCE = 1e-3
OVERRIDES: dict[str, Any] = {
    "cache.num_blocks": 80,  # too few for eight long sequences: some are preempted
    "cache.host_memory": 2**20,
    "cache.swap": "always",
    "server.port": 0,
    "server.public_stats": True,
    "server.step_timeout": 2.0,
    "scheduler.max_waiting": 24,
}


@dataclasses.dataclass(frozen=True)
class Output:
    """One sample of an answer."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()

    def problem(self, expected: Output, *, is_whole: bool) -> str | None:
        """How it differs from what the engine gave alone, if it does.

        The text of one that was cut off isn't compared: half of a character may be at its end.
        """
        count = len(self.tokens)
        if self.tokens != (expected.tokens if is_whole else expected.tokens[:count]):
            return f"{count} tokens differ from the {len(expected.tokens)} of the engine alone"
        if is_whole and self.text != expected.text:
            return f"the text {self.text!r} is not {expected.text!r}"
        if len(self.logprobs) != (count if expected.logprobs else 0):
            return f"{len(self.logprobs)} log-probabilities for {count} tokens"
        for number, (found, right) in enumerate(
            zip(self.logprobs, expected.logprobs, strict=False)
        ):
            # Of equally likely tokens either may come first, so places are compared, not tokens.
            if not np.allclose(_values(found), _values(right), rtol=0, atol=LOGPROB_TOLERANCE):
                return f"log-probabilities of token {number}: {found} is not {right}"
        return None


def _values(entry: TokenLogprobs) -> list[float]:
    return [entry.logprob, *(logprob for _, logprob in entry.top)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, and what it must give."""

    number: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    expected: tuple[Output, ...] = ()  # its samples


KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 0.0, "stop_token_ids": tuple(range(40, 50))},
    {"temperature": 1.0, "stop": ("e", "ou", "\n")},
    {"temperature": 1.0, "logprobs": 5},
    {"beam_width": 3, "n": 2},
    {"constraint": Constraint("regex", "[a-f]{2}(-[0-9]{2}){1,40}")},
    {"constraint": Constraint("choice", choices=("alpha", "alphabet", "beta")), "n": 2},
    {
        "constraint": Constraint(
            "json_schema",
            '{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, '
            '"maxItems": 30, "x-guidance": {"whitespace_flexible": false}}',
        ),
        "logprobs": 2,
    },
)


def make_cases(rng: random.Random, count: int) -> list[Case]:
    """Requests of all kinds: short, long, sampled, penalised, constrained, with samples and beams,
    and ends of all sorts."""
    cases = []
    for number in range(count):
        shared = tiny.random_ids(16 * rng.randrange(12), seed=number % 4)  # prefixes in common
        prompt = (*shared, *tiny.random_ids(rng.choice((3, 20, 60, 250)), seed=100 + number))
        common: dict[str, Any] = {"max_tokens": rng.choice((1, 8, 40, 120)), "seed": number}
        kind = KINDS[number % len(KINDS)]
        if "beam_width" in kind:
            common.pop("seed")
        cases.append(Case(number, prompt, SamplingParams(**common, **kind)))
    return cases


def with_expected(config: Path, cases: list[Case]) -> list[Case]:
    """The cases with what the engine gives them alone, one after the other."""
    with LLM.from_config(config) as llm:
        done = []
        for case in cases:
            [found] = llm.generate([case.prompt], case.sampling)
            samples = tuple(
                Output(sample.token_ids, sample.text, sample.logprobs)
                for sample in (found, *found.others)
            )
            done.append(dataclasses.replace(case, expected=samples))
    return done


@dataclasses.dataclass
class Counts:
    """What the clients saw.

    Attributes:
      outcomes: calls by how they ended.
      tokens: that came, and were compared.
      whole: answers that came to their end and were compared, by case.
      wrong: what came and shouldn't have, or didn't and should.
    """

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    tokens: int = 0
    whole: Counter[int] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)


class Client:
    """Sends one request after another until told to stop."""

    def __init__(self, client: AsyncClient, cases: list[Case], counts: Counts, seed: int):
        self._client = client
        self._cases = cases
        self._counts = counts
        self._rng = random.Random(seed)
        self._name = f"client-{seed}"
        self._number = 0

    async def run(self, until: float) -> None:
        """Until that time.monotonic()."""
        while time.monotonic() < until:
            ways = ("read", "dawdle", "leave", "abort", "deadline")
            way = self._rng.choices(ways, (70, 8, 8, 7, 7))[0]
            await self.once(self._rng.choice(self._cases), way)

    async def once(self, case: Case, way: str = "read") -> None:
        """Send one request, and compare what comes."""
        rng, counts = self._rng, self._counts
        self._number += 1
        name = f"{self._name}-{self._number}"
        seen = [Output() for _ in case.expected]
        ends: list[FinishReason | None] = [None] * len(seen)
        stop_after = rng.randrange(1, 20)
        outcome = way
        stream = self._client.generate(
            case.prompt,
            case.sampling,
            request_id=name,
            cache_salt=str(rng.randrange(TENANTS)),
            share_prefix=rng.random() < 0.85,
            priority=rng.choice((-1, 0, 0, 0, 1)),
            timeout=rng.uniform(0.01, 0.5) if way == "deadline" else LOST_SECONDS,
        )
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    before = seen[delta.index]
                    seen[delta.index] = Output(
                        before.tokens + delta.token_ids,
                        before.text + delta.text,
                        before.logprobs + delta.logprobs,
                    )
                    ends[delta.index] = delta.finish_reason or ends[delta.index]
                    stop_after -= 1
                    if way == "dawdle":
                        await asyncio.sleep(rng.uniform(0.001, 0.05))
                    elif way == "leave" and not stop_after:
                        break
                    elif way == "abort" and not stop_after:
                        await self._client.abort(name)
        except ServiceError as error:
            outcome = f"{way}: {error.code.name}"
            has_begun = any(output.tokens for output in seen)
            if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not has_begun:
                await asyncio.sleep(min(error.retry_after or 1.0, 1.0) * rng.random())
            elif error.code is grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(0.2)
            elif error.code is grpc.StatusCode.INTERNAL and "step" in error.details:
                pass
            elif not (error.code is grpc.StatusCode.DEADLINE_EXCEEDED and way == "deadline"):
                counts.wrong.append(f"{way} ended with {error}")
        counts.outcomes[outcome] += 1
        counts.tokens += sum(len(output.tokens) for output in seen)
        are_whole = [end in (FinishReason.STOP, FinishReason.LENGTH) for end in ends]
        counts.whole[case.number] += all(are_whole)
        for index, (output, expected) in enumerate(zip(seen, case.expected, strict=True)):
            if problem := output.problem(expected, is_whole=are_whole[index]):
                counts.wrong.append(
                    f"{name} ({outcome}), sample {index} of {case.sampling}: {problem}"
                )
        if outcome in ("read", "dawdle", "deadline") and not all(are_whole):
            counts.wrong.append(f"{name} is lost: without an error, it ended with {ends}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """The server at one moment: seconds since the start, bytes, threads and descriptors."""

    at: float
    bytes: int
    threads: int
    descriptors: int


async def _watch(server: ServerProcess, client: AsyncClient, until: float) -> list[Sample]:
    samples, start = [], time.monotonic()
    while (now := time.monotonic()) < until:
        figures = await server.figures(client)
        samples.append(Sample(now - start, figures.bytes, figures.threads, figures.descriptors))
        await asyncio.sleep(1.0)
    return samples


async def _disturb(server: ServerProcess, until: float, injected: Counter[str]) -> None:
    """Have steps fail and hang."""
    next_hang = time.monotonic() + HANG_SECONDS / 2
    while time.monotonic() + FAIL_SECONDS < until:
        await asyncio.sleep(FAIL_SECONDS)
        if time.monotonic() >= next_hang:
            server.hang_or_go_on()
            await asyncio.sleep(HUNG_SECONDS)
            server.hang_or_go_on()
            next_hang += HANG_SECONDS
            injected["hung steps"] += 1
        else:
            server.fail_a_step()
            injected["failed steps"] += 1


async def _soak(
    server: ServerProcess, cases: list[Case], seconds: float, seed: int
) -> dict[str, Any]:
    counts, injected = Counts(), Counter[str]()
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(server.address)) for _ in range(4)]
        first = Client(clients[0], cases, counts, seed - 1)
        for case in cases:  # so that threads and processes that start once are there already
            await first.once(case)
        before = await server.figures(clients[0])
        start = time.monotonic()
        until = start + seconds
        load = [
            Client(clients[number % 4], cases, counts, seed + number).run(until)
            for number in range(CLIENTS)
        ]
        watching = asyncio.create_task(_watch(server, clients[0], until))
        await asyncio.gather(_disturb(server, until, injected), *load)
        samples = await watching
        took = time.monotonic() - start
        after = await server.figures(clients[0])
        while after.blocks or after.sequences:
            await asyncio.sleep(0.1)
            after = await server.figures(clients[0])
            if time.monotonic() > until + 30:
                break  # `broken_bounds` says so
        stats = await clients[0].stats()
    warm = min(60 * WARMUP_MINUTES, seconds / 2)
    settled = [sample for sample in samples if sample.at >= warm]
    hours = np.array([sample.at / 3600 for sample in settled])
    mebibytes = np.array([sample.bytes / 2**20 for sample in settled])
    slope, _ = np.polyfit(hours, mebibytes, 1)
    return {
        "command": machine.command_line(),
        "commit": machine.git_state(),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "seconds": round(took, 1),
        "calls": dict(counts.outcomes.most_common()),
        "injected": dict(injected),
        "tokens": counts.tokens,
        "least_whole_answers_of_a_case": min(counts.whole[case.number] for case in cases),
        "wrong": counts.wrong[:50],
        "num_wrong": len(counts.wrong),
        "steps": stats.steps,
        "generated_tokens": stats.generated_tokens,
        "preemptions": stats.preemptions,
        "swapped_out_blocks": stats.swapped_out_blocks,
        "swapped_in_blocks": stats.swapped_in_blocks,
        "compiles_after_warmup": stats.compiles_after_warmup,
        "failed_steps": stats.failed_steps,
        "rss_before_mib": round(before.bytes / 2**20, 1),
        "rss_warm_mib": round(float(mebibytes[0]), 1),
        "rss_end_mib": round(float(mebibytes[-1]), 1),
        "rss_slope_mib_per_hour": round(float(slope), 1),
        "rss_rise_mib": round(float(slope * (hours[-1] - hours[0])), 1),
        "threads": (before.threads, after.threads),
        "descriptors": (before.descriptors, after.descriptors),
        "blocks_left": after.blocks,
        "sequences_left": after.sequences,
        "samples": [dataclasses.astuple(sample) for sample in samples],
    }


def broken_bounds(figures: dict[str, Any]) -> list[str]:
    """What a run was to show and didn't, in words; empty if all is well."""
    minutes = figures["seconds"] / 60
    injected = figures["injected"]
    failed, hung = injected.get("failed steps", 0), injected.get("hung steps", 0)
    told = [
        sum(count for how, count in figures["calls"].items() if how.endswith(code))
        for code in (": INTERNAL", ": UNAVAILABLE")
    ]
    least, whole = max(1, int(WHOLE_A_MINUTE * minutes)), figures["least_whole_answers_of_a_case"]
    threads, descriptors = figures["threads"], figures["descriptors"]
    blocks, sequences = figures["blocks_left"], figures["sequences_left"]
    bounds = [
        (figures["num_wrong"] == 0, f"{figures['num_wrong']} answers are wrong or lost"),
        (whole >= least, f"{whole} whole answers of some case were compared, not {least} or more"),
        (failed > 0 and hung > 0, "steps must fail and hang; a minute or more has both"),
        # On a machine that others keep busy, a step may hang by itself.
        (
            failed + hung <= figures["failed_steps"] <= 2 * (failed + hung),
            f"{figures['failed_steps']} steps failed, and {failed + hung} were made to",
        ),
        (all(told), f"clients were told of {told[0]} failed steps and {told[1]} times to wait"),
        (
            figures["compiles_after_warmup"] == 0,
            f"{figures['compiles_after_warmup']} programs were compiled after the start",
        ),
        (blocks == sequences == 0, f"{blocks} blocks and {sequences} sequences are left"),
        (
            threads[1] <= threads[0] + SPARE_THREADS,
            f"threads went from {threads[0]} to {threads[1]}; {SPARE_THREADS} more may be",
        ),
        (
            descriptors[1] <= descriptors[0] + SPARE_DESCRIPTORS,
            f"descriptors went from {descriptors[0]} to {descriptors[1]}; {SPARE_DESCRIPTORS} more "
            "may be",
        ),
    ]
    if minutes >= 2 * WARMUP_MINUTES:  # shorter runs are all warm-up, and may not be full enough
        bounds += [
            (
                figures["rss_rise_mib"] <= MAX_RISE_MIB,
                f"memory rose by {figures['rss_rise_mib']} MiB after the warm-up; noise is at most "
                f"{MAX_RISE_MIB:g}",
            ),
            (figures["preemptions"] > 0, "nothing was preempted: the server wasn't at its limit"),
            (figures["swapped_in_blocks"] > 0, "no block came back from host memory"),
        ]
    return [words for holds, words in bounds if not holds]


def run(*, minutes: float, cases: int, seed: int, folder: Path) -> int:
    """Run the soak, print what was seen, and write it down. Returns the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny.write_model(Path(scratch))
        config = tiny.write_config(Path(scratch) / "config.yaml", model, **OVERRIDES)
        catalogue = with_expected(config, make_cases(random.Random(seed), cases))
        with ServerProcess(Path(scratch)) as server:
            figures = asyncio.run(_soak(server, catalogue, minutes * 60, seed))
    broken = figures["broken_bounds"] = broken_bounds(figures)
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path = folder / f"soak-{now}.json"
    path.write_text(json.dumps(figures, indent=1))
    table = Table("", "", title=f"soak, {minutes:g} minutes")
    for name, value in figures.items():
        if name not in ("samples", "wrong", "broken_bounds", "versions", "hardware", "command"):
            table.add_row(name, json.dumps(value))
    Console().print(table)
    for line in figures["wrong"][:10]:
        print(line)
    for line in broken:
        print(f"FAILED: {line}")
    if minutes < 2 * WARMUP_MINUTES:
        print(f"memory was not judged: that takes {2 * WARMUP_MINUTES:g} minutes or more")
    print(f"wrote {path}")
    return 1 if broken else 0
