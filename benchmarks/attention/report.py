"""What was found, as lines to read and as JSON to keep."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from benchmarks.attention.ours import Check
from benchmarks.attention.timing import Ceilings, Timing

SCHEMA = 1  # goes up when a field changes its meaning or goes away
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "numpy", "torch", "tokamax")


@dataclasses.dataclass(frozen=True)
class Result:
    """One contestant on one workload. Rates follow from the workload's least bytes and products,
    the same for all contestants."""

    workload: str
    heads: str
    contestant: str
    is_ours: bool
    bytes_moved: int
    flops: int
    timing: Timing | None
    problem: str | None  # why there is no timing
    check: Check | None

    def rates(self, ceilings: Ceilings) -> dict[str, float]:
        """Per second, and as parts of what the device does at best."""
        assert self.timing is not None
        moved, computed = self.bytes_moved / self.timing.median, self.flops / self.timing.median
        return {
            "bytes_per_second": moved,
            "of_copy": moved / ceilings.copy_bytes_per_second,
            "flops_per_second": computed,
            "of_matmul": computed / ceilings.flops_per_second,
        }

    def as_dict(self, ceilings: Ceilings | None) -> dict[str, Any]:
        """Everything, rates too where there are any."""
        rates = self.rates(ceilings) if ceilings and self.timing else {}
        return dataclasses.asdict(self) | rates


def environment() -> dict[str, Any]:
    """What a figure depends on: when, which device, versions, command and commit."""
    device = jax.devices()[0]
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    arguments = " ".join(map(shlex.quote, sys.argv[1:]))
    named = "" if sys.argv[1:2] == ["attention"] else "attention "
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks {named}{arguments}",
        "platform": device.platform,
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": found,
        "commit": _commit(),
    }


def load_meter() -> Any:
    """A started meter of CPU load, by `octavo bench`; None where the engine's packages are not."""
    try:
        from engine.bench.machine import Meter
    except ImportError:
        return None
    meter = Meter()
    meter.start()
    return meter


def describe_environment(found: dict[str, Any]) -> str:
    """The same in a few lines."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    device = found["device"]
    if found["platform"] == "cpu":
        device = f"CPU ({found['processor']})"
    return (
        f"{found['date']}  {device}, Python {found['python']}, {versions}\n"
        f"commit {found['commit'] or 'unknown'}  {found['command']}"
    )


def describe_check(check: Check) -> str:
    """One line."""
    error = "" if check.error is None else f"  error {check.error:.1e}, limit {check.limit:.1e}"
    verdict = "FAILED" if check.failure else "ok"
    reason = f": {check.failure}" if check.failure else ""
    return f"  {verdict:7}{check.contestant:38}{check.what}{error}{reason}"


def describe_ceilings(ceilings: Ceilings) -> str:
    """One line for each."""
    copy, matmul = ceilings.copy, ceilings.matmul
    return (
        f"copy    {ceilings.copy_bytes / 2**20:,.0f} MiB, read and written: "
        f"{ceilings.copy_bytes_per_second / 1e9:,.1f} GB/s {_range(copy)}\n"
        f"matmul  {ceilings.matmul_size} cubed, {ceilings.matmul_dtype}: "
        f"{ceilings.flops_per_second / 1e12:,.2f} TFLOP/s {_range(matmul)}"
    )


def table(results: Sequence[Result], ceilings: Ceilings) -> str:
    """One line a contestant, in the order given."""
    head = ("", "time", "range", "GB/s", "of copy", "TFLOP/s", "of matmul")
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        if result.timing is None:
            rows.append((result.contestant, f"not timed: {result.problem}"))
            continue
        rates = result.rates(ceilings)
        name = result.contestant
        if result.check and result.check.failure:
            name += " (WRONG)"
        rows.append(
            (
                name,
                _time(result.timing.median),
                _range(result.timing),
                f"{rates['bytes_per_second'] / 1e9:,.1f}",
                f"{rates['of_copy']:.0%}",
                f"{rates['flops_per_second'] / 1e12:,.3f}",
                f"{rates['of_matmul']:.0%}",
            )
        )
    full = [row for row in rows if len(row) == len(head)]
    widths = [max(len(row[column]) for row in full) for column in range(len(head))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        if len(row) == len(head):
            cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        else:
            cells.append(row[1])
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def write(path: Path, found: dict[str, Any]) -> None:
    """Keep everything as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, **found}, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is not for JSON")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.3f} ms"


def _range(timing: Timing) -> str:
    return f"[{_time(timing.least)} - {_time(timing.most)}]"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, marked where tracked files differ; None outside of one."""
    if not (_ROOT / ".git").exists():  # a copy may lie inside some other checkout
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
