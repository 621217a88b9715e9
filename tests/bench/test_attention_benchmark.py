"""`python -m benchmarks attention` on sizes that take no time: its sums, its checks, its loop.

What it measures here means nothing; that it would notice a wrong backend does.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention import command, engine_step, ours, rivals, timing
from benchmarks.attention.inputs import make_inputs, written_pool
from benchmarks.attention.rivals import DoesNotFit, Rival
from benchmarks.attention.timing import Looped, Timing
from pallas_kernels import native
from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.workloads import HEADS, WORKLOADS, Heads, Workload
from tests.conftest import ROOT
from tests.paged_attention import on_device

HEADS_OF_TEST = Heads("test", num_heads=4, num_kv_heads=2, head_dim=8)
MIX = Workload("mix", ((1, 7), (3, 2), (1, 40)))
SMALL = ["--copy-mib", "1", "--matmul-size", "32", "--seconds", "0.001"]


def test_bytes_and_flops_are_what_a_hand_counts() -> None:
    workload = Workload("two rows", ((1, 7), (3, 2)))
    kv_elements = 2 * 2 * 8  # keys and values of two heads of 8
    context = 9 * kv_elements * 1  # in one byte each
    new = 4 * kv_elements * (2 + 1)  # read in two bytes, written in one
    queries_and_output = 2 * (4 * 4 * 8) * 2
    moved = workload.bytes_moved(HEADS_OF_TEST, itemsize=2, cache_itemsize=1)
    assert moved == context + new + queries_and_output
    # Query 0 sees 8 positions; the others 3, 4 and 5. Two products, an addition each.
    assert workload.flops(HEADS_OF_TEST) == (8 + 3 + 4 + 5) * 4 * 8 * 2 * 2


def test_the_named_workloads_are_what_their_names_say() -> None:
    decode, wide, prefill, mixed = WORKLOADS.values()
    assert set(decode.kv_lens) == {4096}
    assert len(decode.rows) == 64
    assert set(wide.kv_lens) == {1024}
    assert len(wide.rows) == 256
    assert prefill.rows == ((8192, 0),)
    assert not prefill.is_decode
    assert decode.is_decode
    assert wide.is_decode
    lens = sorted(mixed.kv_lens)
    assert (lens[0], lens[-1]) == (1024, 4096)
    assert mixed.num_tokens == 64 + 2048
    # 64 contexts of 4,095 tokens of 4 KiB each, and little else.
    moved = decode.bytes_moved(HEADS["llama3-8b"], itemsize=2, cache_itemsize=2)
    assert moved / (64 * 4095 * 4096) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_scaled_workload_keeps_its_kind(name: str) -> None:
    workload = WORKLOADS[name]
    small = workload.scaled(0.01)
    assert len(small.rows) == len(workload.rows)
    assert [new == 1 for new, _ in small.rows] == [new == 1 for new, _ in workload.rows]
    assert sum(small.kv_lens) == pytest.approx(0.01 * sum(workload.kv_lens), rel=0.05)
    assert workload.scaled(1) is workload
    with pytest.raises(ValueError, match=r"2 is not in \(0, 1\]"):
        workload.scaled(2)


def test_inputs_place_every_row_in_blocks_of_its_own() -> None:
    inputs = make_inputs(MIX, HEADS_OF_TEST, seed=3, block_size=4)
    used = [-(-length // 4) for length in MIX.kv_lens]
    tables = np.asarray(inputs.ragged.block_tables)
    blocks = np.concatenate([table[:n] for table, n in zip(tables, used, strict=True)])
    assert len(set(blocks.tolist())) == sum(used) == inputs.num_blocks - 1
    np.testing.assert_array_equal(inputs.ragged.positions, [7, 2, 3, 4, 40])
    np.testing.assert_array_equal(inputs.ragged.token_rows, [0, 1, 1, 1, 2])
    before, after = np.asarray(inputs.pool("xla")), np.asarray(written_pool(inputs, "xla"))
    changed = (before != after).any(axis=(1, 3))
    assert changed.sum() == MIX.num_tokens
    np.testing.assert_array_equal(
        after[tables[1, 0], :, 2, 8:].astype(np.float32), inputs.v[1].astype(jnp.float32)
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_named_workload_is_computed_right(name: str) -> None:
    inputs = make_inputs(WORKLOADS[name].scaled(0.01), HEADS["smollm2"], seed=1, block_size=16)
    sample = ours.sampled_tokens(inputs)
    expected = ours.expected_outputs(inputs, sample)
    run = ours.contestant(inputs, "xla")
    assert ours.check_run(name, inputs, "xla", run, sample, expected).failure is None


Attend = Callable[..., tuple[jax.Array, jax.Array]]


def scaled_wrongly(attend: Attend) -> Attend:
    def wrong(q, kv_new, pool, work, first_block, options):
        options = dataclasses.replace(options, scale=1.1 * options.scale)
        return attend(q, kv_new, pool, work, first_block, options)

    return wrong


def masked_off_by_one(attend: Attend) -> Attend:
    """No token sees the first position of its context."""

    def wrong(q, kv_new, pool, work, first_block, options):
        _, kept = attend(q, kv_new, pool, work, first_block, options)
        options = dataclasses.replace(options, window=work.ragged.kv_lens.max() - 1)
        out, _ = attend(q, kv_new, pool, work, first_block, options)
        return out, kept

    return wrong


def written_nowhere(attend: Attend) -> Attend:
    def wrong(q, kv_new, pool, work, first_block, options):
        return attend(q, kv_new, pool, work, first_block, options)[0], pool

    return wrong


def written_to_another_layer(attend: Attend) -> Attend:
    def wrong(q, kv_new, pool, work, first_block, options):
        out, pool = attend(q, kv_new, pool, work, first_block, options)
        return out, pool.at[-1].set(pool[0])

    return wrong


def not_a_number(attend: Attend) -> Attend:
    def wrong(*arguments):
        out, pool = attend(*arguments)
        return out.at[-1].set(jnp.nan), pool

    return wrong


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (scaled_wrongly, "is rounding"),
        (masked_off_by_one, "is rounding"),
        (written_nowhere, "elements of the pool"),
        (written_to_another_layer, "elements of the pool"),
        (not_a_number, "NaN"),
    ],
)
def test_a_wrong_backend_is_caught(
    mistake: Callable[[Attend], Attend], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla, "attend", mistake(xla.attend))
    workload = WORKLOADS["decode-64x4k"].scaled(0.01)
    inputs = make_inputs(workload, HEADS["smollm2"], seed=5, block_size=16, num_layers=2)
    sample = ours.sampled_tokens(inputs)
    expected = ours.expected_outputs(inputs, sample)
    check = ours.check_run("wrong", inputs, "xla", ours.contestant(inputs, "xla"), sample, expected)
    assert check.failure is not None
    assert message in check.failure


@pytest.mark.parametrize("cache_dtype", pa.CACHE_DTYPES)
def test_awkward_lengths_are_checked_in_every_cache_dtype(cache_dtype: str) -> None:
    dtype = "float32" if cache_dtype == "float32" else "bfloat16"
    checks = ours.check_awkward(
        HEADS_OF_TEST, ["xla"], seed=0, block_size=8, dtype=dtype, cache_dtype=cache_dtype
    )
    assert [check.failure for check in checks] == [None, None]


def test_a_backend_that_raises_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("the kernel does not compile")

    monkeypatch.setattr(xla, "attend", broken)
    checks = ours.check_awkward(
        HEADS_OF_TEST, ["xla"], seed=0, block_size=8, dtype="float32", cache_dtype="float32"
    )
    assert all("does not compile" in (check.failure or "") for check in checks)


def test_the_loop_repeats_as_often_as_it_is_told() -> None:
    def call(count, step, fixed, index):
        return (step, index), count + step

    run = Looped(call, jnp.int32(0), jnp.int32(3), ())
    run(5)
    run(2)
    assert int(run.state) == 7 * 3
    assert run.out is not None
    assert int(run.out[1]) == 1  # of the last repetition


def test_contestants_take_turns_and_an_error_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, turns = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def takes(name: str, *seconds: float) -> Callable[[int], None]:
        rest = iter(seconds)

        def run(repetitions: int) -> None:
            turns.append(name)
            clock[0] += repetitions * next(rest)

        return run

    def fails(repetitions: int) -> None:
        raise MemoryError("no room")

    runs = {"a": takes("a", 9, 1, 1, 5, 3), "broken": fails, "b": takes("b", 9, 2, 2, 2, 2)}
    found = timing.measure(runs, rounds=3, seconds=1.0)
    assert turns == ["a", "a", "b", "b", "a", "b", "a", "b", "a", "b"]
    assert found["a"] == Timing(median=3, least=1, most=5, repetitions=1)
    assert found["b"] == Timing(median=2, least=2, most=2, repetitions=1)
    assert found["broken"] == "MemoryError: no room"


def test_repetitions_fill_the_time_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def run(repetitions: int) -> None:
        clock[0] += repetitions * 0.001

    assert timing.calibrate(run, 0.3) == 300


def test_rates_follow_from_sizes_and_medians() -> None:
    ceilings = timing.measure_ceilings(copy_bytes=4096, matmul_size=16, rounds=3, seconds=0.001)
    copied = ceilings.copy_bytes_per_second * ceilings.copy.median
    assert copied == pytest.approx(2 * 4096)
    assert ceilings.flops_per_second * ceilings.matmul.median == pytest.approx(2 * 16**3)


def test_only_rectangles_go_to_kernels_without_pages() -> None:
    inputs = make_inputs(
        WORKLOADS["decode-256x1k"].scaled(0.01), HEADS_OF_TEST, seed=2, block_size=4
    )
    q, keys, values = rivals.rectangle(inputs)
    assert q.shape == (256, 1, 4, 8)
    assert keys.shape == values.shape == (256, 10, 2, 8)
    np.testing.assert_array_equal(keys[:, -1], inputs.k)  # this step's are the last
    np.testing.assert_array_equal(values[:, -1], inputs.v)
    for workload in (MIX, Workload("a chunk", ((4, 8),))):
        with pytest.raises(DoesNotFit):
            rivals.rectangle(make_inputs(workload, HEADS_OF_TEST, seed=2, block_size=4))


def run_quickly(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "attention.json"
    code = command.main(
        ["--scale", "0.01", "--heads", "smollm2", *SMALL, "--json", str(file), *options]
    )
    return code, json.loads(file.read_bytes())


def test_the_command_checks_times_and_keeps_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(inputs: Any) -> Any:
        raise ArithmeticError("the rival fell over")

    broken = Rival("broken", ("cpu",), None, "", raises)
    absent = Rival("absent", ("cpu",), "no_such_package", "`pip install it`", raises)
    monkeypatch.setattr(command, "RIVALS", (rivals.RIVALS[0], broken, absent))
    backends = ("--backend", "tpu", "gpu", "xla", "reference")  # on any machine
    options = ("--workload", "decode-64x4k", "--rounds", "2", "--seed", "7", *backends)
    code, kept = run_quickly(tmp_path, *options)
    shown = capsys.readouterr().out
    assert code == 0
    assert "seed 7;" in shown
    assert "SCALED: every length times 0.01" in shown
    assert "absent: no_such_package is not installed; `pip install it`" in shown
    assert shown.rstrip().endswith("6 of 6 checks hold")
    assert kept["versions"]["jax"] == jax.__version__
    assert kept["platform"] == "cpu"
    assert set(kept["refused"]) == {"tpu", "gpu"}
    assert {result["contestant"]: result["problem"] for result in kept["results"]} == {
        "xla": None,
        "reference": None,
        rivals.RIVALS[0].name: None,
        "broken": "ArithmeticError: the rival fell over",
    }
    for result in kept["results"][:3]:
        rate = result["bytes_moved"] / result["timing"]["median"]
        assert result["bytes_per_second"] == rate
        assert result["of_copy"] == rate / kept["ceilings"]["copy_bytes_per_second"]


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("cache", ["bfloat16", "int8", "float8_e4m3fn"])
def test_native_attention_is_checked_too(tmp_path: Path, cache: str) -> None:
    options = ("--backend", "cpu", "--workload", "mixed", "--cache-dtype", cache)
    code, kept = run_quickly(tmp_path, *options, "--no-rivals", "--rounds", "0")
    assert code == 0
    assert kept["checks"]
    assert all(check["failure"] is None for check in kept["checks"])


def test_a_wrong_backend_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(xla, "attend", written_nowhere(xla.attend))
    options = ("--workload", "mixed", "--backend", "xla", "--no-rivals", "--rounds", "0")
    code, kept = run_quickly(tmp_path, *options)
    assert code == 1
    assert len(kept["failures"]) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED: xla, smollm2 edges: ")


def test_the_engine_step_runs_on_a_small_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--engine-step", "--model", "tiny", "--sequences", "4", "--context", "20")
    code, kept = run_quickly(tmp_path, *options, "--rounds", "1")
    assert code == 0
    step = kept["engine_step"]
    # Embeddings are the output's too, so a step reads them; keys and values of 2 heads of 64.
    arch = engine_step.architecture("tiny")
    layer = 128 * (4 + 2 * 2 + 4) * 64 + 3 * 128 * 256 + 2 * 128
    assert step["weight_bytes"] == 2 * (arch.vocab_size * 128 + 2 * layer + 128)
    assert step["kv_bytes"] == 4 * 20 * 2 * (2 * 2 * 64) * 2
    floor = (step["weight_bytes"] + step["kv_bytes"]) / kept["ceilings"]["copy_bytes_per_second"]
    assert step["ratio"] == pytest.approx(step["timing"]["median"] / floor)
    assert "target 1.25" in capsys.readouterr().out


def test_a_step_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_step, "available_bytes", lambda device: 24 * 2**30)
    code = command.main(["--engine-step", *SMALL, "--rounds", "1"])
    assert code == 2
    assert "llama3-8b with 64 sequences at 1024 tokens needs 25." in capsys.readouterr().out


def test_tokens_that_tell_of_nan_are_noticed() -> None:
    arch = engine_step.architecture("tiny")
    assert engine_step._judge((3, 9, 3, 1), arch) is None
    assert "NaN" in (engine_step._judge((0, 0, 0, 0), arch) or "")
    assert "beyond the vocabulary" in (engine_step._judge((0, 512), arch) or "")
    assert command.MODELS == engine_step.MODELS


def test_the_oracles_cases_run_on_whatever_device_is_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--backend", "xla", "--only", "one token alone"]
    assert on_device.main(arguments) == 0
    monkeypatch.setattr(xla, "attend", scaled_wrongly(xla.attend))
    assert on_device.main(["--backend", "xla", "--only", "a page first"]) == 1
    assert "0 passed, 1 failed" in capsys.readouterr().out
    assert on_device.main([*arguments, "--seconds", "0"]) == 1, "what did not run did not pass"


def test_both_ways_to_start_it_take_its_options() -> None:
    for module in (["benchmarks", "attention"], ["benchmarks.attention"]):
        line = [sys.executable, "-m", *module, "--rounds", "none"]
        result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert "invalid int value: 'none'" in result.stderr
