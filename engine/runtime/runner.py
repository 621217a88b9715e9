"""Runs batches on the device: programs compiled ahead, their memory donated.

`launch` returns at once; the tokens stay on the device, where the next step finds them, and
come to the host when `Launched.wait` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from engine.config import Architecture
from engine.core import batching
from engine.core.batching import Batch, SamplingBatch
from engine.core.buckets import Bucket
from engine.model import sampler
from engine.model.attention import Attention
from engine.model.decoder import Decoder
from engine.model.empty_pool import empty_kv_pool
from engine.model.prompt_logprobs import PromptLogprobs
from engine.runtime import logprobs
from engine.runtime.block_copies import BlockCopier, BlockEraser
from engine.runtime.host_pool import Contents, HostPool, Outgoing
from engine.runtime.mesh import kv_scales_sharding, replicated
from engine.runtime.programs import Programs
from engine.runtime.slots import slot_state
from engine.runtime.step import RunnerShape, Step
from engine.types import PlanRow, StepPlan, StepTokens, SwapIn


class Launched:
    """A step on its way.

    Attributes:
      masks: None, or what to fill in, row by row (see `Matcher.fill`): the step's tokens are
        chosen when it is passed to `Runner.choose`.
    """

    def __init__(
        self,
        plan: StepPlan,
        batch: Batch,
        logits: jax.Array,
        best: jax.Array,
        of_prompt: PromptLogprobs,
        outgoing: Outgoing | None,
    ):
        self.plan = plan
        self.outgoing = outgoing
        self.masks: np.ndarray | None = None
        self.batch = batch
        self.logits: jax.Array | None = logits
        self.best = best
        self.sampled: sampler.Sampled | None = None
        self._of_prompt = of_prompt

    def wait(self) -> StepTokens:
        """Wait for the step and bring over what its requests asked for.

        Raises whatever the device raised; the runner must then be reset.
        """
        rows, sampled = self.plan.rows, self.sampled
        assert sampled is not None, "the step's tokens are not chosen yet"
        if self.outgoing is not None:
            self.outgoing.finish()
        token_ids = tuple(np.asarray(sampled.token_ids)[: len(rows)].tolist())
        return StepTokens(
            token_ids,
            logprobs.of_choices(rows, token_ids, sampled),
            logprobs.of_prompts(rows, self._of_prompt),
        )


class Runner:
    """A model on a mesh, its KV pool and sampler state, and the compiled steps."""

    def __init__(
        self,
        model: Decoder,
        weights: dict[str, jax.Array],
        mesh: Mesh,
        attention: Attention,
        shape: RunnerShape,
        kv_scales: np.ndarray | None = None,
        programs: Programs | None = None,
    ):
        """
        Args:
          model: abstract or not; its weights are not used.
          weights: by dotted name, placed on the mesh.
          mesh, attention: where and how.
          shape: the sizes.
          kv_scales: float32 [L, 2, K], what keys and values of an 8-bit pool are divided by.
          programs: of the same step, which some may have been compiled of.
        """
        self.model = model
        self.arch: Architecture = model.arch
        self.backends = (attention.backend, model.products.backend)
        self.shape = shape
        self.mesh = mesh
        self.weights = weights  # others of the same shapes may take their place between two steps
        self._kv_scales = (
            None if kv_scales is None else jax.device_put(kv_scales, kv_scales_sharding(mesh))
        )
        if programs is None:
            programs = Programs(Step(model, weights, mesh, attention, shape, self._kv_scales))
        self._programs, self._step = programs, programs.step
        self._forward: dict[Bucket, jax.stages.Compiled] = {}
        self._choose: dict[int, jax.stages.Compiled] = {}
        self._plain: dict[int, tuple[SamplingBatch, jax.Array]] = {}  # nothing asked for, no masks
        self._set_slot = jax.jit(sampler.set_slot, donate_argnums=0, out_shardings=replicated(mesh))
        # Kept, so that a reset after a failure compiles nothing.
        pool = self._step.kv_pool
        self._make_kv_pool = jax.jit(lambda: empty_kv_pool(pool), out_shardings=pool.sharding)
        self._copy_blocks = BlockCopier(pool, self.arch.num_layers, shape.max_num_seqs)
        self._erase_blocks = BlockEraser(pool, self.arch.num_layers)
        self._make_state = jax.jit(
            lambda: sampler.initial_state(shape.max_num_seqs + 1, self.arch.vocab_size),
            out_shardings=replicated(mesh),
        )
        self.host = (
            HostPool(pool, self.arch.num_layers, shape.host_blocks) if shape.host_blocks else None
        )
        self.reset()

    @property
    def kv_pool(self) -> jax.Array:
        """The pool as the last step left it, to look at: the next launch donates it."""
        assert self._kv_pool is not None  # `reset` makes one
        return self._kv_pool

    @property
    def sink_slot(self) -> int:
        """The slot that padded rows write to."""
        return self.shape.max_num_seqs

    def reset(self) -> None:
        """Fresh device memory: an empty pool and no slot in use. The host tier keeps its blocks."""
        self._kv_pool = self._state = None  # give the old memory back first
        self._kv_pool = self._make_kv_pool()
        self._state = self._make_state()
        jax.block_until_ready((self._kv_pool, self._state))  # a lack of memory shows here

    def compile(self, bucket: Bucket) -> jax.stages.Compiled:
        """The decoder's program of one bucket; it and the sampler's are compiled now and kept."""
        num_seqs = bucket.num_seqs
        if num_seqs not in self._choose:
            self._choose[num_seqs] = self._programs.choose(num_seqs)
            masks = batching.masks(num_seqs, self.arch.vocab_size)
            sampling = jax.device_put(batching.neutral_sampling(num_seqs))
            self._plain[num_seqs] = sampling, jax.device_put(masks, replicated(self.mesh))
        if bucket not in self._forward:
            self._forward[bucket] = self._programs.forward(bucket)
        return self._forward[bucket]

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every bucket and run each once, so that no request waits for a compile.

        Args:
          progress: called with (buckets done, buckets in all).
        """
        buckets = self.shape.buckets
        for done, bucket in enumerate(buckets):
            if progress:
                progress(done, len(buckets))
            self.compile(bucket)
            plan = StepPlan(step=-1, rows=())
            self.launch(plan, batching.empty(bucket, self.sink_slot)).wait()
        row = slot_state(None, (), self.arch.vocab_size)
        self._state = self._set_slot(self._state, np.int32(self.sink_slot), row)
        if progress:
            progress(len(buckets), len(buckets))

    def launch(self, plan: StepPlan, batch: Batch) -> Launched:
        """Start a step; launches run in the order they are made.

        Where a row is constrained, the step waits for its masks, and `choose` must be called
        before the next launch.
        """
        outgoing = self.move_blocks(plan)
        for row in plan.rows:
            if row.history is not None and row.request.sampling.edits_logits:
                self._prepare_slot(row)
        assert self._state is not None
        logits, best, of_prompt, self._kv_pool = self._forward[batching.bucket_of(batch)](
            self.weights, self._kv_pool, self._state.recent, batch, self._kv_scales
        )
        launched = Launched(plan, batch, logits, best, of_prompt, outgoing)
        if batch.sampling.constrained.any():
            launched.masks = batching.masks(batch.slots.size, self.arch.vocab_size)
        else:
            self.choose(launched)
        return launched

    def choose(self, launched: Launched) -> None:
        """Have a step's tokens chosen, with its masks as they are now."""
        batch, masks = launched.batch, launched.masks
        num_seqs = batch.slots.size
        plain, no_masks = self._plain[num_seqs]
        launched.sampled, self._state = self._choose[num_seqs](
            launched.logits,
            launched.best,
            batch.slots,
            batch.samples,
            plain if batch.sampling is batching.neutral_sampling(num_seqs) else batch.sampling,
            self._state,
            no_masks if masks is None else masks,
        )
        launched.logits = None  # a row takes hundreds of kilobytes

    def move_blocks(self, plan: StepPlan) -> Outgoing | None:
        """Copies, swaps and erasures: all of a plan without rows, else `launch` calls it.

        Slots are read before they are erased or filled, and blocks likewise.
        """
        if not plan.moves_blocks:
            return None
        outgoing = contents = None
        if self.host is not None and plan.swap_ins:
            contents = self.host.read(swap.slot for swap in plan.swap_ins)
        if self.host is not None and plan.erased_slots:
            self.host.erase(plan.erased_slots)
        if self.host is not None and plan.swap_outs:
            outgoing = self.host.swap_out(self.kv_pool, plan.swap_outs)
        if plan.block_copies:
            self._kv_pool = self._copy_blocks(self.kv_pool, plan.block_copies)
        if plan.erased_blocks:
            self._kv_pool = self._erase_blocks(self.kv_pool, plan.erased_blocks)
        if contents is not None:
            self.swap_in(plan.swap_ins, contents)
        return outgoing

    def swap_in(self, swaps: Sequence[SwapIn], contents: Sequence[Contents]) -> None:
        """Start to copy a host pool's contents to blocks."""
        assert self.host is not None
        self._kv_pool = self.host.swap_in(self.kv_pool, swaps, contents)

    def _prepare_slot(self, row: PlanRow) -> None:
        assert row.history is not None
        state = slot_state(row.request, row.history, self.arch.vocab_size)
        self._state = self._set_slot(self._state, np.int32(row.slot), state)
