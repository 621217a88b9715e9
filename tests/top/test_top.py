"""`octavo top`: figures from two readings, the table, and the command against a server."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.serve.run import background_loop
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.top.command import top
from engine.top.figures import Latency, Reading, figures
from engine.top.table import render
from tests.conftest import ROOT
from tests.observe.served import make_engine


def stats(**fields: Any) -> pb.GetStatsResponse:
    given: dict[str, Any] = {"uptime_seconds": 100.0} | fields
    return pb.GetStatsResponse(**given)


def test_rates_and_shares_are_of_the_time_between_two_readings() -> None:
    before = stats(
        generated_tokens=1000,
        prompt_tokens=400,
        prefix_cache_queries=300,
        prefix_cache_hits=100,
        padded_tokens=1000,
        computed_tokens=900,
        steps=50,
        preemptions=3,
        finished={"stop": 7},
        held_steps={"blocks": 10, "slots": 5},
        time_to_first_token=pb.Histogram(bounds=[1.0, 2.0], counts=[9, 0, 0], sum=1.0),
    )
    now = stats(
        uptime_seconds=102.0,
        generated_tokens=1500,
        prompt_tokens=600,
        prefix_cache_queries=500,
        prefix_cache_hits=250,
        padded_tokens=1400,
        computed_tokens=1200,
        steps=90,
        preemptions=4,
        finished={"stop": 10, "length": 1},
        held_steps={"blocks": 30, "slots": 5},
        running=5,
        time_to_first_token=pb.Histogram(bounds=[1.0, 2.0], counts=[9, 4, 0], sum=7.0),
    )
    found = figures(Reading(now, 22.0), Reading(before, 20.0))
    assert found.seconds == 2.0
    assert found.generated_tokens_per_second == 250.0
    assert found.prompt_tokens_per_second == 100.0
    assert found.answers_per_second == 2.0
    assert found.steps_per_second == 20.0
    assert found.hit_share == 0.75
    assert found.padding_share == 0.25
    assert found.preemptions == 0.5
    assert found.held == {"blocks": 0.5}
    assert found.running == 5
    assert found.time_to_first_token == Latency(mean=1.5, p50=1.5, p90=1.9, p99=1.99)
    assert found.inter_token_latency is None


def test_of_a_server_that_started_in_between_it_is_since_its_start() -> None:
    now = Reading(stats(generated_tokens=1000), 5.0)
    before = Reading(stats(uptime_seconds=5000.0, generated_tokens=10**6), 4.0)
    found = figures(now, before)
    assert found.seconds == 100.0
    assert found.generated_tokens_per_second == 10.0
    assert found.hit_share is None


def shown(**fields: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    before, now = Reading(stats(uptime_seconds=0.0), 0.0), Reading(stats(**fields), 100.0)
    console.print(render(figures(now, before), "echo on here"))
    return console.export_text()


def test_the_bar_is_as_long_as_the_shares_of_the_pool() -> None:
    text = shown(owned_blocks=50, cached_blocks=25, free_blocks=25, total_blocks=100)
    bar = next(line for line in text.splitlines() if line.startswith("pool"))
    assert [bar.count(cell) for cell in "█▒·"] == [30, 15, 15]
    assert "50 owned" in text
    assert "host tier" not in text
    assert "host tier: 3 of 8 blocks" in shown(host_blocks=3, total_host_blocks=8)


def test_what_should_not_happen_is_told() -> None:
    assert "1 steps failed, 2 answers ended with an error" in shown(
        failed_steps=1, finished={"error": 2}
    )
    assert "failed" not in shown()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    engine = make_engine(tmp_path)
    with background_loop() as run:
        server = Server(ServerConfig(port=0, public_stats=True, grace=0.05))
        run(server.start())
        run(server.set_engine(engine))
        yield server
        run(server.stop())
    engine.close()


def test_one_look_is_printed_for_people_and_for_scripts(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert top(address=server.address, interval=0.01, once=True) == 0
    assert f"letters on {server.address}" in capsys.readouterr().out
    assert top(address=server.address, interval=0.01, once=True, json=True) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["total_blocks"] == 64
    assert found["time_to_first_token"] is None


def test_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert top(address="127.0.0.1:1", once=True) == 1
    assert "no Octavo server answers at 127.0.0.1:1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--interval is 0"):
        top(interval=0.0)


# Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from engine.cli import main
main()
"""


def test_ctrl_c_ends_it_without_a_word(server: Server) -> None:
    command = [sys.executable, "-c", INTERRUPTIBLE, "top", "--json", "--interval", "0.01"]
    with subprocess.Popen(
        [*command, "--address", server.address],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=600)
        finally:
            process.kill()  # or it would be waited for without end
        assert (process.returncode, said) == (0, "")
