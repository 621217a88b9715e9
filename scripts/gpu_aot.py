"""Compile the gpu attention kernels for an H100 on a machine that has none: `make gpu-aot`.

Each case is a step of layers scanned over the pool, as the decoder runs them: JAX's CUDA plugin
compiles it to machine code for a device that it knows by description only. Printed are times,
shared memory, registers and spills, and whether the pool is updated in place. A kernel that an
earlier case has compiled is not listed again. Nothing is run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read by Mosaic GPU when it compiles: the assembler's report and what a block takes.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.aot import hlo
from pallas_kernels import paged_attention as pa

DEVICE = "NVIDIA H100 80GB HBM3"
LAYERS = 4
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program. Contexts may be as long as `context`; T == S promises a decode."""

    num_tokens: int = 64
    num_seqs: int = 64
    context: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    num_blocks: int = 8192  # of one layer
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


EVERYTHING = {"window": 1024, "softcap": 30.0, "sinks": True}
PROMPT = {"num_tokens": 2048, "num_seqs": 16}
CASES: dict[str, Case] = {
    "decode": Case(),
    "decode, one KV head": Case(num_heads=8, num_kv_heads=1),
    "decode, head dim 64": Case(head_dim=64),
    "decode, head dim 80, blocks of 256": Case(head_dim=80, block_size=256, num_blocks=512),
    "decode, head dim 256, everything": Case(head_dim=256, num_heads=16, **EVERYTHING),
    "decode, int8, everything": Case(cache_dtype="int8", **EVERYTHING),
    "decode, float8": Case(cache_dtype="float8_e4m3fn"),
    "decode, float8, head dim 256": Case(
        cache_dtype="float8_e4m3fn", head_dim=256, num_heads=16, block_size=64, num_blocks=2048
    ),
    "prompts": Case(**PROMPT),
    "prompts, everything": Case(**PROMPT, **EVERYTHING),
    "prompts, head dim 64, 7 heads a KV head": Case(
        **PROMPT, head_dim=64, num_heads=14, num_kv_heads=2
    ),
    "prompts, head dim 256": Case(**PROMPT, head_dim=256, num_heads=16),
    "prompts, float32 queries, 33 heads a KV head": Case(
        **PROMPT, dtype="float32", num_heads=33, num_kv_heads=1, head_dim=96, num_blocks=32768
    ),
    "prompts, int8": Case(**PROMPT, cache_dtype="int8"),
    "prompts, float8, everything": Case(**PROMPT, cache_dtype="float8_e4m3fn", **EVERYTHING),
}


def h100(description: str | None) -> Mesh:
    """A mesh of one H100, from its description: a text proto, `gpu_device_info { ... }`."""
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=description or plugin_description(), topology="1x1x1"
    )
    return Mesh(np.array(topology.devices[:1]), ("x",))


def plugin_description() -> str:
    """The description of an H100 that the CUDA plugin of jax 0.12 carries."""
    plugin = importlib.util.find_spec("jax_plugins.xla_cuda13")
    if plugin is None or plugin.origin is None:
        raise SystemExit(f"{sys.executable} has no CUDA plugin; see scripts/make_gpu_venv.sh")
    library = next(Path(plugin.origin).parent.glob("*.so")).read_bytes()
    for match in re.finditer(rb"gpu_device_info \{", library):
        text = library[match.start() : library.index(b"\0", match.start())].decode()
        if f'device_description_str: "{DEVICE}"' in text:
            return text
    raise SystemExit(
        f"the CUDA plugin of jax {jax.__version__} does not describe an {DEVICE}; write the "
        "description of a newer one to a file with --describe and name it with --description"
    )


