"""`python -m benchmarks streaming` on a tiny model: both ways are measured on equal requests."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import no_device, streaming
from benchmarks.streaming import WAYS, Sizes
from engine import config_file
from engine.config import ConfigError
from engine.frontend import Engine
from engine.sampling import SamplingParams
from tests.conftest import ROOT

SIZES = Sizes(streams=4, requests=4, input_len=8, output_len=100)


def test_both_ways_are_measured_and_every_stream_is_open_at_once(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = streaming.run(tiny_config, (), SIZES, rounds=1, step_ms=None, folder=tmp_path)
    report = json.loads((tmp_path / "streaming-4.json").read_bytes())
    assert report["streams_held"] == 4
    assert code == 0
    here, there = (report["runs"][way] for way in WAYS)
    assert [len(here), len(there)] == [1, 1]
    for run in (*here, *there):
        assert (run["failed"], run["output_tokens"]) == (0, 4 * 100)
        assert run["ttft_seconds"]["p50"] > 0
        assert run["itl_seconds"]["p99"] > 0
    rates = [runs[0]["output_tokens_per_second"] for runs in (here, there)]
    assert report["ratios"] == [pytest.approx(rates[1] / rates[0])]
    assert "4 of 4 streams ran at once" in " ".join(capsys.readouterr().out.split())


def test_a_config_gets_as_many_sequences_as_there_are_streams(tiny_config: Path) -> None:
    config = config_file.load(tiny_config)
    assert streaming._wide_enough(config, 4) is config
    wide = streaming._wide_enough(config, 100)
    assert wide.scheduler.max_num_seqs == 100
    assert wide.scheduler.max_step_tokens == 100
    assert wide.buckets.decode_seqs == (4, 100)
    assert wide.buckets.prefill_tokens == (32, 100)


def test_steps_without_a_device_take_a_vocabulary_in_a_gguf_file(
    tiny_config: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"\.gguf"):
        streaming.run(tiny_config, (), SIZES, rounds=1, step_ms=1.0, folder=tmp_path)


def test_an_engine_without_a_device_serves_as_many_tokens_as_are_asked_for(
    smollm2_gguf: Path,
) -> None:
    config = config_file.load(
        ROOT / "configs" / "smollm2-135m-cpu.yaml", (f"model.source={smollm2_gguf}",)
    )
    engine = Engine(no_device.load(config, 0.0))

    async def answer() -> list[int]:
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        deltas = [delta async for delta in engine.generate("hello", sampling)]
        return [token for delta in deltas for token in delta.token_ids]

    try:
        tokens = asyncio.run(answer())
    finally:
        engine.close()
    assert len(tokens) == 40
    assert engine.stats().failed_steps == 0
