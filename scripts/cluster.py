"""Workers on this machine, and the SMG gateway over them: OpenAI and Anthropic HTTP in one command.

    python -m scripts.cluster --config configs/smollm2-135m-cpu.yaml --workers 2

It runs until Ctrl-C, or until one of its processes ends, and leaves none behind.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

READY_SECONDS = 600.0  # for a worker to load its model, or the gateway to find its workers
END_SECONDS = 15.0  # for a process to end by itself
# A conversation stays with its worker. By default SMG sends one hit in eight to the worker that has
# less, to warm it up, where the prompt is computed again.
STAY = ("--worker-warmup-secs", "0", "--worker-warmup-divert-every", "0")
STAY += ("--worker-warmup-thin-ratio", "0")
_ADDRESS = re.compile(
    r" on (\S+:\d+)\. "
)  # in the line that `octavo serve` prints when it is ready
# Becomes the command that follows. On Linux (prctl's PR_SET_PDEATHSIG) that gets SIGTERM even if
# this process is killed.
_DIE_WITH_PARENT = f"""
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})
os.execvp(sys.argv[1], sys.argv[1:])
"""


class ClusterError(RuntimeError):
    """A process of the cluster ended, or was not ready in time; says which and what it printed."""


class Worker(NamedTuple):
    """A worker that serves on `address`, which is host:port."""

    process: Process
    address: str


class Gateway(NamedTuple):
    """A gateway that serves on `url`, which has no path."""

    process: Process
    url: str


class Process:
    """A child, which dies with this process, and the last that it printed."""

    def __init__(self, name: str, command: Sequence[str], echo: bool):
        self.name = name
        self.lines: list[str] = []
        self._printed = threading.Condition()
        self._child = subprocess.Popen(
            [sys.executable, "-c", _DIE_WITH_PARENT, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process, which ends the others in order
        )
        assert self._child.stdout is not None
        self._reader = threading.Thread(
            target=self._read, args=(self._child.stdout, echo), daemon=True
        )
        self._reader.start()

    @property
    def is_running(self) -> bool:
        return self._child.poll() is None

    def wait_for(self, pattern: re.Pattern[str], seconds: float) -> str:
        """The first group of the first line with the pattern. Raises ClusterError."""
        seen = 0
        deadline = time.monotonic() + seconds
        with self._printed:
            while True:
                for line in self.lines[seen:]:
                    if match := pattern.search(line):
                        return match[1]
                seen = len(self.lines)
                self._printed.wait(0.1)
                if not self.is_running or time.monotonic() > deadline:
                    raise ClusterError(self.story())

    def story(self) -> str:
        """What became of it, and the last lines that it printed."""
        how = "still runs" if self.is_running else f"ended with {self._child.returncode}"
        return "\n".join([f"{self.name} {how}; it printed last:", *self.lines[-15:]])

    def ask_to_end(self) -> None:
        """Send it SIGTERM."""
        self._child.terminate()

    def end(self) -> None:
        """Ask it to end, and then make it."""
        for ask in (self.ask_to_end, self._child.kill):
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(END_SECONDS)
                self._reader.join(END_SECONDS)  # it closes the pipe at its end
                return

    def _read(self, output: IO[str], echo: bool) -> None:
        with output:
            for line in output:
                if echo:
                    print(f"[{self.name}] {line}", end="", flush=True)
                with self._printed:
                    self.lines.append(line.rstrip())
                    self._printed.notify_all()


@contextlib.contextmanager
def start_workers(
    commands: Sequence[Sequence[str]], *, echo: bool = False
) -> Iterator[list[Worker]]:
    """Start workers and wait until they serve; end them on the way out.

    Args:
      commands: each starts one that prints the line of `octavo serve` when it is ready.
      echo: show what they print.

    Raises:
      ClusterError: one of them ended, or was not ready in time.
    """
    processes: list[Process] = []
    try:
        for number, command in enumerate(commands, 1):
            processes.append(Process(f"worker {number}", command, echo))
        yield [Worker(each, each.wait_for(_ADDRESS, READY_SECONDS)) for each in processes]
    finally:
        for each in processes:
            each.ask_to_end()
        for each in processes:
            each.end()


@contextlib.contextmanager
def start_gateway(
    smg: str,
    workers: Sequence[Worker],
    *,
    port: int = 0,
    echo: bool = False,
) -> Iterator[Gateway]:
    """Start a gateway over workers and wait until it serves; end it on the way out.

    Args:
      smg: its program.
      workers: that serve.
      port: where it listens on this machine; 0 takes a free one.
      echo: show what it prints.

    Raises:
      ClusterError: it ended, was not ready in time, or its port is taken.
    """
    port = _free_port(port)  # or the answers of whoever has it would pass for the gateway's
    command = [
        *(smg, "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", *(f"grpc://{worker.address}" for worker in workers)),
        *("--policy", "cache_aware", *STAY, "--prometheus-host", "127.0.0.1"),
        *("--prometheus-port", str(_free_port()), "--shutdown-grace-period-secs", "1"),
    ]
    process = Process("gateway", command, echo)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for_gateway(process, url)
        yield Gateway(process, url)
    finally:
        process.end()


def _wait_for_gateway(gateway: Process, url: str) -> None:
    """Until it has found its workers and has their tokenizer: before that, it refuses chats."""
    deadline = time.monotonic() + READY_SECONDS
    while not (_answers(f"{url}/readiness") and _has_tokenizer(url)):
        if not gateway.is_running or time.monotonic() > deadline:
            raise ClusterError(gateway.story())
        time.sleep(0.1)


def _has_tokenizer(url: str) -> bool:
    body = _answers(f"{url}/v1/tokenizers")
    return body is not None and b'"id"' in body


def _answers(url: str) -> bytes | None:
    """What a GET answers, or None if that is an error."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read()
    except OSError:
        return None


