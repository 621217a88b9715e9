"""The command line, and the order of things: ceilings, checks, then each workload.

A backend that is wrong, or fails where it said it can run, makes the exit code 1; a rival that
does is reported and no more.
"""

from __future__ import annotations

import argparse
import dataclasses
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention import ours, report
from benchmarks.attention.inputs import Inputs, count_blocks, make_inputs
from benchmarks.attention.ours import BACKENDS, Check
from benchmarks.attention.report import Result
from benchmarks.attention.rivals import RIVALS, DoesNotFit
from benchmarks.attention.timing import (
    Ceilings,
    Run,
    Timing,
    available_bytes,
    describe,
    measure,
    measure_ceilings,
)
from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention.workloads import HEADS, WORKLOADS, Heads, Workload

DTYPES = ("bfloat16", "float32")
MODELS = ("llama3-8b", "smollm2-135m", "tiny")  # of engine_step, which imports the engine
QUICK_SCALE, QUICK_ROUNDS, QUICK_SECONDS = 1 / 16, 3, 0.1
MAX_LAYERS = 32
_BLOCK_SIZE = {"tpu": 128, "gpu": 64}  # elsewhere 16, the engine's default


Keep = Callable[[dict[str, Any]], None]  # takes in what was found


def parser() -> argparse.ArgumentParser:
    """All options; `python -m benchmarks attention --help` shows them."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks attention",
        description="Check every attention backend that runs on this device against the "
        "reference, then time them and what others have over named workloads.",
    )
    add = found.add_argument
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    add("--workload", choices=WORKLOADS, default=list(WORKLOADS), **several)
    add("--heads", choices=HEADS, default=list(HEADS), **several)
    add("--backend", choices=BACKENDS, default=list(BACKENDS), **several)
    add("--no-rivals", action="store_true", help="ours alone")
    add("--scale", type=float, help="lengths times this, such as 0.1; by default 1")
    add("--quick", action="store_true", help=f"--scale {QUICK_SCALE} and short rounds, for CPUs")
    add("--rounds", type=int, help="of all contestants in turn; 0 only checks; by default 7")
    add("--seconds", type=float, help="a contestant takes in a round, about; by default 0.3")
    add("--block-size", type=int, help="tokens; by default 128 on TPUs, 64 on GPUs, else 16")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of queries and output")
    add("--cache-dtype", choices=pa.CACHE_DTYPES, help="of the pool; by default as --dtype")
    add("--seed", type=int, help="of all inputs; by default drawn, and printed")
    add("--copy-mib", type=int, help="array that is copied; by default 1024, 256 on CPUs")
    add("--matmul-size", type=int, help="of the product; by default 8192, 1024 on CPUs")
    add("--engine-step", action="store_true", help="the engine's decode step instead")
    add("--model", choices=MODELS, default="llama3-8b", help="of --engine-step")
    add("--sequences", type=int, default=64, help="of --engine-step")
    add("--context", type=int, default=1024, help="tokens, of --engine-step")
    add("--json", type=Path, metavar="FILE", help="where everything is kept")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for: 0 if every check holds, 1 if not, 2 if it can't be run."""
    given = parser().parse_args(arguments)
    on_cpu = jax.default_backend() == "cpu"
    given.scale = given.scale or (QUICK_SCALE if given.quick else 1.0)
    given.rounds = (QUICK_ROUNDS if given.quick else 7) if given.rounds is None else given.rounds
    given.seconds = given.seconds or (QUICK_SECONDS if given.quick else 0.3)
    given.block_size = given.block_size or _BLOCK_SIZE.get(jax.default_backend(), 16)
    given.cache_dtype = given.cache_dtype or given.dtype
    given.seed = secrets.randbits(31) if given.seed is None else given.seed
    given.copy_mib = given.copy_mib or (256 if on_cpu else 1024)
    given.matmul_size = given.matmul_size or (1024 if on_cpu else 8192)
    try:
        return _run(given)
    except ValueError as error:
        print(f"benchmarks attention: {error}")
        return 2


