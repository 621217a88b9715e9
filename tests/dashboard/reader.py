"""Reads frames as `engine/dashboard/static/model.js` does, in the plainest way."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any

from engine.core.picture import Frame


def document(page: str) -> dict[str, Any]:
    """What a page of one file has in it."""
    packed = re.findall(r'id="recording">([A-Za-z0-9+/=]*)</script>', page)
    assert len(packed) == 1
    return json.loads(gzip.decompress(base64.b64decode(packed[0])))


def recordings(page: str) -> list[dict[str, Any]]:
    """The recordings of a page of one file."""
    return document(page)["pools"]


def expand(runs: list[int]) -> list[int]:
    """first, length, first, length … as the ids themselves."""
    pairs = zip(runs[::2], runs[1::2], strict=True)
    return [block for first, length in pairs for block in range(first, first + length)]


class Reader:
    """Takes frames in, one after the other, and knows what they add up to."""

    def __init__(self) -> None:
        self.running: dict[int, dict[str, Any]] = {}
        self.cached: set[int] = set()
        self.host: set[int] = set()
        self.frame: dict[str, Any] = {}

    def apply(self, frame: dict[str, Any]) -> None:
        """Take in the next frame."""
        if "pool" in frame:
            self.__init__()
        self.frame = frame
        running = {}
        for number, known, computed, preemptions, stays, runs, *rest in frame["running"]:
            old = self.running.get(number, {"table": []})
            assert stays <= len(old["table"])
            facts = (
                dict(zip(("id", "domain", "prompt", "cached"), rest, strict=True)) if rest else old
            )
            running[number] = {
                **facts,
                "known": known,
                "computed": computed,
                "preemptions": preemptions,
                "table": old["table"][:stays] + expand(runs),
            }
        self.running = running
        for mine, (added, removed) in ((self.cached, frame["cached"]), (self.host, frame["host"])):
            assert set(expand(removed)) <= mine
            assert not set(expand(added)) & mine
            mine -= set(expand(removed))
            mine |= set(expand(added))

    def check(self, expected: Frame) -> None:
        """Compare with a whole frame."""
        picture = expected.picture
        tables = picture.running + picture.kept
        assert list(self.running) == [seq.number for seq in tables]
        assert self.frame["num_running"] == len(picture.running)
        for seq in tables:
            assert self.running[seq.number] == {
                "id": seq.request_id,
                "domain": seq.domain,
                "prompt": seq.num_prompt,
                "cached": seq.num_cached,
                "known": seq.num_known,
                "computed": seq.num_computed,
                "preemptions": seq.num_preemptions,
                "table": seq.block_ids.tolist(),
            }
        assert sorted(self.cached) == picture.cached.tolist()
        assert sorted(self.host) == picture.host.tolist()
        frame = self.frame
        assert frame["waiting"] == [list(request) for request in picture.waiting]
        assert (frame["num_waiting"], frame["holding"]) == (picture.num_waiting, picture.holding)
        assert (frame["step"], frame["time"]) == (picture.step, expected.time)
        assert frame["generated"] == expected.num_generated
        assert frame["preemptions"] == expected.num_preemptions
