"""`python -m benchmarks compare` on engines of a few lines of Python, without any peer."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import compare
from benchmarks.peers import child as child_module
from benchmarks.peers import engines, results
from benchmarks.peers.child import Child, PeerError, machine_figures, sum_seconds, tree_seconds
from benchmarks.peers.llama_cpp import read_events
from benchmarks.peers.protocol import (
    UNKNOWN,
    Answer,
    ProtocolError,
    Request,
    Round,
    decode_reply,
    decode_requests,
    encode_requests,
)
from benchmarks.peers.results import Agreement, Measured
from engine.bench.figures import MachineFigures
from engine.bench.workload import WorkloadError
from tests.conftest import ROOT

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, pins to cores")

CONFIG = ROOT / "configs" / "smollm2-135m-cpu.yaml"
QUIET = MachineFigures(1.9, 0.01, 2**20)
REQUESTS = [Request([1, 2, 3], 4), Request([5], 2)]

# A runner whose every answer counts up from the prompt's first token.
RUNNER = """
import os, subprocess, sys, time
from benchmarks.peers.protocol import Answer, Round, channel

def run(requests):
    answers = []
    for request in requests:
        count = request.max_tokens
        tokens = [request.prompt_ids[0] + place for place in range(count)]
        arrived = [(0.01 * (place + 1), 1) for place in range(count)]
        answers.append(Answer(arrived, 0.01 * count, tokens, "", len(request.prompt_ids)))
    {body}
    return Round(0.01 * max(r.max_tokens for r in requests), answers)

with channel("{cores}") as line:
    print("noise that is no reply")
    line.serve("counting 1.0", run)
"""


def runner(body: str = "pass") -> list[str]:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return [sys.executable, "-c", RUNNER.format(body=body, cores=cores)]


def started(body: str = "pass") -> Child:
    return Child("counting", runner(body), {"PYTHONPATH": str(ROOT)}, ROOT)


def answer(tokens: Sequence[int], request: Request) -> Answer:
    arrived = [(0.5 + 0.1 * place, 1) for place in range(len(tokens))]
    return Answer(arrived, 1.0, list(tokens), "", len(request.prompt_ids))


def a_turn(*tokens: Sequence[int], wall: float = 2.0, foreign: float = 0.01) -> results.Turn:
    requests = [Request([1], len(each)) for each in tokens]
    answers = [answer(*pair) for pair in zip(tokens, requests, strict=True)]
    return results.turn(requests, Round(wall, answers), MachineFigures(1.9, foreign, 2**20))


def test_lines_come_out_as_they_went_in() -> None:
    assert decode_requests(encode_requests(REQUESTS)) == REQUESTS
    sent = Round(1.5, [Answer([(0.25, 2)], 0.5, [7, 8], "ab", 3, 1, None)])
    line = json.dumps({"round": dataclasses.asdict(sent)})
    assert decode_reply(line) == {"round": sent}


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"round": {}}', '{"other": 1}', "INFO loading"])
def test_a_line_that_is_no_reply_is_shown(line: str) -> None:
    with pytest.raises(ProtocolError, match="not a reply"):
        decode_reply(line)


@on_linux
def test_a_runner_answers_rounds_and_its_noise_is_no_reply() -> None:
    with started() as child:
        child.wait_until_ready()
        assert child.version == "counting 1.0"
        for _ in range(2):
            done, machine = child.run(REQUESTS)
            assert [answer.token_ids for answer in done.answers] == [[1, 2, 3, 4], [5, 6]]
            assert machine.peak_rss_bytes is not None
            assert machine.peak_rss_bytes > 2**20
        assert child.peak_rss_bytes is not None


@on_linux
def test_a_peer_that_dies_is_named_with_its_last_words() -> None:
    with started("sys.exit('out of luck')") as child:
        child.wait_until_ready()
        with pytest.raises(PeerError, match=r"counting ended with exit code 1(.|\n)*out of luck"):
            child.run(REQUESTS)


@on_linux
def test_a_peer_that_fails_in_a_round_says_so() -> None:
    with started("raise ValueError('too hot')") as child:
        child.wait_until_ready()
        with pytest.raises(PeerError, match="counting failed: ValueError: too hot"):
            child.run(REQUESTS)


@on_linux
def test_a_peer_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "ROUND_SECONDS", 0.1)
    monkeypatch.setattr(child_module, "END_SECONDS", 0.1)
    with started("time.sleep(60)") as child:
        child.wait_until_ready()
        with pytest.raises(PeerError, match="said nothing"):
            child.run(REQUESTS)


def test_a_command_that_is_not_there_is_a_peers_error() -> None:
    with pytest.raises(PeerError, match="counting can't be started"):
        Child("counting", ["/no/such/program"], {}, ROOT)


@on_linux
def test_nothing_that_a_peer_started_outlives_it() -> None:
    below = "answers[0].text = str(subprocess.Popen(['sleep', '60']).pid)"
    for gently in (True, False):
        with started(below) as child:
            child.wait_until_ready()
            done, _ = child.run(REQUESTS)
            pids = [child.pid, int(done.answers[0].text)]
            assert set(pids) <= set(child_module.descendants(child.pid))
            child.close(gently)
        deadline = time.monotonic() + 10  # a signal takes its time on a busy machine
        while any(map(_runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [pid for pid in pids if _runs(pid)] == []


def _runs(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet is dead all the same."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@on_linux
def test_a_peer_takes_no_cpu_time_while_it_is_not_its_turn() -> None:
    spin = "import threading; threading.Thread(target=lambda: [0 for _ in iter(int, 1)], "
    with started(spin + "daemon=True).start()") as child:
        child.wait_until_ready()
        child.run(REQUESTS)
        busy = _seconds_in(child, 0.3)
        child.pause()
        idle = _seconds_in(child, 0.3)
        child.resume()
        done, _ = child.run(REQUESTS)
        child.close(gently=False)
    assert busy > 0.05
    assert idle <= 0.02  # a tick, and the one that it was stopped in
    assert len(done.answers) == 2


def _seconds_in(child: Child, wall: float) -> float:
    time.sleep(0.02)
    before = tree_seconds(child.pid)
    time.sleep(wall)
    after = tree_seconds(child.pid)
    assert before is not None
    assert after is not None
    return after - before


@on_linux
def test_an_interrupt_ends_the_peers_too(tmp_path: Path) -> None:
    code = f"""
