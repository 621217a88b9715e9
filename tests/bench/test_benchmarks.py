"""The scripts in benchmarks/, on sizes that take no time: they run, and refuse what can't be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.engine
from benchmarks import scheduler, turns
from tests.conftest import ROOT
from tests.runtime.tiny import write_config, write_model


def test_the_scheduler_is_measured_in_every_case_over_every_pool(tmp_path: Path) -> None:
    pools = (500, 1000)
    assert scheduler.run(sequences=8, steps=20, rounds=2, pools=pools, folder=tmp_path) == 0
    report = json.loads((tmp_path / "scheduler.json").read_bytes())
    rows = [(result["case"], result["num_blocks"]) for result in report["results"]]
    assert rows == [(case.name, pool) for case in scheduler.CASES for pool in pools]
    for result in report["results"]:
        assert result["steps"] == 40
        assert result["preempted"] == 0
        phases = [result[name] for name in ("schedule", "build", "commit")]
        for timing in (*phases, result["total"]):
            assert 0 < timing["median"] <= timing["p99"] <= timing["max"]
        assert result["total"]["max"] <= sum(timing["max"] for timing in phases)


def test_sequences_end_and_start_only_where_they_should(tmp_path: Path) -> None:
    steady, turnover, everything = (
        scheduler.measure(case, 2000, sequences=32, steps=60, rounds=1)
        for case in scheduler.CASES
        if case.name in ("greedy", "turnover", "everything")
    )
    assert steady.mean_rows == 32
    assert steady.mean_tokens == 32  # every row decodes
    assert turnover.mean_rows > 31
    assert turnover.mean_tokens > 33  # prompts come in between
    assert everything.mean_rows > 31
    assert everything.mean_tokens > 33


def test_a_pool_that_can_not_hold_the_sequences_is_refused(tmp_path: Path) -> None:
    needed = scheduler.blocks_needed(8, 20)
    with pytest.raises(ValueError, match=f"may need {needed:,} blocks"):
        scheduler.run(sequences=8, steps=20, rounds=1, pools=(needed - 1,), folder=tmp_path)
    scheduler.run(sequences=8, steps=20, rounds=1, pools=(needed,), folder=tmp_path)


def test_more_steps_than_a_sequence_can_last_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer steps and more rounds"):
        scheduler.run(sequences=8, steps=4000, rounds=1, pools=(10**6,), folder=tmp_path)


def test_an_unknown_workload_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no workload 'huge'; known: decode16, mixed64, single"):
        benchmarks.engine.run(Path("none.yaml"), (), ["single", "huge"], repeat=1, folder=tmp_path)


def test_the_module_lists_its_commands() -> None:
    command = [sys.executable, "-m", "benchmarks", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "scheduler" in shown
    assert "engine" in shown


@pytest.mark.slow
def test_chats_of_several_turns_are_held_in_each_case(tmp_path: Path) -> None:
    """On the tiny model, with a pool for one chat and little more; the host tier keeps all."""
    model = write_model(tmp_path / "model")
    config = write_config(tmp_path / "a.yaml", model, **{"cache.num_blocks": None})
    sizes = turns.Sizes(users=3, turns=4, active=1, small="128KiB", host="1MiB", disk="64MiB")
    options = ("cache.memory=2MiB", "cache.swap=always")
    cases = ("small", "host")
    assert turns.run(config, options, sizes, cases, rounds=1, restart=True, folder=tmp_path) == 0
    (report,) = tmp_path.glob("turns-*.json")
    by_case = {case["case"]: case for case in json.loads(report.read_bytes())["cases"]}
    assert list(by_case) == [*cases, "disk", "restart, no disk", "restart, disk"]
    rates = {name: case["hit_rate"] for name, case in by_case.items()}
    assert rates["restart, no disk"] == 0
    assert rates["small"] < rates["host"] == rates["disk"]
    assert rates["host"] > 0.5
    assert rates["restart, disk"] > 0.7
    assert by_case["restart, disk"]["restored_blocks"] > 0
    assert all(0 < case["ttft_p50"] <= case["ttft_p90"] for case in by_case.values())
