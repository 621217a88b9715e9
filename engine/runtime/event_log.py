"""The scheduler's inputs and decisions as lines of JSON: recording, and replay with a check.

A log holds prompts and outputs in full: treat it like the conversations themselves. Reading
one is safe whatever it holds: it is parsed strictly, no number in it sizes memory before it is
checked, and it is only ever fed to the scheduler.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from engine.core import scheduler
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.types import FinishReason, QueueFull, Request, StepPlan, StepTokens

FORMAT = 1

# Far beyond what one scheduler runs, and small enough for any machine that replays.
MAX_BLOCKS = 2**22
MAX_SEQS = 2**16
MAX_LINE = 2**26  # characters; a prompt of a million tokens takes a tenth


class LogError(ValueError):
    """A log that can't be read or doesn't replay: says which line, and why."""


class Recorder:
    """Appends events to a file. Not thread-safe: the engine loop owns it."""

    def __init__(self, path: str | Path, limits: Limits):
        # For its owner only: it holds conversations.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115 - kept open on purpose
        self._write({"octavo_event_log": FORMAT, "limits": dataclasses.asdict(limits)})

    def admit(self, request: Request) -> None:
        """A request came in."""
        tree = msgspec.to_builtins(request)
        del tree["sampler_row"]  # follows from the rest
        self._write({"admit": tree})

    def abort(self, request_id: str, reason: FinishReason) -> None:
        """A request was ended from outside."""
        self._write({"abort": [request_id, reason.value]})

    def schedule(self, plan: StepPlan) -> None:
        """A step was planned."""
        rows = [[row.request.request_id, row.start, row.num_tokens] for row in plan.rows]
        self._write({"schedule": plan.step, "digest": plan_digest(plan), "rows": rows})
        self._file.flush()  # once a step: a crash then leaves the step that led to it

    def commit(self, plan: StepPlan, tokens: StepTokens) -> None:
        """A step's tokens were taken in."""
        self._write({"commit": plan.step, "tokens": list(tokens.token_ids[: len(plan.rows)])})

    def fail(self, plans: tuple[StepPlan, ...]) -> None:
        """These steps failed on the device."""
        self._write({"fail": [plan.step for plan in plans]})
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event, separators=(",", ":")) + "\n")


