from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.bench import machine
from engine.bench.machine import Meter

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Works for 0.4 s of a core when told to, says when it has, and stays until it is told to go.
BUSY = """
import time
input()
begin = time.process_time()
while time.process_time() < begin + 0.4: pass
print(flush=True)
input()
"""


class Worker:
    """Another process, which is not waited for while it works: its CPU time is none of ours."""

    def __init__(self, child: subprocess.Popen[str]):
        self.pid = child.pid
        self._child = child

    def work(self) -> None:
        """Have it work, and return when it has."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(file=self._child.stdin, flush=True)
        self._child.stdout.readline()

    def end(self) -> None:
        """Have it end."""
        self._child.communicate("\n")


@pytest.fixture
def worker() -> Iterator[Worker]:
    command, pipe = [sys.executable, "-c", BUSY], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        yield Worker(child)
        child.kill()


@on_linux
def test_work_of_another_process_is_foreign_and_ours_is_not(worker: Worker) -> None:
    meter = Meter()
    began, own = time.perf_counter(), time.process_time()
    meter.start()
    begin = time.perf_counter()
    worker.work()
    time.sleep(max(0.0, begin + 1.1 - time.perf_counter()))
    least = time.perf_counter() - begin
    figures = meter.stop()
    own, most = time.process_time() - own, time.perf_counter() - began
    assert figures.own_cores is not None
    assert figures.foreign_cores is not None
    assert figures.foreign_cores * most >= 0.3  # of 0.4; ticks are 10 ms on each of the cores
    assert figures.own_cores * least <= own


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
def test_another_process_is_measured_by_its_id(worker: Worker) -> None:
    meter = Meter(worker.pid)
    began, ours = time.perf_counter(), time.process_time()
    meter.start()
    worker.work()
    figures = meter.stop()
    ours, most = time.process_time() - ours, time.perf_counter() - began
    assert figures.own_cores is not None
    assert figures.own_cores * most - ours >= 0.3  # of 0.4
    assert (machine.peak_rss_bytes(worker.pid) or 0) > 2**20
    worker.end()
    assert machine.peak_rss_bytes(worker.pid) is None


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
