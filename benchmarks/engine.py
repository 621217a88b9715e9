"""The named workloads, each through a freshly loaded engine: the shapes that get compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine import bench
from engine.bench import WorkloadError

WORKLOADS = Path(__file__).resolve().parent / "workloads"


def run(
    config: Path, overrides: tuple[str, ...], names: Sequence[str], *, repeat: int, folder: Path
) -> int:
    """Measure the throughput of workloads; returns 1 if a request of any of them failed.

    Args:
      config, overrides: as `octavo bench throughput` takes them.
      names: of files in `WORKLOADS`, without their ending.
      repeat: runs that count.
      folder: where each workload's report goes, as `engine-NAME.json`.
    """
    known = sorted(path.stem for path in WORKLOADS.glob("*.jsonl"))
    for name in names:
        if name not in known:
            raise WorkloadError(f"there is no workload {name!r}; known: {', '.join(known)}")
    codes = [
        bench.throughput(
            config,
            overrides=overrides,
            workload=WORKLOADS / f"{name}.jsonl",
            repeat=repeat,
            output=folder / f"engine-{name}.json",
        )
        for name in names
    ]
    return max(codes)
