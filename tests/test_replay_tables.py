"""`octavo replay LOG --at STEP`: the state at a step, as data and as tables."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from engine.cli import app
from engine.core.core import Holding
from engine.replay_tables import MAX_ROWS, WAITS, ranges, render, state_at
from engine.runtime.event_log import LogError
from engine.runtime.recorder import Recorder
from engine.types import Fork
from tests.core.driver import make_limits, make_request
from tests.core.random_operations import LIMITS, REQUEST, draw, perform, possible
from tests.core.random_operations import make_limits as random_limits
from tests.core.simulation import Simulation


def record_story(path: Path) -> None:
    """Two sequences and one that waits for a slot; a fork, a preemption and a host tier."""
    limits = make_limits(num_blocks=6, max_num_seqs=3, host_blocks=4)
    recorder = Recorder(path, limits)
    simulation = Simulation(limits, 1, recorder)
    first = make_request("secret", (3, 1, 4, 1, 0, 2, 0), max_tokens=14, forks=(Fork("other", 1),))
    simulation.admit(first)
    simulation.admit(make_request("b", (3, 1, 4), max_tokens=3))
    simulation.admit(make_request("c", (2,), priority=1))
    simulation.drain()
    recorder.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    record_story(path)
    return path


def text_of(state: dict[str, Any]) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render(state))
    return console.export_text()


def test_the_state_at_a_step_is_as_it_was_planned(log: Path) -> None:
    state = state_at(log, 0)
    assert state["events"] == {"admit": 3, "schedule": 1}
    assert (state["step"], state["line"], state["in_flight"]) == (0, 5, [0])
    assert state["pool"] == {"blocks": 6, "block_size": 4, "owned": 3, "cached": 0, "free": 3}
    assert state["host"] == {"slots": 4, "used": 0}
    assert [seq["request_id"] for seq in state["running"]] == ["r0", "r0.1", "r1"]
    assert [seq["num_shared_blocks"] for seq in state["running"]] == [2, 2, 0]
    assert [seq["blocks"] for seq in state["running"]] == [[0, 1], [0, 1], [2]]
    assert [seq["rank"] for seq in state["waiting"]] == [[1, 3]]
    assert state["holding"] == "slots"
    assert [row["num_tokens"] for row in state["plan"]["rows"]] == [7, 3, 0]
    assert [row["logits_of"] for row in state["plan"]["rows"]] == [None, None, 0]


def test_the_tables_say_it_in_words(log: Path) -> None:
    text = text_of(state_at(log, 0))
    for words in (
        "step 0 of ",
        "events so far: 3 admit, 1 schedule; steps on their way: 0",
        "6 blocks of 4 tokens; 3 owned, 0 cached, 3 free; host tier: 0 of 4",
        "3 running",
        "1 in the queue; r2 waits for slots: every slot was taken",
        "the plan: 10 tokens in 3 rows",
        "parts from r0",
    ):
        assert words in text
    [line] = [line for line in text.splitlines() if line.startswith("r0.1") and "0-1" in line]
    assert line.split() == ["r0.1", "0,", "1", "7", "0", "+", "1", "0", "2", "7", "2", "0-1"]


def test_copies_swaps_and_preemptions_are_shown_where_there_are_any(log: Path) -> None:
    seen: set[str] = set()
    last = int(str(error_of(log, 10**6)).split(" to ")[1].split(";")[0])
    for step in range(last + 1):
        state = state_at(log, step)
        text = text_of(state)
        for name, words in (
            ("block_copies", "copied, block to block: "),
            ("swap_outs", "swapped out, block to host slot: "),
            ("swap_ins", "swapped in, host slot to block: "),
            ("preempted", "preempted: r"),
        ):
            assert (words in text) == bool(state["plan"][name])
            seen |= {name} if state["plan"][name] else set()
    assert seen >= {"block_copies", "preempted", "swap_outs"}


def error_of(log: Path, step: int) -> LogError:
    with pytest.raises(LogError) as caught:
        state_at(log, step)
    return caught.value


@pytest.mark.parametrize("step", [-1, 999])
def test_a_step_that_is_not_there_names_those_that_are(log: Path, step: int) -> None:
    assert f"{log} has steps 0 to " in str(error_of(log, step))
    assert str(error_of(log, step)).endswith(f"there is no step {step}")
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    assert str(error_of(log, step)) == f"{log} has no steps; there is no step {step}"


@pytest.mark.parametrize("seed", range(3))
def test_every_state_of_a_random_run_is_that_of_the_run(tmp_path: Path, seed: int) -> None:
    path, rng = tmp_path / "log", random.Random(seed)
    limits = random_limits(draw(rng, LIMITS))
    recorder = Recorder(path, limits, tokens=True)  # so that the names are the same
    simulation = Simulation(limits, 2, recorder)
    states = []
    for serial in range(100):
        operation = rng.choice(["admit", "schedule", "commit", "abort"])
        if operation in possible(simulation):
            perform(simulation, operation, draw(rng, REQUEST), serial)
            if operation == "schedule":
                states.append(simulation.state.snapshot())
    recorder.close()
    for step in range(0, len(states), 5):
        found = state_at(path, step)
        for seq in found["running"]:
            del seq["num_shared_blocks"]
        for name in ("running", "waiting", "holding", "in_flight"):
            assert found[name] == states[step][name]


def test_the_command_prints_tables_or_json(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert app(["replay", str(log), "--at", "3"]) == 0
    assert f"step 3 of {log}, line " in capsys.readouterr().out
    assert app(["replay", str(log), "--at", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(state_at(log, 3)))
    with pytest.raises(ValueError, match="--json prints the state at a step; name the step with"):
        app(["replay", str(log), "--json"])


def test_every_reason_to_wait_is_explained() -> None:
    assert set(WAITS) == set(get_args(Holding))


def test_blocks_are_shown_as_ranges() -> None:
    assert ranges([4, 5, 6, 2, 9, 10]) == "4-6 2 9-10"
    assert ranges([]) == ""


def test_long_tables_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    limits = make_limits(
        num_blocks=200, max_num_seqs=64, max_step_tokens=64, max_waiting=100, prefix_reuse=False
    )
    recorder = Recorder(path, limits)
    simulation = Simulation(limits, 1, recorder)
    for number in range(60):
        simulation.admit(make_request(f"s{number}", (number % 5,)))
    simulation.schedule()
    recorder.close()
    text = text_of(state_at(path, 0))
    assert text.count(f"and {60 - MAX_ROWS} more; --json has all") == 2
