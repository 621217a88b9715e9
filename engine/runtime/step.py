"""The program of a step: what it computes, and the arrays that it takes, as shapes.

Nothing here holds memory. The runner compiles it for the devices it has, `engine.aot` the same
for chips that aren't there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from engine.core import batching
from engine.core.batching import Batch, SamplingBatch
from engine.core.buckets import Bucket
from engine.model import sampler
from engine.model.attention import Attention, Ragged, kv_pool_dtype, kv_pool_shape
from engine.model.decoder import Decoder
from engine.runtime.mesh import kv_pool_sharding, replicated
from engine.sampling import MAX_LOGPROBS

PROMPT_LOGPROB_ROWS = 16  # prompt positions whose logits are computed at a time

for _cls in (Batch, SamplingBatch):
    jax.tree_util.register_dataclass(
        _cls, data_fields=[field.name for field in dataclasses.fields(_cls)], meta_fields=[]
    )


@dataclasses.dataclass(frozen=True)
class RunnerShape:
    """The sizes that memory and programs are made from.

    Units: blocks in the pool, tokens in a block, slots without the sink, blocks on the host.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    cache_dtype: Any
    buckets: tuple[Bucket, ...]
    host_blocks: int = 0


class Step:
    """A model's step, one program a bucket; the pool and the sampler's state are donated."""

    def __init__(
        self,
        model: Decoder,
        weights: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
        mesh: Mesh,
        attention: Attention,
        shape: RunnerShape,
        kv_scales: jax.Array | jax.ShapeDtypeStruct | None = None,
    ):
        """
        Args:
          model: abstract or not; its weights are not used.
          weights: by dotted name, placed on the mesh; only their shapes matter here.
          mesh, attention: where and how.
          shape: the sizes.
          kv_scales: float32 [L, 2, K], placed; only the shape matters here.
        """
        arch = model.arch
        self._definition, _ = nnx.split(model)
        self._attention = attention
        self._sink_slot = shape.max_num_seqs
        self.num_layers = arch.num_layers
        self.weights = {name: _abstract(value) for name, value in weights.items()}
        self.kv_pool = jax.ShapeDtypeStruct(
            kv_pool_shape(
                num_layers=arch.num_layers,
                num_blocks=shape.num_blocks,
                num_kv_heads=arch.num_kv_heads,
                block_size=shape.block_size,
                head_dim=arch.head_dim,
                backend=attention.backend,
            ),
            kv_pool_dtype(shape.cache_dtype, attention.backend),
            sharding=kv_pool_sharding(mesh),
        )
        state = jax.eval_shape(
            lambda: sampler.initial_state(shape.max_num_seqs + 1, arch.vocab_size)
        )
        self.state = jax.tree.map(
            lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=replicated(mesh)),
            state,
        )
        self._kv_scales = None if kv_scales is None else _abstract(kv_scales)
        self._jitted = jax.jit(self._step, donate_argnums=(1, 2))

    def lower(self, bucket: Bucket, platform: str | None = None) -> jax.stages.Lowered:
        """Trace and lower the program of one bucket.

        Call the compiled program with (weights, kv_pool, state, batch, kv_scales); it gives
        `sampler.Sampled`, and the pool and the state in the place of those it took.

        Args:
          bucket: the batch's sizes.
          platform: what to lower for; by default the platform of this process's devices.
        """
        batch = batching.empty(bucket, self._sink_slot)
        arguments = (self.weights, self.kv_pool, self.state, batch, self._kv_scales)
        traced = self._jitted.trace(*arguments)
        return traced.lower(lowering_platforms=(platform,) if platform else None)

    def _step(self, weights, kv_pool, state: sampler.SamplerState, batch: Batch, kv_scales):
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
        hidden_TD, kv_pool = model(token_ids, kv_pool, ragged, self._attention, kv_scales)
        logits_SV = model.logits(hidden_TD[batch.logits_tokens])
        sampled, state = sampler.sample(
            logits_SV, batch.slots, batch.samples, batch.sampling, state
        )
        sampled = _add_prompt_logprobs(model, hidden_TD, batch.sampling, sampled)
        return sampled, kv_pool, state


def _abstract(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


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
