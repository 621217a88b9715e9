"""The disk tier gives a key's block bit for bit or nothing: over restarts, kills and full disks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from engine.runtime.block_file import PUBLIC_TAG, BlockLayout, Miss
from engine.runtime.disk_tier import DiskTier
from engine.runtime.figures import TierCounts
from engine.runtime.flushed_tags import FlushedTags
from tests.conftest import ROOT
from tests.runtime import disk_tier_writers

LAYOUT = BlockLayout((2, 1, 4, 6), "bfloat16", "weights")
OTHER = BlockLayout((2, 1, 4, 6), "bfloat16", "other weights")
PLENTY = 1000 * LAYOUT.file_bytes
KEYS = [bytes([number]) * 32 + bytes([1 + number // 4]) * 8 for number in range(16)]  # of 4 tags


def contents(key: bytes, layout: BlockLayout = LAYOUT) -> np.ndarray:
    """The one right block of a key, another for each layout."""
    seed = [*key, *layout.fingerprint.encode()]
    bits = np.random.default_rng(seed).integers(256, size=layout.num_bytes, dtype=np.uint8)
    return bits.view(layout.dtype).reshape(layout.shape)


def same(block: np.ndarray | None, key: bytes, layout: BlockLayout = LAYOUT) -> bool:
    """Whether a block is that of the key, in bits, shape and dtype; NaNs compare as bits."""
    right = contents(key, layout)
    return (
        block is not None
        and (block.shape, block.dtype) == (right.shape, right.dtype)
        and block.tobytes() == right.tobytes()
    )


Open = Callable[..., DiskTier]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the tier's folder will be."""
    return tmp_path / "blocks"


@pytest.fixture
def open_tier(folder: Path) -> Iterator[Open]:
    """Opens tiers on the folder, and closes them after the test."""
    tiers = []

    def open_one(max_bytes: int = PLENTY, layout: BlockLayout = LAYOUT, **options: Any) -> DiskTier:
        tiers.append(DiskTier(folder, max_bytes, layout, **options))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        tier.close()


def fill(tier: DiskTier, keys: list[bytes] = KEYS) -> None:
    """Put the right blocks and wait until they are files."""
    dropped = tier.counts().dropped
    for key in keys:
        assert tier.put(key, contents(key, tier.layout))
    assert tier.flush(30)
    assert tier.counts().dropped == dropped


def present(tier: DiskTier) -> list[int]:
    """Which of the keys the tier says it has, by number."""
    return [number for number, key in enumerate(KEYS) if key in tier]


def files(folder: Path, pattern: str = "*.blk") -> list[Path]:
    """The block files in the folder."""
    return sorted(folder.glob(f"??/{pattern}"))


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; pytest's time limit ends a test that waits in vain."""
    while not condition():
        time.sleep(0.001)


def survey_now(tier: DiskTier) -> None:
    """Let the tier look through its folder here and now, after the one of its start."""
    tier._survey_if_due()
    tier._bytes_to_survey = 0
    tier._survey_if_due()


def file_of(folder: Path, key: bytes) -> Path:
    """The one file of a key."""
    [path] = files(folder, f"{key.hex()}.*.blk")
    return path


class Gate:
    """Stands in for os.write: holds writers up while it is closed, as it is at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.arrived = threading.Event()
        self._opened = threading.Event()
        self._write = os.write
        monkeypatch.setattr(os, "write", self._wait)

    def open(self) -> None:
        """Let all pass, from now on."""
        self._opened.set()

    def close(self) -> None:
        """Hold up whoever comes from now on."""
        self.arrived.clear()
        self._opened.clear()

    def _wait(self, descriptor: int, data: memoryview) -> int:
        self.arrived.set()
        assert self._opened.wait(60)
        return self._write(descriptor, data)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate that is closed until the test opens it or ends."""
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


# What it is for


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_a_block_comes_back_bit_for_bit(open_tier: Open, dtype: str) -> None:
    layout = BlockLayout((3, 2, 4, 10), dtype, "weights")
    tier = open_tier(layout=layout)
    fill(tier)
    for key in KEYS:
        block = tier.get(key)
        assert same(block, key, layout)
        assert block is not None
        assert not block.flags.writeable
    counts = tier.counts()
    assert (counts.hits, counts.written, counts.misses) == (16, 16, {})
    assert counts.bytes_written == counts.bytes_read == 16 * layout.num_bytes
    assert counts.num_files == 16
    assert counts.num_bytes == 16 * layout.file_bytes


def test_a_restart_finds_the_folder_warm(open_tier: Open) -> None:
    first = open_tier()
    fill(first)
    assert first.close()
    second = open_tier()
    assert present(second) == list(range(16))
    assert all(same(second.get(key), key) for key in KEYS)
    assert bytes(39) + b"\xff" not in second


def test_close_writes_what_waits(open_tier: Open) -> None:
    first = open_tier()
    for key in KEYS:
        first.put(key, contents(key))
    assert first.close(30)
    assert present(open_tier()) == list(range(16))


def test_a_block_is_there_before_it_is_written(open_tier: Open, gate: Gate) -> None:
    tier = open_tier()
    assert tier.put(KEYS[0], contents(KEYS[0]))
    assert KEYS[0] in tier
    assert same(tier.get(KEYS[0]), KEYS[0])
    assert tier.counts().queued_bytes == LAYOUT.num_bytes


