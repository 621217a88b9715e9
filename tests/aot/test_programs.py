"""What is compiled ahead of time is the program that the engine runs, made without memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from engine.aot import programs
from engine.aot.hlo import Collectives
from engine.aot.programs import Program
from engine.config import Config, ConfigError
from engine.config_file import from_tree
from engine.core.buckets import Bucket
from engine.loading import load_engine
from engine.memory_plan import plan
from engine.runtime.runner import Runner
from tests.runtime.tiny import ARCH, config_tree, write_model

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def config_of(model: Path, **changes: Any) -> Config:
    return from_tree(config_tree(model, **changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"mesh.tensor": 2}, {"mesh.tensor": 4}, {"cache.dtype": "float8_e4m3fn"}],
    ids=["one device", "two", "more devices than KV heads", "8 bits"],
)
def test_it_is_the_program_that_the_engine_runs(
    model: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(model, **changes)
    before = len(jax.live_arrays())
    step, buckets = programs.step_of(config, jax.devices())
    ours = {bucket: step.lower_forward(bucket).as_text() for bucket in buckets}
    sizes = {bucket.num_seqs for bucket in buckets}
    choosing = {num_seqs: step.lower_choose(num_seqs).as_text() for num_seqs in sizes}
    assert len(jax.live_arrays()) <= before
    monkeypatch.setattr(Runner, "warm_up", lambda *_: None)  # compiling would take its time
    runner = load_engine(config).runner
    assert buckets == runner.shape.buckets
    assert len(set(ours.values())) == len(buckets)
    for bucket in buckets:
        assert ours[bucket] == runner._step.lower_forward(bucket).as_text()
    for num_seqs in sizes:
        assert choosing[num_seqs] == runner._step.lower_choose(num_seqs).as_text()


def test_bytes_of_a_chip_are_those_of_octavo_plan(model: Path) -> None:
    config = config_of(model, **{"mesh.tensor": 4, "attention.backend": "xla"})
    step, _ = programs.step_of(config, jax.devices())
    expected = plan(config, ARCH)
    assert programs.bytes_per_chip(step.weights) == expected.weight_bytes_per_chip
    pool = 64 * expected.block_bytes_per_chip
    assert programs.bytes_per_chip(step.kv_pool) == pool
    assert programs.bytes_per_chip(step.state) >= expected.sampler_bytes_per_chip


def test_the_largest_buckets_are_one_of_each_kind() -> None:
    buckets = (
        Bucket(1, 1, 4),
        Bucket(8, 2, 4),
        Bucket(8, 8, 4),
        Bucket(64, 2, 4),
        Bucket(64, 8, 4),
    )
    assert programs.largest_buckets(buckets) == (Bucket(8, 8, 4), Bucket(64, 8, 4))


def test_a_kernel_that_the_devices_can_t_run_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"attention\.backend: .*not a TPU"):
        programs.step_of(config_of(model), jax.devices(), "tpu")


def test_what_copies_or_does_not_fit_is_a_problem() -> None:
    good = Program(
        topology="v5e:2x4",
        bucket=Bucket(8, 8, 4),
        seconds=1.0,
        weight_bytes=GIB,
        kv_bytes=12 * GIB,
        state_bytes=GIB,
        temp_bytes=0,
        peak_bytes=14 * GIB,
        hbm_bytes=15 * GIB,
        num_blocks=12,
        num_blocks_that_fit=13,
        collectives=Collectives({}, {}, {}),
        vmem_bytes={},
        copies=[],
    )
    assert good.fits
    assert good.problems == []
    copies = dataclasses.replace(good, copies=["copy makes 1,2 elements"])
    assert copies.problems == ["KV-sized copy: copy makes 1,2 elements"]
    large = dataclasses.replace(good, peak_bytes=16 * GIB, num_blocks_that_fit=11)
    assert not large.fits
    [problem] = large.problems
    assert "lower cache.memory to at most 11 blocks" in problem
