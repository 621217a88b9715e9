"""Frames: changes that add up to the whole, in few bytes; and recordings of them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.picture import Frame, take_picture
from engine.dashboard.frames import encode, runs
from engine.dashboard.recording import KEY_EVERY, Recording
from tests.core.driver import Driver, make_request
from tests.core.test_picture import pictures_of_a_random_run
from tests.dashboard.reader import Reader, expand


@given(st.lists(st.integers(0, 40)))
def test_runs_say_what_the_list_says(ids: list[int]) -> None:
    found = runs(np.array(ids, np.int32))
    assert expand(found) == ids
    assert len(found) <= 2 * len(ids)


def test_a_slab_is_one_run() -> None:
    assert runs(np.arange(7, 107, dtype=np.int32)) == [7, 100]


@pytest.mark.parametrize("seed", range(25))
def test_changes_add_up_to_the_whole_whichever_frames_are_left_out(seed: int) -> None:
    rng = random.Random(seed)
    pictures, _ = pictures_of_a_random_run(seed, 150)
    reader = Reader()
    before = None
    for index, picture in enumerate(pictures):
        if rng.random() < 0.3:
            continue
        frame = Frame(picture, index / 8, 3 * index, index // 5)
        sent = json.loads(json.dumps(encode(frame, None if rng.random() < 0.1 else before)))
        reader.apply(sent)
        reader.check(frame)
        before = frame


def test_a_frame_in_which_nothing_happened_is_small() -> None:
    driver = Driver(num_blocks=1000)
    driver.admit(make_request("a", 60, max_tokens=64), make_request("b", 60, max_tokens=64))
    driver.step()
    frame = Frame(take_picture(driver.state), 1.0, 0, 0)
    assert len(json.dumps(encode(frame, frame))) < 300


def record(num_frames: int, max_frames: int) -> Recording:
    driver = Driver()
    recording = Recording("run", max_frames=max_frames)
    for number in range(num_frames):
        driver.admit(make_request(f"r{number}", 3, max_tokens=2))
        driver.step()
        frame = Frame(take_picture(driver.state), float(number), number, 0)
        recording.add(frame.time, lambda frame=frame: frame, is_last=number == num_frames - 1)
    return recording


def test_a_long_recording_is_thinned_evenly_and_keeps_its_ends() -> None:
    recording = record(1000, max_frames=20)
    times = [frame["time"] for frame in recording.as_dict()["frames"]]
    assert 20 <= len(times) <= 41
    assert (times[0], times[-1]) == (0.0, 999.0)
    gaps = np.diff(times)[:-1]
    assert gaps.min() >= 0.5 * gaps.max()


def test_a_short_recording_keeps_every_frame() -> None:
    recording = record(30, max_frames=20)
    assert [frame["time"] for frame in recording.as_dict()["frames"]] == list(range(30))
    assert recording.num_seen == 30


def test_a_recording_can_be_entered_at_regular_intervals() -> None:
    frames = record(KEY_EVERY * 2 + 5, max_frames=100).as_dict()["frames"]
    assert [index for index, frame in enumerate(frames) if "pool" in frame] == [
        0,
        KEY_EVERY,
        2 * KEY_EVERY,
    ]


def test_frames_are_taken_only_when_they_are_kept() -> None:
    recording = Recording("run", max_frames=4)
    frame = Frame(take_picture(Driver().state), 0.0, 0, 0)
    taken = 0

    def take(time: float) -> Frame:
        nonlocal taken
        taken += 1
        return frame._replace(time=time)

    for number in range(10_000):
        recording.add(number, lambda number=number: take(float(number)))
    assert taken < 100
