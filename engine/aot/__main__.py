"""`python -m engine.aot`: compile kernels and whole steps for TPUs that aren't there, and report.

Fails on anything that doesn't compile, doesn't fit its chip, copies the KV pool, or schedules
worse than the thresholds. Without a choice it does all three parts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from engine.aot import report
from engine.aot.topologies import GENERATIONS, AotError, prepare_environment

# A config says how many chips it takes, not how they are wired: that depends on where it runs.
# v5p-16 in a file's name counts TensorCores; it has eight chips.
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TARGETS = (
    ("llama3-8b-v5e-8.yaml", "v5e:2x4"),
    ("llama3-8b-v6e-8.yaml", "v6e:2x4"),
    ("llama3-70b-v6e-8.yaml", "v6e:2x4"),
    ("llama3-70b-v5p-16.yaml", "v5p:2x2x2"),
    ("qwen3-8b-v5e-4.yaml", "v5e:2x2"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for: 0 if all of it holds, 1 if not, 2 if it can't be run."""
    parser = argparse.ArgumentParser(prog="python -m engine.aot", description=__doc__)
    parser.add_argument("--kernels", action="store_true", help="the kernel, over its features")
    parser.add_argument("--programs", action="store_true", help="whole steps of configs/")
    parser.add_argument("--schedule", action="store_true", help="bundles for a token of context")
    parser.add_argument("--small", action="store_true", help="a few of each, for `make test`")
    parser.add_argument("--config", type=Path, action="append", default=[], help="a YAML file …")
    parser.add_argument("--topology", action="append", default=[], help="… and its v5e:2x4")
    parser.add_argument("--backend", default="tpu", choices=("tpu", "xla"), help="of attention")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(
            f"argument --jobs: {options.jobs} is not a number of processes; at least 1 is needed"
        )
    if len(options.config) != len(options.topology):
        parser.error("every --config needs a --topology beside it, such as v6e:2x4")
    given = list(zip(options.config, options.topology, strict=True))
    everything = not (options.kernels or options.programs or options.schedule or given)
    try:
        prepare_environment()
    except AotError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2

    from engine.aot import kernels  # with jax, so only once the environment is set

    targets = given
    if not given and (options.programs or everything):
        targets = [(CONFIGS / name, topology) for name, topology in TARGETS]
        targets = targets[:1] if options.small else targets
    tasks: list[report.Task] = [
        (report.program, (path, topology, which, options.backend))
        for path, topology in targets
        for which in (0, 1)
    ]
    if options.kernels or everything:
        cases = kernels.features()[: 1 if options.small else None]
        tasks += [
            (report.kernel, (case, generation.smallest, options.backend))
            for generation in GENERATIONS
            for case in cases
        ]

    start = time.perf_counter()
    counts = {"programs": 0, "kernels": 0, "KV-sized copies": 0, "failures": 0}
    for what, copies, problems, text in report.run(tasks, options.jobs):
        counts[what] += 1
        counts["KV-sized copies"] += copies
        counts["failures"] += bool(problems)
        print("\n".join([text, *(f"  FAILED: {problem}" for problem in problems)]), flush=True)
    if options.schedule or everything:
        print(flush=True)
        # A process of its own: the compiler's dumps are turned on once a process.
        command = [sys.executable, "-m", "engine.aot.schedule"]
        counts["failures"] += subprocess.run(command, check=False).returncode != 0
    summary = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"\naot: {summary}, {time.perf_counter() - start:.0f} s")
    return 1 if counts["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
