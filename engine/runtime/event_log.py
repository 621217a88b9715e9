"""The scheduler's inputs and decisions as lines of JSON: recording, and replay with a check.

A log holds prompts and outputs in full: treat it like the conversations themselves. Reading
one is safe whatever it holds: it is parsed strictly and only ever fed to the scheduler.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.core import scheduler
from engine.core.scheduler import Limits, SchedulerState
from engine.types import FinishReason, InvalidRequest, QueueFull, Request, StepPlan, StepTokens

FORMAT = 1


class LogError(ValueError):
    """A log that can't be read or doesn't replay: says which line, and why."""


class Recorder:
    """Appends events to a file. Not thread-safe: the engine loop owns it."""

    def __init__(self, path: str | Path, limits: Limits):
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - kept open on purpose
        self._write({"octavo_event_log": FORMAT, "limits": dataclasses.asdict(limits)})

    def admit(self, request: Request) -> None:
        """A request came in."""
        self._write({"admit": msgspec.to_builtins(request)})

    def abort(self, request_id: str, reason: FinishReason) -> None:
        """A request was ended from outside."""
        self._write({"abort": [request_id, reason.value]})

    def schedule(self, plan: StepPlan) -> None:
        """A step was planned."""
        rows = [[row.request.request_id, row.start, row.num_tokens] for row in plan.rows]
        self._write({"schedule": plan.step, "digest": plan_digest(plan), "rows": rows})

    def commit(self, plan: StepPlan, tokens: StepTokens) -> None:
        """A step's tokens were taken in."""
        self._write({"commit": plan.step, "tokens": list(tokens.token_ids[: len(plan.rows)])})

    def fail(self, plans: tuple[StepPlan, ...]) -> None:
        """These steps failed on the device."""
        self._write({"fail": [plan.step for plan in plans]})

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


def replay(path: str | Path, *, check: bool = False) -> Replayed:
    """Run a log through the scheduler and compare every plan with the recorded one.

    Args:
      path: a log that `Recorder` wrote; a torn last line is ignored.
      check: also assert all invariants after every event (slow: O(pool) each).

    Raises:
      LogError: the file is not such a log, or a plan differs; names the line.
    """
    lines = _lines(path)
    number, header = next(lines, (0, {}))
    if header.get("octavo_event_log") != FORMAT:
        raise LogError(f"{path} is not an Octavo event log of format {FORMAT}")
    limits = _decode(header.get("limits"), Limits, f"{path}:{number}")
    state = SchedulerState.initial(limits)
    plans: dict[int, StepPlan] = {}
    requests = steps = tokens = preemptions = 0
    for number, event in lines:
        where = f"{path}:{number}"
        try:
            if "admit" in event:
                state = scheduler.admit(state, limits, _request(event["admit"], where))
                requests += 1
            elif "abort" in event:
                request_id, reason = event["abort"]
                state, _ = scheduler.abort(state, request_id, FinishReason(reason))
            elif "schedule" in event:
                state, plan = scheduler.schedule(state, limits)
                _compare(plan, event, where)
                plans[plan.step] = plan
                steps += 1
                preemptions += len(plan.preempted)
            elif "commit" in event:
                plan = plans.pop(event["commit"])
                values = _decode(event["tokens"], tuple[int, ...], where)
                if len(values) != len(plan.rows):
                    raise LogError(f"{where}: {len(values)} tokens for {len(plan.rows)} rows")
                state, outputs = scheduler.commit(state, plan, StepTokens(values), limits)
                tokens += sum(len(output.token_ids) for output in outputs)
            elif "fail" in event:
                failed = tuple(plans.pop(step) for step in event["fail"])
                state, _ = scheduler.fail(state, failed)
            else:
                raise LogError(f"{where}: unknown event {sorted(event)[:3]}")
        except (KeyError, TypeError, ValueError, QueueFull) as error:
            if isinstance(error, LogError):
                raise
            raise LogError(f"{where}: {type(error).__name__}: {error}") from None
        if check:
            state.check()
    return Replayed(requests, steps, tokens, preemptions, state)


def _lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    return  # the writer was cut off here
                try:
                    event = json.loads(line)
                except ValueError:
                    raise LogError(f"{path}:{number}: not JSON") from None
                if not isinstance(event, dict):
                    raise LogError(f"{path}:{number}: not an event")
                yield number, event
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"can't read {path}: {error}") from None


def _request(tree: Any, where: str) -> Request:
    if isinstance(tree, dict):
        tree = {key: value for key, value in tree.items() if key != "is_plain_greedy"}
    return _decode(tree, Request, where)


def _decode(tree: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(tree, kind)
    except (msgspec.ValidationError, InvalidRequest) as error:
        raise LogError(f"{where}: {error}") from None


def _compare(plan: StepPlan, event: dict[str, Any], where: str) -> None:
    if plan.step == event["schedule"] and plan_digest(plan) == event["digest"]:
        return
    rows = [[row.request.request_id, row.start, row.num_tokens] for row in plan.rows]
    for index, (ours, theirs) in enumerate(zip(rows, event["rows"], strict=False)):
        if ours != theirs:
            raise LogError(
                f"{where}: step {plan.step} differs at row {index}: recorded {theirs}, now {ours}"
            )
    raise LogError(
        f"{where}: step {plan.step} differs: recorded {len(event['rows'])} rows, now {len(rows)}"
        if len(rows) != len(event["rows"])
        else f"{where}: step {plan.step} has the same rows with other blocks, slots or tokens"
    )
