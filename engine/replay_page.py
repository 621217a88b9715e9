"""`octavo replay LOG --html FILE`: the pool of a recorded run, step by step, as a page."""

from __future__ import annotations

from pathlib import Path

from engine.core.picture import Frame, take_picture
from engine.core.scheduler import SchedulerState
from engine.dashboard.page import single_file
from engine.dashboard.recording import Recording
from engine.runtime.replay import Replayed, replay


def replay_to_page(log: Path, html: Path, *, check: bool = False) -> Replayed:
    """Replay a log, and write what the pool looked like to a file that opens from a disk.

    Args:
      log, check: see `replay`.
      html: the file to write.

    Raises:
      LogError: see `replay`; then no file is written.
      OSError: the file can't be written.
    """
    recording = Recording("recorded run")
    step = 0

    def on_step(state: SchedulerState, tokens: int, preemptions: int) -> None:
        nonlocal step
        step += 1
        recording.add(step, lambda: Frame(take_picture(state), step, tokens, preemptions))

    seen = replay(log, check=check, on_step=on_step)
    last = Frame(take_picture(seen.state), step, seen.tokens, seen.preemptions)
    recording.add(step, lambda: last, is_last=True)
    page = single_file(log.name, [recording.as_dict()], unit="steps")
    html.write_text(page, encoding="utf-8")
    return seen