def compile_case(case: Case, mesh: Mesh) -> tuple[jax.stages.Compiled, tuple[int, ...]]:
    """The compiled program, and the shape of its pool.

    Raises:
      ValueError: the kernels refuse the case.
    """
    pa.check_supported(
        pa.Shape(
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            block_size=case.block_size,
            dtype=case.dtype,
            cache_dtype=case.cache_dtype,
        ),
        "gpu",
        DEVICE,
    )
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    tokens, seqs = case.num_tokens, case.num_seqs
    pool = pa.kv_pool_shape(
        num_layers=LAYERS,
        num_blocks=case.num_blocks,
        num_kv_heads=case.num_kv_heads,
        block_size=case.block_size,
        head_dim=case.head_dim,
        backend="gpu",
    )
    ragged = pa.Ragged(
        token_rows=array((tokens,)),
        positions=array((tokens,)),
        query_starts=array((seqs + 1,)),
        kv_lens=array((seqs,)),
        block_tables=array((seqs, case.context // case.block_size)),
    )

    def step(q, k, v, kv_pool, ragged, sinks, kv_scales):
        work = pa.prepare(
            ragged,
            block_size=case.block_size,
            max_query_len=1 if tokens == seqs else tokens,
            backend="gpu",
        )

        def layer(carry, index):
            q, kv_pool = carry
            return pa.paged_attention(
                q,
                k,
                v,
                kv_pool,
                work,
                first_block=index * case.num_blocks,
                scale=case.head_dim**-0.5,
                backend="gpu",
                window=case.window,
                softcap=case.softcap,
                sinks_N=sinks if case.sinks else None,
                kv_scales_2K=kv_scales if case.cache_dtype != "bfloat16" else None,
            ), None

        return jax.lax.scan(layer, (q, kv_pool), jnp.arange(LAYERS))[0]

    heads = (tokens, case.num_kv_heads, case.head_dim)
    arguments = (
        array((tokens, case.num_heads, case.head_dim), case.dtype),
        array(heads, case.dtype),
        array(heads, case.dtype),
        array(pool, case.cache_dtype),
        ragged,
        array((case.num_heads,), "float32"),
        array((2, case.num_kv_heads), "float32"),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step, donate_argnums=3).trace(*arguments)
        return lowered.lower(lowering_platforms=("cuda",)).compile(), pool


@contextlib.contextmanager
def captured_output() -> Iterator[list[str]]:
    """What native code prints to stdout and stderr, as one text, once the block ends."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield texts
        finally:
            for descriptor, copy in enumerate(kept, start=1):
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


def kernels_of(report: str) -> Iterator[str]:
    """One line a kernel, from the assembler's report."""
    for part in report.split("Compiling entry function '")[1:]:
        name = part.partition("_mosaic_gpu")[0]
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores", part)
        if registers and spills:
            ignored = " (setmaxnreg ignored)" if "setmaxnreg' ignored" in report else ""
            yield f"    {name}: {registers[1]} registers, {spills[1]} bytes spilled{ignored}"


def run_case(name: str, case: Case, mesh: Mesh) -> bool:
    """Compile a case and print what came of it; True if all is well."""
    start = time.monotonic()
    try:
        with captured_output() as output:
            compiled, pool = compile_case(case, mesh)
    except Exception as error:  # whatever it is, it is this case's result
        print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
        return False
    seconds = time.monotonic() - start
    shared = max(map(int, re.findall(r"smem_scratch_bytes=(\d+)", output[0])), default=0)
    num_elements = math.prod(pool)
    copies = hlo.pool_copies(
        compiled,
        num_elements=num_elements,
        num_bytes=num_elements * jnp.dtype(case.cache_dtype).itemsize,
        smallest=num_elements // LAYERS,
    )
    verdict = f"FAILED: the pool is copied: {'; '.join(copies)}" if copies else "ok"
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes if memory else 0
    print(
        f"{name}: {seconds:.1f} s, {shared / 1024:.0f} KiB of shared memory a block, "
        f"{temporaries / MIB:.1f} MiB of temporaries, {verdict}"
    )
    print("\n".join(kernels_of(output[0])), flush=True)
    return not copies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--describe", action="store_true", help="print the H100's description")
    parser.add_argument("--description", type=Path, help="a file with it, for jax before 0.12")
    options = parser.parse_args()
    if options.describe:
        print(plugin_description())
        return 0
    only = options.only
    mesh = h100(options.description.read_text() if options.description else None)
    print(f"jax {jax.__version__} for one {mesh.devices.flat[0].device_kind}")
    chosen = {name: case for name, case in CASES.items() if only in name}
    failed = [name for name, case in chosen.items() if not run_case(name, case, mesh)]
    if failed or not chosen:
        print(f"gpu-aot: {len(failed)} of {len(chosen)} cases failed: {', '.join(failed)}")
        return 1
    print(f"gpu-aot: all {len(chosen)} cases compile, with no copy of the pool; nothing was run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
