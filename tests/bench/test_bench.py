"""The commands from end to end, with a tiny model: what they return, print and write."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine import bench
from engine.bench import Synthetic
from engine.config import ConfigError
from engine.frontend import Engine
from engine.serve.server import Server
from engine.server_config import ServerConfig

SHAPE = Synthetic(num_requests=12, input_len=40, output_len=10, shared_prefix=20)


@pytest.fixture
async def address(tiny_engine: Engine) -> AsyncIterator[str]:
    server = Server(ServerConfig(port=0, public_stats=True, grace=0.05))
    await server.start()
    await server.set_engine(tiny_engine)
    yield server.address
    await server.stop()


def check_run(run: dict[str, Any]) -> None:
    """What must hold for SHAPE, whatever the machine."""
    assert (run["requests"], run["failed"]) == (12, 0)
    assert (run["prompt_tokens"], run["output_tokens"]) == (480, 120)
    assert run["output_tokens_per_second"] == pytest.approx(120 / run["wall_seconds"])
    assert run["total_tokens_per_second"] == pytest.approx(600 / run["wall_seconds"])
    for name in ("ttft_seconds", "itl_seconds", "e2e_seconds"):
        figures = run[name]
        assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"] <= figures["max"]
    assert run["e2e_seconds"]["max"] <= run["wall_seconds"] + 1e-9
    # One block of the prefix is shared. Whoever starts in the step that computes it misses it.
    hits = run["prefix_cache_hit_share"] * 480 / 16
    assert hits == pytest.approx(round(hits))
    assert 12 - 4 <= round(hits) <= 11
    engine = run["engine"]
    assert 0 < engine["padding_waste"] < 1
    assert engine["compiles"] == 0


def test_throughput_measures_and_reports(tiny_config: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "new" / "report.json"
    overrides = ["cache.num_blocks=24"]
    code = bench.throughput(
        tiny_config, overrides=overrides, synthetic=SHAPE, repeat=2, output=output
    )
    assert code == 0
    report = json.loads(output.read_bytes())
    assert set(report) == {
        "schema", "benchmark", "date", "command", "versions", "git", "hardware", "subject",
        "asked", "compiles_after_warmup", "peak_rss_bytes", "runs", "summary", "failures",
    }  # fmt: skip
    assert report["schema"] == 1
    assert report["benchmark"] == "throughput"
    assert report["date"].endswith("+00:00")
    assert report["versions"]["jax"]
    subject, asked = report["subject"], report["asked"]
    assert subject["config"]["path"] == str(tiny_config)
    assert subject["config"]["cache"]["num_blocks"] == 24
    assert subject["overrides"] == overrides
    assert subject["device"]["platform"] == "cpu"
    assert Synthetic(**asked["synthetic"]) == SHAPE
    assert (asked["requests"], asked["repeat"], asked["warm_up"]) == (12, 2, True)
    assert report["compiles_after_warmup"] == 0
    assert report["failures"] == []
    assert len(report["runs"]) == 2  # without the warm-up, whose blocks they don't find
    for run in report["runs"]:
        check_run(run)
        engine = run["engine"]
        # Four sequences of at most 50 tokens run at once, in 24 blocks.
        assert 0 < engine["kv_utilisation_mean"] <= engine["kv_utilisation_peak"] <= 16 / 24
        steps = engine["steps"]
        shares = [steps[name]["share"] for name in ("schedule", "build", "launch", "wait")]
        assert 0 < sum(shares) + steps["commit"]["share"] <= 1.05  # the last step ends later
        # Every sampled token is a row of some step, and the prompts are computed once.
        computed = steps["count"] * steps["tokens_mean"]
        assert computed == pytest.approx(480 * (1 - run["prefix_cache_hit_share"]) + 12 * 9)
    walls = sorted(run["wall_seconds"] for run in report["runs"])
    spread = report["summary"]["wall_seconds"]
    assert [spread["min"], spread["max"]] == walls
    assert spread["median"] == pytest.approx(sum(walls) / 2)
    shown = capsys.readouterr()
    assert "12 requests (40, 20 shared + 10 tokens, seed 0), all at once, 2 runs" in shown.out
    for label in ("output tokens/s", "padding waste", "time to first token", "commit"):
        assert label in shown.out
    assert "run 2 of 2" in shown.err


def test_latency_sends_one_request_after_the_other(tiny_config: Path, tmp_path: Path) -> None:
    workload = tmp_path / "requests.jsonl"
    workload.write_text(
        '{"prompt_ids": [5, 6, 7], "max_tokens": 4, "ignore_eos": true}\n'
        '{"prompt": "!!", "max_tokens": 5}'
    )
    output = tmp_path / "report.json"
    assert bench.latency(tiny_config, workload=workload, warm_up=False, output=output) == 0
    report = json.loads(output.read_bytes())
    assert report["asked"]["workload"] == str(workload)
    assert report["asked"]["synthetic"] is None
    assert report["asked"]["load"]["concurrency"] == 1
    [run] = report["runs"]
    assert run["engine"]["steps"]["rows_mean"] == 1.0
    assert run["e2e_seconds"]["mean"] * 2 <= run["wall_seconds"]
    assert run["engine"]["preemptions"] == 0


def test_a_request_that_gets_less_than_it_asked_for_fails_the_benchmark(
    tiny_config: Path, tmp_path: Path, capsys: Any
) -> None:
    too_long = Synthetic(num_requests=2, input_len=100, output_len=60)  # the model takes 128
    output = tmp_path / "report.json"
    assert bench.throughput(tiny_config, synthetic=too_long, output=output) == 1
    report = json.loads(output.read_bytes())
    assert [(f["run"], f["request"]) for f in report["failures"]] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert "60 tokens were asked for, but 28 came" in report["failures"][0]["message"]
    assert report["runs"][0]["output_tokens_per_second"] == 0
    assert "60 tokens were asked for" in capsys.readouterr().out.replace("\n", " ")


async def test_serve_measures_a_server(address: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "report.json"
    code = await asyncio.to_thread(
        bench.serve, address, synthetic=SHAPE, concurrency=3, repeat=2, output=output
    )
    assert code == 0
    report = json.loads(output.read_bytes())
    assert report["subject"]["address"] == address
    assert report["subject"]["model"] == "tiny"
    assert report["subject"]["config"] is None
    assert report["asked"]["load"]["concurrency"] == 3
    for run in report["runs"]:
        check_run(run)
        assert run["engine"]["steps"] is None
        assert run["machine"]["foreign_cores"] is None
    assert "concurrency 3" in capsys.readouterr().out


async def test_a_server_s_cache_is_looked_at_while_it_runs(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.bench.targets.POLL_SECONDS", 0.0)
    output = tmp_path / "report.json"
    code = await asyncio.to_thread(
        bench.serve, address, synthetic=SHAPE, concurrency=4, output=output
    )
    assert code == 0
    engine = json.loads(output.read_bytes())["runs"][0]["engine"]
    assert 0 < engine["kv_utilisation_mean"] <= engine["kv_utilisation_peak"] <= 16 / 32


async def test_a_server_may_keep_its_figures_to_itself(
    tiny_engine: Engine, tmp_path: Path, capsys: Any
) -> None:
    server = Server(ServerConfig(port=0, grace=0.05))
    await server.start()
    await server.set_engine(tiny_engine)
    output = tmp_path / "report.json"
    try:
        code = await asyncio.to_thread(
            bench.serve, server.address, synthetic=SHAPE, concurrency=4, output=output
        )
    finally:
        await server.stop()
    assert code == 0
    run = json.loads(output.read_bytes())["runs"][0]
    assert run["output_tokens_per_second"] > 0
    assert set(run["engine"].values()) == {None}
    assert run["internal_fragmentation"] is None
    assert capsys.readouterr().err.count("--set server.public_stats=true") == 1


async def test_a_server_that_refuses_fails_the_benchmark(
    address: str, tmp_path: Path, capsys: Any
) -> None:
    workload = tmp_path / "requests.jsonl"
    workload.write_text('{"prompt_ids": [5], "max_tokens": 2}\n{"prompt_ids": [999]}')
    code = await asyncio.to_thread(bench.serve, address, workload=workload, warm_up=False)
    assert code == 1
    shown = capsys.readouterr().out
    assert "run 1, request 1: ServiceError" in shown
    assert "999 is not a token id" in shown.replace("\n", " ")


def test_a_server_that_is_not_there_is_one_line(capsys: Any) -> None:
    assert bench.serve("127.0.0.1:1", synthetic=SHAPE) == 1
    assert "no Octavo server answers at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workload": Path("x"), "synthetic": SHAPE}, "--workload x says what to ask for"),
        ({"repeat": 0}, "--repeat is 0"),
        ({"concurrency": 1, "request_rate": 1.0}, "exclude each other"),
    ],
)
def test_options_that_contradict_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(bench.WorkloadError, match=message):
        bench.serve("127.0.0.1:1", **arguments)


def test_files_are_checked_before_anything_is_loaded(tiny_config: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bench.throughput(tiny_config, workload=tmp_path / "missing.jsonl")
    with pytest.raises(IsADirectoryError):
        bench.throughput(tiny_config, output=tmp_path)
    with pytest.raises(ConfigError, match="there is no config file"):
        bench.throughput(tmp_path / "missing.yaml")