import pathlib, time
from tests.bench.test_compare import started
with started("time.sleep(60)") as child:
    child.wait_until_ready()
    child.pause()
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
    time.sleep(60)
"""
    outer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    file = tmp_path / "pid"
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    outer.send_signal(signal.SIGINT)
    outer.wait(30)
    assert not _runs(int(file.read_text()))


def test_what_is_neither_the_engines_nor_ours_is_foreign() -> None:
    figures = machine_figures(wall=10.0, busy=18.0, own=15.0, ours=1.0, peak_rss=5)
    assert (figures.own_cores, figures.peak_rss_bytes) == (1.5, 5)
    assert figures.foreign_cores == pytest.approx(0.2)
    assert machine_figures(10.0, 14.99, 15.0, 0.0, None).foreign_cores == 0.0
    assert machine_figures(10.0, None, 15.0, 0.0, None).foreign_cores is None
    assert machine_figures(10.0, 18.0, None, 0.0, None).foreign_cores is None


def test_cpu_time_of_a_tree_has_that_of_children_which_ended() -> None:
    fields = ["S", *["0"] * 10, "100", "20", "7", "3", "0"]
    ticks = os.sysconf("SC_CLK_TCK")
    assert sum_seconds([fields, None, fields]) == pytest.approx(2 * 130 / ticks)
    assert sum_seconds([None]) is None


def test_answers_of_another_length_or_prompt_are_failures() -> None:
    request = Request([1, 2], 3)
    good = answer([7, 8, 9], request)
    assert results.shortcoming(request, good) is None
    short = results.shortcoming(request, answer([7, 8], request))
    assert short == "3 tokens were asked for, but 2 came"
    unnamed = dataclasses.replace(good, token_ids=[7])
    assert results.shortcoming(request, unnamed) == "3 tokens were asked for, but 1 were named"
    other = results.shortcoming(request, dataclasses.replace(good, prompt_tokens=1))
    assert other == "the prompt has 2 tokens, but 1 were read"
    done = results.turn([request], Round(1.0, [answer([7], request)]), QUIET)
    assert done.run.failed == 1
    assert done.run.output_tokens == 0
    (complaint,) = results.complaints({"w": {"peer": [done]}}, {}, least=0.5)
    assert complaint == "w, peer, round 1: request 0: 3 tokens were asked for, but 1 came"


def test_times_are_counted_from_the_sending_of_the_round() -> None:
    done = a_turn([1, 2, 3], wall=2.0)
    assert done.run.output_tokens_per_second == pytest.approx(1.5)
    assert done.run.ttft_seconds is not None
    assert done.run.ttft_seconds.p50 == pytest.approx(0.5)
    assert done.run.itl_seconds is not None
    assert done.run.itl_seconds.p50 == pytest.approx(0.1)


def test_agreement_counts_beginnings_wholes_and_what_is_in_common() -> None:
    long = list(range(40))
    late, early = [*long[:20], -7, *long[21:]], [*long[:3], -7, *long[4:]]
    found = results.agreement([(long, long), (long, late), (long, early), ([1, 2], [1, 2])])
    assert found == Agreement(requests=4, first=0.75, whole=0.5, common_median=11.5)
    assert results.agreement([]) is None


def test_a_token_that_was_not_told_differs_from_none() -> None:
    assert results.num_common([1, UNKNOWN, 3, 4], [1, 2, 3, 9]) == 3


def test_a_peer_that_computes_something_else_is_complained_of() -> None:
    agreed = Agreement(requests=20, first=0.4, whole=0.1, common_median=5.0)
    (complaint,) = results.complaints({}, {"peer": agreed, "other": None}, least=0.5)
    assert "peer: only 40% of 20 answers" in complaint
    assert results.complaints({}, {"peer": agreed}, least=0.4) == []
    few = agreed._replace(requests=results.ENOUGH - 1)
    assert results.complaints({}, {"peer": few}, least=0.5) == []


def test_ratios_are_taken_round_by_round() -> None:
    ours = [a_turn([1, 2], wall=wall) for wall in (1.0, 2.0, 4.0)]
    theirs = [a_turn([1, 2], wall=wall) for wall in (2.0, 2.0, 2.0)]
    found = results.ratios(ours, theirs, results.RATE)
    assert found is not None
    assert (found.median, found.min, found.max) == (1.0, 0.5, 2.0)
    assert results.ratios(ours, theirs, "no such figure") is None


def test_foreign_load_is_warned_of() -> None:
    assert results.warnings({"w": {"e": [a_turn([1]), a_turn([1], foreign=0.04)]}}) == []
    (warning,) = results.warnings({"w": {"e": [a_turn([1], foreign=0.5)]}})
    assert "0.50 cores" in warning


def test_tables_have_medians_ranges_and_ratios() -> None:
    turns = {
        "octavo": [a_turn([1, 2], wall=1.0), a_turn([1, 2], wall=0.5)],
        "peer": [a_turn([1, 2], wall=2.0), a_turn([1, 9], wall=2.0, foreign=0.2)],
    }
    agreed = results.agreement(results.pairs(turns["octavo"], turns["peer"]))
    known = {
        "octavo": Measured("in process", "Octavo 1", [7.0], 2**31),
        "peer": Measured("server", "Peer 2", [1.0, 2.0, 3.0], None),
    }
    out = io.StringIO()
    console = Console(file=out, width=200)
    console.print(results.workload_table("single", turns, "octavo"))
    console.print(results.engines_table(known, {"peer": agreed}))
    lines = out.getvalue().splitlines()
    ours, theirs = (next(line for line in lines if line.startswith(n)) for n in turns)
    assert "3.0 [2.0-4.0]" in ours
    assert "3.00 [2.00-4.00]" in theirs
    assert "0.200" in theirs
    started, peer = (next(x for x in lines[4:] if x.startswith(n)) for n in turns)
    assert "2,048" in started
    assert "2.0 [1.0-3.0]" in peer
    assert "50%" in peer
    json_ready = results.workload_report(turns)
    assert json_ready["peer"]["ours_over_it"][results.RATE].median == 3.0
    assert json_ready["octavo"]["agreement"]["whole"] == 1.0


def event(tokens: list[int], predicted: int, **more: object) -> bytes:
    fields = {"content": "x", "tokens": tokens, "tokens_predicted": predicted, "stop": False}
    return b"data: " + json.dumps(fields | more).encode() + b"\n"


LAST = {"stop": True, "tokens_evaluated": 9, "timings": {"cache_n": 4}}


def test_events_of_llama_cpp_are_an_answer() -> None:
    found = read_events([(0.1, event([5], 1)), (0.3, event([7], 3)), (0.4, event([], 3, **LAST))])
    assert found.token_ids == [5, UNKNOWN, 7]  # one was held back with half a character
    assert found.arrived == [(0.1, 1), (0.3, 2)]
    assert (found.end, found.prompt_tokens, found.cached_tokens) == (0.4, 9, 4)
    assert found.failure is None


@pytest.mark.parametrize(
    ("line", "failure"),
    [
        (b'data: {"error": {"message": "no slot"}}\n', "no slot"),
        (b'{"error": 1}\n', "error"),
        (event([5], 1), "the stream ended early"),
    ],
)
def test_an_event_that_is_an_error_is_a_failure(line: bytes, failure: str) -> None:
    assert failure in (read_events([(0.1, line)]).failure or "")


def compared(tmp_path: Path, **changes: object) -> Callable[[], int]:
    options: dict[str, object] = {
        "ours": "in-process",
        "peers": ["vllm"],
        "workloads": ["single"],
        "rounds": 2,
        "fresh": False,
        "prefix_caching": True,
        "cores": None,
        "min_agreement": 0.5,
        "venv": tmp_path / "peers",
        "folder": tmp_path,
    }
    return lambda: compare.run(CONFIG, (), **(options | changes))  # type: ignore[bad-argument-type]


def test_a_peer_that_is_not_installed_names_the_target_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vllm is not installed(.|\n)*make peers"):
        compared(tmp_path)()
    with pytest.raises(ValueError, match="make peers"):
        compared(tmp_path, peers=None)()
    with pytest.raises(ValueError, match="no peer 'sglang'; known: vllm"):
        compared(tmp_path, peers=["sglang"])()


def test_workloads_that_engines_can_not_agree_on_are_refused(tmp_path: Path) -> None:
    def file(**line: object) -> str:
        path = tmp_path / "asked.jsonl"
        path.write_text(json.dumps({"max_tokens": 4, "temperature": 0.0, **line}))
        return str(path)

    assert compare._requests(file(prompt_ids=[1, 2], ignore_eos=True)) == [Request([1, 2], 4)]
    for line, reason in (
        ({"prompt": "text", "ignore_eos": True}, "prompt_ids"),
        ({"prompt_ids": [1]}, "ignore_eos"),
        ({"prompt_ids": [1], "ignore_eos": True, "temperature": 0.5}, "greedy"),
    ):
        with pytest.raises(WorkloadError, match=reason):
            compare._requests(file(**line))
    with pytest.raises(WorkloadError, match="known: decode16, mixed64, single"):
        compare._requests("doubled")


@on_linux
@pytest.mark.parametrize("fresh", [False, True])
def test_engines_take_turns_and_the_report_has_all_of_it(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def counting(body: str) -> engines.Engine:
        start = engines.Start(runner(body), {"PYTHONPATH": str(ROOT)})
        return engines.Engine("counts", lambda _: start, lambda _: None)

    monkeypatch.setitem(engines.ENGINES, "octavo", counting("pass"))
    monkeypatch.setitem(engines.ENGINES, "vllm", counting("pass"))
    monkeypatch.setitem(engines.ENGINES, "llama.cpp", counting("answers[0].token_ids[0] = 0"))
    peers = ["vllm", "llama.cpp"]
    code = compared(tmp_path, peers=peers, workloads=["single", "decode16"], fresh=fresh)()
    report = json.loads((tmp_path / "compare.json").read_bytes())
    assert list(report["engines"]) == ["octavo", *peers]
    assert len(report["engines"]["vllm"]["startup_seconds"]) == (4 if fresh else 1)
    for name, count in (("single", 1), ("decode16", 16)):
        workload = report["workloads"][name]
        assert workload["requests"] == count
        for engine in workload["engines"].values():
            assert [run["failed"] for run in engine["runs"]] == [0, 0]
        assert workload["engines"]["vllm"]["ours_over_it"][results.RATE]["median"] == 1.0
    assert report["agreement"]["vllm"]["whole"] == 1.0
    assert report["agreement"]["llama.cpp"]["first"] == pytest.approx(15 / 17)
    assert code == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "round 1 of 2" in line]
    order = [line.split(":")[0].rpartition(" ")[2] for line in said]
    assert order == 2 * ["octavo", *peers]


@on_linux
def test_an_engine_that_computes_something_else_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, body in (("octavo", "pass"), ("vllm", "answers[0].token_ids[0] = 0")):
        start = engines.Start(runner(body), {"PYTHONPATH": str(ROOT)})
        engine = engines.Engine("counts", lambda _, start=start: start, lambda _: None)
        monkeypatch.setitem(engines.ENGINES, name, engine)
    assert compared(tmp_path, rounds=16)() == 1
    assert "does not compute the same" in " ".join(capsys.readouterr().out.split())
