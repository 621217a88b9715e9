"""Runs batches on the device: one program a bucket, compiled ahead, its memory donated.

`launch` returns at once; the tokens stay on the device, where the next step finds them, and
come to the host when `Launched.wait` asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from engine.config import Architecture
from engine.core import batching
from engine.model import sampler
from engine.model.attention import Attention, Ragged, kv_pool_shape
from engine.model.decoder import Decoder
from engine.runtime.mesh import kv_pool_sharding, replicated
from engine.types import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGPROBS,
    Batch,
    Bucket,
    PlanRow,
    Request,
    SamplingBatch,
    StepPlan,
    StepTokens,
    TokenLogprobs,
)

PROMPT_LOGPROB_ROWS = 16  # prompt positions whose logits are computed at a time

for _cls in (Batch, SamplingBatch):
    jax.tree_util.register_dataclass(
        _cls, data_fields=[field.name for field in dataclasses.fields(_cls)], meta_fields=[]
    )


@dataclasses.dataclass(frozen=True)
class RunnerShape:
    """The sizes that device memory and programs are made from.

    Units: blocks in the pool, tokens in a block, slots without the sink.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    cache_dtype: Any
    buckets: tuple[Bucket, ...]


class Launched:
    """A step on its way."""

    def __init__(self, plan: StepPlan, sampled: sampler.Sampled):
        self.plan = plan
        self._sampled = sampled

    def wait(self) -> StepTokens:
        """Wait for the step and bring over what its requests asked for.

        Raises whatever the device raised; the runner must then be reset.
        """
        rows, sampled = self.plan.rows, self._sampled
        token_ids = np.asarray(sampled.token_ids)[: len(rows)]
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if any(row.request.sampling.logprobs is not None for row in rows):
            values = jax.device_get((sampled.logprobs, sampled.top_ids, sampled.top_logprobs))
            for index, row in enumerate(rows):
                count = row.request.sampling.logprobs
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
    ):
        """
        Args:
          model: abstract or not; its weights are not used.
          weights: by dotted name, placed on the mesh.
          mesh, attention: where and how.
          shape: the sizes.
        """
        self.arch: Architecture = model.arch
        self.shape = shape
        self.mesh = mesh
        self._definition, _ = nnx.split(model)
        self._weights = weights
        self._attention = attention
        self._programs: dict[Bucket, jax.stages.Compiled] = {}
        self._jitted_step = jax.jit(self._step, donate_argnums=(1, 2))
        self._set_slot = jax.jit(sampler.set_slot, donate_argnums=0, out_shardings=replicated(mesh))
        # Kept, so that a reset after a failure compiles nothing.
        self._make_kv_pool = jax.jit(
            lambda: jnp.zeros(self.kv_pool_shape, shape.cache_dtype),
            out_shardings=kv_pool_sharding(mesh),
        )
        self._make_state = jax.jit(
            lambda: sampler.initial_state(shape.max_num_seqs + 1, self.arch.vocab_size),
            out_shardings=replicated(mesh),
        )
        self.reset()

    @property
    def kv_pool_shape(self) -> tuple[int, ...]:
        """Of the whole pool, over all devices."""
        return kv_pool_shape(
            num_layers=self.arch.num_layers,
            num_blocks=self.shape.num_blocks,
            num_kv_heads=self.arch.num_kv_heads,
            block_size=self.shape.block_size,
            head_dim=self.arch.head_dim,
        )

    @property
    def sink_slot(self) -> int:
        """The slot that padded rows write to."""
        return self.shape.max_num_seqs

    def reset(self) -> None:
        """Fresh device memory: an empty pool and no slot in use."""
        self._kv_pool = self._state = None  # give the old memory back first
        self._kv_pool = self._make_kv_pool()
        self._state = self._make_state()
        jax.block_until_ready((self._kv_pool, self._state))  # a lack of memory shows here

    def compile(self, bucket: Bucket) -> jax.stages.Compiled:
        """The program of one bucket, compiled now and kept."""
        if bucket not in self._programs:
            batch = batching.empty(bucket, self.sink_slot)
            lowered = self._jitted_step.lower(self._weights, self._kv_pool, self._state, batch)
            self._programs[bucket] = lowered.compile()
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
        for row in plan.rows:
            if row.history is not None and row.request.sampling.edits_logits:
                self._prepare_slot(row)
        return self._run(plan, batch)

    def _run(self, plan: StepPlan, batch: Batch) -> Launched:
        sampled, self._kv_pool, self._state = self._programs[batching.bucket_of(batch)](
            self._weights, self._kv_pool, self._state, batch
        )
        return Launched(plan, sampled)

    def _prepare_slot(self, row: PlanRow) -> None:
        assert row.history is not None
        state = _slot_state(row.request, row.history, self.arch.vocab_size)
        self._state = self._set_slot(self._state, np.int32(row.slot), state)

    def _step(self, weights, kv_pool, state: sampler.SamplerState, batch: Batch):
        """The whole step, traced once a bucket: decode, choose, remember."""
        flat = {tuple(name.split(".")): value for name, value in weights.items()}
        model = nnx.merge(self._definition, nnx.from_flat_state(flat))
        num_seqs = batch.slots.shape[0]
        slots_T = batch.slots[jnp.minimum(batch.token_rows, num_seqs - 1)]
        last_T = state.recent[slots_T, -1]
        token_ids = jnp.where(batch.token_ids < 0, last_T, batch.token_ids)
        token_ids = jnp.maximum(token_ids, 0)
        ragged = Ragged(
            batch.token_rows,
            batch.positions,
            batch.query_starts,
            batch.kv_lens,
            batch.block_tables,
        )
        hidden_TD, kv_pool = model(token_ids, kv_pool, ragged, self._attention)
        last = jnp.maximum(batch.query_starts[1:] - 1, 0)
        logits_SV = model.logits(hidden_TD[last])
        sampled, state = sampler.sample(
            logits_SV, batch.slots, batch.samples, batch.sampling, state
        )
        sampled = _add_prompt_logprobs(model, hidden_TD, batch.sampling, sampled)
        return sampled, kv_pool, state


