"""Small real engines for tests: a scheduler and a runner, stepped until every request is done.

Shapes are few and small, because compiling takes most of the time. Invariants are checked
after every event, and an engine is kept for the process, so that later runs find the garbage
that earlier ones left in the pool.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from engine.config import (
    Backend,
    BucketConfig,
    CacheDtype,
    Dtype,
    MeshConfig,
    Quantization,
    SchedulerConfig,
)
from engine.core import batching, scheduler
from engine.core.batching import Batch
from engine.core.buckets import bucket_set
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.memory_plan import kv_copies
from engine.model.attention import Attention
from engine.model.decoder import Decoder, abstract_decoder
from engine.model.products import Products
from engine.runtime.constraints import Constraints
from engine.runtime.mesh import make_mesh, weight_shardings
from engine.runtime.runner import Launched, Runner, RunnerShape
from engine.sampling import SamplingParams
from engine.types import (
    BeamScore,
    FinishReason,
    Request,
    StepOutput,
    StepPlan,
    TokenLogprobs,
    Waited,
)
from engine.weights import Checkpoint, load_params, open_checkpoint, with_kv_copies
from engine.weights.kv_scales import read_scales

SCHEDULER = SchedulerConfig(max_num_seqs=4, max_step_tokens=32)
BUCKETS = BucketConfig(decode_seqs=(4,), prefill_tokens=(32,), prefill_seqs=(4,))


@dataclasses.dataclass
class Result:
    """Everything that came out for one request."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    beam: BeamScore | None = None
    waited: Waited | None = dataclasses.field(default=None, compare=False)  # depends on time

    def add(self, output: StepOutput) -> None:
        """Take in one step's news."""
        assert self.finish_reason is None, "news after the end"
        self.token_ids += output.token_ids
        self.finish_reason = output.finish_reason
        self.num_cached_tokens = output.num_cached_tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.beam = output.beam
        self.waited = output.waited or self.waited


@dataclasses.dataclass(frozen=True)
class SmallEngine:
    """A warm runner with the limits that fit it."""

    checkpoint: Checkpoint
    runner: Runner
    limits: Limits

    def run(
        self,
        requests: Sequence[Request],
        *,
        limits: Limits | None = None,
        ahead: bool = True,
        on_plan: Callable[[StepPlan, Batch], None] = lambda plan, batch: None,
        abort_at: Mapping[int, Sequence[str]] | None = None,
    ) -> dict[str, Result]:
        """Admit everything, step until idle, and check that every block came back.

        Args:
          requests: in order of arrival.
          limits: instead of the engine's own; its pool must not be larger.
          ahead: plan step N + 1 before step N's tokens are known, as the step loop does.
          on_plan: called with each plan that is launched, and its batch.
          abort_at: ids of requests to abort, by the number of the step before which.
        """
        limits = limits or self.limits
        assert limits.num_blocks <= self.runner.shape.num_blocks
        results = {name: Result() for request in requests for name in request.replies}
        state = SchedulerState.initial(limits)
        constraints = Constraints()
        for request in requests:
            state = scheduler.admit(state, limits, request)
            constraints.add(request)
        in_flight: Launched | None = None
        step = 0
        while not state.is_idle or in_flight is not None:
            assert step < 10_000, "no end in sight"
            for request_id in (abort_at or {}).get(step, ()):
                state, outputs = scheduler.abort(state, request_id)
                _deliver(outputs, results)
                state.check()
            step += 1
            state, plan = scheduler.schedule(state, limits)
            state.check()
            launched = self._launch(plan, on_plan) if plan.rows else None
            if launched is None:
                self.runner.move_blocks(plan)
            assert launched or in_flight or state.is_idle, "no progress"
            if not ahead:
                self._choose(launched, constraints)
            waited, in_flight = (in_flight, launched) if ahead else (launched, None)
            if waited is not None:
                state, outputs = scheduler.commit(state, waited.plan, waited.wait(), limits)
                state.check()
                _deliver(outputs, results)
                for output in outputs:
                    if output.finish_reason is not None:
                        constraints.forget(output.request_id)
                assert not constraints.advance(outputs)
            if ahead:
                self._choose(launched, constraints)
        assert state.pool.owned == 0, "blocks are still owned after the last request"
        assert all(result.finish_reason is not None for result in results.values())
        return results

    def run_one(self, request: Request, **options: Any) -> Result:
        """`run` for a single request."""
        return self.run([request], **options)[request.request_id]

    def _choose(self, launched: Launched | None, constraints: Constraints) -> None:
        if launched is not None and launched.masks is not None:
            assert not constraints.fill(launched.plan, launched.masks)
            self.runner.choose(launched)

    def _launch(self, plan: StepPlan, on_plan: Callable[[StepPlan, Batch], None]) -> Launched:
        batch = batching.build(plan, self.runner.shape.buckets, self.runner.sink_slot)
        on_plan(plan, batch)
        return self.runner.launch(plan, batch)


