"""A damaged, foreign or strange file is a miss and is removed; an open folder is refused."""

from __future__ import annotations

import hashlib
import math
import os
import socket
import stat
import struct
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from engine.runtime.block_file import BlockLayout, Miss
from engine.runtime.block_folder import BlockFolder, FolderRefused

LAYOUT = BlockLayout((2, 3, 4), "float16", "weights")
KEY, OTHER_KEY = (hashlib.sha256(text).digest() + b"whose it" for text in (b"a", b"b"))
BLOCK = np.random.default_rng(0).standard_normal(LAYOUT.shape).astype(np.float16)
NEVER = struct.pack("<d", math.inf)


def by_hand(
    *,
    magic: bytes = b"octavoKV",
    version: int = 2,
    num_bytes: int = 48,
    layout: bytes | None = None,
    key: bytes = KEY,
    expires: bytes = NEVER,
    payload: bytes = BLOCK.tobytes(),
) -> bytes:
    """A file as the format's table says, checksum included."""
    layout = LAYOUT.digest() if layout is None else layout
    start = magic + struct.pack("<IQ", version, num_bytes) + layout + key + expires
    return start + hashlib.sha256(start + payload).digest() + payload


WHOLE = by_hand()


@pytest.fixture
def folder(tmp_path: Path) -> BlockFolder:
    """A new folder of blocks."""
    return BlockFolder(tmp_path / "blocks", LAYOUT)


@pytest.fixture
def path(folder: BlockFolder, tmp_path: Path) -> Path:
    """The file of KEY, which is whole."""
    assert folder.write(KEY, BLOCK, math.inf)
    return tmp_path / "blocks" / folder.name_of(KEY)


def test_a_file_is_written_as_the_table_says(path: Path) -> None:
    assert path.read_bytes() == WHOLE
    digest = LAYOUT.digest().hex()
    assert path.relative_to(path.parents[1]).as_posix() == (
        f"{KEY.hex()[:2]}/{KEY.hex()}.{digest[:16]}.blk"
    )


def test_a_file_made_by_hand_is_read(folder: BlockFolder, path: Path) -> None:
    other = -BLOCK
    path.write_bytes(by_hand(payload=other.tobytes()))
    block = folder.read(KEY)
    assert isinstance(block, np.ndarray)
    assert block.dtype == np.float16
    assert np.array_equal(block, other)


# Damage


def expect_miss(folder: BlockFolder, path: Path, reason: Miss) -> None:
    """Reading the key is a miss for that reason, which removes the file."""
    assert folder.read(KEY) is reason
    assert not os.path.lexists(path)
    assert folder.read(KEY) is Miss.ABSENT


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_any_byte_that_changes_makes_a_miss(folder: BlockFolder, path: Path, mask: int) -> None:
    for offset in range(len(WHOLE)):
        damaged = bytearray(WHOLE)
        damaged[offset] ^= mask
        path.write_bytes(damaged)
        reason = Miss.FOREIGN if 8 <= offset < 92 else Miss.CORRUPTED
        expect_miss(folder, path, reason)


def test_a_file_cut_anywhere_is_a_miss(folder: BlockFolder, path: Path) -> None:
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        expect_miss(folder, path, Miss.TRUNCATED)


@pytest.mark.parametrize("extra", [b"\0", WHOLE])
def test_a_file_with_something_behind_it_is_a_miss(
    folder: BlockFolder, path: Path, extra: bytes
) -> None:
    path.write_bytes(WHOLE + extra)
    expect_miss(folder, path, Miss.TOO_LONG)


EDITS = st.lists(st.tuples(st.integers(0, len(WHOLE) + 8), st.binary(max_size=70)), max_size=5)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EDITS, st.integers(0, len(WHOLE) + 99) | st.none())
def test_any_damage_gives_the_block_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]], length: int | None
) -> None:
    base = tmp_path_factory.getbasetemp() / "damage"
    folder = BlockFolder(base, LAYOUT)
    assert folder.write(KEY, BLOCK, math.inf)
    damaged = bytearray(WHOLE)
    for offset, data in edits:
        damaged[offset : offset + len(data)] = data
    damaged = damaged[:length]
    (base / folder.name_of(KEY)).write_bytes(damaged)
    outcome = folder.read(KEY)
    if damaged == WHOLE:
        assert isinstance(outcome, np.ndarray)
        assert outcome.tobytes() == BLOCK.tobytes()
    else:
        assert isinstance(outcome, Miss)


def test_a_file_torn_by_a_power_cut_is_a_miss(folder: BlockFolder, path: Path) -> None:
    for whole_bytes in (0, 64, 132, len(WHOLE) - 1):  # its size is known, its end never written
        path.write_bytes(WHOLE[:whole_bytes].ljust(len(WHOLE), b"\0"))
        assert isinstance(folder.read(KEY), Miss)


