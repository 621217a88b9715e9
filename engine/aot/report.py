"""The parts of `python -m engine.aot` as tasks for worker processes, and what they print.

jax is imported by the workers alone, which inherit the environment that libtpu needs.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.aot.topologies import AotError, describe

if TYPE_CHECKING:
    from engine.aot.kernels import Case
    from pallas_kernels.paged_attention import Backend


class Outcome(NamedTuple):
    """What a task found: its kind, copies of the KV pool, what must not be, and the report."""

    what: str
    copies: int
    problems: list[str]
    report: str


Task = tuple[Callable[..., Outcome], tuple[Any, ...]]


def run(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """The outcomes in order, from processes that inherit this one's environment."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(tasks) or 1), context) as pool:
        for future in [pool.submit(function, *arguments) for function, arguments in tasks]:
            yield future.result()


def kernel(case: Case, topology: str, backend: Backend) -> Outcome:
    """Compile one case of the kernel."""
    from engine.aot import kernels

    try:
        done = kernels.examine(case, topology, backend)
    except AotError as error:
        return Outcome("kernels", 0, [str(error)], f"{topology} {case}")
    vmem = " + ".join(f"{size / 2**20:.1f}" for size in done.vmem_bytes.values()) or "no"
    report = (
        f"{topology:12} {case!s:72} {done.seconds:5.1f} s, {vmem} MiB of VMEM, "
        f"{done.temp_bytes / 2**20:.1f} MiB of temp"
    )
    problems = [f"KV-sized copy: {copy}" for copy in done.copies]
    return Outcome("kernels", len(done.copies), problems, report)


def program(path: Path, topology: str, which: int, backend: Backend) -> Outcome:
    """Compile the largest decode step (0) or prefill step (1) of a config."""
    from engine.aot import programs
    from engine.config import ConfigError
    from engine.config_file import load
    from engine.weights import WeightsError

    name = f"{path.stem} on {topology}, {('decode', 'prefill')[which]}"
    try:
        step, buckets = programs.step_of(load(path), describe(topology).devices, backend)
        largest = programs.largest_buckets(buckets)
        if which >= len(largest):
            raise AotError(
                "it has no prefill bucket, as none may have more than one token; raise "
                "scheduler.max_step_tokens or buckets.prefill_tokens"
            )
        bucket = largest[which]
        done = programs.compile_program(step, bucket, topology)
    except (AotError, ConfigError, WeightsError) as error:
        return Outcome("programs", 0, [str(error)], name)
    sizes = ", ".join(
        f"{what} {_gib(size)}"
        for what, size in (
            ("weights", done.weight_bytes),
            ("KV", done.kv_bytes),
            ("sampler", done.state_bytes),
            ("temp", done.temp_bytes),
            ("peak", done.peak_bytes),
        )
    )
    vmem = " + ".join(f"{size / 2**20:.1f}" for size in done.vmem_bytes.values()) or "no"
    verdict = "fits" if done.fits else "does not fit"
    report = (
        f"{name}: {bucket.num_tokens} tokens of {bucket.num_seqs} sequences, "
        f"compiled in {done.seconds:.1f} s\n"
        f"  HBM a chip, GiB: {sizes}; {verdict} in {_gib(done.hbm_bytes)}\n"
        f"  {done.num_blocks} blocks, {done.num_blocks_that_fit} would fit; "
        f"{vmem} MiB of VMEM; collectives: {done.collectives}"
    )
    return Outcome("programs", len(done.copies), done.problems, report)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
