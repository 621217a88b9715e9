"""Runs batches on the device: one program a bucket, compiled ahead, its memory donated.

`launch` returns at once; the tokens stay on the device, where the next step finds them, and
come to the host when `Launched.wait` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from engine.config import Architecture
from engine.core import batching
from engine.core.batching import Batch
from engine.core.buckets import Bucket
from engine.model import sampler
from engine.model.attention import Attention
from engine.model.decoder import Decoder
from engine.runtime.block_copies import BlockCopier, BlockEraser
from engine.runtime.host_pool import Contents, HostPool, Outgoing
from engine.runtime.mesh import kv_scales_sharding, replicated
from engine.runtime.step import RunnerShape, Step
from engine.sampling import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from engine.types import PlanRow, Request, StepPlan, StepTokens, SwapIn, TokenLogprobs


class Launched:
    """A step on its way."""

    def __init__(self, plan: StepPlan, sampled: sampler.Sampled, outgoing: Outgoing | None = None):
        self.plan = plan
        self._sampled = sampled
        self.outgoing = outgoing

    def wait(self) -> StepTokens:
        """Wait for the step and bring over what its requests asked for.

        Raises whatever the device raised; the runner must then be reset.
        """
        rows, sampled = self.plan.rows, self._sampled
        if self.outgoing is not None:
            self.outgoing.finish()
        token_ids = np.asarray(sampled.token_ids)[: len(rows)]
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if any(row.request.num_logprobs is not None for row in rows):
            values = jax.device_get((sampled.logprobs, sampled.top_ids, sampled.top_logprobs))
            for index, row in enumerate(rows):
                count = row.request.num_logprobs
                if row.samples and count is not None:
                    token = int(token_ids[index])
                    logprobs[index] = _token_logprobs(token, index, count, *values)
        if any(row.request.sampling.prompt_logprobs is not None for row in rows):
            values = jax.device_get(
                (sampled.prompt_logprobs, sampled.prompt_top_ids, sampled.prompt_top_logprobs)
            )
            entry = 0
            for index, row in enumerate(rows):
                count = row.request.sampling.prompt_logprobs
                if count is None:
                    continue
                targets = row.request.prompt_ids[row.start + 1 : row.start + row.num_tokens + 1]
                prompt_logprobs[index] = tuple(
                    _token_logprobs(token, entry + offset, count, *values)
                    for offset, token in enumerate(targets)
                )
                entry += len(targets)
        return StepTokens(tuple(token_ids.tolist()), logprobs, prompt_logprobs)


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
    ):
        """
        Args:
          model: abstract or not; its weights are not used.
          weights: by dotted name, placed on the mesh.
          mesh, attention: where and how.
          shape: the sizes.
          kv_scales: float32 [L, 2, K], what keys and values of an 8-bit pool are divided by.
        """
        self.arch: Architecture = model.arch
        self.shape = shape
        self.mesh = mesh
        self._weights = weights
        self._kv_scales = (
            None if kv_scales is None else jax.device_put(kv_scales, kv_scales_sharding(mesh))
        )
        self._step = Step(model, weights, mesh, attention, shape, self._kv_scales)
        self._programs: dict[Bucket, jax.stages.Compiled] = {}
        self._set_slot = jax.jit(sampler.set_slot, donate_argnums=0, out_shardings=replicated(mesh))
        # Kept, so that a reset after a failure compiles nothing.
        pool = self._step.kv_pool
        self._make_kv_pool = jax.jit(
            lambda: jnp.zeros(pool.shape, pool.dtype), out_shardings=pool.sharding
        )
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
    def kv_pool_shape(self) -> tuple[int, ...]:
        """Of the whole pool, over all devices."""
        return self._step.kv_pool.shape

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
        """The program of one bucket, compiled now and kept."""
        if bucket not in self._programs:
            self._programs[bucket] = self._step.lower(bucket).compile()
        return self._programs[bucket]

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
            self._run(plan, batching.empty(bucket, self.sink_slot)).wait()
        row = _slot_state(None, (), self.arch.vocab_size)
        self._state = self._set_slot(self._state, np.int32(self.sink_slot), row)
        if progress:
            progress(len(buckets), len(buckets))

    def launch(self, plan: StepPlan, batch: Batch) -> Launched:
        """Start a step; launches run in the order they are made."""
        outgoing = self.move_blocks(plan)
        for row in plan.rows:
            if row.history is not None and row.request.sampling.edits_logits:
                self._prepare_slot(row)
        return self._run(plan, batch, outgoing)

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

    def _run(self, plan: StepPlan, batch: Batch, outgoing: Outgoing | None = None) -> Launched:
        sampled, self._kv_pool, self._state = self._programs[batching.bucket_of(batch)](
            self._weights, self._kv_pool, self._state, batch, self._kv_scales
        )
        return Launched(plan, sampled, outgoing)

    def _prepare_slot(self, row: PlanRow) -> None:
        assert row.history is not None
        state = _slot_state(row.request, row.history, self.arch.vocab_size)
        self._state = self._set_slot(self._state, np.int32(row.slot), state)


def _slot_state(
    request: Request | None, history: tuple[int, ...], vocab_size: int
) -> sampler.SlotState:
    """The sampler's row for a request that has generated `history` so far."""
    recent = np.full(MAX_BAD_WORD_TOKENS, -1, np.int32)
    counts = np.zeros(vocab_size, np.int32)
    in_prompt = np.zeros(vocab_size, np.bool_)
    bias = np.zeros(vocab_size, np.float32)
    bad_words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    stop_ids = np.full(sampler.MAX_STOP_IDS, vocab_size, np.int32)
    if request is not None:
        tail = history[-MAX_BAD_WORD_TOKENS:]
        recent[len(recent) - len(tail) :] = tail
        np.add.at(counts, np.array(history, np.int32), 1)
        in_prompt[list(request.prompt_ids)] = True
        sampling = request.sampling
        if sampling.allowed_token_ids is not None:
            bias[:] = sampler.NOT_ALLOWED
            bias[list(sampling.allowed_token_ids)] = 0.0
        for token, value in sampling.logit_bias:
            bias[token] += value
        for index, word in enumerate(request.bad_word_ids):
            bad_words[index, MAX_BAD_WORD_TOKENS - len(word) :] = word
        stop_ids[: len(request.stop_ids)] = sorted(request.stop_ids)
    return sampler.SlotState(recent, counts, in_prompt, bias, bad_words, stop_ids)


def _token_logprobs(token, index, count, chosen, top_ids, top_logprobs) -> TokenLogprobs:
    top = zip(top_ids[index, :count].tolist(), top_logprobs[index, :count].tolist(), strict=True)
    # A vocabulary of fewer tokens than MAX_LOGPROBS is filled up with impossible ones.
    return TokenLogprobs(token, float(chosen[index]), tuple(e for e in top if e[1] > -np.inf))
