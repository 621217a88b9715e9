"""The programs of a step: what they compute, and the arrays that they take, as shapes.

Nothing here holds memory. The runner compiles them for the devices it has, `engine.aot` the same
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
from engine.model.prompt_logprobs import prompt_logprobs
from engine.runtime.mesh import kv_pool_sharding, logits_sharding, replicated

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
    """A model's step, in two programs, so that the host may look at the last step's tokens between
    them: `forward`, one for each bucket, donates the pool, and `choose`, one for each number of
    rows, the sampler's state."""

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
        self._logits_sharding = logits_sharding(mesh)
        self._vocab_size = arch.vocab_size
        self._forward = jax.jit(
            self._compute_logits,
            donate_argnums=1,
            out_shardings=(self._logits_sharding, *[replicated(mesh)] * 2, self.kv_pool.sharding),
        )
        self._choose = jax.jit(
            sampler.sample, donate_argnames="state", out_shardings=replicated(mesh)
        )

    def lower_forward(self, bucket: Bucket, platform: str | None = None) -> jax.stages.Lowered:
        """Trace and lower the decoder's program of one bucket.

        Call the compiled program with (weights, kv_pool, recent, batch, kv_scales), the third from
        the sampler's state. It gives the logits of the rows, float32[S, V], their best tokens,
        int32[S], `PromptLogprobs`, and the pool in the place of the one it took.

        Args:
          bucket: the batch's sizes.
          platform: what to lower for; by default the platform of this process's devices.
        """
        batch = batching.empty(bucket, self._sink_slot)
        arguments = (self.weights, self.kv_pool, self.state.recent, batch, self._kv_scales)
        traced = self._forward.trace(*arguments)
        return traced.lower(lowering_platforms=(platform,) if platform else None)

    def lower_choose(self, num_seqs: int, platform: str | None = None) -> jax.stages.Lowered:
        """Trace and lower the sampler's program for a number of rows.

        Call the compiled program as `sampler.sample`, with arguments by position.
        """
        batch = batching.empty(Bucket(num_seqs, num_seqs, 1), self._sink_slot)
        logits = jax.ShapeDtypeStruct(
            (num_seqs, self._vocab_size), jnp.float32, sharding=self._logits_sharding
        )
        masks = batching.masks(num_seqs, self._vocab_size)
        # Or the compiler splits them as the logits are.
        whole = self.state.recent.sharding
        masks = jax.ShapeDtypeStruct(masks.shape, masks.dtype, sharding=whole)
        best = jax.ShapeDtypeStruct((num_seqs,), jnp.int32, sharding=whole)
        arguments = (logits, best, batch.slots, batch.samples, batch.sampling, self.state, masks)
        traced = self._choose.trace(*arguments)
        return traced.lower(lowering_platforms=(platform,) if platform else None)

    def _compute_logits(self, weights, kv_pool, recent, batch: Batch, kv_scales):
        """Decode, traced once a bucket."""
        flat = {tuple(name.split(".")): value for name, value in weights.items()}
        model = nnx.merge(self._definition, nnx.from_flat_state(flat))
        num_seqs = batch.slots.shape[0]
        slots_T = batch.slots[jnp.minimum(batch.token_rows, num_seqs - 1)]
        last_T = recent[slots_T, -1]
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
        logits_SV, best_S = model.logits(hidden_TD[batch.logits_tokens])
        return logits_SV, best_S, prompt_logprobs(model, hidden_TD, batch), kv_pool


def _abstract(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
