"""What a start says of its time."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from engine.start_up import StartUp


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_parts_follow_one_another_and_may_come_again() -> None:
    clock = Clock()
    start_up = StartUp(clock)
    for part, seconds in (("files", 1.0), ("weights", 2.5), ("files", 0.25)):
        start_up.begin(part)
        clock.now += seconds
    assert start_up.seconds == {"files": 1.0, "weights": 2.5}
    start_up.end()
    clock.now += 50
    start_up.end()
    assert start_up.seconds == {"files": 1.25, "weights": 2.5}


def test_the_line_adds_up_to_the_age_of_the_process() -> None:
    clock = Clock()
    start_up = StartUp(clock)
    start_up.begin("weights")
    clock.now += 1.5
    start_up.end()
    start_up.programs = (12, 11)
    cache = "; 11 of 12 programs came from the compile cache"
    assert start_up.describe() == f"started in 1.5 s: weights 1.5{cache}"
    expected = f"started in 4.0 s: Python and imports 2.5, weights 1.5{cache}"
    assert start_up.describe(age=4.0) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the age comes from Linux's /proc")
def test_a_process_knows_its_age() -> None:
    begin = time.monotonic()
    code = "import time; time.sleep(0.5); from engine.start_up import *; print(process_age())"
    command = (sys.executable, "-c", code)
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    age = float(said.stdout)
    assert 0.5 - 2 / os.sysconf("SC_CLK_TCK") < age < time.monotonic() - begin + 1
