"""Attention over a mesh: split by KV head, with whatever else goes by head, it stays the same."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from engine.model.attention import TENSOR, Attention, Ragged, kv_pool_shape

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 8, 4, 16, 16, 8
LENGTHS, CONTEXTS = (3, 1, 5), (20, 33, 5)  # tokens of each row in this step, and in all


def ragged() -> Ragged:
    starts = np.cumsum((0, *LENGTHS))
    positions = [np.arange(kv - n, kv) for n, kv in zip(LENGTHS, CONTEXTS, strict=True)]
    return Ragged(
        token_rows=jnp.asarray(np.repeat(np.arange(len(LENGTHS)), LENGTHS), jnp.int32),
        positions=jnp.asarray(np.concatenate(positions), jnp.int32),
        query_starts=jnp.asarray(starts, jnp.int32),
        kv_lens=jnp.asarray(CONTEXTS, jnp.int32),
        block_tables=jnp.asarray([[5, 1, 0], [2, 7, 3], [4, 0, 0]], jnp.int32),
    )


def run(attention: Attention, cache_dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Output and pool of one step after a random past."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    shape = kv_pool_shape(
        num_layers=2,
        num_blocks=NUM_BLOCKS,
        num_kv_heads=NUM_KV_HEADS,
        block_size=BLOCK_SIZE,
        head_dim=HEAD_DIM,
        backend=attention.backend,
    )
    pool = (random(*shape) * 20).astype(cache_dtype)
    tokens = sum(LENGTHS)
    q = random(tokens, NUM_HEADS, HEAD_DIM)
    k, v = (random(tokens, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))

    @jax.jit
    def step(q, k, v, pool, ragged, options):
        work = attention.prepare(ragged, block_size=BLOCK_SIZE, max_query_len=max(LENGTHS))
        first = jnp.asarray(NUM_BLOCKS, jnp.int32)
        softcap = 15.0 if "softcap" in options else None
        arrays = {name: value for name, value in options.items() if name != "softcap"}
        return attention(q, k, v, pool, work, first, 0.25, softcap=softcap, **arrays)

    return step(q, k, v, pool, ragged(), options)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": jnp.asarray(7, jnp.int32)},
    "softcap": {"softcap": True},
    "sinks": {"sinks_N": jnp.linspace(-2, 5, NUM_HEADS, dtype=jnp.float32)},
    "scales": {"kv_scales_2K": jnp.linspace(0.01, 0.09, 8, dtype=jnp.float32).reshape(2, 4)},
}
OPTIONS["all"] = {name: value for part in OPTIONS.values() for name, value in part.items()}


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_goes_by_head_is_split_by_head(name: str, tensor: int) -> None:
    """Every head has a sink and a scale of its own, so one in another's place would show."""
    options = OPTIONS[name]
    dtype = jnp.int8 if "kv_scales_2K" in options else jnp.float32
    mesh = Mesh(np.array(jax.devices()[:tensor]), (TENSOR,), axis_types=(AxisType.Auto,))
    whole, pool = run(Attention("xla"), dtype, options)
    split, split_pool = run(Attention("xla", mesh), dtype, options)
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(split_pool, pool)
    if options:
        plain, _ = run(Attention("xla"), jnp.float32, {})
        assert np.abs(plain - whole).max() > 0.01, "the option did nothing"


def test_an_interpreter_is_passed_on_and_refused_by_backends_without_kernels() -> None:
    with pytest.raises(ValueError, match="interpret=True is for the tpu and gpu backends"):
        run(Attention("xla", interpret=True), jnp.float32, {})