def _add_prompt_logprobs(
    model: Decoder, hidden_TD: jax.Array, batch: SamplingBatch, sampled: sampler.Sampled
) -> sampler.Sampled:
    """Log-probabilities of prompt tokens, a few positions at a time; free if nobody asked."""
    num_tokens = hidden_TD.shape[0]
    rows = min(PROMPT_LOGPROB_ROWS, num_tokens)
    padding = -num_tokens % rows
    indices = jnp.pad(batch.prompt_indices, (0, padding))
    targets = jnp.pad(batch.prompt_targets, (0, padding))

    def some_rows(step, out):
        start = step * rows
        index = jax.lax.dynamic_slice_in_dim(indices, start, rows)
        target = jax.lax.dynamic_slice_in_dim(targets, start, rows)
        new = sampler.token_logprobs(model.logits(hidden_TD[index]), target)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(array, part, start, 0)
            for array, part in zip(out, new, strict=True)
        )

    out = (
        jnp.zeros(num_tokens + padding, jnp.float32),
        jnp.zeros((num_tokens + padding, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((num_tokens + padding, MAX_LOGPROBS), jnp.float32),
    )
    steps = -(-batch.num_prompt_logprobs // rows)
    # The condition keeps XLA from moving the logits in front of the loop; see sampler.sample.
    chosen, top_ids, top = jax.lax.cond(
        steps > 0,
        lambda out: jax.lax.fori_loop(0, steps, some_rows, out),
        lambda out: out,
        out,
    )
    return sampled._replace(
        prompt_logprobs=chosen[:num_tokens],
        prompt_top_ids=top_ids[:num_tokens],
        prompt_top_logprobs=top[:num_tokens],
    )


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
