"""How the decoder reaches the attention kernels: resolved once, sharded by KV head.

The only module that imports `pallas_kernels`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import (
    Ragged,
    Resolved,
    Rope,
    Shape,
    check_supported,
    kv_pool_dtype,
    kv_pool_shape,
    resolve_backend,
)

__all__ = [
    "Attention",
    "Ragged",
    "Resolved",
    "Rope",
    "Shape",
    "check_supported",
    "kv_pool_dtype",
    "kv_pool_shape",
    "resolve_backend",
]

TENSOR = "tensor"  # the mesh axis that heads are split over


@dataclasses.dataclass(frozen=True)
class Attention:
    """Paged attention by one backend, on one device or split by KV head over a mesh.

    `interpret` runs the kernels of `tpu` and `gpu` on a CPU, for tests: True, or an
    interpreter's parameters.
    """

    backend: pa.Backend
    mesh: Mesh | None = None
    interpret: Any = False

    def prepare(self, ragged: Ragged, *, block_size: int, max_query_len: int) -> Any:
        """Once a step; the result serves every layer."""
        return pa.prepare(
            ragged, block_size=block_size, max_query_len=max_query_len, backend=self.backend
        )

    def __call__(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        kv_pool: jax.Array,
        work: Any,
        first_block: jax.Array,
        scale: float,
        *,
        rope: Rope | None = None,
        window: jax.Array | int | None = None,
        softcap: float | None = None,
        sinks_N: jax.Array | None = None,
        kv_scales_2K: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """See `pallas_kernels.paged_attention.paged_attention`."""

        def attend(q, k, v, pool, work, arrays):
            return pa.paged_attention(
                q,
                k,
                v,
                pool,
                work,
                scale=scale,
                softcap=softcap,
                backend=self.backend,
                interpret=self.interpret,
                **arrays,
            )

        arrays = {
            "first_block": first_block,
            "rope": rope,
            "window": window,
            "sinks_N": sinks_N,
            "kv_scales_2K": kv_scales_2K,
        }
        if self.mesh is not None and self.mesh.shape[TENSOR] > 1:
            heads = P(None, TENSOR)  # the second axis of q, k, v, of the pool and of its scales
            specs = {
                "first_block": P(),
                "rope": P(),
                "window": P(),
                "sinks_N": P(TENSOR),
                "kv_scales_2K": heads,
            }
            attend = jax.shard_map(
                attend,
                mesh=self.mesh,
                in_specs=(heads, heads, heads, heads, P(), specs),
                out_specs=(heads, heads),
                check_vma=False,  # the kernels' loops carry replicated indices
            )
        return attend(q_TNH, k_TKH, v_TKH, kv_pool, work, arrays)
