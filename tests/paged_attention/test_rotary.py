"""Rotary positions by XLA and by native code, against turns of complex numbers in float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import cpu

needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)
BACKENDS = ["xla", *(pytest.param(name, marks=needs_native) for name in native.INSTRUCTIONS)]
DTYPES = {np.float32: 2.0**-24, ml_dtypes.bfloat16: 2.0**-8}  # half of what each rounds to


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (1, 1, 16), (4, 2, 80)])
@pytest.mark.parametrize("tokens", [1, 5, 32, 77])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_half_a_head_apart_are_turned(
    backend: str, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: Any
) -> None:
    if backend != "xla":
        most = native.INSTRUCTIONS.index(backend)
        if most > native.INSTRUCTIONS.index(native.instructions()):
            pytest.skip(f"this processor has no {backend}")
    rng, half = np.random.default_rng(0), head_dim // 2
    q, k, v = (
        rng.normal(size=(tokens, each, head_dim)).astype(dtype)
        for each in (heads, kv_heads, kv_heads)
    )
    angles = rng.uniform(-7, 7, (tokens, half))
    cos, sin = (each.astype(np.float32) for each in (np.cos(angles), np.sin(angles)))
    rope = pa.Rope(jnp.asarray(cos), jnp.asarray(np.concatenate([-sin, sin], axis=1)))
    if backend == "xla":
        turned, keys = (np.asarray(pa.rotate(jnp.asarray(x), rope)) for x in (q, k))
    else:
        found = cpu.rotate(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), rope, backend)
        turned, entries = map(np.asarray, found)
        keys = entries[..., :head_dim]
        assert entries.dtype == dtype
        assert entries[..., head_dim:].tobytes() == v.tobytes()
    for y, x in ((turned, q), (keys, k)):
        pairs = x[..., :half].astype(np.float64) + 1j * x[..., half:].astype(np.float64)
        complex_turns = (cos.astype(np.float64) + 1j * sin.astype(np.float64))[:, None]
        exact = pairs * complex_turns
        exact = np.concatenate((exact.real, exact.imag), axis=-1)
        allowed = DTYPES[dtype] * np.abs(exact) + 4 * 2.0**-24 * np.tile(np.abs(pairs), 2)
        assert y.dtype == dtype
        assert (np.abs(y.astype(np.float64) - exact) <= allowed).all()


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    q, k = jnp.zeros((3, 4, 16)), jnp.zeros((3, 2, 16))
    rope = pa.Rope(jnp.zeros((3, 8)), jnp.zeros((3, 16)))
    for queries, values in ((q, k[:2]), (q, k.astype(jnp.bfloat16)), (q[:2], k)):
        with pytest.raises(Exception, match="must fit the queries"):
            cpu.rotate(queries, k, values, rope, None)
    with pytest.raises(Exception, match="must fit the queries"):
        cpu.rotate(q, k, k, pa.Rope(rope.cos[:2], rope.sin), None)


@pytest.mark.parametrize("backend", ["xla", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize(("head_dim", "cache"), [(32, "bfloat16"), (32, "int8"), (8, "bfloat16")])
def test_attention_turns_queries_and_keys_before_all_else(
    backend: pa.Backend, head_dim: int, cache: str
) -> None:
    """As if they had been turned before, with a cache that holds keys as they are, in 8 bits, or
    with more room for each than it has."""
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=(3, heads, head_dim)), jnp.bfloat16) for heads in (4, 2, 2)
    )
    angles = rng.uniform(-7, 7, (3, head_dim // 2)).astype(np.float32)
    sin = np.sin(angles)
    rope = pa.Rope(jnp.asarray(np.cos(angles)), jnp.asarray(np.concatenate([-sin, sin], axis=1)))
    ragged = pa.Ragged(
        token_rows=jnp.zeros(3, jnp.int32),
        positions=jnp.arange(3, dtype=jnp.int32),
        query_starts=jnp.array([0, 3], jnp.int32),
        kv_lens=jnp.array([3], jnp.int32),
        block_tables=jnp.array([[1]], jnp.int32),
    )
    shape = pa.kv_pool_shape(
        num_layers=1,
        num_blocks=2,
        num_kv_heads=2,
        block_size=16,
        head_dim=head_dim,
        backend=backend,
    )
    scales = jnp.full((2, 2), 0.05, jnp.float32) if cache == "int8" else None

    def attend(q: Any, k: Any, rope: pa.Rope | None) -> tuple[np.ndarray, np.ndarray]:
        out, pool = pa.paged_attention(
            q,
            k,
            v,
            jnp.zeros(shape, pa.kv_pool_dtype(cache, backend)),
            pa.prepare(ragged, block_size=16, max_query_len=3, backend=backend),
            first_block=jnp.int32(0),
            scale=0.2,
            backend=backend,
            rope=rope,
            kv_scales_2K=scales,
        )
        return np.asarray(out, np.float32), np.asarray(pool[1], np.float32)

    found, expected = attend(q, k, rope), attend(pa.rotate(q, rope), pa.rotate(k, rope), None)
    # A product more or less that is fused may round to the other side: a step of 8 bits, at most.
    for one, other, step in zip(
        found, expected, (0.1, 1.0 if scales is not None else 0.0), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2.0**-7, atol=step + 0.02)
    assert np.abs(attend(q, k, None)[0] - expected[0]).max() > 0.2
