"""A runner's process as `compare` sees it: started, asked, stopped between its turns, measured.

What a process and its descendants take comes from Linux's /proc; elsewhere those figures are None.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.protocol import (
    ProtocolError,
    Request,
    Round,
    decode_reply,
    encode_requests,
)
from engine.bench.figures import MachineFigures
from engine.bench.machine import busy_seconds, peak_rss_bytes

READY_SECONDS = 900.0  # vLLM compiles for minutes on a slow machine
ROUND_SECONDS = 1800.0
END_SECONDS = 10.0
POLL_SECONDS = 0.25  # between looks at the tree's memory
_TAIL_LINES = 25
_PROC = Path("/proc")


class PeerError(ValueError):
    """An engine that can't be measured: says which, why, and what it said last."""


class Child:
    """A runner. Use it as a context; its process and all of its descendants end with it.

    Args:
      name: of the engine, for messages.
      command: starts the runner.
      env: what its environment has beside this process's.
      folder: its working directory, which has `benchmarks`.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], folder: Path):
        self.name = name
        self.version = "?"
        self.peak_rss_bytes: int | None = None
        self._tree_peak = 0
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self._unread = b""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=os.environ | env,
                cwd=folder,
                start_new_session=True,  # Ctrl-C is for us: we end it
            )
        except OSError as error:
            self._stderr.close()
            raise PeerError(f"{name} can't be started: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(gently=kind is None)

    @property
    def pid(self) -> int:
        """Of the runner, which its engine may have more processes below."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until the engine is loaded; sets `version`."""
        self.version = self._reply("ready", READY_SECONDS)["version"]

    def run(self, requests: Sequence[Request]) -> tuple[Round, MachineFigures]:
        """Run a round, and what that took of the machine.

        Raises:
          PeerError: it ended, failed or took too long.
        """
        for pid in descendants(self.pid):
            with contextlib.suppress(OSError):
                (_PROC / f"{pid}/clear_refs").write_text("5")  # peaks count from now on
        self._tree_peak = 0
        meter = TreeMeter(self.pid)
        self._say(encode_requests(list(requests)))
        answers = self._reply("round", ROUND_SECONDS)
        return answers, meter.stop(self._tree_peak or None)

    def pause(self) -> None:
        """Stop all of its processes, so that they take no CPU time whatever they wait for."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def close(self, gently: bool = True) -> None:
        """End it, by closing its input if it is given the time, and by force if need be."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started = descendants(self.pid)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if gently:
            self.resume()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
            self._process.wait()
        for pid in started:  # what it left behind; its session tells it from a reused number
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == self.pid:
                    os.kill(pid, signal.SIGKILL)
        self._process.stdout.close()
        self._stderr.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in descendants(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure("ended before it was asked") from None

    def _reply(self, kind: str, seconds: float) -> Any:
        line = self._line(seconds)
        try:
            reply = decode_reply(line.decode(errors="replace"))
        except ProtocolError as error:
            raise self._failure(f"said what it should not: {error}") from None
        if "error" in reply:
            raise self._failure(f"failed: {reply['error']}")
        if kind not in reply:
            raise self._failure(f"said {next(iter(reply))!r} in the place of {kind!r}")
        return reply[kind]

    def _line(self, seconds: float) -> bytes:
        """The runner's next line; looks at the memory of its tree while it waits."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        end = time.monotonic() + seconds
        looked = 0.0
        while b"\n" not in self._unread:
            if time.monotonic() - looked >= POLL_SECONDS:
                self._look()
                looked = time.monotonic()
            if not select.select([pipe], [], [], POLL_SECONDS)[0]:
                if time.monotonic() > end:
                    raise self._failure(f"said nothing for {seconds:,.0f} s")
                continue
            if not (data := os.read(pipe, 2**20)):
                raise self._failure(f"ended with exit code {self._process.wait()}")
            self._unread += data
        self._look()
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _look(self) -> None:
        """Note the most memory that the tree's processes of now have had, all together."""
        now = sum(filter(None, map(peak_rss_bytes, descendants(self.pid))))
        if now:
            self._tree_peak = max(self._tree_peak, now)
            self.peak_rss_bytes = max(self.peak_rss_bytes or 0, now)

    def _failure(self, what: str) -> PeerError:
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        tail = "\n".join(f"  | {line}" for line in said) or "  | nothing"
        return PeerError(f"{self.name} {what}; the last lines that it printed:\n{tail}")


class TreeMeter:
    """CPU time of a process and its descendants, and of the rest of the machine, from now on."""

    def __init__(self, pid: int):
        self._pid = pid
        self._begin = self._now()

    def stop(self, peak_rss: int | None) -> MachineFigures:
        """The figures since it was made; this process's own time counts for neither."""
        wall, busy, own, ours = (
            None if begin is None or end is None else end - begin
            for begin, end in zip(self._begin, self._now(), strict=True)
        )
        assert wall is not None
        assert ours is not None
        return machine_figures(wall, busy, own, ours, peak_rss)

    def _now(self) -> tuple[float, float | None, float | None, float]:
        return time.perf_counter(), busy_seconds(), tree_seconds(self._pid), time.process_time()


def machine_figures(
    wall: float, busy: float | None, own: float | None, ours: float, peak_rss: int | None
) -> MachineFigures:
    """What a round took, from CPU seconds of the machine, of the engine and of the one who asks."""
    foreign = None
    if busy is not None and own is not None:
        foreign = max(0.0, busy - own - ours) / wall  # ticks of 10 ms may put it just below zero
    return MachineFigures(
        own_cores=None if own is None else own / wall,
        foreign_cores=foreign,
        peak_rss_bytes=peak_rss,
    )


def descendants(root: int) -> list[int]:
    """A process and all that it has started, directly or not, and that are still there."""
    children: dict[int, list[int]] = {}
    for stat in _PROC.glob("[0-9]*/stat"):
        if (fields := _stat(stat)) is not None:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [root]
    for pid in found:  # grows meanwhile
        found += children.get(pid, ())
    return found


def tree_seconds(root: int) -> float | None:
    """CPU seconds of the tree's processes, and of those below them that have ended."""
    return sum_seconds(_stat(_PROC / f"{pid}/stat") for pid in descendants(root))


def sum_seconds(stats: Iterable[Sequence[str] | None]) -> float | None:
    """CPU seconds in some processes' fields; None if there are none (proc_pid_stat(5))."""
    ticks = [sum(map(int, fields[11:15])) for fields in stats if fields is not None]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def _stat(path: Path) -> Sequence[str] | None:
    """The fields after a process's name, so without the first two; None if it is gone."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return None
