"""The engine's decode step, against the time that streaming weights and KV takes.

It is the runner's own program on a batch that the scheduler's plans are laid out as; weights are
random, prompts are computed first, so that the cache holds what a model put there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention.timing import Ceilings, Timing, available_bytes, measure
from engine import config_file, memory_plan
from engine.config import Architecture, MeshConfig
from engine.core import batching
from engine.core.buckets import Bucket
from engine.model.attention import Attention, Shape, check_supported, resolve_backend
from engine.model.decoder import abstract_decoder
from engine.runtime.mesh import make_mesh, weight_shardings
from engine.runtime.runner import Runner, RunnerShape
from engine.sampling import SamplingParams
from engine.types import PlanRow, Request, StepPlan

TARGET = 1.25  # times the streaming time
PROMPT_TOKENS = 2048  # of one step that fills the cache
_CONFIGS = Path(__file__).resolve().parents[2] / "configs"

_LLAMA = {"family": "llama", "tie_embeddings": True, "rope_theta": 1e5, "max_position": 8192}
_SMALL = {
    "smollm2-135m": Architecture(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        **_LLAMA,  # type: ignore[bad-argument-type]
    ),
    "tiny": Architecture(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        **_LLAMA,  # type: ignore[bad-argument-type]
    ),
}
MODELS = ("llama3-8b", *_SMALL)


class TooLarge(ValueError):
    """The step does not fit this device; the message says by how much."""


@dataclasses.dataclass(frozen=True)
class EngineStep:
    """One measured step.

    Attributes:
      model, backend, sequences, context: what ran.
      weight_bytes: streamed by a step. Of an embedding table that isn't also the output's, a step
        reads one row a sequence, which is left out.
      kv_bytes: of the sequences' contexts, without padding.
      floor_seconds: those bytes at the measured copy bandwidth.
      timing: of a step; steps follow one another on the device, without waiting for the host.
      failure: what is wrong with the tokens, or None.
    """

    model: str
    backend: str
    sequences: int
    context: int
    weight_bytes: int
    kv_bytes: int
    floor_seconds: float
    timing: Timing
    failure: str | None

    @property
    def ratio(self) -> float:
        """Measured time over the floor."""
        return self.timing.median / self.floor_seconds

    def __str__(self) -> str:
        met = "met" if self.ratio <= TARGET else "missed"
        return (
            f"{self.model}, {self.backend}, {self.sequences} sequences at {self.context} tokens: "
            f"{self.timing.median * 1e3:,.3f} ms "
            f"[{self.timing.least * 1e3:,.3f} - {self.timing.most * 1e3:,.3f}]\n"
            f"  weights {self.weight_bytes / 1e9:,.2f} GB + KV {self.kv_bytes / 1e9:,.2f} GB take "
            f"{self.floor_seconds * 1e3:,.3f} ms at the measured bandwidth: ratio "
            f"{self.ratio:.2f} (target {TARGET} {met})"
        )


def architecture(model: str) -> Architecture:
    """One of `MODELS`."""
    if model in _SMALL:
        return _SMALL[model]
    found = config_file.load(_CONFIGS / "llama3-8b-v5e-8.yaml").model.architecture
    assert found is not None
    return found


def run(
    model: str,
    ceilings: Ceilings,
    *,
    backend: str,
    sequences: int,
    context: int,
    block_size: int,
    cache_dtype: str,
    seed: int,
    rounds: int,
    seconds: float,
) -> EngineStep:
    """Measure one model's decode step on the first device.

    Args:
      model: one of `MODELS`.
      ceilings: of this device, from this run.
      backend: of attention, or "auto".
      sequences, context: of the batch; context in tokens, the new one included, at least 4.
      block_size, cache_dtype: of the pool.
      seed: of weights and prompts.
      rounds, seconds: as of `measure`.

    Raises:
      TooLarge: weights and cache don't fit the device's memory.
      ValueError: the backend can't run this.
    """
    if context < 4:
        raise ValueError(f"a context of {context} tokens is too short; take at least 4")
    arch = architecture(model)
    device = jax.devices()[0]
    resolved = resolve_backend(backend, device.platform, device.device_kind).backend
    check_supported(
        Shape(
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            block_size=block_size,
            dtype="bfloat16",
            cache_dtype=cache_dtype,
        ),
        resolved,
        device.device_kind,
    )
    weight_bytes = 2 * memory_plan.num_parameters(arch)
    per_token = memory_plan.kv_bytes_per_token_per_chip(
        arch, cache_dtype, tensor=1, backend=resolved
    )
    pool_bytes = sequences * (-(-context // block_size) * block_size) * per_token
    held = weight_bytes + pool_bytes + memory_plan.sampler_bytes(arch, sequences)
    _check_memory(f"{model} with {sequences} sequences at {context} tokens", held, device)
    runner, prefill, decode = _make_runner(
        arch, resolved, sequences, context, block_size, cache_dtype, seed
    )
    plan, batch = _fill_cache(runner, prefill, decode, arch, sequences, context, seed)
    latest: list[Any] = []

    def steps(repetitions: int) -> None:
        launched = [runner.launch(plan, batch) for _ in range(repetitions)]
        latest[:] = [launched[-1].wait()]

    timing = measure({"step": steps}, rounds=rounds, seconds=seconds)["step"]
    if isinstance(timing, str):
        raise RuntimeError(f"the engine's step failed: {timing}")
    embedding = 0 if arch.tie_embeddings else 2 * arch.vocab_size * arch.hidden_size
    streamed = weight_bytes - embedding
    kv_bytes = sequences * context * memory_plan.kv_bytes_per_token(arch, cache_dtype)
    floor = (streamed + kv_bytes) / ceilings.copy_bytes_per_second
    return EngineStep(
        model=model,
        backend=resolved,
        sequences=sequences,
        context=context,
        weight_bytes=streamed,
        kv_bytes=kv_bytes,
        floor_seconds=floor,
        timing=timing,
        failure=_judge(latest[0].token_ids, arch),
    )


def _judge(token_ids: tuple[int, ...], arch: Architecture) -> str | None:
    """NaN anywhere makes every row choose the same token."""
    if not all(0 <= token < arch.vocab_size for token in token_ids):
        return f"tokens beyond the vocabulary of {arch.vocab_size}: {token_ids}"
    if len(token_ids) > 3 and len(set(token_ids)) == 1:
        return f"every sequence chose token {token_ids[0]}, as it would from NaN"
    return None


def _check_memory(what: str, held: int, device: jax.Device) -> None:
    """A tenth beyond what is held is for activations, logits and programs."""
    needed, available = round(1.1 * held), available_bytes(device)
    if available is not None and needed > available:
        raise TooLarge(
            f"{what} needs {needed / 2**30:.1f} GiB, but {device.device_kind} has "
            f"{available / 2**30:.1f} GiB free; take a smaller --model, fewer --sequences or a "
            "shorter --context"
        )


def _make_runner(
    arch: Architecture,
    backend: Any,
    sequences: int,
    context: int,
    block_size: int,
    cache_dtype: str,
    seed: int,
) -> tuple[Runner, Bucket, Bucket]:
    """A runner with random weights, and its buckets for prompts and for decodes, compiled."""
    mesh = make_mesh(MeshConfig(), arch)
    model = abstract_decoder(arch, jnp.bfloat16)
    shapes = weight_shardings(model, mesh)
    weights = {}
    # The largest first, while there is room for what drawing takes.
    for index, (name, shape) in enumerate(sorted(shapes.items(), key=lambda i: -i[1].size)):
        weights[name] = _random_weight(jax.random.fold_in(jax.random.key(seed), index), name, shape)
    table = -(-context // block_size)
    prompts = max(1, min(sequences, PROMPT_TOKENS // (context - 1)))
    prefill = Bucket(prompts * (context - 1), prompts, table)
    decode = Bucket(sequences, sequences, table)
    shape = RunnerShape(
        num_blocks=sequences * table,
        block_size=block_size,
        max_num_seqs=sequences,
        cache_dtype=jnp.dtype(cache_dtype),
        buckets=(decode, prefill),
    )
    scales = None
    if cache_dtype == "int8":
        scales = np.full((arch.num_layers, 2, arch.num_kv_heads), 4 / 127, np.float32)
    runner = Runner(model, weights, mesh, Attention(backend, mesh), shape, scales)
    for bucket in (prefill, decode):
        runner.compile(bucket)
    return runner, prefill, decode


def _random_weight(key: jax.Array, name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Normal at a scale that keeps activations near one; norms are one and biases are zero."""

    def draw():
        if "norm" in name or name.endswith("bias"):
            return jnp.full(shape.shape, 0 if name.endswith("bias") else 1, shape.dtype)
        scale = jnp.asarray(shape.shape[-2] ** -0.5, shape.dtype)

        def one(key):  # a layer at a time, as drawing takes several times the memory
            return jax.random.normal(key, shape.shape[1:], shape.dtype) * scale

        if len(shape.shape) < 3:
            return jax.random.normal(key, shape.shape, shape.dtype) * scale
        return jax.lax.map(one, jax.random.split(key, shape.shape[0]))

    return jax.block_until_ready(jax.jit(draw, out_shardings=shape.sharding)())