def test_a_block_in_strange_memory_order_is_written_as_it_reads(open_tier: Open) -> None:
    tier = open_tier()
    tier.put(KEYS[0], np.asfortranarray(contents(KEYS[0])))
    tier.put(KEYS[1], np.repeat(contents(KEYS[1]), 2, axis=3)[..., ::2])
    assert tier.flush(30)
    assert same(tier.get(KEYS[0]), KEYS[0])
    assert same(tier.get(KEYS[1]), KEYS[1])


def test_what_exceeds_the_queue_is_dropped_and_counted(open_tier: Open, gate: Gate) -> None:
    tier = open_tier(queue_bytes=4 * LAYOUT.num_bytes - 1)
    assert [tier.put(key, contents(key)) for key in KEYS[:5]] == [True] * 3 + [False] * 2
    assert present(tier) == [0, 1, 2]
    gate.open()
    assert tier.flush(30)
    assert tier.counts().written == 3
    assert tier.counts().dropped == 2
    assert tier.put(KEYS[4], contents(KEYS[4])), "there is room again"


def test_the_same_block_is_written_once(open_tier: Open, gate: Gate) -> None:
    tier = open_tier()
    assert tier.put(KEYS[0], contents(KEYS[0]))
    assert tier.put(KEYS[0], contents(KEYS[0]))
    gate.open()
    assert tier.flush(30)
    assert tier.put(KEYS[0], contents(KEYS[0]))
    assert tier.flush(30)
    assert tier.counts().written == 1


class Late:
    """A block that can tell who read it, as one in a device's memory might be."""

    def __init__(self, block: np.ndarray):
        self.shape, self.dtype, self.nbytes = block.shape, block.dtype, block.nbytes
        self._block = block
        self.readers: set[str] = set()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.readers.add(threading.current_thread().name)
        return self._block


def test_a_block_is_read_by_the_thread_that_writes_it(open_tier: Open) -> None:
    tier = open_tier()
    block = Late(contents(KEYS[0]))
    assert tier.put(KEYS[0], block)
    assert tier.flush(30)
    assert block.readers
    assert all(name.startswith("disk-tier-write") for name in block.readers)
    assert same(tier.get(KEYS[0]), KEYS[0])


def test_wrong_shapes_dtypes_and_keys_are_refused(open_tier: Open) -> None:
    tier = open_tier()
    block = contents(KEYS[0])
    with pytest.raises(ValueError, match=r"bfloat16\[2, 1, 4, 6\], not bfloat16\[2, 4, 6\]"):
        tier.put(KEYS[0], block[:, 0])
    with pytest.raises(ValueError, match=r"not float32\[2, 1, 4, 6\]"):
        tier.put(KEYS[0], block.astype(np.float32))
    for use in (lambda: tier.put(b"short", block), lambda: tier.get(b""), lambda: b"" in tier):
        with pytest.raises(ValueError, match=r"a block key has 40 bytes, not [05]"):
            use()


def test_limits_below_one_block_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes is 100, but must be at least 228 for"):
        DiskTier(folder, 100, LAYOUT)
    with pytest.raises(ValueError, match="queue_bytes is 95, but must be at least 96"):
        DiskTier(folder, PLENTY, LAYOUT, queue_bytes=95)
    with pytest.raises(ValueError, match="num_readers is 0"):
        DiskTier(folder, PLENTY, LAYOUT, num_readers=0)
    assert not folder.exists()


# Fetching


def test_a_fetch_ends_at_the_first_miss(open_tier: Open) -> None:
    tier = open_tier(num_readers=3)
    fill(tier, KEYS[:9] + KEYS[10:])
    blocks = tier.fetch(KEYS).result(30)
    assert len(blocks) == 9
    assert all(map(same, blocks, KEYS))
    assert tier.fetch(KEYS[9:]).result(30) == []
    assert tier.fetch([]).result(30) == []
    assert all(map(same, tier.fetch(KEYS[10:]).result(30), KEYS[10:]))
    assert tier.counts().misses == {Miss.ABSENT: 2}


def test_a_fetch_reads_nothing_behind_a_miss_that_it_knows_of(open_tier: Open) -> None:
    tier = open_tier(num_readers=1)
    fill(tier, KEYS[:2] + KEYS[3:])
    assert len(tier.fetch(KEYS).result(30)) == 2
    assert tier.counts().hits == 2
    assert tier.counts().misses == {Miss.ABSENT: 1}