@dataclasses.dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay saw: counts, and the state at the end of the log."""

    requests: int
    steps: int
    tokens: int
    preemptions: int
    state: SchedulerState


def plan_digest(plan: StepPlan) -> str:
    """SHA-256 over everything a plan decides, as hex."""
    digest = hashlib.sha256()
    head = (plan.step, plan.block_copies, plan.preempted)
    digest.update(repr(head).encode())
    for row in plan.rows:
        rest = (row.request.request_id, *row[1:5], *row[6:])
        digest.update(repr(rest).encode())
        digest.update(np.ascontiguousarray(row.block_ids, dtype="<i4").tobytes())
    return digest.hexdigest()


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    """One line. Its first field, which names the kind, is what tells the kinds apart."""


class _Admit(_Event):
    admit: Request


class _Abort(_Event):
    abort: tuple[str, FinishReason]


class _Schedule(_Event):
    schedule: int
    digest: str
    rows: list[tuple[str, int, int]]


class _Commit(_Event):
    commit: int
    tokens: tuple[Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)], ...]


class _Fail(_Event):
    fail: tuple[int, ...]


class _Header(_Event):
    octavo_event_log: int
    limits: Limits


_KINDS = {kind.__struct_fields__[0]: kind for kind in (_Admit, _Abort, _Schedule, _Commit, _Fail)}


def replay(
    path: str | Path,
    *,
    check: bool = False,
    on_step: Callable[[SchedulerState, int, int], None] | None = None,
) -> Replayed:
    """Run a log through the scheduler and compare every plan with the recorded one.

    Args:
      path: a log that `Recorder` wrote; a torn last line is ignored.
      check: also assert all invariants after every event (slow: O(pool) each).
      on_step: called after each plan with the state, to look at, and how many tokens were
        generated and how many sequences preempted so far.

    Raises:
      LogError: the file is not such a log, or a plan differs; names the line.
    """
    lines = _lines(path)
    number, tree = next(lines, (0, {}))
    if tree.get("octavo_event_log") != FORMAT:
        raise LogError(f"{path} is not an Octavo event log of format {FORMAT}")
    limits = _limits(tree, f"{path}:{number}")
    state = SchedulerState.initial(limits)
    plans: dict[int, StepPlan] = {}  # those that may still be committed or fail
    requests = steps = tokens = preemptions = 0
    for number, tree in lines:
        where = f"{path}:{number}"
        kind = next((kind for name, kind in _KINDS.items() if name in tree), None)
        if kind is None:
            raise LogError(f"{where}: unknown event {sorted(tree)[:3]!r:.80}")
        event = _decode(tree, kind, where)
        try:
            match event:
                case _Admit(admit=request):
                    state = scheduler.admit(state, limits, request)
                    requests += 1
                case _Abort(abort=(request_id, reason)):
                    state, _ = scheduler.abort(state, request_id, reason)
                case _Schedule():
                    state, plan = scheduler.schedule(state, limits)
                    _compare(plan, event)
                    plans[plan.step] = plan
                    steps += 1
                    preemptions += len(plan.preempted)
                    if on_step is not None:
                        on_step(state, tokens, preemptions)
                case _Commit(commit=step, tokens=values):
                    plan = _planned(plans, step)
                    if len(values) != len(plan.rows):
                        raise LogError(f"{len(values)} tokens for {len(plan.rows)} rows")
                    state, outputs = scheduler.commit(state, plan, StepTokens(values), limits)
                    plans = {later: plan for later, plan in plans.items() if later > step}
                    tokens += sum(len(output.token_ids) for output in outputs)
                case _Fail(fail=failed):
                    state, _ = scheduler.fail(
                        state, tuple(_planned(plans, step) for step in failed)
                    )
        except (ValueError, QueueFull) as error:
            raise LogError(f"{where}: {error}") from None
        if check:
            state.check()
    return Replayed(requests, steps, tokens, preemptions, state)


def _lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects, one a line, up to a line that the writer didn't get to finish."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE)
                if not line.endswith("\n"):
                    if len(line) == MAX_LINE:
                        raise LogError(f"{path}:{number}: longer than {MAX_LINE} characters")
                    return
                try:
                    tree = json.loads(line)
                except (ValueError, RecursionError):
                    raise LogError(f"{path}:{number}: not JSON") from None
                if not isinstance(tree, dict):
                    raise LogError(f"{path}:{number}: not an event")
                yield number, tree
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"can't read {path}: {error}") from None


def _limits(tree: dict[str, Any], where: str) -> Limits:
    """The header's limits, if a scheduler with them can be made anywhere."""
    limits = _decode(tree, _Header, where).limits
    for name, value, largest in (
        ("num_blocks", limits.num_blocks, MAX_BLOCKS),
        ("max_num_seqs", limits.max_num_seqs, MAX_SEQS),
    ):
        if value > largest:
            raise LogError(f"{where}: {name} is {value}, but a log may say at most {largest}")
    return limits


def _decode[T](tree: dict[str, Any], kind: type[T], where: str) -> T:
    try:
        value = msgspec.convert(tree, kind)
        for name, part in tree.items():
            _refuse_unknown(part, getattr(value, name))
    except (ValueError, RecursionError) as error:  # msgspec's and InvalidRequest are ValueErrors
        raise LogError(f"{where}: {error}") from None
    return value


def _refuse_unknown(tree: Any, value: Any) -> None:
    """A field that this version doesn't know may matter to the plans."""
    if dataclasses.is_dataclass(value):
        fields = {field.name for field in dataclasses.fields(value) if field.init}
        if unknown := sorted(tree.keys() - fields):
            raise ValueError(f"unknown fields {unknown[:3]!r:.80} in {type(value).__name__}")
        for name, part in tree.items():
            _refuse_unknown(part, getattr(value, name))


def _planned(plans: dict[int, StepPlan], step: int) -> StepPlan:
    plan = plans.pop(step, None)
    if plan is None:
        raise LogError(f"step {step} was not planned, or was taken in already")
    return plan


def _compare(plan: StepPlan, event: _Schedule) -> None:
    """Raise if the plan is not the recorded one; say where they part."""
    if plan.step != event.schedule:
        raise LogError(f"step {event.schedule} was recorded here, but {plan.step} is next")
    if plan_digest(plan) == event.digest:
        return
    rows = [(row.request.request_id, row.start, row.num_tokens) for row in plan.rows]
    for index, (ours, theirs) in enumerate(zip(rows, event.rows, strict=False)):
        if ours != theirs:
            raise LogError(
                f"step {plan.step} differs at row {index}: recorded {theirs}, now {ours}"
            )
    raise LogError(
        f"step {plan.step} differs: recorded {len(event.rows)} rows, now {len(rows)}"
        if len(rows) != len(event.rows)
        else f"step {plan.step} has the same rows with other blocks, slots or tokens"
    )
