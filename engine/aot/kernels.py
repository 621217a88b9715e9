"""The attention kernel over its features, compiled for a chip that isn't there.

Each `Case` is one program: `prepare` and `paged_attention` of one layer, with the pool donated
as the engine's step donates it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engine.aot import hlo
from engine.aot.topologies import AotError, first_lines, one_chip
from pallas_kernels.paged_attention import (
    Backend,
    Ragged,
    Shape,
    check_supported,
    kv_pool_shape,
    paged_attention,
    prepare,
)

MAX_MODEL_LEN = 4096  # tokens; the block table's width
MIN_POOL_ELEMENTS = 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One program of the kernel.

    Attributes:
      num_tokens: of the batch; `num_seqs` of them with `decode_only`, which promises one each.
      dtype: of queries and output. cache_dtype: of the pool; 8-bit ones come with scales.
    """

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    decode_only: bool = True
    num_seqs: int = 64
    num_tokens: int = 512

    def __str__(self) -> str:
        extras = [name for name in ("window", "softcap", "sinks") if getattr(self, name)]
        dtypes = dict.fromkeys((self.dtype, self.cache_dtype))
        return " ".join(
            (
                "decode" if self.decode_only else "mixed",
                f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim},",
                f"blocks of {self.block_size},",
                "/".join(dtypes),
                *extras,
            )
        )


def features() -> tuple[Case, ...]:
    """What every generation must compile: each feature beside the usual rest, mixed and decodes.

    Heads are those of one chip, so one KV head is Llama 3 70B on eight. The first case has both
    of the kernel's calls, for decodes and for prompts.
    """
    cases = [Case()]
    cases += [Case(head_dim=dim) for dim in (64, 80, 96, 256)]
    cases += [
        Case(num_heads=heads, num_kv_heads=kv_heads)
        for heads, kv_heads in ((8, 8), (4, 1), (8, 1), (14, 2))
    ]
    cases += [Case(num_heads=71, num_kv_heads=1, head_dim=64)]  # Falcon 7B
    cases += [Case(block_size=size) for size in (32, 64, 128, 256)]
    cases += [Case(num_heads=8, num_kv_heads=1, block_size=256)]
    cases += [Case(cache_dtype=dtype) for dtype in ("float8_e4m3fn", "int8")]
    cases += [Case(cache_dtype="int8", head_dim=64, num_heads=14, num_kv_heads=2, block_size=32)]
    cases += [Case(dtype="float32", cache_dtype="float32")]
    cases += [Case(dtype="float32", cache_dtype="float8_e4m3fn")]
    cases += [Case(window=True), Case(softcap=True), Case(sinks=True)]
    cases += [
        Case(window=True, softcap=True, sinks=True, head_dim=64, num_heads=64, block_size=128),
        Case(window=True, softcap=True, head_dim=256, num_heads=16, cache_dtype="float8_e4m3fn"),
    ]
    return tuple(
        dataclasses.replace(case, decode_only=decode_only)
        for case, decode_only in itertools.product(cases, (False, True))
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One compiled case.

    Attributes:
      case, topology: what was compiled, and for which chips.
      seconds: of tracing and compiling.
      temp_bytes: memory beside arguments and outputs.
      vmem_bytes: vector memory by kernel; the xla backend has none.
      copies: why it may copy the KV pool; empty if it doesn't.
    """

    case: Case
    topology: str
    seconds: float
    temp_bytes: int
    vmem_bytes: dict[str, int]
    copies: list[str]


def examine(case: Case, topology: str, backend: Backend = "tpu") -> Kernel:
    """Compile one case and read what the compiler says about it.

    Raises:
      AotError: the kernel refuses the case, or the compiler refuses the kernel.
    """
    start = time.perf_counter()
    where = f"{case} on {topology}"
    try:
        compiled = compile_case(case, topology, backend)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise AotError(f"{where}: {type(error).__name__}: {first_lines(error)}") from None
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text
    elements = math.prod(pool_shape(case, backend))
    return Kernel(
        case=case,
        topology=topology,
        seconds=seconds,
        temp_bytes=memory.temp_size_in_bytes,
        vmem_bytes=hlo.kernel_vmem(text),
        copies=hlo.pool_copies(
            compiled,
            num_elements=elements,
            num_bytes=elements * jnp.dtype(case.cache_dtype).itemsize,
        ),
    )


def pool_shape(case: Case, backend: Backend) -> tuple[int, ...]:
    """Of a pool that holds every sequence at its longest, in as many layers as make it so large
    that no activation compares with it."""
    blocks, *rest = kv_pool_shape(
        num_layers=1,
        num_blocks=case.num_seqs * _table_width(case),
        num_kv_heads=case.num_kv_heads,
        block_size=case.block_size,
        head_dim=case.head_dim,
        backend=backend,
    )
    num_layers = -(-MIN_POOL_ELEMENTS // (blocks * math.prod(rest)))
    return (num_layers * blocks, *rest)


def compile_case(case: Case, topology: str, backend: Backend = "tpu") -> jax.stages.Compiled:
    """Compile one case for a topology's first chip.

    Raises:
      ValueError: the backend doesn't support the case.
      Exception: whatever the compiler raises.
    """
    mesh = one_chip(topology)
    shape = Shape(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        block_size=case.block_size,
        dtype=case.dtype,
        cache_dtype=case.cache_dtype,
    )
    sharding = NamedSharding(mesh, P())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    seqs = case.num_seqs
    tokens = seqs if case.decode_only else case.num_tokens
    ragged: dict[str, tuple[int, ...]] = {
        "token_rows": (tokens,),
        "positions": (tokens,),
        "query_starts": (seqs + 1,),
        "kv_lens": (seqs,),
        "block_tables": (seqs, _table_width(case)),
    }
    kv = array((tokens, case.num_kv_heads, case.head_dim), case.dtype)
    arguments: dict[str, Any] = {
        "q": array((tokens, case.num_heads, case.head_dim), case.dtype),
        "k": kv,
        "v": kv,
        "ragged": {name: array(sizes, jnp.int32) for name, sizes in ragged.items()},
        "first_block": array((), jnp.int32),
    }
    if case.window:
        arguments["window"] = array((), jnp.int32)
    if case.sinks:
        arguments["sinks"] = array((case.num_heads,), jnp.float32)
    if jnp.dtype(case.cache_dtype).itemsize == 1:
        arguments["kv_scales"] = array((2, case.num_kv_heads), jnp.float32)

    def step(kv_pool, arguments):
        work = prepare(
            Ragged(**arguments["ragged"]),
            block_size=case.block_size,
            max_query_len=1 if case.decode_only else tokens,
            backend=backend,
        )
        return paged_attention(
            arguments["q"],
            arguments["k"],
            arguments["v"],
            kv_pool,
            work,
            first_block=arguments["first_block"],
            scale=case.head_dim**-0.5,
            backend=backend,
            window=arguments.get("window"),
            softcap=30.0 if case.softcap else None,
            sinks_N=arguments.get("sinks"),
            kv_scales_2K=arguments.get("kv_scales"),
        )

    pool = array(pool_shape(case, backend), case.cache_dtype)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # names the kernels' target
        check_supported(shape, backend, mesh.devices[0].device_kind)
        traced = jax.jit(step, donate_argnums=0).trace(pool, arguments)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def _table_width(case: Case) -> int:
    return MAX_MODEL_LEN // case.block_size
