"""Files that a server reads at its start and again when they change: who may call, certificates.

They are looked at on a thread of their own, so that no call waits for a disk.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.config_error import ConfigError

log = logging.getLogger("octavo.serve")

LOOK_SECONDS = 2.0
"""Between looks at whether the files have changed."""


class Watched[T]:
    """What was read from files. If they change to what can't be used, the last stays in force.

    Args:
      what: names it in the log.
      paths: the files that it depends on.
      read: reads it; raises ConfigError.
      remind: called with what holds at each look.

    Raises:
      ConfigError: it can't be read now.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        read: Callable[[], T],
        remind: Callable[[T], None] = lambda _: None,
    ):
        self._remind = remind
        self._what = what
        self._paths = tuple(paths)
        self._read = read
        self._seen = self._signature()  # before they are read: a change in between shows later
        self.value = read()
        """The latest that could be used. Replaced in one piece, so any thread may read it."""

    def look(self, *, again: bool = False) -> None:
        """Read the files if they have changed; `again` reads them anyway, and says less if not."""
        signature = self._signature()
        has_changed = signature != self._seen
        if has_changed or again:
            self._seen = signature
            self._read_again(logging.WARNING if has_changed else logging.INFO)
        self._remind(self.value)

    def _read_again(self, level: int) -> None:
        try:
            self.value = self._read()
        except ConfigError as error:
            log.error("%s was not taken up, and what it was before holds: %s", self._what, error)
        else:
            log.log(level, "%s was read again", self._what)

    def _signature(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_file_signature, self._paths))


class Watcher:
    """Looks at files every `LOOK_SECONDS`."""

    def __init__(self, watched: Sequence[Watched[Any]]):
        self._watched = tuple(watched)
        self._wake = threading.Event()
        self._is_stopped = False
        self._again = False
        self._thread = threading.Thread(target=self._run, name="octavo-files", daemon=True)

    def start(self) -> None:
        """Begin to look, if there is anything to look at."""
        if self._watched:
            self._thread.start()

    def look_now(self) -> None:
        """Have all files read again soon. May be called from a signal's handler."""
        self._again = True
        self._wake.set()

    def stop(self) -> None:
        """Look no more."""
        self._is_stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
            if self._is_stopped:
                return
            again, self._again = self._again, False
            for watched in self._watched:
                try:
                    watched.look(again=again)
                except Exception:  # whatever it is, the next change must be seen
                    log.exception("looking at a file failed; what it said before holds")


def refuse_open_to_others(path: Path, what: str, forbidden: int, advice: str) -> None:
    """Refuse a file that other users of this machine may change or read.

    Args:
      path: the file.
      what: it is, such as "the private key".
      forbidden: bits of `stat` that it must not have.
      advice: how to change that.

    Raises:
      ConfigError: it has one of them, or can't be looked at.
    """
    if sys.platform == "win32":  # its permissions are not in these bits
        return
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"can't read {what} {path}: {error.strerror}") from None
    if mode & forbidden:
        raise ConfigError(
            f"{what} {path} has mode {stat.S_IMODE(mode):04o}, so others on this machine could "
            f"misuse it; {advice}"
        )


def _file_signature(path: Path) -> tuple[int, ...] | None:
    """Differs if the file was written or replaced, or may be used by others than before; None if it
    isn't there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    # A time may be too coarse to tell what follows at once, such as what the log has asked for.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_mode
