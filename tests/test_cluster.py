"""The processes of a cluster: they come up together, and none is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from scripts import cluster
from scripts.cluster import ClusterError, Process, start_workers
from tests.conftest import ROOT

READY = 'print("Octavo is ready: a (attention: x) on 127.0.0.1:{}. Talk to it: …", flush=True)'
SLEEP = "import time; time.sleep(600)"


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_workers_are_told_by_their_addresses_and_end_with_the_block() -> None:
    commands = [python(READY.format(port), SLEEP) for port in (1111, 2222)]
    with start_workers(commands) as workers:
        assert [worker.address for worker in workers] == ["127.0.0.1:1111", "127.0.0.1:2222"]
        assert all(worker.process.is_running for worker in workers)
    assert not any(worker.process.is_running for worker in workers)


def test_a_worker_that_does_not_come_up_says_why_and_the_others_end() -> None:
    good = python(READY.format(1111), SLEEP)
    bad = python('print("octavo: no such model")', "raise SystemExit(3)")
    with pytest.raises(ClusterError) as raised, start_workers([good, bad]):
        pass
    assert "worker 2 ended with 3" in str(raised.value)
    assert "octavo: no such model" in str(raised.value)


def test_a_process_that_does_not_end_when_asked_is_made_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scripts.cluster.END_SECONDS", 0.2)
    stubborn = python(
        "import signal", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print('up')", SLEEP
    )
    process = Process("stubborn", [stubborn[0], "-u", *stubborn[1:]], echo=False)
    while not process.lines:
        time.sleep(0.01)
    process.end()
    assert not process.is_running


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's end")
def test_children_end_even_if_the_script_is_killed() -> None:
    script = python(
        "from scripts.cluster import Process",
        f"child = Process('child', {python('import os', 'print(os.getpid())', SLEEP)!r}, False)",
        "import re, time",
        "print(child.wait_for(re.compile('([0-9]+)'), 60), flush=True)",
        "time.sleep(600)",
    )
    # Unbuffered, so that the child's number comes at once.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    while is_alive(child):
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", "0"), "'0' is not a number from 1 to 64"),
        (("--port", "99999"), "'99999' is not a number from 0 to 65535"),
    ],
)
def test_numbers_that_no_cluster_can_have_are_refused(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["cluster", "--config", "c.yaml", *arguments])
    with pytest.raises(SystemExit):
        cluster.main()
    assert message in capsys.readouterr().err


def test_a_port_that_another_has_is_told_before_workers_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(cluster, "start_workers", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["cluster", "--config", "c.yaml", "--port", str(port)])
        assert cluster.main() == 1
    assert f"port {port} can't be had" in capsys.readouterr().err