def _fill_cache(
    runner: Runner,
    prefill: Bucket,
    decode: Bucket,
    arch: Architecture,
    sequences: int,
    context: int,
    seed: int,
):
    """Compute random prompts of all sequences; the plan and batch of the decodes after them."""
    rng = np.random.default_rng(seed)
    length = context - 1
    blocks = rng.permutation(sequences * decode.num_blocks).astype(np.int32)
    blocks = blocks.reshape(sequences, decode.num_blocks)
    used = -(-length // runner.shape.block_size)
    rows = []
    for slot in range(sequences):
        prompt = tuple(rng.integers(0, arch.vocab_size, length).tolist())
        request = Request(str(slot), prompt, SamplingParams(temperature=0.0), max_tokens=2)
        rows.append(PlanRow(request, slot, 0, length, prompt, blocks[slot, :used], True, 0, ()))
    for step, first in enumerate(range(0, sequences, prefill.num_seqs)):
        plan = StepPlan(step, tuple(rows[first : first + prefill.num_seqs]))
        batch = batching.build(plan, (prefill,), runner.sink_slot)
        runner.launch(plan, batch).wait()
    decodes = tuple(
        row._replace(
            start=length,
            num_tokens=1,
            token_ids=(),
            block_ids=blocks[row.slot],
            output_position=1,
            history=None,
        )
        for row in rows
    )
    plan = StepPlan(sequences, decodes)
    return plan, batching.build(plan, (decode,), runner.sink_slot)
