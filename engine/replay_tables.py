"""The state of a replay at one step, as plain data for machines and as tables for a terminal.

It is what `octavo replay LOG --at STEP` prints: how things stood when that step was planned, and
the plan, in the log's names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.core.core import Holding
from engine.core.limits import Limits
from engine.runtime.event_log import LogError, Schedule, kind_of
from engine.runtime.replay import Moment, moments
from engine.types import StepPlan

WAITS: dict[Holding, str] = {
    "token": "its last token is still being computed",
    "budget": "the step's token budget was spent",
    "slots": "every slot was taken",
    "blocks": "too few blocks were free or cached",
    "forecast": "running sequences are expected to need the blocks that are left",
    "preemption": "the step preempted, and so started nobody",
}
MAX_ROWS = 40  # of a table; JSON has all


def show(log: Path, step: int, *, as_json: bool, check: bool) -> None:
    """Print the state at a step.

    Raises:
      LogError: the log can't be read, doesn't replay so far, or has no such step.
    """
    state = state_at(log, step, check=check)
    if as_json:
        print(json.dumps(state, indent=1))
    else:
        Console().print(render(state))


def state_at(log: str | Path, step: int, *, check: bool = False) -> dict[str, Any]:
    """The state when a step was planned, as plain data; every plan before it is compared."""
    header, after = moments(log, check=check)
    events: Counter[str] = Counter()
    last = -1
    for moment in after:
        events[kind_of(moment.event)] += 1
        if isinstance(moment.event, Schedule):
            last = moment.event.schedule
            if last == step:
                return {"log": str(log), "events": dict(events)} | describe(moment, header.limits)
    has = f"has steps 0 to {last}" if last >= 0 else "has no steps"
    raise LogError(f"{log} {has}; there is no step {step}")


def describe(moment: Moment, limits: Limits) -> dict[str, Any]:
    """The state after a step was planned, and its plan, as plain data.

    Tokens are counted: `num_known` are the prompt and what was generated and taken in, `num_total`
    adds those that planned steps sample, and `num_computed` are in the cache or planned to be.
    """
    assert moment.plan is not None
    state: dict[str, Any] = moment.state.snapshot()
    owners = Counter(block for seq in state["running"] for block in seq["blocks"])
    for seq in state["running"]:
        seq["num_shared_blocks"] = sum(owners[block] > 1 for block in seq["blocks"])
    return {
        "line": moment.line,
        "step": moment.plan.step,
        "in_flight": state["in_flight"],
        "pool": {"blocks": limits.num_blocks, "block_size": limits.block_size, **state["pool"]},
        "host": {"slots": limits.host_blocks, "used": state["host"]},
        "running": state["running"],
        "waiting": state["waiting"],
        "holding": state["holding"],
        "plan": _describe_plan(moment.plan),
    }


def _describe_plan(plan: StepPlan) -> dict[str, Any]:
    return {
        "rows": [
            {
                "request_id": row.request.request_id,
                "slot": row.slot,
                "start": row.start,
                "num_tokens": row.num_tokens,
                "samples": row.samples,
                "logits_of": row.logits_of,
            }
            for row in plan.rows
        ],
        "num_tokens": plan.num_tokens,
        "preempted": list(plan.preempted),
        "block_copies": [list(copy) for copy in plan.block_copies],
        "swap_outs": [[swap.block, swap.slot] for swap in plan.swap_outs],
        "swap_ins": [list(swap) for swap in plan.swap_ins],
    }


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in their order, runs of consecutive ones as `first-last`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def render(state: dict[str, Any]) -> Group:
    """What `state_at` returned as a rich renderable."""
    pool, host = state["pool"], state["host"]
    events = ", ".join(f"{count:,} {name}" for name, count in state["events"].items())
    in_flight = ranges(state["in_flight"]) or "none"
    parts: list[RenderableType] = [
        Text(f"step {state['step']:,} of {state['log']}, line {state['line']:,}", style="bold"),
        Text(f"events so far: {events}; steps on their way: {in_flight}"),
        Text(
            f"pool: {pool['blocks']:,} blocks of {pool['block_size']} tokens; {pool['owned']:,} "
            f"owned, {pool['cached']:,} cached, {pool['free']:,} free"
            + (f"; host tier: {host['used']:,} of {host['slots']:,}" if host["slots"] else "")
        ),
        Text(f"\n{len(state['running']):,} running", style="italic"),
        _sequences(state["running"], running=True),
        Text(f"\n{len(state['waiting']):,} in the queue{_why(state)}", style="italic"),
        _sequences(state["waiting"], running=False),
        *_plan(state["plan"]),
    ]
    return Group(*parts)


def _why(state: dict[str, Any]) -> str:
    holding: Holding | None = state["holding"]
    if not state["waiting"] or holding is None:
        return ""
    name = state["waiting"][0]["request_id"]
    return f"; {name} waits for {holding}: {WAITS[holding]}"


def _sequences(sequences: list[dict[str, Any]], *, running: bool) -> RenderableType:
    numbers = ["prompt", "generated", "preempted"]
    numbers += ["slot", "computed", "shared"] if running else ["forks"]
    table = Table(box=None, pad_edge=False)
    table.add_column("request")
    table.add_column("rank")
    for heading in numbers:
        table.add_column(heading, justify="right")
    if running:
        table.add_column("blocks", overflow="fold")
    for seq in sequences[:MAX_ROWS]:
        priority, arrival = seq["rank"]
        generated = f"{seq['num_known'] - seq['num_prompt']:,}"
        if pending := seq["num_total"] - seq["num_known"]:
            generated += f" + {pending}"
        cells = [f"{seq['num_prompt']:,}", generated, f"{seq['num_preemptions']}"]
        if running:
            cells += [str(seq["slot"]), f"{seq['num_computed']:,}", str(seq["num_shared_blocks"])]
            cells.append(ranges(seq["blocks"]))
        else:
            cells.append(str(len(seq["forks"])))
        table.add_row(seq["request_id"], f"{priority}, {arrival}", *cells)
    return _cut(table, len(sequences))


def _plan(plan: dict[str, Any]) -> list[RenderableType]:
    rows = plan["rows"]
    title = f"\nthe plan: {plan['num_tokens']:,} tokens in {len(rows):,} rows"
    table = Table(box=None, pad_edge=False)
    table.add_column("request")
    for heading in ("slot", "start", "tokens"):
        table.add_column(heading, justify="right")
    table.add_column("what", style="dim")
    for row in rows[:MAX_ROWS]:
        what = "samples" if row["samples"] else "a part of its tokens"
        if row["logits_of"] is not None:
            what = f"parts from {rows[row['logits_of']]['request_id']}"
        numbers = (str(row["slot"]), f"{row['start']:,}", f"{row['num_tokens']:,}")
        table.add_row(row["request_id"], *numbers, what)
    parts: list[RenderableType] = [Text(title, style="italic"), _cut(table, len(rows))]
    if plan["preempted"]:
        parts.append(Text(f"preempted: {' '.join(plan['preempted'])}"))
    for name, what in (
        ("block_copies", "copied, block to block"),
        ("swap_outs", "swapped out, block to host slot"),
        ("swap_ins", "swapped in, host slot to block"),
    ):
        if moves := plan[name]:
            shown = " ".join(f"{source}>{target}" for source, target in moves[:MAX_ROWS])
            more = f" and {len(moves) - MAX_ROWS:,} more" if len(moves) > MAX_ROWS else ""
            parts.append(Text(f"{what}: {shown}{more}"))
    return parts


def _cut(table: Table, count: int) -> RenderableType:
    if count == 0:
        return Text("none", style="dim")
    if count <= MAX_ROWS:
        return table
    return Group(table, Text(f"and {count - MAX_ROWS:,} more; --json has all", style="dim"))
