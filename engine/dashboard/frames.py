"""Pictures as JSON: each frame says what changed since the one before it.

`static/model.js` reads them. A frame that starts afresh is the change from an empty picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.core.picture import Frame, Running

FORMAT = 1


def encode(frame: Frame, before: Frame | None) -> dict[str, Any]:
    """A frame as plain data for JSON.

    Lists of block ids are *runs*: first, length, first, length and so on.

    Args:
      before: the frame that the reader has; None: it has none, or shall forget it.

    Returns:
      `running` has every running sequence in order, and after those `num_running` what is kept
      besides, as [number, tokens known, positions computed,
      preemptions, blocks of its table that stay, runs of those that follow them], and for one that
      the reader has not seen running before also [id, domain, prompt tokens, tokens found in the
      cache]. `cached` and `host` are [runs added, runs removed]. `pool`, in frames that start
      afresh, has the sizes of everything.
    """
    picture = frame.picture
    seen = (
        {}
        if before is None
        else {seq.number: seq for seq in before.picture.running + before.picture.kept}
    )
    nothing = np.zeros(0, np.int32)
    cached = nothing if before is None else before.picture.cached
    host = nothing if before is None else before.picture.host
    change: dict[str, Any] = {
        "time": round(frame.time, 4),
        "step": picture.step,
        "generated": frame.num_generated,
        "preemptions": frame.num_preemptions,
        "holding": picture.holding,
        "num_waiting": picture.num_waiting,
        "waiting": [list(request) for request in picture.waiting],
        "num_running": len(picture.running),
        "running": [_running(seq, seen.get(seq.number)) for seq in picture.running + picture.kept],
        "cached": _changes(cached, picture.cached),
        "host": _changes(host, picture.host),
    }
    if before is None:
        names = ("num_blocks", "block_size", "num_host_slots", "num_slots")
        change["pool"] = {name: getattr(picture, name) for name in names}
    return change


def runs(ids: np.ndarray) -> list[int]:
    """Block ids in any order as first, length, first, length and so on: int[N] to int[2R]."""
    if not len(ids):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(ids) != 1) + 1))
    lengths = np.diff(starts, append=len(ids))
    return np.stack((ids[starts], lengths), axis=1).ravel().tolist()


def _running(seq: Running, before: Running | None) -> list[Any]:
    stays = 0 if before is None else _common(before.block_ids, seq.block_ids)
    change: list[Any] = [
        seq.number,
        seq.num_known,
        seq.num_computed,
        seq.num_preemptions,
        stays,
        runs(seq.block_ids[stays:]),
    ]
    if before is None:
        change += [seq.request_id, seq.domain, seq.num_prompt, seq.num_cached]
    return change


def _common(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many entries two tables have in common at their beginning."""
    length = min(len(ours), len(theirs))
    differs = np.flatnonzero(ours[:length] != theirs[:length])
    return int(differs[0]) if len(differs) else length


def _changes(before: np.ndarray, after: np.ndarray) -> list[list[int]]:
    added = np.setdiff1d(after, before, assume_unique=True)
    removed = np.setdiff1d(before, after, assume_unique=True)
    return [runs(added), runs(removed)]
