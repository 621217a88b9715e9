"""What a start spends its time on, part by part, and what it says of it when it is over."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_CLOCK_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", None)


class StartUp:
    """Seconds of a start by part; one part at a time, and each may come again.

    Attributes:
      seconds: of every part that has ended, in the order in which they first began.
      programs: compiled or read from the compile cache, and those of them that were read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self.programs = (0, 0)
        self._clock = clock
        self._part: tuple[str, float] | None = None

    def begin(self, part: str) -> None:
        """End the part before, if any, and begin this one."""
        self.end()
        self.seconds.setdefault(part, 0.0)
        self._part = (part, self._clock())

    def end(self) -> None:
        """End the last part."""
        if self._part is not None:
            part, since = self._part
            self.seconds[part] += self._clock() - since
            self._part = None

    def describe(self, age: float | None = None) -> str:
        """One line for people: the seconds in all, and by part.

        Args:
          age: of the process; what it did before and between the parts is then listed first.
        """
        parts = dict(self.seconds)
        if age is not None:
            parts = {"Python and imports": max(age - sum(parts.values()), 0.0), **parts}
        listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        made, read = self.programs
        return (
            f"started in {sum(parts.values()):.1f} s: {listed}; {read} of {made} programs came "
            "from the compile cache"
        )


def process_age() -> float | None:
    """Seconds since this process began; None where the system doesn't say (proc_pid_stat(5))."""
    if sys.platform != "linux" or _CLOCK_BOOTTIME is None:
        return None
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return time.clock_gettime(_CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
