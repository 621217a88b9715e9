"""What others have for the same work: JAX's own kernels, torch's and tokamax's, where they are.

Each is given what it likes best: pages in its own layout, or keys and values of a sequence in one
piece, and only whole rectangles. They read one layer's context again and again, where ours walk
from layer to layer, and most write no keys and values: both are in their favour.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.attention.inputs import Inputs, written_pool
from benchmarks.attention.timing import Looped, Run

Contestant = tuple[Run, Callable[[], Any]]
"""What to time, and how to read its latest outputs, [T, N, H]."""


class DoesNotFit(ValueError):
    """The rival was not made for this workload; the message says why."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """Another's attention.

    Attributes:
      name: package and function.
      platforms: of jax, where it can run.
      package: what must be installed, or None.
      install: how.
      make: prepares a workload.
    """

    name: str
    platforms: tuple[str, ...]
    package: str | None
    install: str
    make: Callable[[Inputs], Contestant]

    def absence(self, platform: str) -> str | None:
        """Why it can't take part on this machine, or None."""
        if platform not in self.platforms:
            return f"runs on {' and '.join(self.platforms)} only"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed; {self.install}"
        return None


def rectangle(inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [S, n, N, H], and keys and values [S, C, K, H], of rows that are all alike: decodes,
    or whole prompts.

    Raises:
      DoesNotFit: a ragged batch, or a pool of 8 bits.
    """
    rows = set(inputs.workload.rows)
    if len(rows) > 1:
        raise DoesNotFit("rows of different lengths are no rectangle")
    new, before = rows.pop()
    if new > 1 and before:
        raise DoesNotFit("a chunk in the middle of a prompt is no triangle")
    if inputs.cache_dtype != inputs.q.dtype.name:
        raise DoesNotFit(f"takes no {inputs.cache_dtype} context with {inputs.q.dtype} queries")
    keys, values = (x[:, : new + before] for x in inputs.contiguous())
    q = inputs.q.reshape(-1, new, inputs.heads.num_heads, inputs.heads.head_dim)
    return q, keys, values


def _whole(inputs: Inputs, attend: Callable[..., jax.Array]) -> Contestant:
    """A contestant that takes a rectangle: `attend` is (q, k, v) -> [S, n, N, H]."""
    q, keys, values = rectangle(inputs)

    def call(state, varying, fixed, index):
        # Not everybody writes out every cast, as our tests demand of us.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return attend(*varying), state

    run = Looped(call, (), (q, keys, values), ())
    return run, lambda: run.out.reshape(inputs.q.shape)  # type: ignore[missing-attribute]


def _jax_nn(
    implementation: Literal["xla", "cudnn"],
) -> Callable[[Inputs], Contestant]:
    def make(inputs: Inputs):
        def attend(q, k, v):
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                scale=inputs.scale,
                is_causal=q.shape[1] > 1,
                implementation=implementation,
            )

        return _whole(inputs, attend)

    return make


def _jax_ragged_paged(inputs: Inputs) -> Contestant:
    """JAX's TPU kernel: pages [blocks, B, 2K, H], a head's keys before its values."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ops

    if inputs.cache_dtype != inputs.q.dtype.name:
        raise DoesNotFit(f"takes no {inputs.cache_dtype} context with {inputs.q.dtype} queries")
    pages = _interleaved_pages(inputs)
    ragged = inputs.ragged

    def call(state, varying, fixed, index):
        (q,), (kv_lens, tables, starts) = varying, fixed
        count = jnp.full(1, kv_lens.shape[0], jnp.int32)
        out = ops.ragged_paged_attention(
            q, state, kv_lens, tables, starts, count, sm_scale=inputs.scale
        )
        return out, state

    fixed = (ragged.kv_lens, ragged.block_tables, ragged.query_starts)
    run = Looped(call, pages, (inputs.q,), fixed)
    return run, lambda: run.out


def _interleaved_pages(inputs: Inputs) -> jax.Array:
    """One layer as [blocks, B, 2K, H]."""
    heads = inputs.heads

    @jax.jit
    def rearrange(pool):
        pages = pool[: inputs.num_blocks].transpose(0, 2, 1, 3)  # [blocks, B, K, 2H]
        return pages.reshape(*pages.shape[:2], 2 * heads.num_kv_heads, heads.head_dim)

    return rearrange(written_pool(inputs, "xla"))


def _jax_mosaic_gpu(inputs: Inputs) -> Contestant:
    """JAX's FlashAttention-3 for Hopper; it knows no scale, so queries are scaled before."""
    if inputs.workload.is_decode:
        raise DoesNotFit("takes 128 queries of a sequence at a time, so no decodes")
    from jax.experimental.pallas.ops.gpu import attention_mgpu as ops

    config = ops.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    scaled = dataclasses.replace(inputs, q=inputs.q * jnp.asarray(inputs.scale, inputs.q.dtype))
    return _whole(scaled, lambda q, k, v: ops.attention(q, k, v, config))


def _tokamax(inputs: Inputs) -> Contestant:
    """On TPUs its paged kernel, which writes the cache too; else its best for rectangles."""
    import tokamax  # type: ignore[missing-import]

    if jax.default_backend() != "tpu":
        return _whole(
            inputs,
            lambda q, k, v: tokamax.dot_product_attention(
                q, k, v, scale=inputs.scale, is_causal=q.shape[1] > 1
            ),
        )
    if inputs.cache_dtype != inputs.q.dtype.name:
        raise DoesNotFit(f"takes no {inputs.cache_dtype} context with {inputs.q.dtype} queries")
    pages = _interleaved_pages(inputs)
    padding = -inputs.heads.head_dim % 128
    pages = jnp.pad(pages, ((0, 0), (0, 0), (0, 0), (0, padding)))
    ragged, rows = inputs.ragged, inputs.workload.rows
    decodes = sum(new == 1 for new, _ in rows)
    prompts = sum(new > 1 and before == 0 for new, before in rows)
    # Up to where decodes go, whole prompts, and the rest: rows are sorted so in our workloads.
    stops = jnp.asarray([decodes, decodes + prompts, len(rows)], jnp.int32)

    def call(pages, new, fixed, index):
        kv_lens, tables, starts = fixed
        return tokamax.ops.batched_ragged_paged_attention(
            *new, pages, kv_lens, tables.reshape(-1), starts, stops, sm_scale=inputs.scale
        )

    fixed = (ragged.kv_lens, ragged.block_tables, ragged.query_starts)
    run = Looped(call, pages, (inputs.q, inputs.k, inputs.v), fixed)
    return run, lambda: run.out


def _torch(kind: str) -> Callable[[Inputs], Contestant]:
    """torch on the arrays where they are; its calls are queued, and waited for at the end."""

    def make(inputs: Inputs) -> Contestant:
        import torch  # type: ignore[missing-import]

        arrays = rectangle(inputs)
        is_prompt = arrays[0].shape[1] > 1
        q, k, v = (torch.from_dlpack(x).transpose(1, 2).contiguous() for x in arrays)
        if kind == "sdpa":

            def attend():
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=is_prompt, scale=inputs.scale, enable_gqa=True
                )
        else:
            from torch.nn.attention import flex_attention as flex  # type: ignore[missing-import]

            mask = None
            if is_prompt:

                def causal(batch, head, query, key):
                    return query >= key

                length = q.shape[2]
                mask = flex.create_block_mask(causal, None, None, length, length, device=q.device)
            compiled = torch.compile(flex.flex_attention)

            def attend():
                return compiled(q, k, v, block_mask=mask, scale=inputs.scale, enable_gqa=True)

        latest: list[Any] = []

        def run(repetitions: int) -> None:
            with torch.inference_mode():
                for _ in range(repetitions):
                    latest[:] = [attend()]
            if q.is_cuda:
                torch.cuda.synchronize()

        def outputs():
            return latest[0].transpose(1, 2).float().cpu().numpy().reshape(inputs.q.shape)

        return run, outputs

    return make


_EVERYWHERE = ("cpu", "gpu", "tpu")

RIVALS = (
    Rival("jax.nn.dot_product_attention (xla)", _EVERYWHERE, None, "", _jax_nn("xla")),
    Rival("jax.nn.dot_product_attention (cudnn)", ("gpu",), None, "", _jax_nn("cudnn")),
    Rival("jax ragged_paged_attention", ("tpu",), None, "", _jax_ragged_paged),
    Rival("jax attention_mgpu", ("gpu",), None, "", _jax_mosaic_gpu),
    Rival(
        "torch SDPA",
        ("cpu", "gpu"),
        "torch",
        "`pip install torch` (for GPUs: a build for the driver's CUDA)",
        _torch("sdpa"),
    ),
    Rival(
        "torch FlexAttention",
        ("gpu",),
        "torch",
        "`pip install torch` (a build for the driver's CUDA)",
        _torch("flex"),
    ),
    Rival("tokamax", ("gpu", "tpu"), "tokamax", "`pip install tokamax`", _tokamax),
)
