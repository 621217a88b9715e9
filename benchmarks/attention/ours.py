"""Our backends: as contestants, and checked against the reference.

What is checked is what is timed: the same program, its outputs at sampled tokens and every bit of
the pool. Before that, each backend computes a small batch of awkward lengths, all tokens of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.attention.inputs import Inputs, make_inputs, written_pool
from benchmarks.attention.timing import Looped, describe
from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention.workloads import Heads, Workload

BACKENDS: tuple[pa.Backend, ...] = ("tpu", "gpu", "cpu", "xla", "reference")
REFERENCE_BYTES = 2**30  # of float32 context that the reference may gather at once

# Half the distance of two neighbours, relative to the number.
_ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison with the reference.

    Attributes:
      what: which program.
      contestant: whose.
      error: the largest, over tokens and heads, of |out - expected| / |expected|, norms over the
        head's elements.
      limit: how large it may be.
      failure: what is wrong, or None.
    """

    what: str
    contestant: str
    error: float | None
    limit: float
    failure: str | None


def refusal(
    backend: pa.Backend, heads: Heads, block_size: int, dtype: str, cache_dtype: str
) -> str | None:
    """Why a backend can't run on this device, or None."""
    device = jax.devices()[0]
    shape = pa.Shape(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    try:
        pa.resolve_backend(backend, device.platform, device.device_kind)
        pa.check_supported(shape, backend, device.device_kind)
    except ValueError as error:
        return str(error)
    return None


def contestant(inputs: Inputs, backend: pa.Backend) -> Looped:
    """One layer's attention, layer after layer: the program is prepared once, as a step does it,
    and the pool goes from repetition to repetition in place."""

    def call(pool, new, ragged, index):
        q, k, v = new
        return pa.paged_attention(
            q,
            k,
            v,
            pool,
            ragged,
            first_block=lax.rem(index, inputs.num_layers) * inputs.num_blocks,
            scale=inputs.scale,
            backend=backend,
            **inputs.options,
        )

    def prepare(ragged):
        return pa.prepare(
            ragged,
            block_size=inputs.block_size,
            max_query_len=inputs.max_query_len,
            backend=backend,
        )

    work = jax.jit(prepare)(inputs.ragged)
    return Looped(call, inputs.pool(backend), (inputs.q, inputs.k, inputs.v), work)


def sampled_tokens(inputs: Inputs, limit_bytes: int = REFERENCE_BYTES) -> np.ndarray:
    """Indices of tokens whose outputs are compared: the first, the last and some between, as many
    as the reference has room for."""
    width = inputs.ragged.block_tables.shape[1] * inputs.block_size
    context_bytes = 4 * width * 2 * inputs.heads.num_kv_heads * inputs.heads.head_dim
    num_tokens = inputs.workload.num_tokens
    count = min(num_tokens, max(2, limit_bytes // (4 * context_bytes)), 64)
    inner = np.random.default_rng(inputs.seed).permutation(np.arange(1, num_tokens - 1))
    return np.unique(np.concatenate((inner[: max(0, count - 2)], [0, num_tokens - 1])))


def reference_bytes(inputs: Inputs) -> int:
    """What the reference gathers for the whole workload."""
    table_tokens = inputs.ragged.block_tables.shape[1] * inputs.block_size
    per_token = 2 * inputs.heads.num_kv_heads * inputs.heads.head_dim * 4
    return inputs.workload.num_tokens * table_tokens * per_token


def expected_outputs(inputs: Inputs, tokens: np.ndarray) -> np.ndarray:
    """What the reference gives for some tokens, float32[n, N, H]: each alone, as the last token
    of a sequence that ends there, on a pool that was written without any backend."""
    ragged = inputs.ragged
    rows = np.asarray(ragged.token_rows)[tokens]
    positions = np.asarray(ragged.positions)[tokens]
    alone = pa.Ragged(
        token_rows=jnp.arange(len(tokens), dtype=jnp.int32),
        positions=jnp.asarray(positions),
        query_starts=jnp.arange(len(tokens) + 1, dtype=jnp.int32),
        kv_lens=jnp.asarray(positions + 1),
        block_tables=ragged.block_tables[jnp.asarray(rows)],
    )

    @jax.jit
    def compute(q, k, v, pool, ragged):
        work = pa.prepare(
            ragged, block_size=inputs.block_size, max_query_len=1, backend="reference"
        )
        out, _ = pa.paged_attention(
            q,
            k,
            v,
            pool,
            work,
            first_block=jnp.int32(0),
            scale=inputs.scale,
            backend="reference",
            **inputs.options,
        )
        return out

    new = [x[jnp.asarray(tokens)] for x in (inputs.q.astype(jnp.float32), inputs.k, inputs.v)]
    return np.asarray(compute(*new, written_pool(inputs, "reference"), alone))


def precision(inputs: Inputs) -> str:
    """The coarsest dtype on the way: of the output or of the products."""
    is_float32 = inputs.q.dtype.name == inputs.cache_dtype == "float32"
    return "float32" if is_float32 else "bfloat16"


def compare(
    what: str, name: str, out: jax.Array | np.ndarray, expected: np.ndarray, dtype: str
) -> Check:
    """Judge outputs [n, N, H] that were computed with products or rounded in `dtype`.

    Rounding the weights and the output to `dtype`, with unit roundoff u, is off by some 0.6 u in
    these norms, as errors of many elements are independent; the limit is 2 u. In float32 it is
    sums over thousands of positions that matter: 64 u.
    """
    limit = _ROUNDOFF[dtype] * (2 if dtype == "bfloat16" else 64)
    actual = np.asarray(out, np.float64)
    norms = np.linalg.norm(expected, axis=-1)
    errors = np.linalg.norm(actual - expected, axis=-1) / np.maximum(norms, 1e-30)
    if not np.isfinite(errors).all():
        return Check(what, name, None, limit, "the output has NaN or infinity")
    worst = float(errors.max())
    failure = None if worst <= limit else f"off by {worst:.2g} of its size; {limit:.2g} is rounding"
    return Check(what, name, worst, limit, failure)


def check_run(
    what: str,
    inputs: Inputs,
    backend: pa.Backend,
    run: Looped,
    tokens: np.ndarray,
    expected: np.ndarray,
) -> Check:
    """Do one repetition, and judge its outputs and its pool."""
    run(1)
    assert run.out is not None
    out = np.asarray(run.out[jnp.asarray(tokens)])
    check = compare(what, backend, out, expected, precision(inputs))
    if check.failure is None:
        wrong = int(_count_different(run.state, written_pool(inputs, backend)))
        if wrong:
            failure = f"{wrong} elements of the pool are not what was written"
            check = dataclasses.replace(check, failure=failure)
    return check


def check_awkward(
    heads: Heads, backends: Sequence[pa.Backend], *, seed: int, block_size: int, **dtypes: str
) -> list[Check]:
    """Every token of a batch whose rows end before, on and after a block's edge, with one that is
    empty and NaN in all unused blocks; then again with a window, a soft cap and sinks."""
    edge = block_size
    rows = ((1, 0), (1, edge - 1), (0, 0), (1, edge), (edge + 3, edge - 2), (2, 5 * edge - 1))
    checks = []
    sinks = jax.random.normal(jax.random.key(seed), (heads.num_heads,), jnp.float32)
    features = {"window": edge + 3, "softcap": 2.0, "sinks_N": sinks}
    for name, options in (("edges", {}), ("edges, window, cap, sinks", features)):
        inputs = make_inputs(
            Workload(name, rows),
            heads,
            seed=seed,
            block_size=block_size,
            options=options,
            is_poisoned=True,
            **dtypes,  # type: ignore[bad-argument-type]
        )
        tokens = np.arange(inputs.workload.num_tokens)
        expected = expected_outputs(inputs, tokens)
        what = f"{heads.name} {name}"
        for backend in backends:
            try:
                run = contestant(inputs, backend)
                checks.append(check_run(what, inputs, backend, run, tokens, expected))
            except Exception as error:
                checks.append(Check(what, backend, None, 0.0, describe(error)))
    return checks


@jax.jit
def _count_different(a: jax.Array, b: jax.Array) -> jax.Array:
    bits = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    a, b = (lax.bitcast_convert_type(x, bits) for x in (a, b))
    return jnp.sum(a != b, dtype=jnp.int32)
