"""How the gpu kernels use a thread block: tiles and buffers, from the shape and shared memory.

Nothing is tuned by tables: buffers are as many as fit beside what must be there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.paged_attention.gpu_items import THREAD_BLOCKS, UNIT
from pallas_kernels.paged_attention.layout import Shape, not_hopper

ROWS = 64  # query rows of a warpgroup: the M of wgmma
COLUMNS = 64  # of the output that leave shared memory at a time: what a staging buffer holds
SHARED_MEMORY = 227 * 1024 - 3072  # bytes of a block, less barriers and the compiler's scratch


def unsupported(shape: Shape, device_kind: str) -> str | None:
    """Why this backend can't run `shape`, naming what it can; None if it can.

    Any Hopper GPU will do, though those with fewer than `THREAD_BLOCKS` multiprocessors (H100
    PCIe, H20) share the work unevenly.
    """
    if device_kind and (reason := not_hopper(device_kind)):
        return f"{reason}; use the xla backend"
    if shape.cache_dtype not in ("bfloat16", "float8_e4m3fn", "int8"):
        return (
            f"the gpu kernels take a cache of bfloat16, float8_e4m3fn or int8, not "
            f"{shape.cache_dtype}: tensor cores round float32 to 10 bits; set cache.dtype or use "
            f"the xla backend"
        )
    if shape.dtype not in ("bfloat16", "float32"):
        return f"the gpu kernels take bfloat16 or float32 queries, not {shape.dtype}"
    if shape.head_dim > 256:
        return f"the gpu kernels take head dims up to 256, not {shape.head_dim}"
    if shape.block_size not in (16, 32, 64, 128, 256):
        return f"the gpu kernels take blocks of 16, 32, 64, 128 or 256, not {shape.block_size}"
    if shape.num_heads > ROWS * shape.num_kv_heads:
        return (
            f"the gpu kernels take up to {ROWS} query heads for a KV head, not "
            f"{shape.num_heads // shape.num_kv_heads}; use the xla backend"
        )
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static side of one launch: what a thread block holds and how it is cut."""

    is_decode: bool
    width: int  # W
    group: int  # query heads of a KV head
    num_kv_heads: int
    block_size: int
    pool_dtype: Any
    out_dtype: Any  # of what leaves the kernel: float32 parts in a decode
    has_window: bool
    softcap: float | None
    has_sinks: bool
    interpret: Any

    @property
    def thread_blocks(self) -> int:
        return 2 if self.interpret else THREAD_BLOCKS

    @property
    def is_narrow(self) -> bool:
        """Whether the pool has 8-bit values, which wgmma sees as bfloat16."""
        return jnp.dtype(self.pool_dtype).itemsize == 1

    @property
    def tile(self) -> int:
        """Context tokens of one buffer of the ring."""
        is_small = self.is_decode or self.is_narrow or self.width > 128  # or registers run out
        return UNIT // 2 if is_small else UNIT

    @property
    def tile_tokens(self) -> int:
        """Tokens of one warpgroup: as many as fill its rows, in a power of two."""
        return 1 if self.is_decode else 1 << ((ROWS // self.group).bit_length() - 1)

    @property
    def rows_a_token(self) -> int:
        """Rows of a tile that one token takes: its query heads, so that copies are of 8 rows."""
        multiple = max(1, 8 // self.tile_tokens)
        return -(-self.group // multiple) * multiple

    @property
    def query_copies(self) -> int:
        """Pieces of one item's queries: both warpgroups share one in a decode."""
        return 1 if self.is_decode else 2

    @property
    def buffers(self) -> tuple[int, int]:
        """Buffers of queries and of context, as many as fit: (query slots, ring stages)."""
        queries = self.query_copies * ROWS * self.width * 2
        stage = self.tile * 2 * self.width * jnp.dtype(self.pool_dtype).itemsize
        fixed = 2 * ROWS * COLUMNS * jnp.dtype(self.out_dtype).itemsize
        fixed += 2 * ROWS * 4 if self.is_decode else 0
        fixed += 2 * self.tile * self.width * 2 if self.is_narrow else 0
        for slots in (2, 1):
            stages = min((SHARED_MEMORY - fixed - slots * queries) // stage, 8)
            if stages >= 2:
                return slots, stages - stages % (2 if self.is_decode else 1)
        raise AssertionError(f"{self} does not fit the shared memory")

    @property
    def piece(self) -> int:
        """Context tokens of one copy: a page, or as much of it as a buffer holds."""
        return min(self.block_size, self.tile)


class Buffers(NamedTuple):
    """Shared memory of a thread block and the barriers that pass it around."""

    query_buffer: Any  # bfloat16[slots, copies, ROWS, W]
    ring: Any  # [stages, tile, 2W]: keys beside values, in the pool's dtype
    staging: Any  # [2, ROWS, COLUMNS]: of each warpgroup's output
    query_ready: Any
    query_free: Any
    ready: Any
    free: Any
    together: Any  # both computing warpgroups
    sums: Any = None  # float32[2, ROWS]: of a decode's parts
    wide: Any = None  # bfloat16[2, tile, W]: 8-bit keys or values as wgmma takes them
    weights: Any = None  # of the interpreter only


def scratch(plan: Plan) -> dict[str, Any]:
    """The types of `Buffers`, by name, as far as `plan` needs them."""

    def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
        # Rows of 64 elements at a time, so that keys and values lie in tiles of their own.
        swizzle = plgpu.SwizzleTransform(64 * jnp.dtype(dtype).itemsize)
        transforms = (plgpu.TilingTransform((8, 64)), swizzle)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    slots, stages = plan.buffers
    width, tile, copies = plan.width, plan.tile, plan.query_copies
    types = {
        "query_buffer": swizzled((slots, copies, ROWS, width), jnp.bfloat16),
        "ring": swizzled((stages, tile, 2 * width), plan.pool_dtype),
        "staging": plgpu.SMEM((2, ROWS, COLUMNS), plan.out_dtype),
        "query_ready": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        "query_free": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "ready": plgpu.Barrier(num_arrivals=tile // plan.piece, num_barriers=stages),
        # Each buffer of a decode has one reader.
        "free": plgpu.Barrier(num_arrivals=1 if plan.is_decode else 2, num_barriers=stages),
        "together": plgpu.Barrier(num_arrivals=2),
    }
    if plan.is_decode:
        types["sums"] = plgpu.SMEM((2, ROWS), jnp.float32)
    if plan.is_narrow:
        types["wide"] = swizzled((2, tile, width), jnp.bfloat16)
    if plan.interpret:
        types["weights"] = plgpu.SMEM((2, ROWS, tile), jnp.bfloat16)
    return types
