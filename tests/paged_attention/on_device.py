"""The oracle's cases on the accelerator that is here, without an interpreter.

`python -m tests.paged_attention.on_device` needs jax and NumPy only, no test runner. CI has no
such device; `scripts/gpu_check.sh` and whoever has a TPU VM run it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels import paged_attention as pa
from tests.paged_attention.oracle import FEATURES, Case, bits, check, compiled, make_case, run

# (new tokens, context before): ends before, on and after the edges of blocks and of buffers, an
# empty row, prompts that end inside a tile.
KINDS = [(1, 0), (5, 130), (1, 127), (0, 0), (1, 15), (33, 16), (1, 300), (2, 63), (1, 16)]
MIXES: dict[str, list[tuple[int, int]]] = {
    "all kinds": KINDS,
    "decodes": [(1, length) for length in (0, 15, 16, 17, 63, 64, 127, 128, 129, 500)],
    "long decodes": [(1, 4000), (1, 2), (1, 2047), (0, 0), (1, 3100)],
    "a page first": [(16, 0), (1, 400), (40, 0)],
    "a long prompt": [(300, 0)],
    "a chunk in the middle": [(1, 90), (129, 255), (1, 700)],
    "one token alone": [(1, 0)],
}
SHAPES: tuple[dict[str, Any], ...] = (
    {"head_dim": 128, "ratio": 4, "num_kv_heads": 8, "block_size": 16},
    {"head_dim": 128, "ratio": 8, "num_kv_heads": 1, "block_size": 128},
    {"head_dim": 64, "ratio": 3, "num_kv_heads": 3, "block_size": 64},
    {"head_dim": 64, "ratio": 1, "num_kv_heads": 2, "block_size": 256},
    {"head_dim": 80, "ratio": 5, "num_kv_heads": 2, "block_size": 32},
    {"head_dim": 96, "ratio": 7, "num_kv_heads": 2, "block_size": 16},
    {"head_dim": 256, "ratio": 2, "num_kv_heads": 2, "block_size": 64},
    {"head_dim": 128, "ratio": 2, "num_kv_heads": 2, "block_size": 16, "dtype": "float32"},
)
RANDOM_BATCHES = 40  # of one shape, through one program: what timing and leftovers may spoil


def case_of(rows: list[tuple[int, int]], **options: Any) -> Case:
    """A bfloat16 batch with padding on every side, unless options say otherwise."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "block_size": 16, "head_dim": 64} | options
    width = max(-(-sum(row) // settings["block_size"]) for row in rows)
    if settings["dtype"] == "float32":
        settings.setdefault("pool_dtype", "bfloat16")
    return make_case(
        rows,
        num_tokens=sum(new for new, _ in rows) + 3,
        num_seqs=len(rows) + 2,
        table_width=width + 1,
        **settings,
    )


def cases() -> Iterator[tuple[str, Case]]:
    """Every case by name: shapes, features and mixes of lengths."""
    for shape in SHAPES:
        yield " ".join(f"{name}={value}" for name, value in shape.items()), case_of(KINDS, **shape)
    for name, feature in FEATURES.items():
        yield f"{name}, all kinds", case_of(KINDS, **feature)
    for name in ("window, cap and sinks", "int8 with everything"):
        yield f"{name}, decodes", case_of(MIXES["decodes"], **FEATURES[name])
    for name, rows in MIXES.items():
        yield f"{name}, head dim 128", case_of(rows, head_dim=128, ratio=4)
    for name in ("long decodes", "a chunk in the middle"):
        options = {"window": 200, "sinks": True, "pool_dtype": "int8"}
        yield f"{name}, int8, window, sinks", case_of(MIXES[name], **options)


def random_case(seed: int) -> Case:
    """A random batch; all have one shape."""
    rng = np.random.default_rng(seed)
    rows, left = [], 96
    for _ in range(12):
        drawn = (0, 1, 1, 1, int(rng.integers(2, 60)))[rng.integers(5)]
        new = min(left, drawn)
        rows.append((new, int(rng.integers(0, 640 - new)) if new else 0))
        left -= new
    return make_case(
        rows,
        block_size=16,
        head_dim=128,
        num_kv_heads=2,
        ratio=4,
        dtype="bfloat16",
        num_tokens=96,
        num_seqs=12,
        num_blocks=512,
        table_width=40,
        num_layers=2,
        seed=seed,
    )


def refusal(case: Case, backend: pa.Backend, device_kind: str) -> str | None:
    """Why the backend does not take a case, if it doesn't."""
    shape = pa.Shape(
        num_heads=case.q.shape[1],
        num_kv_heads=case.pool.shape[1],
        head_dim=case.q.shape[2],
        block_size=case.pool.shape[2],
        dtype=case.q.dtype.name,
        cache_dtype=case.pool.dtype.name,
    )
    try:
        pa.check_supported(shape, backend, device_kind)
    except ValueError as error:
        return str(error)
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the cases: 0 if all of them hold, 1 if not."""
    parser = argparse.ArgumentParser(prog="on_device", description=__doc__)
    parser.add_argument("--backend", default="auto", help="tpu, gpu, xla or reference")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--seconds", type=float, default=600, help="start no case after these")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    backend = pa.resolve_backend(options.backend, device.platform, device.device_kind).backend
    print(f"{backend} on {device.device_kind}, jax {jax.__version__}", flush=True)
    end = time.monotonic() + options.seconds
    failed, passed, refused, late = [], 0, 0, 0

    def attempt(name: str, case: Case, program: Any = None) -> None:
        nonlocal passed, refused, late
        reason = refusal(case, backend, device.device_kind)
        if reason is not None:
            refused += 1
            print(f"refused  {name}: {reason}", flush=True)
            return
        if time.monotonic() > end:
            late += 1
            return
        start = time.monotonic()
        try:
            program = program or compiled(backend, decode_only=case.is_decode_only)
            out, pool = run(case, backend, program)
            check(case, out, pool)
            again, _ = run(case, backend, program)
            assert bits(again) == bits(out), "the same step twice gave two results"
        except Exception as error:
            failed.append(name)
            text = " ".join(str(error).split())[:400]
            print(f"FAILED   {name}: {type(error).__name__}: {text}", flush=True)
            return
        passed += 1
        print(f"ok       {name} ({time.monotonic() - start:.1f} s)", flush=True)

    for name, case in cases():
        if options.only in name:
            attempt(name, case)
    program = compiled(backend)
    for seed in range(RANDOM_BATCHES):
        name = f"random batch {seed}"
        if options.only in name:
            attempt(name, random_case(seed), program)
    print(f"{passed} passed, {len(failed)} failed, {refused} refused, {late} not started in time")
    return 1 if failed or late or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
