"""The whole engine with the kernels that were written for accelerators, interpreted on the CPU.

What the kernels compute is tested beside their oracle, in tests/paged_attention. Here they must
fit the engine: its batches, its block tables, its meshes and its caches. Models and steps are
small, because an interpreter takes a thousand times as long as the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
    reset_gpu_interpret_mode_state,  # has no public name
)

from engine.config import Backend
from engine.types import Request, StepPlan
from engine.weights import open_checkpoint
from tests.conftest import DATA
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.model.goldens import GOLDEN_TOLERANCE, golden, through_engine
from tests.model.quantised import largest_values, write_scales
from tests.model.sampler_oracle import log_softmax
from tests.runtime.tiny import random_ids
from tests.weights.checkpoints import read_all

KERNELS: tuple[Backend, ...] = ("tpu",)
BLOCK_SIZE = 16  # the least that they take
TOLERANCE = 1e-4  # float32 sums in another order; log-probabilities are of the order of ten


# One device, and four that hold two copies of each of two KV heads.
@pytest.mark.parametrize(
    ("name", "tensor"), [("llama", 1), pytest.param("qwen3", 4, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_and_logprobs_are_the_references(kernel: Backend, name: str, tensor: int) -> None:
    logprobs, results = through_engine(
        DATA / "tiny" / name,
        name,
        backend=kernel,
        interpret=True,
        block_size=BLOCK_SIZE,
        tensor=tensor,
    )
    assert results[2].token_ids == tuple(golden(name)["greedy_ids"].tolist())
    expected = log_softmax(golden(name)["logits"])
    seen = np.isfinite(logprobs)
    np.testing.assert_allclose(logprobs[seen], expected[seen], rtol=0, atol=GOLDEN_TOLERANCE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_int8_cache_split_over_two_devices_gives_what_the_xla_backend_gives(
    kernel: Backend, tmp_path: Path
) -> None:
    """Both hold the same 8 bits and multiply in bfloat16; sums in another order may turn a
    rounding over."""
    folder = DATA / "tiny" / "llama"
    checkpoint = open_checkpoint(folder)
    largest = largest_values(
        checkpoint.architecture, read_all(checkpoint), golden("llama")["input_ids"]
    )
    file = tmp_path / "scales.safetensors"
    write_scales(file, largest, "int8")
    options = {"cache_dtype": "int8", "scales": file, "block_size": BLOCK_SIZE}
    expected, _ = through_engine(folder, "llama", **options)
    found, _ = through_engine(folder, "llama", backend=kernel, interpret=True, tensor=2, **options)
    both = np.isfinite(expected) & np.isfinite(found)
    assert (both.sum(axis=-1) >= 18).all()  # the last may change places with those behind
    np.testing.assert_allclose(found[both], expected[both], rtol=0, atol=1e-3)


def engine(source: Path, backend: Backend) -> SmallEngine:
    return small_engine(
        source, backend=backend, interpret=backend in KERNELS, block_size=BLOCK_SIZE, num_blocks=24
    )


def mixed_requests() -> list[Request]:
    """Prompts of one token to several chunks, with shared prefixes, greedy and drawn."""
    shared = random_ids(40, seed=9)
    prompts: Sequence[tuple[int, ...]] = (
        random_ids(1),
        random_ids(15),
        random_ids(16),
        random_ids(17),
        shared + random_ids(3),
        shared + random_ids(5),
        random_ids(70),
        shared + random_ids(3),
    )
    return [
        make_request(
            f"r{number}",
            prompt,
            6 + 5 * (number % 4),
            seed=number,
            temperature=0.7 * (number % 2),
            logprobs=3,
            ignore_eos=True,
        )
        for number, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mixed_workload_gives_what_the_xla_backend_gives(
    kernel: Backend, tiny_model: Path
) -> None:
    """Chunks beside decodes, sharing, and a pool so tight that sequences are preempted."""
    kinds: set[str] = set()

    def on_plan(plan: StepPlan, _: object) -> None:
        lengths = {row.num_tokens > 1 for row in plan.rows}
        kinds.add("mixed" if len(lengths) == 2 else "prompts" if True in lengths else "decodes")
        kinds.update(["preempted"] if plan.preempted else [])
        kinds.update(["shared"] if any(r.start and r.history == () for r in plan.rows) else [])

    def run(backend: Backend) -> dict[str, Result]:
        small = engine(tiny_model, backend)
        limits = dataclasses.replace(small.limits, num_blocks=9)
        return small.run(mixed_requests(), limits=limits, on_plan=on_plan)

    expected, found = run("xla"), run(kernel)
    assert kinds == {"mixed", "prompts", "decodes", "preempted", "shared"}
    for name, result in found.items():
        assert result.token_ids == expected[name].token_ids, name
        assert result.num_cached_tokens == expected[name].num_cached_tokens
        for ours, theirs in zip(result.logprobs, expected[name].logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=TOLERANCE), name


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_the_gpu_kernels_give_what_the_xla_backend_gives() -> None:
    """They take a cache of bfloat16 at most, so probabilities agree as far as its roundings do."""
    prompts = golden("llama")["input_ids"]
    chunks: set[tuple[int, ...]] = set()

    def run(backend: Backend, **interpreter: Any) -> dict[str, Result]:
        small = small_engine(
            DATA / "tiny" / "llama",
            dtype="bfloat16",
            backend=backend,
            block_size=BLOCK_SIZE,
            num_blocks=24,
            max_model_len=64,
            **interpreter,
        )
        requests = [
            make_request("long", prompts[0][:44], 2, logprobs=1),  # two chunks
            make_request("short", prompts[1][:5], 4, logprobs=1),
        ]
        return small.run(
            requests, on_plan=lambda plan, _: chunks.add(tuple(r.num_tokens for r in plan.rows))
        )

    expected, found = run("xla"), run("gpu", interpret=plgpu.InterpretGPUParams())
    reset_gpu_interpret_mode_state()
    assert {(32,), (12, 5), (1, 1)} <= chunks
    for name, result in found.items():
        assert result.token_ids == expected[name].token_ids
        ours, theirs = ([t.logprob for t in r.logprobs] for r in (result, expected[name]))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-6)  # logits of four: 8 bits
