from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.bench import machine
from engine.bench.machine import Meter

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BUSY = "import time\nwhile time.process_time() < 0.4: pass"


@on_linux
def test_work_of_another_process_is_foreign_and_ours_is_not() -> None:
    meter = Meter()
    meter.start()
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", BUSY])  # not waited for: not our CPU time
    while time.perf_counter() < begin + 1.2:
        time.sleep(0.05)
    figures = meter.stop()
    child.wait()
    assert figures.own_cores is not None
    assert figures.foreign_cores is not None
    wall = time.perf_counter() - begin
    # The child used a little less than 0.4 s at least; ticks are 10 ms on each of the cores.
    assert figures.foreign_cores * wall >= 0.3
    assert figures.own_cores < 0.5


@on_linux
def test_a_run_that_is_too_short_for_the_clock_has_no_foreign_load() -> None:
    meter = Meter()
    meter.start()
    assert meter.stop().foreign_cores is None


@on_linux
def test_the_memory_peak_of_a_run_forgets_what_came_before() -> None:
    large = np.ones(64 * 2**20, np.uint8)
    before = machine.peak_rss_bytes()
    assert before is not None
    assert before > large.nbytes
    del large
    meter = Meter()
    meter.start()
    peak = meter.stop().peak_rss_bytes
    assert peak is not None
    assert peak < before - 32 * 2**20


@on_linux
def test_another_process_is_measured_by_its_id() -> None:
    child = subprocess.Popen([sys.executable, "-c", BUSY + "\ninput()"], stdin=subprocess.PIPE)
    try:
        meter = Meter(child.pid)
        meter.start()
        own_before = time.process_time()
        while (seconds := machine._process_seconds(child.pid)) is not None and seconds < 0.3:
            time.sleep(0.02)
        figures = meter.stop()
        assert figures.own_cores is not None
        assert figures.own_cores > 0
        assert time.process_time() - own_before < 0.3
        assert (machine.peak_rss_bytes(child.pid) or 0) > 2**20
    finally:
        child.communicate(b"\n")
    assert machine.peak_rss_bytes(child.pid) is None


def test_the_hardware_is_described() -> None:
    described = machine.hardware()
    assert described["cpu"]
    assert described["cores"] >= 1


def test_the_commit_is_that_of_this_project_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        command = ["git", *identity, "-c", "commit.gpgsign=false", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert machine.git_state(tmp_path) is None
    git("init", "--quiet")
    package = tmp_path / "engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert machine.git_state(tmp_path) is None  # a checkout, but of something else
    git("add", "engine")
    git("commit", "--quiet", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert machine.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (package / "other.py").write_text("")
    assert machine.git_state(tmp_path) == {"commit": commit, "dirty": False}  # not tracked
    (package / "__init__.py").write_text("x = 1")
    assert machine.git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_the_command_line_names_the_program_and_quotes_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/octavo", "bench", "--set", "a=b c"])
    assert machine.command_line() == "octavo bench --set 'a=b c'"
    monkeypatch.setattr(sys, "argv", ["/some/benchmarks/__main__.py", "engine"])
    assert machine.command_line() == "python -m benchmarks engine"