def _free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there, or any. Raises ClusterError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what left it may linger
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ClusterError(
                f"port {wanted} can't be had: {error.strerror}; --port takes another, or 0 for a "
                "free one"
            ) from None
        return probe.getsockname()[1]


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return parse


def _until_signal(goes_on: Callable[[], bool]) -> bool:
    """Wait for Ctrl-C or SIGTERM. Returns False if `goes_on` doesn't hold any more."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(0.5):
        if not goes_on():
            return False
    return True


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True, help="of the workers")
    parser.add_argument(
        "--workers", type=_whole_number(1, 64), default=2, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=_whole_number(0, 65535),
        default=30000,
        help="of the gateway; 0: a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--smg",
        default=".venv-cluster/bin/smg",
        help="the gateway's program (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="don't show what they print")
    parser.add_argument("settings", nargs="*", help="of the workers, such as cache.memory=512MiB")
    options = parser.parse_args()
    # The gateway routes by what workers say they have, and both are this user's own.
    settings = ["server.port=0", "server.kv_events=tokens", *options.settings]
    sets = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "engine", "serve", "--config", str(options.config), *sets]
    echo = not options.quiet
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until all is up
    try:
        _free_port(options.port)  # before the workers load their model
        with (
            start_workers([command] * options.workers, echo=echo) as workers,
            start_gateway(options.smg, workers, port=options.port, echo=echo) as gateway,
        ):
            addresses = " and ".join(worker.address for worker in workers)
            print(
                f"The cluster is ready: OpenAI's API on {gateway.url}/v1, Anthropic's on "
                f"{gateway.url}, over workers on {addresses}. Ctrl-C ends it.",
                flush=True,
            )
            processes = [gateway.process, *(worker.process for worker in workers)]
            if _until_signal(lambda: all(each.is_running for each in processes)):
                return 0
            ended = next(each for each in processes if not each.is_running)
            print(ended.story(), file=sys.stderr)
            return 1
    except ClusterError as error:
        print(f"the cluster did not come up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
