"""The machine under a benchmark: which one it is, and how busy it was with other things.

Foreign load comes from Linux's /proc; elsewhere those figures are None, never a guess.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine import __version__
from engine.bench.figures import MachineFigures

_ROOT = Path(__file__).resolve().parents[2]
_SHORTEST_SECONDS = 1.0  # /proc counts in ticks of 10 ms, on each core
_SHOWN_PACKAGES = ("jax", "jaxlib", "numpy")


class Meter:
    """CPU load and peak memory between `start` and `stop`.

    Args:
      pid: the process that is measured; by default this one. Another one's memory peak counts
        from its start.
    """

    def __init__(self, pid: int | None = None):
        self._pid = pid
        self._begin: tuple[float, float | None, float | None] = (0.0, None, None)

    def start(self) -> None:
        """Begin to measure."""
        if self._pid is None:
            _reset_peak_rss()
        self._begin = self._now()

    def stop(self) -> MachineFigures:
        """The figures since `start`."""
        wall, busy, own = (
            None if begin is None or end is None else end - begin
            for begin, end in zip(self._begin, self._now(), strict=True)
        )
        assert wall is not None
        foreign = None
        if busy is not None and own is not None and wall >= _SHORTEST_SECONDS:
            foreign = max(0.0, busy - own) / wall  # clock ticks may put it just below zero
        return MachineFigures(
            own_cores=None if own is None else own / wall,
            foreign_cores=foreign,
            peak_rss_bytes=peak_rss_bytes(self._pid),
        )

    def _now(self) -> tuple[float, float | None, float | None]:
        """(wall clock, CPU seconds of the whole machine, those of the process)."""
        own = time.process_time() if self._pid is None else _process_seconds(self._pid)
        if self._pid is not None:
            own = None if own is None else own + time.process_time()  # the client is no stranger
        return time.perf_counter(), busy_seconds(), own


def provenance(benchmark: str, device: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a report begins with: of which benchmark it is, and when, how and where it came about.

    Args:
      benchmark: its name.
      device: from `jax_device`, if one was used.
    """
    return {
        "schema": 1,
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(device),
    }


def peak_rss_bytes(pid: int | None = None) -> int | None:
    """Most resident memory of a process since it started, or since `Meter.start` if it is ours."""
    try:
        for line in Path(f"/proc/{pid or 'self'}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def hardware(device: dict[str, Any] | None = None) -> dict[str, Any]:
    """What this machine is. `device` describes the accelerator, if this process uses one."""
    return {
        "cpu": _cpu_model(),
        "cores": _num_cores(),
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device,
    }


def jax_device() -> dict[str, Any]:
    """The devices that jax uses in this process."""
    import jax

    devices = jax.devices()
    first = devices[0]
    return {"platform": first.platform, "kind": first.device_kind, "count": len(devices)}


def versions() -> dict[str, str]:
    """Versions of what a figure depends on; packages that aren't installed are left out."""
    found = {"octavo": __version__, "python": platform.python_version()}
    for package in _SHOWN_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state(root: Path = _ROOT) -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether tracked files differ from it.

    None if it doesn't run from a checkout: an installed package may lie inside some other one.
    """
    try:
        _git(root, "ls-files", "--error-unmatch", "engine/__init__.py")
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def command_line() -> str:
    """The command that runs, without the machine's paths to it."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def busy_seconds() -> float | None:
    """CPU seconds that all cores were busy, or stolen by another guest of the host (proc(5))."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _process_seconds(pid: int) -> float | None:
    """CPU seconds of a process, all its threads together (proc_pid_stat(5))."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    utime, stime = after_name[11:13]
    return (int(utime) + int(stime)) / os.sysconf("SC_CLK_TCK")


def _reset_peak_rss() -> None:
    """Let VmHWM count from now on (proc_pid_clear_refs(5)); where it can't, it counts on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