def test_a_fetch_can_be_cancelled(open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(num_readers=1)
    fill(tier)
    reading, go_on, get = threading.Event(), threading.Event(), tier.get

    def slow_get(key: bytes) -> np.ndarray | None:
        reading.set()
        assert go_on.wait(30)
        return get(key)

    monkeypatch.setattr(tier, "get", slow_get)
    first, second = tier.fetch(KEYS), tier.fetch(KEYS[:2])
    assert reading.wait(30)
    assert first.cancel()
    go_on.set()
    assert len(second.result(30)) == 2, "the threads go on to the next fetch"
    assert tier.counts().hits == 3


def test_an_error_while_fetching_reaches_whoever_waits(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()

    def broken(key: bytes) -> np.ndarray | None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(tier, "get", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        tier.fetch(KEYS).result(30)


# Room


def test_the_least_recently_used_block_goes_first(open_tier: Open, folder: Path) -> None:
    tier = open_tier(max_bytes=5 * LAYOUT.file_bytes, num_writers=1)
    fill(tier, KEYS[:5])
    assert same(tier.get(KEYS[0]), KEYS[0])
    tier.put(KEYS[2], contents(KEYS[2]))  # is there already: counts as a use
    fill(tier, KEYS[5:7])
    assert present(tier) == [0, 2, 4, 5, 6]
    assert len(files(folder)) == 5
    assert tier.counts().evicted == 2
    assert tier.get(KEYS[1]) is None


def test_the_order_of_use_outlives_a_restart(open_tier: Open, folder: Path) -> None:
    first = open_tier()
    fill(first, KEYS[:5])
    for age, number in enumerate([3, 1, 0, 4, 2]):
        os.utime(file_of(folder, KEYS[number]), (1000 - age, 1000 - age))
    assert same(first.get(KEYS[2]), KEYS[2])  # the oldest is now the youngest
    first.close()
    second = open_tier(max_bytes=5 * LAYOUT.file_bytes, num_writers=1)
    fill(second, KEYS[5:7])
    assert present(second) == [1, 2, 3, 5, 6]


def test_a_lower_limit_is_kept_from_the_start(open_tier: Open, folder: Path) -> None:
    fill(first := open_tier())
    first.close()
    tier = open_tier(max_bytes=3 * LAYOUT.file_bytes, num_writers=1)
    fill(tier, [bytes(39) + b"\xff"])
    assert len(files(folder)) == 3


def test_the_limit_holds_with_several_writers(open_tier: Open, folder: Path) -> None:
    tier = open_tier(max_bytes=3 * LAYOUT.file_bytes, num_writers=8)
    for _ in range(20):
        for key in KEYS:
            tier.put(key, contents(key))
        assert tier.flush(30)
        assert tier.counts().num_bytes == bytes_on_disk(folder)
        assert bytes_on_disk(folder) <= tier.max_bytes


def test_what_others_are_writing_counts_towards_the_limit(
    open_tier: Open, gate: Gate, folder: Path
) -> None:
    tier = open_tier(max_bytes=LAYOUT.file_bytes, num_writers=2)
    tier.put(KEYS[0], contents(KEYS[0]))
    assert gate.arrived.wait(30)
    tier.put(KEYS[1], contents(KEYS[1]))  # the other writer finds no room, and nothing to evict
    while tier.counts().dropped == 0:
        time.sleep(0.001)
    gate.open()
    assert tier.flush(30)
    assert present(tier) == [0]
    assert bytes_on_disk(folder) == tier.max_bytes
    assert tier.counts().evicted == 0


def bytes_on_disk(folder: Path) -> int:
    """Of block files and temporary ones."""
    return sum(path.stat().st_size for path in files(folder, "*"))


def test_models_share_a_folder_and_its_limit(open_tier: Open, folder: Path) -> None:
    fill(open_tier(), KEYS[:3])
    fill(open_tier(layout=OTHER), KEYS[:3])
    for path in files(folder, "*"):
        os.utime(path, (2000, 2000))
    os.utime(file_of_layout(folder, KEYS[1], OTHER), (1000, 1000))
    tier = open_tier(max_bytes=6 * LAYOUT.file_bytes, num_writers=1)
    assert all(same(tier.get(key), key) for key in KEYS[:3])
    fill(tier, KEYS[3:4])
    assert present(tier) == [0, 1, 2, 3]
    assert tier.counts().num_bytes == 6 * LAYOUT.file_bytes
    other = open_tier(layout=OTHER)
    assert present(other) == [0, 2]
    assert same(other.get(KEYS[0]), KEYS[0], OTHER)


def file_of_layout(folder: Path, key: bytes, layout: BlockLayout) -> Path:
    """The file of a key in one layout."""
    [path] = files(folder, f"{key.hex()}.{layout.digest()[:8].hex()}.blk")
    return path


def test_files_that_are_no_blocks_are_left_alone(open_tier: Open, folder: Path) -> None:
    fill(first := open_tier(), KEYS[:2])
    first.close()
    strangers = [folder / "notes", folder / "01" / "notes", folder / "cd" / f"{'ab' * 32}.blk"]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100_000))
    tier = open_tier(max_bytes=2 * LAYOUT.file_bytes)
    fill(tier, KEYS[:6])
    assert tier.counts().num_bytes == 2 * LAYOUT.file_bytes
    tier.forget_tagged(None).result(30)
    assert all(path.exists() for path in strangers)
    assert files(folder) == [strangers[2]]


# Forgetting


def test_forgotten_blocks_are_misses_and_their_files_gone(open_tier: Open, folder: Path) -> None:
    tier = open_tier()
    fill(tier)
    for tag in (KEYS[0][32:], bytes(7) + b"\xff"):
        tier.forget_tagged(tag).result(30)
    assert present(tier) == list(range(4, 16))
    assert all(tier.get(key) is None for key in KEYS[:4])
    assert len(files(folder)) == 12
    assert present(open_tier()) == list(range(4, 16))


def test_a_block_forgotten_while_it_is_written_never_appears(
    open_tier: Open, gate: Gate, folder: Path
) -> None:
    tier = open_tier(num_writers=1)
    for key in (*KEYS[:2], KEYS[4]):
        tier.put(key, contents(key))
    assert gate.arrived.wait(30)
    tier.forget_tagged(KEYS[0][32:])  # of which the first is half written
    assert tier.get(KEYS[0]) is None
    assert present(tier) == [4]
    assert not tier.put(KEYS[0], contents(KEYS[0])), "not before the old one is out of the way"
    gate.open()
    assert tier.flush(30)
    assert tier.get(KEYS[0]) is None
    assert present(tier) == present(open_tier()) == [4]
    assert len(files(folder, "*")) == 1
    assert tier.put(KEYS[0], contents(KEYS[0]))


def test_a_block_put_again_does_not_go_with_its_old_file(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(max_bytes=LAYOUT.file_bytes)
    fill(tier, KEYS[:1])
    remove, outcomes = tier._folder.remove, []

    def while_it_is_evicted(name: str) -> bool:
        outcomes.append(tier.put(KEYS[0], contents(KEYS[0])))
        return remove(name)

    monkeypatch.setattr(tier._folder, "remove", while_it_is_evicted)
    assert tier.put(KEYS[1], contents(KEYS[1]))
    assert tier.flush(30)
    assert outcomes == [False]
    assert present(tier) == [1]


def test_forgetting_all_takes_all_layouts(open_tier: Open, gate: Gate) -> None:
    """Those of earlier weights and configs among them: what was flushed must not come back."""
    gate.open()
    other, tier, neighbour = open_tier(layout=OTHER), open_tier(), open_tier()
    fill(other, KEYS[:2])
    fill(tier, KEYS[:4])
    fill(neighbour, KEYS[4:6])
    tier.forget_tagged(None).result(30)
    assert present(tier) == []
    assert neighbour.get(KEYS[5]) is None, "those of another process too"
    assert other.get(KEYS[0]) is None


def test_forgetting_a_tag_leaves_all_others(open_tier: Open, folder: Path) -> None:
    public = bytes([99]) * 32 + PUBLIC_TAG
    other = open_tier(layout=OTHER)
    fill(other, KEYS[:2])
    fill(open_tier(), [*KEYS[:6], public])
    fill(neighbour := open_tier(), KEYS[6:10])
    tier = open_tier()
    fill(neighbour, KEYS[10:12])  # which it doesn't know
    tier.forget_tagged(KEYS[0][32:]).result(30)
    assert present(open_tier()) == list(range(4, 12))
    tier.forget_tagged(KEYS[11][32:]).result(30)
    assert present(open_tier()) == [4, 5, 6, 7], "those of another process too"
    tier.forget_tagged(None).result(30)
    assert present(open_tier()) == []
    assert same(tier.get(public), public), "it is everybody's"
    assert other.get(KEYS[0]) is None
    assert len(files(folder)) == 1


def test_what_is_being_forgotten_is_a_miss_at_once(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    fill(tier, KEYS[:8])
    listing, names = threading.Event(), tier._folder.names

    def slow_names(**options: bool) -> list[str]:
        listing.wait()
        return names(**options)

    monkeypatch.setattr(tier._folder, "names", slow_names)
    done = tier.forget_tagged(KEYS[0][32:])
    try:
        assert present(tier) == [4, 5, 6, 7]
        assert [tier.get(key) is None for key in KEYS[:5]] == [True] * 4 + [False]
        assert not tier.put(KEYS[0], contents(KEYS[0])), "it might go with the old one"
        assert tier.put(KEYS[8], contents(KEYS[8]))
        until(lambda: tier.counts().written == 9)
        assert not done.done()
        assert not tier.flush(0), "nobody may take it for done"
    finally:
        listing.set()
    done.result(30)
    assert tier.put(KEYS[0], contents(KEYS[0]))
    assert tier.flush(30)
    assert present(tier) == present(open_tier()) == [0, 4, 5, 6, 7, 8]


def test_a_tag_is_forgotten_only_when_nothing_of_it_is_being_written(
    open_tier: Open, gate: Gate, folder: Path
) -> None:
    """A kill as soon as it is told to be forgotten must find nothing."""
    tier = open_tier(num_writers=1)
    for key in (KEYS[0], KEYS[4]):
        assert tier.put(key, contents(key))
    assert gate.arrived.wait(30)
    done = tier.forget_tagged(KEYS[0][32:])
    with pytest.raises(TimeoutError):
        done.result(0.2)
    assert present(tier) == [4]
    gate.open()
    done.result(30)
    assert files(folder, f"{KEYS[0].hex()}*") == []
    assert tier.flush(30)
    assert present(open_tier()) == [4]


def test_who_asked_to_forget_hears_that_a_file_is_still_there(
    open_tier: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    fill(tier, KEYS[:6])

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(OSError, match="4 blocks that were flushed can't be removed"):
            tier.forget_tagged(KEYS[0][32:]).result(30)
        assert present(tier) == [4, 5]
        patch.setattr(os, "listdir", refuse)
        with pytest.raises(OSError, match="Read-only"):
            tier.forget_tagged(KEYS[4][32:]).result(30)
    assert present(tier) == []
    assert [tier.get(key) for key in KEYS[:6]] == [None] * 6
    assert len(files(folder)) == 6
    file_of(folder, KEYS[0]).unlink()  # by hand
    tier.forget_tagged(KEYS[0][32:]).result(30)
    assert len(files(folder)) == 2, "a second try can succeed"


def too_many_files(*args: object, **options: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("tag", [KEYS[0][32:], None])
def test_a_flush_that_fails_brings_nothing_back_until_a_restart(
    open_tier: Open, folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, tag: bytes | None
) -> None:
    """The folder can't be listed. Blocks known here go all the same; those of others are hidden."""
    gate.open()
    fill(neighbour := open_tier(), KEYS[:1])
    tier = open_tier(num_writers=1)
    tier._survey_if_due()  # that of its start, which might be late and find the next one too
    fill(neighbour, KEYS[1:2])
    gate.close()
    for key in (KEYS[2], KEYS[3], KEYS[4]):  # one half written, and two that wait
        assert tier.put(key, contents(key))
    assert gate.arrived.wait(30)
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", too_many_files)
        done = tier.forget_tagged(tag)
        until(lambda: done.done() or not files(folder, f"{KEYS[0].hex()}*"))
        gate.open()
        with pytest.raises(OSError, match="Too many open files"):
            done.result(30)
    assert tier.flush(30), "nobody waits for what has failed"
    left = [] if tag is None else [4]
    assert present(tier) == left
    assert [tier.get(key) for key in KEYS[:4]] == [None] * 4
    assert not tier.put(KEYS[3], contents(KEYS[3])), "it couldn't be told from an old one"
    assert [path.name[:80] for path in files(folder)] == [KEYS[n].hex() for n in (1, *left)]
    survey_now(tier)
    assert present(tier) == left
    assert present(open_tier()) == [1, *left], "a restart doesn't know of it"


@pytest.mark.parametrize("tag", [KEYS[0][32:], None])
def test_a_flush_that_failed_can_be_repeated(
    open_tier: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, tag: bytes | None
) -> None:
    """Of the same domain, or of all."""
    tier = open_tier()
    fill(open_tier(), KEYS[:3])  # which it doesn't know
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", too_many_files)
        with pytest.raises(OSError, match="Too many open files"):
            tier.forget_tagged(KEYS[0][32:]).result(30)
    tier.forget_tagged(KEYS[4][32:]).result(30)
    assert tier.get(KEYS[1]) is None
    tier.forget_tagged(tag).result(30)
    assert files(folder) == []
    fill(tier, KEYS[:3])
    assert present(tier) == [0, 1, 2]


def test_flushes_share_one_look_through_the_folder(
    open_tier: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are asked for while one is at work, only one more follows."""
    tier = open_tier()
    fill(tier)
    listing, names, begun = threading.Event(), tier._folder.names, []

    def slow_names(**options: bool) -> list[str]:
        begun.append(options)
        listing.wait()
        return names(**options)

    monkeypatch.setattr(tier._folder, "names", slow_names)
    done = [tier.forget_tagged(KEYS[0][32:])]
    try:
        until(lambda: begun)
        done += [tier.forget_tagged(bytes([number % 3]) * 8) for number in range(3000)]
        assert len(set(done)) == 4
        assert not any(future.cancel() for future in done), "others wait for it too"
        assert present(tier) == list(range(8, 16))
    finally:
        listing.set()
    for future in done:
        future.result(30)
    assert len(begun) == 2
    assert tier.flush(30)
    assert present(tier) == present(open_tier()) == list(range(8, 16))


def test_a_tag_that_is_asked_for_again_while_it_is_flushed_stays_hidden() -> None:
    """Another process may have written since the folder was listed."""
    flushed, nothing = FlushedTags(), Counter[bytes]()
    first = flushed.add(KEYS[0][32:])
    assert list(flushed.begin()) == [KEYS[0][32:]]
    second = flushed.add(KEYS[0][32:])
    assert flushed.end(nothing, None) == [(first, None)]
    assert flushed.hidden == {KEYS[0][32:]}
    flushed.begin()
    assert flushed.end(nothing, None) == [(second, None)]
    assert flushed.hidden == set()


def test_of_flushes_together_only_the_one_whose_file_stays_fails(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    fill(tier)
    entered, listing, names = threading.Event(), threading.Event(), tier._folder.names
    remove = tier._folder.remove

    def slow_names(**options: bool) -> list[str]:
        entered.set()
        listing.wait()
        return names(**options)

    def refuse(name: str) -> bool:
        if name.startswith("05"):
            raise OSError(errno.EPERM, "Operation not permitted")
        return remove(name)

    monkeypatch.setattr(tier._folder, "names", slow_names)
    first = tier.forget_tagged(bytes(7) + b"\xff")
    assert entered.wait(30)
    monkeypatch.setattr(tier._folder, "remove", refuse)
    done = [tier.forget_tagged(KEYS[number][32:]) for number in (0, 4, 8)]
    listing.set()
    assert [isinstance(one.exception(30), OSError) for one in (first, *done)] == [
        False,
        False,
        True,
        False,
    ]
    assert present(tier) == [12, 13, 14, 15]


KILLED_AFTER_A_FLUSH = """
import glob, os, signal, sys
import numpy as np
from engine.runtime.disk_tier import DiskTier
from tests.runtime.disk_tier_writers import LAYOUT
tier = DiskTier(sys.argv[1], 100 * LAYOUT.file_bytes, LAYOUT)
for number in range(20):
    tag = bytes([1 + number % 2]) * 8
    tier.put(bytes([number]) * 32 + tag, np.ones(LAYOUT.shape, LAYOUT.dtype))
while len(glob.glob(f"{sys.argv[1]}/??/*{'02' * 8}.*.blk")) < int(sys.argv[2]):
    pass
tier.forget_tagged(bytes([1]) * 8).result()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("written", [0, 1, 4])
def test_a_kill_right_after_a_flush_brings_nothing_back(folder: Path, written: int) -> None:
    """Some blocks are queued, some half written and some files when they are flushed."""
    command = [sys.executable, "-c", KILLED_AFTER_A_FLUSH, str(folder), str(written)]
    process = subprocess.run(command, cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    tags = {path.name.split(".")[0][64:] for path in files(folder)}
    assert tags <= {"02" * 8}
    assert len(files(folder)) >= written, "the others stay"


class ErasedLater:
    """A block in memory that can be erased."""

    def __init__(self, array: np.ndarray):
        self._array: np.ndarray | None = array
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes

    def erase(self) -> None:
        self._array = None

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        if self._array is None:
            raise RuntimeError("Array has been deleted")
        return self._array


def test_a_block_erased_while_it_waits_is_a_miss(open_tier: Open, gate: Gate) -> None:
    tier = open_tier(num_writers=1)
    block = ErasedLater(contents(KEYS[1]))
    tier.put(KEYS[0], contents(KEYS[0]))  # which holds the writer up
    tier.put(KEYS[1], block)
    assert gate.arrived.wait(30)
    assert same(tier.get(KEYS[1]), KEYS[1])
    block.erase()
    assert tier.get(KEYS[1]) is None
    assert [len(tier.fetch([key]).result(30)) for key in KEYS[:2]] == [1, 0]
    gate.open()
    assert tier.flush(30)
    assert present(tier) == present(open_tier()) == [0]
    assert tier.writable
    assert tier.counts().dropped == 1
    assert tier.put(KEYS[1], contents(KEYS[1]))


def test_a_file_that_can_not_be_removed_is_a_miss_all_the_same(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here one that is evicted."""
    tier = open_tier(max_bytes=2 * LAYOUT.file_bytes, num_writers=1)
    fill(tier, KEYS[:2])

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "unlink", refuse)
    fill(tier, KEYS[2:3])
    assert KEYS[0] not in tier
    assert tier.get(KEYS[0]) is None
    assert same(tier.get(KEYS[1]), KEYS[1])
    assert "Read-only file system" in caplog.text


def test_an_expired_block_is_a_miss(open_tier: Open, folder: Path, gate: Gate) -> None:
    tier = open_tier()
    tier.put(KEYS[0], contents(KEYS[0]), expires=time.time() - 1)
    tier.put(KEYS[1], contents(KEYS[1]), expires=time.time() + 3600)
    assert tier.get(KEYS[0]) is None, "nor from the queue"
    assert tier.counts().misses == {Miss.EXPIRED: 1}
    assert same(tier.get(KEYS[1]), KEYS[1])
    gate.open()
    assert tier.flush(30)
    tier = open_tier()  # which looks its folder through, and may have removed the file by now
    assert tier.get(KEYS[0]) is None
    assert same(tier.get(KEYS[1]), KEYS[1])
    assert len(files(folder)) == 1


def test_expired_files_go_though_nobody_asks_for_them(
    open_tier: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all layouts, when the folder is looked through; what can't be read is left there."""
    for layout in (LAYOUT, OTHER):
        tier = open_tier(layout=layout)
        for number, seconds in enumerate((1000, 3000)):
            tier.put(KEYS[number], contents(KEYS[number], layout), time.time() + seconds)
        assert tier.flush(30)
    (folder / "02").mkdir()
    stranger = folder / "02" / f"{KEYS[2].hex()}.{'0' * 16}.blk"
    stranger.write_bytes(b"short")
    assert len(files(folder)) == 5
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2000)
    survey_now(tier := open_tier())
    names = {path.name[:2] for path in files(folder)}
    assert (len(files(folder)), names) == (3, {"01", "02"})
    assert tier.counts().num_bytes == bytes_on_disk(folder)
    assert present(tier) == [1]


# Disks that fail


def fail_with(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    """Make a function of `os` raise; of `open` only when it makes files."""
    original = getattr(os, function)

    def broken(*args: Any, **options: Any) -> Any:
        if function == "open" and not args[1] & os.O_CREAT:
            return original(*args, **options)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, broken)


@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("write", errno.ENOSPC),
        ("write", errno.EIO),
        ("replace", errno.EIO),
        ("replace", errno.ENOSPC),
        ("open", errno.EROFS),
        ("open", errno.EACCES),
    ],
)
def test_a_disk_that_fails_turns_writing_off_with_one_warning(
    open_tier: Open,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    number: int,
) -> None:
    tier = open_tier()
    fill(tier, KEYS[:4])
    with monkeypatch.context() as patch:
        fail_with(patch, function, number)
        for key in KEYS:
            tier.put(key, contents(key))
        assert tier.flush(30)
    assert not tier.writable
    assert not tier.put(KEYS[5], contents(KEYS[5]))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert os.strerror(number) in caplog.text
    assert present(tier) == [0, 1, 2, 3], "it still reads"
    assert all(same(tier.get(key), key) for key in KEYS[:4])
    assert tier.counts().dropped == 13
    assert len(files(folder, "*")) == 4, "no half file is left"


def test_short_writes_are_continued(open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    fill(tier, KEYS[:2])
    assert same(tier.get(KEYS[1]), KEYS[1])


def test_a_vanished_folder_is_misses_and_drops(open_tier: Open, folder: Path) -> None:
    tier = open_tier()
    fill(tier, KEYS[:2])
    shutil.rmtree(folder)
    assert tier.get(KEYS[0]) is None
    assert tier.put(KEYS[5], contents(KEYS[5]))
    assert tier.flush(30)
    assert not tier.writable
    tier.forget_tagged(None).result(30)


def test_emptying_the_folder_by_hand_costs_the_blocks_only(open_tier: Open, folder: Path) -> None:
    tier = open_tier()
    fill(tier, KEYS[:2])
    for sub in folder.iterdir():
        shutil.rmtree(sub)
    assert tier.get(KEYS[0]) is None
    assert present(tier) == [1]
    fill(tier, [KEYS[0], KEYS[3]])
    assert same(tier.get(KEYS[0]), KEYS[0])
    assert tier.writable


def test_too_many_open_files_is_a_miss_but_not_the_files_end(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    fill(tier, KEYS[:1])
    with monkeypatch.context() as patch:
        original = os.open

        def broken(path: str, *args: Any, **options: Any) -> int:
            if str(path).endswith(".blk"):
                raise OSError(errno.EMFILE, "Too many open files")
            return original(path, *args, **options)

        patch.setattr(os, "open", broken)
        assert tier.get(KEYS[0]) is None
    assert tier.counts().misses == {Miss.UNREADABLE: 1}
    assert present(tier) == [0]
    assert same(tier.get(KEYS[0]), KEYS[0])


def test_close_gives_up_on_a_disk_that_hangs(open_tier: Open, gate: Gate) -> None:
    tier = open_tier(num_writers=1)
    for key in KEYS[:4]:
        tier.put(key, contents(key))
    assert gate.arrived.wait(30)
    assert not tier.close(timeout=0.05)
    assert not tier.put(KEYS[5], contents(KEYS[5]))
    assert present(tier) == []
    assert tier.get(KEYS[0]) is None
    assert tier.fetch(KEYS).result(30) == []
    assert not tier.close(timeout=0.0), "again"


# Other processes


def test_tiers_that_share_a_folder_see_each_others_blocks(open_tier: Open) -> None:
    one, two = open_tier(), open_tier()
    fill(one, KEYS[:2])
    assert same(two.get(KEYS[0]), KEYS[0]), "written after the second was opened"
    assert present(two) == [0]
    one.forget_tagged(KEYS[0][32:]).result(30)
    assert two.get(KEYS[0]) is None
    assert present(two) == []
    assert two.counts().misses == {Miss.ABSENT: 1}


def test_what_others_wrote_is_found_again_and_counted(open_tier: Open) -> None:
    one = open_tier(max_bytes=16 * LAYOUT.file_bytes, num_writers=1)
    two = open_tier(num_writers=1)
    fill(two, KEYS[:6])
    fill(one, KEYS[10:12])  # an eighth of the limit
    assert present(one) == [10, 11]
    fill(one, KEYS[12:13])
    assert present(one) == [0, 1, 2, 3, 4, 5, 10, 11, 12]
    assert one.counts().num_bytes == 9 * LAYOUT.file_bytes


def test_a_survey_does_not_lose_what_happens_meanwhile(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(first := open_tier(), KEYS[:6])
    first.close()
    tier = open_tier(num_writers=1)
    fill(tier, KEYS[6:8])
    survey = tier._folder.survey

    def slow_survey() -> list[Any]:
        found = survey()
        tier.forget_tagged(KEYS[0][32:]).result(30)
        assert tier.get(KEYS[5]) is not None
        return found

    monkeypatch.setattr(tier._folder, "survey", slow_survey)
    survey_now(tier)
    assert present(tier) == [4, 5, 6, 7]
    assert list(tier._files)[-1].startswith(f"05/{KEYS[5].hex()}"), "used last"
    assert tier.counts().num_bytes == 4 * LAYOUT.file_bytes


def test_a_survey_does_not_bring_back_what_is_being_removed(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    fill(tier, KEYS[3:6])
    remove = tier._folder.remove

    def survey_first(name: str) -> bool:
        survey_now(tier)
        return remove(name)

    monkeypatch.setattr(tier._folder, "remove", survey_first)
    tier.forget_tagged(KEYS[3][32:]).result(30)
    assert present(tier) == [4, 5]
    survey_now(tier)
    assert present(tier) == [4, 5]
    assert tier.counts().num_bytes == 2 * LAYOUT.file_bytes


def test_a_survey_leaves_files_that_are_just_there_to_their_writer(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    tier = open_tier(max_bytes=2 * LAYOUT.file_bytes, num_writers=1)
    fill(tier, KEYS[:1])
    write = tier._folder.write

    def survey_after(key: bytes, array: np.ndarray, expires: float) -> bool:
        assert write(key, array, expires)
        survey_now(tier)
        tier._make_room(another := tier._folder.name_of(KEYS[2]))  # as another writer would
        tier._reserved.discard(another)
        return True

    monkeypatch.setattr(tier._folder, "write", survey_after)
    fill(tier, KEYS[1:2])
    assert present(tier) == [1]
    assert len(files(folder)) == 1


def test_a_start_removes_the_temporary_files_of_the_dead_alone(
    open_tier: Open, folder: Path, gate: Gate
) -> None:
    living = open_tier(num_writers=1)
    living.put(KEYS[0], contents(KEYS[0]))
    assert gate.arrived.wait(30)
    [at_work] = files(folder, "*.tmp")
    dead = at_work.with_name(f"{at_work.name[:-20]}{'0' * 16}.tmp")
    dead.write_bytes(b"half")
    survey_now(open_tier())
    assert files(folder, "*") == [at_work]
    gate.open()
    assert living.flush(30)
    assert same(open_tier().get(KEYS[0]), KEYS[0])


def test_a_file_taken_for_abandoned_before_it_is_locked_is_begun_anew(
    open_tier: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(num_writers=1)
    tier._survey_if_due()
    flock, locked = fcntl.flock, []

    def tidied_first(descriptor: int, flags: int) -> None:
        if not locked:
            files(folder, "*.tmp")[0].unlink()
        locked.append(descriptor)
        flock(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", tidied_first)
    fill(tier, KEYS[:1])
    assert len(locked) == 2
    assert tier.counts().written == 1


def test_without_locks_only_old_temporary_files_are_removed(
    open_tier: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    fill(tier, KEYS[:1])

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    block = file_of(folder, KEYS[0])
    young, old = (block.with_name(f"{block.name}.{digit * 16}.tmp") for digit in "01")
    young.touch()
    old.touch()
    os.utime(old, (1000, 1000))
    survey_now(tier)
    assert files(folder, "*") == [block, young]
    fill(tier, KEYS[1:2])  # and writing needs none


# All of it together


Operation = tuple[str, int]
OPERATIONS = st.tuples(
    st.sampled_from(["put", "get", "tag", "clear", "restart", "damage", "remove", "flush"]),
    st.integers(0, 7),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OPERATIONS, max_size=40), st.integers(1, 8))
def test_any_history_gives_right_blocks_within_the_limit(
    tmp_path_factory: pytest.TempPathFactory, history: list[Operation], max_files: int
) -> None:
    folder = tmp_path_factory.mktemp("history") / "blocks"
    max_bytes = max_files * LAYOUT.file_bytes
    tier = DiskTier(folder, max_bytes, LAYOUT)
    wanted: set[int] = set()  # put since it was last forgotten
    for step, (operation, number) in enumerate(history):
        key = KEYS[number]
        if operation == "put":
            if tier.put(key, contents(key)):  # just after it was forgotten it may be on its way out
                wanted.add(number)
        elif operation == "get":
            block = tier.get(key)
            assert block is None or (same(block, key) and number in wanted)
        elif operation == "tag":  # which nobody waits for
            tier.forget_tagged(key[32:])
            wanted -= set(range(number // 4 * 4, number // 4 * 4 + 4))
            assert set(present(tier)) <= wanted
        elif operation == "clear":
            tier.forget_tagged(None).result(30)
            wanted.clear()
            assert present(tier) == []
        elif operation == "restart":
            assert tier.close(30)
            tier = DiskTier(folder, max_bytes, LAYOUT)
        elif operation == "flush":
            assert tier.flush(30)
            assert bytes_on_disk(folder) <= max_bytes
            assert set(present(tier)) <= wanted
        elif tier.flush(30) and (paths := files(folder)):
            path = random.Random(step).choice(paths)
            path.unlink() if operation == "remove" else path.write_bytes(bytes(228))
    assert tier.close(30)


def test_fifty_kills_in_the_middle_of_writing_cost_cold_misses_at_most(folder: Path) -> None:
    """Two processes write, read, evict and forget at once, and both are killed."""
    rng = random.Random(4)
    hits, half_written = [], 0
    command = [sys.executable, "-m", disk_tier_writers.__name__, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writers:
        assert writers.stdin
        assert writers.stdout
        for kill in range(50):
            moment = "writing" if kill % 2 else "whenever"
            writers.stdin.write(f"{2 * kill} {rng.uniform(0, 0.02)} {moment}\n")
            writers.stdin.flush()
            assert writers.stdout.readline() == "-9 -9\n", "one ended by itself"
            half_written += bool(files(folder, "*.tmp"))
            counts = check_every_block(folder)
            hits.append(counts.hits)
            assert counts.misses.keys() <= {Miss.ABSENT}, "a torn file got a block's name"
        writers.stdin.close()
    assert files(folder, "*.tmp") == []
    assert half_written >= 5, "the kills came between writes"
    assert sum(hits) >= 50 * 5, "hardly anything was ever found"


def check_every_block(folder: Path) -> TierCounts:
    """A reader after a crash: every block it finds is right."""
    tier = DiskTier(folder, disk_tier_writers.MAX_BYTES, disk_tier_writers.LAYOUT)
    for key in disk_tier_writers.KEYS:
        block = tier.get(key)
        assert block is None or disk_tier_writers.is_right(key, block)
    survey_now(tier)  # it removes temporary files
    assert tier.close(30)
    return tier.counts()