def test_a_file_cut_while_it_is_read_is_a_miss(
    folder: BlockFolder, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat

    def cut_after(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(path, 130)
        return status

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", cut_after)
        assert folder.read(KEY) is Miss.TRUNCATED


# Whole files of something else


@pytest.mark.parametrize(
    "file",
    [
        by_hand(key=OTHER_KEY),
        by_hand(layout=BlockLayout((2, 3, 4), "float16", "other weights").digest()),
        by_hand(layout=BlockLayout((4, 3, 2), "float16", "weights").digest()),
        by_hand(layout=BlockLayout((2, 3, 4), "int16", "weights").digest()),
        by_hand(version=1),
        by_hand(num_bytes=2**60),
    ],
    ids=["key", "weights", "shape", "dtype", "version", "size"],
)
def test_a_whole_file_of_another_kind_is_foreign(
    folder: BlockFolder, path: Path, file: bytes
) -> None:
    path.write_bytes(file)
    expect_miss(folder, path, Miss.FOREIGN)


def test_another_block_under_our_name_is_foreign(folder: BlockFolder, path: Path) -> None:
    folder.write(OTHER_KEY, -BLOCK, math.inf)
    (path.parents[1] / folder.name_of(OTHER_KEY)).rename(path)
    expect_miss(folder, path, Miss.FOREIGN)


@pytest.mark.parametrize("expires", [0.0, -math.inf, math.nan])
def test_a_time_that_has_come_or_makes_no_sense_is_expired(
    folder: BlockFolder, path: Path, expires: float
) -> None:
    path.write_bytes(by_hand(expires=struct.pack("<d", expires)))
    expect_miss(folder, path, Miss.EXPIRED)


def test_no_size_in_or_of_a_file_sizes_memory(folder: BlockFolder, path: Path) -> None:
    tracemalloc.start()
    try:
        path.write_bytes(by_hand(num_bytes=2**50))
        assert folder.read(KEY) is Miss.FOREIGN
        folder.write(KEY, BLOCK, math.inf)
        os.truncate(path, 2**40)  # a sparse file
        assert folder.read(KEY) is Miss.TOO_LONG
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "other",
    [
        BlockLayout((2, 3, 4), "float16", "weights2"),
        BlockLayout((3, 2, 4), "float16", "weights"),
        BlockLayout((2, 3, 4), "bfloat16", "weights"),
    ],
)
def test_layouts_do_not_meet_in_one_folder(path: Path, other: BlockLayout) -> None:
    folder = BlockFolder(path.parents[1], other)
    assert folder.read(KEY) is Miss.ABSENT
    assert path.exists()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((), "float32", "is empty"),
        ((2, 0), "float32", "is empty"),
        ((2,), "float33", "unknown to NumPy and ml_dtypes"),
        ((2,), "object", "must be a plain number"),
        ((2,), "f4", "by its own name"),
    ],
)
def test_layouts_without_meaning_are_refused(
    shape: tuple[int, ...], dtype: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BlockLayout(shape, dtype, "weights")


# Things in a file's place


def test_a_symbolic_link_is_a_miss_and_its_target_is_spared(
    folder: BlockFolder, path: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    path.rename(target)  # as good as it gets: whole, and of this very key
    path.symlink_to(target)
    expect_miss(folder, path, Miss.NOT_A_FILE)
    assert target.read_bytes() == WHOLE


def test_a_pipe_is_a_miss_and_nobody_waits_for_it(folder: BlockFolder, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    expect_miss(folder, path, Miss.NOT_A_FILE)


def test_a_socket_is_a_miss(
    folder: BlockFolder, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.unlink()
    monkeypatch.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
        expect_miss(folder, path, Miss.UNREADABLE)


def test_a_folder_is_a_miss_and_not_ours_to_remove(folder: BlockFolder, path: Path) -> None:
    path.unlink()
    path.mkdir()
    assert folder.read(KEY) is Miss.NOT_A_FILE
    assert not folder.remove(folder.name_of(KEY))
    assert not folder.write(KEY, BLOCK, math.inf)
    assert list(path.parent.iterdir()) == [path]
    assert folder.survey() == []


def test_a_sub_folder_that_is_a_link_is_not_looked_into(
    folder: BlockFolder, path: Path, tmp_path: Path
) -> None:
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    assert folder.names() == []
    assert folder.survey() == []


# The folder


def mode_of(path: Path) -> int:
    """Permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_and_files_are_for_their_owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        base = tmp_path / "deep" / "blocks"
        folder = BlockFolder(base, LAYOUT)
        folder.write(KEY, BLOCK, math.inf)
    finally:
        os.umask(old)
    path = base / folder.name_of(KEY)
    assert [mode_of(at) for at in (base, path.parent, path)] == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777, 0o755, 0o701])
def test_a_folder_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(FolderRefused, match=f"mode {mode:04o}.*chmod it to 0700"):
        BlockFolder(tmp_path, LAYOUT)
    assert mode_of(tmp_path) == mode


def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BlockFolder(tmp_path / "blocks", LAYOUT)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(FolderRefused, match="for user 12345 alone"):
        BlockFolder(tmp_path / "blocks", LAYOUT)


@pytest.mark.parametrize("name", ["link", "link/"])
def test_a_link_to_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(FolderRefused, match="is a symbolic link; name the folder itself"):
        BlockFolder(f"{tmp_path}/{name}", LAYOUT)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(FolderRefused, match="can't be used for cached blocks"):
            BlockFolder(tmp_path / name, LAYOUT)


def test_the_folder_that_was_checked_is_the_one_that_is_used(path: Path) -> None:
    checked = BlockFolder(path.parents[1], LAYOUT)
    path.parents[1].rename(path.parents[2] / "moved")
    path.parent.mkdir(parents=True)  # somebody puts another in its place
    path.write_bytes(by_hand(payload=bytes(48)))
    block = checked.read(KEY)
    assert isinstance(block, np.ndarray)
    assert np.array_equal(block, BLOCK)
