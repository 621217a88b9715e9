"""A run as a list of frames, thinned as it goes on, so that its length doesn't matter.

The page shows one recording or several side by side, on one slider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.core.picture import Frame
from engine.dashboard.frames import encode

MAX_FRAMES = 400
KEY_EVERY = 25
"""Frames from one that starts afresh to the next: a slider that jumps reads half as many."""

_MAX_BLOCKS = 2**24  # in the frames of a recording that is being made: they take memory


class Recording:
    """Frames of one pool, evenly spread over its time.

    All are kept until there are twice `max_frames`; then those that are too close to the one
    before them are dropped, and so on.
    """

    def __init__(self, name: str, max_frames: int = MAX_FRAMES):
        self.name = name
        self.max_frames = max_frames
        self.num_seen = 0
        self._frames: list[Frame] = []
        self._interval = 0.0

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, time: float, take: Callable[[], Frame], *, is_last: bool = False) -> None:
        """Take a frame if it is time for one, or if it is the last.

        Args:
          time: of the frame, not before that of the one before.
          take: takes it; called if it is needed.
        """
        self.num_seen += 1
        if self._frames and not is_last and time < self._frames[-1].time + self._interval:
            return
        frame = take()
        if not self._frames:
            self.max_frames = max(2, min(self.max_frames, _MAX_BLOCKS // frame.picture.num_blocks))
        self._frames.append(frame)
        if len(self._frames) >= 2 * self.max_frames and not is_last:
            self._interval = (time - self._frames[0].time) / self.max_frames
            self._thin()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        frames = []
        for index, frame in enumerate(self._frames):
            before = None if index % KEY_EVERY == 0 else self._frames[index - 1]
            frames.append(encode(frame, before))
        return {"name": self.name, "num_seen": self.num_seen, "frames": frames}

    def _thin(self) -> None:
        kept = self._frames[:1]
        for frame in self._frames[1:]:
            if frame.time >= kept[-1].time + self._interval:
                kept.append(frame)
        self._frames = kept