def _deliver(outputs: Sequence[StepOutput], results: Mapping[str, Result]) -> None:
    for output in outputs:
        results[output.request_id].add(output)


@functools.cache
def small_engine(
    source: Path,
    *,
    dtype: Dtype = "float32",
    cache_dtype: CacheDtype | None = None,
    quantization: Quantization = "none",
    backend: Backend = "xla",
    interpret: Any = False,
    scales: Path | None = None,
    tensor: int = 1,
    num_blocks: int = 64,
    block_size: int = 8,
    max_model_len: int = 128,
    config: SchedulerConfig = SCHEDULER,
    buckets: BucketConfig = BUCKETS,
    host_blocks: int = 0,
) -> SmallEngine:
    """Load a checkpoint and compile its buckets; equal arguments give the same engine.

    The default serves 4 sequences of at most 128 tokens, 32 tokens a step, from a pool of 64
    blocks of 8 tokens. `interpret` runs the kernels of `tpu` and `gpu` on the CPU; `scales` is
    a file for an 8-bit cache.
    """
    assert backend != "auto"
    checkpoint = open_checkpoint(source)
    arch = checkpoint.architecture
    mesh = make_mesh(MeshConfig(tensor=tensor), arch)
    copies = kv_copies(arch, tensor)
    products = Products("xla", quantization)
    model = abstract_decoder(with_kv_copies(arch, copies), jnp.dtype(dtype), products)
    shape = RunnerShape(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=config.max_num_seqs,
        cache_dtype=jnp.dtype(cache_dtype or dtype),
        buckets=bucket_set(buckets, config, -(-max_model_len // block_size)),
        host_blocks=host_blocks,
    )
    weights = load_params(checkpoint, weight_shardings(model, mesh), kv_copies=copies)
    attention = Attention(backend, mesh, interpret)
    kv_scales = None
    if scales is not None:
        kv_scales = np.repeat(read_scales(scales, arch, cache_dtype or dtype), copies, axis=-1)
    runner = Runner(model, weights, mesh, attention, shape, kv_scales)
    runner.warm_up()
    limits = Limits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens,
        max_model_len=max_model_len,
        max_waiting=config.max_waiting,
        host_blocks=host_blocks,
        fingerprint=checkpoint.fingerprint,
    )
    return SmallEngine(checkpoint, runner, limits)


def load_decoder(checkpoint: Checkpoint, dtype: str = "float32") -> Decoder:
    """The decoder of a checkpoint with its weights, on one device."""
    arch = checkpoint.architecture
    model = abstract_decoder(arch, jnp.dtype(dtype))
    weights = load_params(checkpoint, weight_shardings(model, make_mesh(MeshConfig(), arch)))
    definition, _ = nnx.split(model)
    flat: dict[Any, Any] = {tuple(name.split(".")): value for name, value in weights.items()}
    return nnx.merge(definition, nnx.from_flat_state(flat))


def make_request(
    request_id: str, prompt_ids: Iterable[int], max_tokens: int = 8, **fields: Any
) -> Request:
    """A greedy request. Fields of `SamplingParams` may be given among those of `Request`."""
    own = {field.name for field in dataclasses.fields(Request)}
    sampling: dict[str, Any] = {"temperature": 0.0}
    sampling |= {name: fields.pop(name) for name in list(fields) if name not in own}
    return Request(
        request_id,
        tuple(int(token) for token in prompt_ids),
        SamplingParams(**sampling),
        max_tokens=max_tokens,
        **fields,
    )
