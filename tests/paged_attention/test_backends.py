"""Which backend runs, what it supports, and the reasons that refuse everything else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.aot.hlo import pool_copies
from pallas_kernels import paged_attention as pa
from tests.paged_attention.oracle import make_case

BACKENDS: tuple[pa.Backend, ...] = ("xla", "reference")


@pytest.mark.parametrize(
    ("name", "platform", "device_kind", "backend", "reason"),
    [
        ("auto", "tpu", "TPU v5 lite", "tpu", "made for TPU v5 lite"),
        ("auto", "gpu", "NVIDIA H100 80GB HBM3", "gpu", "made for NVIDIA H100 80GB HBM3"),
        ("auto", "cuda", "NVIDIA H200", "gpu", "made for NVIDIA H200"),
        ("auto", "gpu", "NVIDIA GH200 480GB", "gpu", "made for NVIDIA GH200 480GB"),
        ("auto", "gpu", "NVIDIA B200", "xla", "NVIDIA B200 is not a Hopper GPU"),
        (
            "auto",
            "gpu",
            "NVIDIA A100-SXM4-80GB",
            "xla",
            "NVIDIA A100-SXM4-80GB is not a Hopper GPU, which the gpu kernels are made for",
        ),
        ("auto", "gpu", "Tesla V100-SXM2-16GB", "xla", "Tesla V100-SXM2-16GB is not a Hopper GPU"),
        ("auto", "gpu", "NVIDIA L4", "xla", "NVIDIA L4 is not a Hopper GPU"),
        ("tpu", "tpu", "TPU v6 lite", "tpu", "as asked for"),
        ("xla", "tpu", "TPU v6 lite", "xla", "as asked for"),
        ("xla", "gpu", "NVIDIA H100", "xla", "as asked for"),
        ("reference", "cpu", "cpu", "reference", "as asked for"),
    ],
)
def test_a_backend_is_what_was_asked_for_or_the_best_one(
    name: str, platform: str, device_kind: str, backend: str, reason: str
) -> None:
    resolved = pa.resolve_backend(name, platform, device_kind)
    assert resolved.backend == backend
    assert resolved.reason.startswith(reason)


@pytest.mark.parametrize(
    ("name", "platform", "device_kind", "message"),
    [
        ("flash", "cpu", "cpu", "'flash' is not one of auto, tpu, gpu, cpu, xla, reference"),
        ("tpu", "cpu", "cpu", "'tpu' can't run: cpu is not a TPU; take auto, or xla"),
        ("tpu", "gpu", "NVIDIA H100", "NVIDIA H100 is not a TPU"),
        ("gpu", "cpu", "", "'gpu' can't run: cpu is not an NVIDIA GPU; take auto, or xla"),
        ("gpu", "tpu", "TPU v4", "TPU v4 is not an NVIDIA GPU"),
        ("cpu", "tpu", "TPU v4", "TPU v4 is not a CPU"),
        ("gpu", "gpu", "NVIDIA A100-PCIE-40GB", "not a Hopper GPU.*; take auto, or xla"),
    ],
)
def test_a_backend_that_can_not_run_raises_its_reason(
    name: str, platform: str, device_kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pa.resolve_backend(name, platform, device_kind)


SUPPORTED = pa.Shape(
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    block_size=16,
    dtype="bfloat16",
    cache_dtype="bfloat16",
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_xla_and_reference_support_every_feature_and_shape(backend: pa.Backend) -> None:
    pa.check_supported(SUPPORTED, backend)
    for head_dim, block_size, cache_dtype in ((80, 24, "int8"), (7, 1, "float8_e4m3fn")):
        shape = dataclasses.replace(
            SUPPORTED,
            head_dim=head_dim,
            block_size=block_size,
            cache_dtype=cache_dtype,
        )
        pa.check_supported(shape, backend, "any device")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "queries can't be float16, only float32 or bfloat16"),
        ({"cache_dtype": "int4"}, "the cache can't be int4, only one of float32, bfloat16, float8"),
        ({"num_heads": 3}, "3 query heads can't share 2 KV heads evenly"),
        ({"num_kv_heads": 0}, "8 query heads can't share 0 KV heads evenly"),
        ({"head_dim": 0}, "head dim 0 and blocks of 16 tokens must both be at least 1"),
    ],
)
def test_what_no_backend_supports_is_refused_with_what_is(
    changes: dict[str, Any], message: str
) -> None:
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=message):
            pa.check_supported(dataclasses.replace(SUPPORTED, **changes), backend)


@pytest.mark.parametrize(
    ("head_dim", "tpu", "gpu", "cpu"),
    [
        *((8, 64, 64, 16), (64, 64, 64, 64), (80, 128, 128, 80), (96, 128, 128, 96)),
        *((100, 128, 128, 112), (128, 128, 128, 128), (256, 256, 256, 256)),
    ],
)
def test_each_backend_says_how_wide_a_head_lies_in_the_pool(
    head_dim: int, tpu: int, gpu: int, cpu: int
) -> None:
    sizes: dict[pa.Backend, int] = {"tpu": tpu, "gpu": gpu, "cpu": cpu}
    sizes |= {"xla": head_dim, "reference": head_dim}
    for backend, width in sizes.items():
        shape = pa.kv_pool_shape(
            num_layers=3,
            num_blocks=5,
            num_kv_heads=2,
            block_size=16,
            head_dim=head_dim,
            backend=backend,
        )
        assert shape == (15, 2, 16, 2 * width)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (4, 2, 16)}, "don't fit each other"),
        ({"v": (4, 1, 8)}, "don't fit each other"),
        ({"k": (3, 2, 8), "v": (3, 2, 8)}, "don't fit each other"),
        ({"q": (4, 3, 8)}, "3 query heads can't share 2 KV heads"),
        ({"kv_pool": (6, 1, 8, 16)}, "must be \\[blocks, 2, B, 16\\]"),
        ({"kv_pool": (6, 2, 8, 8)}, "must be \\[blocks, 2, B, 16\\]"),
        ({"kv_pool": (6, 2, 128)}, "must be \\[blocks, 2, B, 16\\]"),
        ({"kv_pool": (6, 2, 8, 17)}, "must be \\[blocks, 2, B, 16\\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    changes: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {"q": (4, 4, 8), "k": (4, 2, 8), "v": (4, 2, 8), "kv_pool": (6, 2, 8, 16)}
    q, k, v, pool = (jnp.zeros(shape) for shape in (shapes | changes).values())
    ragged = make_case([(4, 0)]).ragged()
    for backend in BACKENDS:
        work = pa.prepare(ragged, block_size=8, max_query_len=4, backend=backend)
        with pytest.raises(ValueError, match=message):
            pa.paged_attention(
                q, k, v, pool, work, first_block=jnp.int32(0), scale=1.0, backend=backend
            )


@pytest.mark.parametrize("cache_dtype", pa.CACHE_DTYPES)
def test_xla_updates_the_pool_in_place(cache_dtype: str) -> None:
    """It would widen all of a float8 pool, on a CPU, to write and to read a few blocks."""
    pool = jax.ShapeDtypeStruct(
        pa.kv_pool_shape(
            num_layers=1, num_blocks=2048, num_kv_heads=2, block_size=16, head_dim=64, backend="xla"
        ),
        pa.kv_pool_dtype(cache_dtype, "xla"),
    )
    scales = jnp.ones((2, 2)) if jnp.dtype(cache_dtype).itemsize == 1 else None

    def step(pool, q, k):
        work = pa.prepare(ragged, block_size=16, max_query_len=4, backend="xla")
        return pa.paged_attention(
            q,
            k,
            k,
            pool,
            work,
            first_block=jnp.int32(0),
            scale=1.0,
            backend="xla",
            kv_scales_2K=scales,
        )

    ragged = make_case([(4, 0), (1, 12)], block_size=16).ragged()
    q, k = (jax.ShapeDtypeStruct((5, heads, 64), jnp.bfloat16) for heads in (4, 2))
    program = jax.jit(step, donate_argnums=0).lower(pool, q, k).compile()
    size = pool.size * pool.dtype.itemsize
    assert pool_copies(program, num_elements=pool.size, num_bytes=size) == []


@pytest.mark.parametrize(
    ("pool_dtype", "options", "message"),
    [
        ("float32", {"window": 0}, "window=0 must be an integer of at least 1, or None"),
        ("float32", {"window": -1}, "window=-1 must be an integer of at least 1, or None"),
        ("float32", {"window": 2.5}, "window=2.5 must be an integer"),
        ("float32", {"window": np.ones(2, np.int32)}, "must be an integer"),
        ("float32", {"softcap": 0.0}, "softcap=0.0 must be positive, or None"),
        ("float32", {"softcap": -1.0}, "softcap=-1.0 must be positive, or None"),
        (
            "float32",
            {"sinks_N": np.zeros(2, np.float32)},
            r"must be float32\[4\], not float32\(2,\)",
        ),
        ("float32", {"sinks_N": np.zeros(4, np.int32)}, r"must be float32\[4\], not int32\(4,\)"),
        (
            "float32",
            {"kv_scales_2K": np.ones((2, 2), np.float32)},
            "float32 pool takes no kv_scales",
        ),
        ("bfloat16", {"kv_scales_2K": np.ones((2, 2), np.float32)}, "pool takes no kv_scales"),
        ("int8", {}, "an int8 pool needs kv_scales"),
        ("int8", {"kv_scales_2K": np.ones((2, 4), np.float32)}, r"must be float32\[2, 2\], not"),
        ("uint8", {"kv_scales_2K": np.ones((2, 2), np.int32)}, r"must be float32\[2, 2\]"),
        ("int32", {}, "must be one of float32, bfloat16, uint8, int8 for the"),
        ("float8_e4m3fn", {}, "must be one of float32, bfloat16, uint8, int8 for the"),
        ("float32", {"interpret": True}, "interpret=True is for the tpu and gpu backends"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    pool_dtype: str, options: dict[str, Any], message: str
) -> None:
    q, k, pool = jnp.zeros((4, 4, 8)), jnp.zeros((4, 2, 8)), jnp.zeros((6, 2, 8, 16), pool_dtype)
    ragged = make_case([(4, 0)]).ragged()
    for backend in BACKENDS:
        work = pa.prepare(ragged, block_size=8, max_query_len=4, backend=backend)
        with pytest.raises(ValueError, match=message):
            pa.paged_attention(
                q, k, k, pool, work, first_block=jnp.int32(0), scale=1.0, backend=backend, **options
            )