def _run(given: argparse.Namespace) -> int:
    environment = report.environment()
    print(report.describe_environment(environment))
    print(f"seed {given.seed}; {given.rounds} rounds of {given.seconds} s each")
    if given.scale != 1 and not given.engine_step:
        print(f"SCALED: every length times {given.scale:g}; not the workloads that names promise")
    options = {name: _as_json(value) for name, value in vars(given).items()}
    kept: dict[str, Any] = {**environment, "options": options}

    def keep(found: dict[str, Any]) -> None:
        """As soon as it is known: a run that is cut off leaves what it had."""
        kept.update(found)
        if given.json:
            report.write(given.json, kept)

    meter = report.load_meter()
    ceilings = None
    if given.rounds or given.engine_step:
        ceilings = measure_ceilings(
            copy_bytes=given.copy_mib * 2**20,
            matmul_size=given.matmul_size,
            rounds=max(given.rounds, 3),
            seconds=given.seconds,
        )
        print(report.describe_ceilings(ceilings))
        keep({"ceilings": ceilings})
    if given.engine_step:
        assert ceilings is not None
        failures, last = _engine_step(given, ceilings, keep)
    else:
        failures, last = _attention(given, ceilings, keep)
    foreign = None if meter is None else meter.stop().foreign_cores
    if foreign is not None:
        print(f"others kept {foreign:.2f} cores busy meanwhile")
    keep({"failures": failures, "summary": last, "foreign_cores": foreign})
    print(last)
    return 1 if failures else 0


def _engine_step(
    given: argparse.Namespace, ceilings: Ceilings, keep: Keep
) -> tuple[list[str], str]:
    """Measure the decode step; (failures, the last line)."""
    if given.rounds < 1:
        raise ValueError("--engine-step measures: --rounds must be at least 1")
    from benchmarks.attention import engine_step  # with flax and msgspec, which kernels don't need

    backend = given.backend[0] if len(given.backend) == 1 else "auto"
    step = engine_step.run(
        given.model,
        ceilings,
        backend=backend,
        sequences=given.sequences,
        context=given.context,
        block_size=given.block_size,
        cache_dtype=given.cache_dtype,
        seed=given.seed,
        rounds=given.rounds,
        seconds=given.seconds,
    )
    print(step)
    failures = [step.failure] if step.failure else []
    measured = dataclasses.asdict(step) | {"ratio": step.ratio, "target": engine_step.TARGET}
    keep({"engine_step": measured})
    verdict = f"FAILED: {step.failure}" if step.failure else "the step ran and its tokens are sane"
    return failures, f"{verdict}; ratio {step.ratio:.2f}"


def _attention(
    given: argparse.Namespace, ceilings: Ceilings | None, keep: Keep
) -> tuple[list[str], str]:
    """Check and time; (failures, the last line)."""
    checks: list[Check] = []
    results: list[Result] = []
    platform = jax.default_backend()
    absent = {} if given.no_rivals else {r.name: r.absence(platform) for r in RIVALS}
    rivals = [rival for rival in RIVALS if absent.get(rival.name, "") is None]
    absent = {name: reason for name, reason in absent.items() if reason}
    for name, reason in absent.items():
        print(f"without {name}: {reason}")
    refused: dict[str, str] = {}
    for heads in (HEADS[name] for name in given.heads):
        backends = _backends(given, heads, refused)
        print(
            f"\n{heads.name}: {heads.num_heads} query and {heads.num_kv_heads} KV heads of "
            f"{heads.head_dim}, blocks of {given.block_size}, {given.dtype}, cache "
            f"{given.cache_dtype}"
        )
        awkward = ours.check_awkward(
            heads,
            backends,
            seed=given.seed,
            block_size=given.block_size,
            dtype=given.dtype,
            cache_dtype=given.cache_dtype,
        )
        _show(awkward)
        checks += awkward
        for workload in (WORKLOADS[name].scaled(given.scale) for name in given.workload):
            found = _measure_workload(given, workload, heads, backends, rivals)
            checks += [result.check for result in found if result.is_ours and result.check]
            results += found
            if ceilings is not None:
                print(report.table(found, ceilings))
            rows = [result.as_dict(ceilings) for result in results]
            keep({"absent": absent, "refused": refused, "checks": checks, "results": rows})
    failures = [f"{c.contestant}, {c.what}: {c.failure}" for c in checks if c.failure]
    failures += [
        f"{r.contestant}, {r.heads} {r.workload}: {r.problem}"
        for r in results
        if r.is_ours and r.problem and not r.problem.startswith(_NOT_TRIED)
    ]
    wrong = [r.contestant for r in results if not r.is_ours and r.check and r.check.failure]
    held = sum(check.failure is None for check in checks)
    last = f"{held} of {len(checks)} checks hold"
    if failures:
        last = "FAILED: " + "; ".join(failures[:3]) + f"; {last}"
    if wrong:
        last += f"; rivals with other results: {', '.join(sorted(set(wrong)))}"
    return failures, last


def _backends(given: argparse.Namespace, heads: Heads, refused: dict[str, str]) -> list[pa.Backend]:
    """Those asked for that run here. Reasons why others don't are added to `refused`, and shown
    once."""
    found = []
    for backend in given.backend:
        reason = ours.refusal(backend, heads, given.block_size, given.dtype, given.cache_dtype)
        if reason is None:
            found.append(backend)
        elif refused.get(backend) != reason:
            refused[backend] = reason
            print(f"without {backend}: {reason}")
    return found


