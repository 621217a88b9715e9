"""`octavo serve` whose device fails a step on SIGUSR1, and hangs from one SIGUSR2 to the next.

The faults are put in from outside: the engine itself has no such switch.
"""

from __future__ import annotations

import signal
import sys
import threading

from engine.config_file import load
from engine.runtime.runner import Launched
from engine.serve.run import run_server
from engine.types import StepTokens


class Faults:
    """What the next step's wait does instead of waiting."""

    def __init__(self) -> None:
        self._wait = Launched.wait
        self._num_failures = 0
        self._works = threading.Event()
        self._works.set()

    def install(self) -> None:
        """Take the place of the device's own wait."""
        faults = self

        def wait(self: Launched) -> StepTokens:
            return faults.wait(self)

        Launched.wait = wait
        signal.signal(signal.SIGUSR1, self._fail)
        signal.signal(signal.SIGUSR2, self._hang)

    def wait(self, launched: Launched) -> StepTokens:
        """Hang, fail, or wait as ever."""
        self._works.wait()
        if self._num_failures:
            self._num_failures -= 1
            raise RuntimeError("a failure that was asked for")
        return self._wait(launched)

    def _fail(self, *_: object) -> None:
        self._num_failures += 1

    def _hang(self, *_: object) -> None:
        (self._works.clear if self._works.is_set() else self._works.set)()


if __name__ == "__main__":
    Faults().install()
    _, config, *overrides = sys.argv
    sys.exit(run_server(load(config, [*overrides, "server.http=127.0.0.1:0"])))
