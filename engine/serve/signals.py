"""SIGINT and SIGTERM: the first asks the server to end, the second ends the process at once."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_SECONDS = 0.5  # between looks at whether there is still something to wait for


class StoppedEarly(BaseException):
    """The first signal came while the main thread did what need not be finished."""


class Signals:
    """Takes both signals over while it is entered, in the main thread."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self._may_interrupt = False
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._take) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """The first signal raises StoppedEarly in here, also if it came before."""
        self._may_interrupt = True
        try:
            if self._came.is_set():
                raise StoppedEarly
            yield
        finally:
            self._may_interrupt = False

    def wait(self, is_alive: Callable[[], bool]) -> bool:
        """Wait for the first signal. Returns False if `is_alive` doesn't hold any more instead."""
        while not self._came.wait(_LOOK_SECONDS):
            if not is_alive():
                return False
        return True

    def _take(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._came.is_set():
            end_now(128 + number)
        self._came.set()
        if self._may_interrupt:
            raise StoppedEarly


def end_now(code: int) -> NoReturn:
    """End the process, whatever its threads are stuck in; what was logged is written."""
    with contextlib.suppress(Exception):  # a signal may have come in the middle of such a write
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
