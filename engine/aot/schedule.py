"""The regression gate on the compiler's schedule of decodes: bundles for each token of context.

`python -m engine.aot.schedule` compiles the tpu kernel for v6e with the compiler's dumps on and
counts with `engine.aot.bundles`; `--baseline` counts JAX's own kernel the same way. Bundles are
a lower bound on cycles that sees neither memory nor stalls, so they are never called a time.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.aot import bundles
from engine.aot.topologies import AotError, first_lines, one_chip, prepare_environment

TOPOLOGY = "v6e:2x2"
HEAD_DIM = 128
DTYPE_BYTES = 2  # bfloat16
LIMITS = Path(__file__).resolve().parents[2] / "tests" / "data" / "static_schedule.yaml"


class Decode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One decode program and what it may cost: heads are of one chip, blocks are in tokens.

    Attributes:
      max_bundles: for each token of context.
      max_spills: in the loop that multiplies.
    """

    num_heads: int
    num_kv_heads: int
    block_size: int
    max_bundles: float
    max_spills: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads} heads, blocks of {self.block_size}"


def read_limits(path: Path) -> list[Decode]:
    """The programs to count, and their limits.

    Raises:
      AotError: the file is missing or says something else.
    """
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=list[Decode])
    except (OSError, msgspec.DecodeError) as error:
        raise AotError(f"can't read limits from {path}: {error}") from None


class Counted(NamedTuple):
    """A schedule: what a token costs, and the loops it was counted in."""

    cost: bundles.TokenCost
    loops: bundles.Loop


def count(decode: Decode, folder: Path) -> Counted:
    """Compile a decode with the tpu kernel and count; the compiler's dumps must go to `folder`.

    Raises:
      bundles.ScheduleError: the schedule has another form than the kernel's.
    """
    import jax
    import jax.numpy as jnp

    from engine.aot.kernels import Case, compile_case
    from pallas_kernels.paged_attention import tpu_plan

    case = Case(
        num_heads=decode.num_heads,
        num_kv_heads=decode.num_kv_heads,
        head_dim=HEAD_DIM,
        block_size=decode.block_size,
    )
    before = set(folder.iterdir())
    compile_case(case, TOPOLOGY)
    loops = bundles.parse(bundles.kernel_listing(folder, "paged_attention_decode", before))
    with jax.sharding.use_abstract_mesh(one_chip(TOPOLOGY).abstract_mesh):  # for its VMEM
        plan = tpu_plan.Plan(
            num_heads=decode.num_heads,
            num_kv_heads=decode.num_kv_heads,
            width=HEAD_DIM,
            block=decode.block_size,
            dtype=jnp.dtype(case.cache_dtype),
            out_dtype=jnp.dtype(case.dtype),
            tile=0,
        )
        cost = bundles.token_cost(
            loops,
            token_bytes=_token_bytes(decode),
            block_tokens=plan.fetch,
            chunk_tokens=plan.chunk,
        )
    return Counted(cost, loops)


# JAX's kernel leaves its block sizes to a table of measured chips. Its count depends on them: with
# 8 KV heads and pages of 16, blocks of 8 pages take 6.5 bundles with 1 query and 9.1 with 8. These
# are the sizes whose counts, 9.09 and 3.86 (pages of 128), are those that were reported before for
# this kernel, 9.03 and 3.86; so ours are counted as those were.
_JAX_PAGES = 8
_JAX_QUERIES = 8


def count_jax(decode: Decode, folder: Path) -> Counted:
    """The same for `jax.experimental.pallas.ops.tpu.ragged_paged_attention`.

    All of its work on a fetched block, the starts of copies included, is one loop body.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = one_chip(TOPOLOGY)

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    seqs, width = 64, 4096 // decode.block_size
    pool = (seqs * width, decode.block_size, 2 * decode.num_kv_heads, HEAD_DIM)
    arguments = (
        array((seqs, decode.num_heads, HEAD_DIM), jnp.bfloat16),
        array(pool, jnp.bfloat16),
        array((seqs,)),
        array((seqs, width)),
        array((seqs + 1,)),
        array((1,)),
    )
    attend = functools.partial(
        ragged_paged_attention,
        sm_scale=HEAD_DIM**-0.5,
        num_kv_pages_per_block=_JAX_PAGES,
        num_queries_per_block=_JAX_QUERIES,
    )
    before = set(folder.iterdir())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(attend).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    listing = bundles.kernel_listing(folder, "ragged_paged_attention_kernel", before)
    loops = bundles.parse(listing)
    tokens = _JAX_PAGES * decode.block_size
    cost = bundles.token_cost(
        loops, token_bytes=_token_bytes(decode), block_tokens=tokens, chunk_tokens=tokens
    )
    return Counted(cost, loops)


def _token_bytes(decode: Decode) -> int:
    return 2 * decode.num_kv_heads * HEAD_DIM * DTYPE_BYTES


def main(arguments: list[str] | None = None) -> int:
    """Count, print, and compare with the thresholds: 0 if all hold."""
    parser = argparse.ArgumentParser(prog="python -m engine.aot.schedule", description=__doc__)
    parser.add_argument("--limits", type=Path, default=LIMITS, help="a YAML file of programs")
    parser.add_argument("--baseline", action="store_true", help="count JAX's own kernel instead")
    parser.add_argument("--loops", action="store_true", help="print the loop trees too")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of programs, from 0")
    parser.add_argument("--keep", type=Path, help="keep the compiler's listings in this folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            decodes = read_limits(options.limits)
            prepare_environment(dump_to=str(folder))
        except AotError as error:
            print(f"aot: {error}", file=sys.stderr)
            return 2

        import jax  # only once the environment is set

        print(f"bundles for each token of context: decode, bfloat16, {TOPOLOGY.split(':')[0]}")
        failures = 0
        for index, decode in enumerate(decodes):
            if options.only and index not in options.only:
                continue
            try:
                cost, loops = (count_jax if options.baseline else count)(decode, folder)
            except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
                print(f"{decode!s:28} FAILED: {first_lines(error)}", flush=True)
                failures += 1
                continue
            fails = cost.total > decode.max_bundles or cost.spills > decode.max_spills
            failures += fails and not options.baseline
            print(
                f"{decode!s:28} {cost.total:6.3f} (limit {decode.max_bundles}) = attend "
                f"{cost.attend:.3f} + issue {cost.issue:.3f} + wait {cost.wait:.3f} + block "
                f"{cost.block:.3f}; {cost.spills} spills (limit {decode.max_spills})"
                f"{' FAILED' if fails and not options.baseline else ''}",
                flush=True,
            )
            if options.loops:
                print(bundles.show(loops, 1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
