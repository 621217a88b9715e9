"""What a command shows while it works; rich is loaded when there is a bar to draw."""

from __future__ import annotations

import sys
from typing import Any


class ProgressBar:
    """A progress bar on a terminal, and one line a task elsewhere; both on standard error."""

    def __enter__(self) -> Any:
        self._task: tuple[str, Any] | None = None
        self._bar: Any = None
        return self._show

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _show(self, what: str, done: int, total: int) -> None:
        if self._task is None or self._task[0] != what:
            self._stop()
            if sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import Progress

                self._bar = Progress(console=Console(stderr=True), transient=True)
                self._bar.start()
                self._task = (what, self._bar.add_task(what, total=total))
            else:
                print(f"{what} …", file=sys.stderr, flush=True)
                self._task = (what, None)
        if self._bar is not None:
            self._bar.update(self._task[1], completed=done, total=total)
        if done >= total:
            self._stop()
            self._task = (what, None)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
