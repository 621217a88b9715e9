"""`octavo simulate` as a function: what it prints and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.simulate.command import simulate
from tests.dashboard.reader import document, recordings

SMALL: dict[str, Any] = {"requests": 40, "num_blocks": 400, "max_num_seqs": 16}


def _output(**options: Any) -> str:
    file = io.StringIO()
    simulate(**{**SMALL, **options}, console=Console(file=file, width=200))
    return file.getvalue()


def test_the_report_has_a_column_an_allocator_and_a_last_line() -> None:
    lines = _output().rstrip().splitlines()
    assert "one TPU v6e (estimate)" in lines[1]
    assert lines[3].split() == ["paged", "contiguous"]
    assert lines[-1].startswith("paged 9")
    assert "waste only in last blocks" in lines[-1]
    assert "x the sequences at once" in lines[-1]
    alone = _output(allocator=["contiguous"]).rstrip().splitlines()
    assert alone[-1].startswith("contiguous ")
    assert "at once" not in alone[-1]


def test_the_page_has_both_pools_on_the_same_stream_to_their_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.html"
    report = json.loads(_output(html=path, json=True))
    naive_and_paged = recordings(path.read_text(encoding="utf-8"))
    assert "wrote" in capsys.readouterr().err
    for recording, figures in zip(naive_and_paged, report["allocators"], strict=True):
        assert recording["name"] == figures["allocator"]
        frames = recording["frames"]
        times = [frame["time"] for frame in frames]
        assert times == sorted(times)
        assert times[-1] == pytest.approx(figures["duration_s"], abs=1e-3)
        assert frames[-1]["generated"] == figures["output_tokens"]
        assert frames[-1]["preemptions"] == figures["preemptions"]
        assert frames[-1]["running"] == frames[-1]["waiting"] == []
        # All that wait are counted, not only those that the scheduler was told of.
        assert frames[0]["num_waiting"] + len(frames[0]["running"]) + figures["rejected"] >= 39
    assert report["summary"] in document(path.read_text(encoding="utf-8"))["summary"]


def test_the_same_seed_gives_the_same_report() -> None:
    assert _output(json=True) == _output(json=True)
    assert _output(json=True) != _output(json=True, seed=1)


def test_json_holds_the_figures() -> None:
    document = json.loads(_output(json=True, turns=3.0, rate=5.0))
    paged, naive = document["allocators"]
    assert (paged["allocator"], naive["allocator"]) == ("paged", "contiguous")
    assert paged["finished"] + paged["rejected"] == 40
    assert sum(paged["owned"].values()) == pytest.approx(1)
    assert paged["cached_tokens"] > 0 == naive["cached_tokens"]
    assert document["summary"].startswith("paged")
    assert paged["timeline"][0]["time_s"] >= 0
    assert document["num_blocks"] == 400


def test_the_pool_may_be_given_in_bytes_or_left_to_the_device() -> None:
    options: dict[str, Any] = {**SMALL, "num_blocks": None, "memory": "1GiB", "requests": 5}
    reports = simulate(**options, console=Console(file=io.StringIO()))
    sample = reports[0].timeline[0]
    assert sample.owned + sample.free == 512 * 16  # blocks of 2 MiB
    document = json.loads(_output(num_blocks=None, json=True, requests=5))
    assert document["num_blocks"] == 6074  # 0.9 x 32 GB less 16.06 GB


def test_system_prompts_are_hits_across_conversations_and_can_be_left_alone() -> None:
    options: dict[str, Any] = {"allocator": ["paged"], "json": True, "rate": 5.0}
    options |= {"system_share": 1.0, "system_prompts": 1, "system_tokens": 160}
    (report,) = json.loads(_output(**options))["allocators"]
    # All but the first find its ten blocks, or those that were admitted with it do not.
    assert 30 * 160 <= report["cached_tokens"] <= 39 * 160
    assert 0 < report["hit_rate"] < 1
    (report,) = json.loads(_output(**options, prefix_reuse=False))["allocators"]
    assert report["cached_tokens"] == report["hit_rate"] == 0


def test_hits_survive_in_host_memory_and_take_time_to_come_back() -> None:
    options: dict[str, Any] = {"allocator": ["paged"], "turns": 8.0, "num_blocks": 160}
    (bare,) = json.loads(_output(**options, json=True))["allocators"]
    (tiered,) = json.loads(_output(**options, json=True, host_memory="8GiB"))["allocators"]
    assert tiered["cached_tokens"] > 2 * bare["cached_tokens"]
    assert tiered["swapped_in"] > 0 == bare["swapped_in"]
    assert "blocks to / from host memory" in _output(**options, host_memory="8GiB")
    assert "host memory" not in _output(**options)


def test_a_trace_takes_the_place_of_the_drawn_stream(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival": 0, "prompt_tokens": 10, "output_tokens": 5}\n' * 3)
    text = _output(trace=trace)
    assert "3 requests of trace.jsonl" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocator": ["slab"]}, "'slab' is not known"),
        ({"allocator": []}, "empty; take some of paged, contiguous"),
        ({"device": "abacus"}, "'abacus' is not known; take one of v6e, h100"),
        ({"num_blocks": 4, "memory": "1GiB"}, "leave one out"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": None, "memory": "1KiB"}, "not one block of 16"),
        ({"num_blocks": None, "memory": "much"}, "is not a number"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_num_seqs": 4096}, "max_step_tokens"),
        ({"requests": 0}, "requests is 0"),
        ({"host_memory": "much"}, "is not a number"),
        ({"system_share": -1.0}, "system_share is -1"),
        ({"host_memory": "1GiB", "prefix_reuse": False}, "which no-prefix-reuse turns off"),
        ({"html": Path("nowhere/out.html")}, "there is no folder nowhere"),
        ({"num_blocks": 1}, "none of the .* requests fits in a context"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _output(**options)