_NOT_TRIED = "not tried: "


def _measure_workload(
    given: argparse.Namespace,
    workload: Workload,
    heads: Heads,
    backends: Sequence[pa.Backend],
    rivals: Sequence[Any],
) -> list[Result]:
    """Check every contestant on one workload, then time those that ran, in turn."""
    layer = workload_bytes(workload, heads, given.block_size, given.cache_dtype)
    layers = max(1, min(MAX_LAYERS, round(given.copy_mib * 2**20 / layer)))
    available = available_bytes(jax.devices()[0])
    needed = (len(backends) + 2) * layers * layer
    inputs = make_inputs(
        workload,
        heads,
        seed=given.seed,
        block_size=given.block_size,
        dtype=given.dtype,
        cache_dtype=given.cache_dtype,
        num_layers=layers,
    )
    what = f"{heads.name} {workload.name}"
    tokens = workload.num_tokens
    print(
        f"\n{what}: {len(workload.rows)} rows, {tokens} tokens, context {min(workload.kv_lens)} "
        f"to {max(workload.kv_lens)}; {inputs.bytes_moved / 1e6:,.1f} MB, "
        f"{workload.flops(heads) / 1e9:,.2f} GFLOP; pool of {layers} layers, "
        f"{layers * layer / 2**20:,.0f} MiB"
    )

    def result(name: str, is_ours: bool, check: Check | None, problem: str | None) -> Result:
        return Result(
            workload=workload.name,
            heads=heads.name,
            contestant=name,
            is_ours=is_ours,
            bytes_moved=inputs.bytes_moved,
            flops=workload.flops(heads),
            timing=None,
            problem=problem,
            check=check,
        )

    if available is not None and needed > available:
        problem = (
            f"{_NOT_TRIED}needs {needed / 2**30:.1f} GiB of the {available / 2**30:.1f} that are "
            "free; take a smaller --scale or --copy-mib"
        )
        return [result(name, True, None, problem) for name in backends]
    sample = ours.sampled_tokens(inputs)
    expected = ours.expected_outputs(inputs, sample)
    found: list[Result] = []
    runs: dict[str, Run] = {}
    for backend in backends:
        gathered = ours.reference_bytes(inputs)
        if backend == "reference" and gathered > ours.REFERENCE_BYTES:
            problem = f"{_NOT_TRIED}it would gather {gathered / 2**30:.1f} GiB of context"
            found.append(result(backend, True, None, problem))
            continue
        try:
            run = ours.contestant(inputs, backend)
            check = ours.check_run(what, inputs, backend, run, sample, expected)
        except Exception as error:
            found.append(result(backend, True, None, describe(error)))
            continue
        runs[backend] = run
        found.append(result(backend, True, check, None))
    for rival in rivals:
        found.append(_try_rival(rival, inputs, what, sample, expected, runs, result))
    _show([r.check for r in found if r.check])
    if not given.rounds:
        return found
    timings = measure(runs, rounds=given.rounds, seconds=given.seconds)
    return [_timed(r, timings.get(r.contestant)) for r in found]


def _try_rival(
    rival: Any,
    inputs: Inputs,
    what: str,
    sample: Any,
    expected: Any,
    runs: dict[str, Run],
    result: Callable[..., Result],
) -> Result:
    """One rival's first run; it joins `runs` if it got through."""
    try:
        run, outputs = rival.make(inputs)
        run(1)
        check = ours.compare(what, rival.name, outputs()[sample], expected, ours.precision(inputs))
    except DoesNotFit as reason:
        return result(rival.name, False, None, f"{_NOT_TRIED}{reason}")
    except Exception as error:
        return result(rival.name, False, None, describe(error))
    runs[rival.name] = run
    return result(rival.name, False, check, None)


def workload_bytes(workload: Workload, heads: Heads, block_size: int, cache_dtype: str) -> int:
    """Bytes of one layer of the pool, without a backend's padding."""
    elements = heads.num_kv_heads * block_size * 2 * heads.head_dim
    return count_blocks(workload, block_size) * elements * jnp.dtype(cache_dtype).itemsize


def _timed(result: Result, timing: Timing | str | None) -> Result:
    if isinstance(timing, str):
        return dataclasses.replace(result, problem=timing)
    return dataclasses.replace(result, timing=timing)


def _show(checks: Sequence[Check]) -> None:
    for check in checks:
        print(report.describe_check(check))


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
