"""A folder of block files: opening it, and single files by name, each call safe by itself.

Names are ``ab/ab12….0123….blk``: a sub-folder of 256, the key, which ends with the tag of whose it
is, and the start of the layout's digest, so that models share a folder without meeting. All access
goes through a descriptor of the folder, which stays the one that was checked, whatever is done to
the path later.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.runtime.block_file import (
    HEADER_BYTES,
    KEY_BYTES,
    NEVER,
    PUBLIC_TAG,
    BlockFormat,
    BlockLayout,
    Miss,
    as_bytes,
    expiry,
)

_SUB_FOLDER = re.compile(r"[0-9a-f]{2}")
# The first version's keys had no tag; its files go as those of any other layout do.
_BLOCK = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}(?P<tag>[0-9a-f]{16})?\.[0-9a-f]{16}\.blk")
_TEMPORARY = re.compile(_BLOCK.pattern + r"\.[0-9a-f]{16}\.tmp")
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe in a file's place would block an open without O_NONBLOCK.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ABANDONED_AFTER = 3600.0  # seconds; for file systems without locks
# This process's own trouble: says nothing about the file, which stays.
_NOT_THE_FILES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}


class FolderRefused(ValueError):
    """The folder can't be used for blocks: says which, why, and the way out."""


class Found(NamedTuple):
    """A block file that a survey met, of whatever layout."""

    used_ns: int
    name: str
    num_bytes: int


class BlockFolder:
    """The files of a folder, of which those of one layout are read and written.

    It holds no state besides the folder's descriptor, so it is safe from many threads, and several
    processes may use one folder: files appear whole under their name or not at all.

    Raises:
      FolderRefused: it isn't a folder, or somebody else may look into it or write to it.
    """

    def __init__(self, path: Path | str, layout: BlockLayout):
        self._format = BlockFormat(layout)
        self._ending = f".{self._format.layout_digest[:8].hex()}.blk"
        self._root = _open_private_folder(Path(path))
        # Only once no thread holds `self` any more: a descriptor's number is soon another file's.
        weakref.finalize(self, os.close, self._root)

    def name_of(self, key: bytes) -> str:
        """The path, below the folder, of the file for a key.

        Raises:
          ValueError: the key has another length than block keys have.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"a block key has {KEY_BYTES} bytes, not {len(key)}")
        digits = key.hex()
        return f"{digits[:2]}/{digits}{self._ending}"

    def is_of_layout(self, name: str) -> bool:
        """Whether a block file's name is that of this layout."""
        return name.endswith(self._ending)

    @staticmethod
    def tag_of(name: str) -> bytes | None:
        """Whose block a file is, of whatever layout, by its name; None if that says nothing."""
        found = _BLOCK.fullmatch(name)
        return bytes.fromhex(found["tag"]) if found and found["tag"] else None

    def has_tag(self, name: str, tags: Container[bytes | None]) -> bool:
        """Whether a block file's name has one of those tags, of which None stands for all but the
        public one."""
        tag = self.tag_of(name)
        return tag is not None and (tag in tags or (None in tags and tag != PUBLIC_TAG))

    def names(self, *, strict: bool = False) -> list[str]:
        """Block files of all layouts. Looks at names alone, so it is quick.

        Raises:
          OSError: if `strict`, when a folder that is there can't be listed.
        """
        return [name for name in self._entries(strict=strict) if _BLOCK.fullmatch(name)]

    def survey(self) -> list[Found]:
        """Block files of all layouts, in no order. Removes those that have expired, and temporary
        files that killed processes left behind."""
        found, now = [], time.time()
        for name in self._entries():
            with contextlib.suppress(OSError):  # it is gone already
                if _BLOCK.fullmatch(name):
                    status = os.stat(name, dir_fd=self._root, follow_symlinks=False)
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    if now < self._expiry(name):
                        found.append(Found(status.st_mtime_ns, name, status.st_size))
                    else:
                        self.remove(name)
                elif _TEMPORARY.fullmatch(name):
                    self._remove_if_abandoned(name)
        return found

    def read(self, key: bytes) -> np.ndarray | Miss:
        """The block of a key, read-only, or why there is none. Raises nothing.

        A file that is read counts as used; one that is no answer is removed.
        """
        name = self.name_of(key)
        try:
            descriptor = os.open(name, _OPEN_FILE, dir_fd=self._root)
            try:
                outcome = self._format.read(descriptor, key, time.time())
                if not isinstance(outcome, Miss):
                    with contextlib.suppress(OSError):  # a read-only file system
                        os.utime(descriptor)
                    return outcome
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return Miss.ABSENT
        except OSError as error:
            if error.errno in _NOT_THE_FILES_FAULT:
                return Miss.UNREADABLE
            outcome = Miss.NOT_A_FILE if error.errno == errno.ELOOP else Miss.UNREADABLE
        with contextlib.suppress(OSError):
            self.remove(name)
        return outcome

    def write(self, key: bytes, array: np.ndarray, expires: float) -> bool:
        """Write a block's file. Until it is whole it has another name.

        It is not forced to the disk: after a power cut it may be torn, which its reader sees.

        Returns:
          False if somebody removed the file while it was written, or a folder has its name.

        Raises:
          OSError: the disk is full, read-only, broken or gone.
        """
        name = self.name_of(key)
        header = self._format.header(key, array, expires)
        temporary, descriptor = self._create_temporary(name)
        try:
            try:
                for part in (memoryview(header), as_bytes(array)):
                    while part:
                        part = part[os.write(descriptor, part) :]
            finally:
                os.close(descriptor)  # some file systems report a full disk only here
            os.replace(temporary, name, src_dir_fd=self._root, dst_dir_fd=self._root)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._root)
            if isinstance(error, FileNotFoundError | IsADirectoryError):
                return False
            raise
        return True

    def touch(self, name: str) -> None:
        """Let a file count as used now, if it is there."""
        with contextlib.suppress(OSError):
            os.utime(name, dir_fd=self._root, follow_symlinks=False)

    def remove(self, name: str) -> bool:
        """Remove a file; False if there is none. Its bytes on the disk are not overwritten.

        Raises:
          OSError: it can't be removed.
        """
        try:
            os.unlink(name, dir_fd=self._root)  # of a symbolic link, the link
        except (FileNotFoundError, IsADirectoryError):
            return False
        return True

    def _create_temporary(self, name: str) -> tuple[str, int]:
        """A new file beside `name`, open for writing and locked: see `_remove_if_abandoned`."""
        while True:
            temporary = f"{name}.{secrets.token_hex(8)}.tmp"
            try:
                descriptor = os.open(temporary, _CREATE, 0o600, dir_fd=self._root)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name.partition("/")[0], 0o700, dir_fd=self._root)
                descriptor = os.open(temporary, _CREATE, 0o600, dir_fd=self._root)
            with contextlib.suppress(OSError):  # without locks, age decides
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return temporary, descriptor
            os.close(descriptor)  # it was taken for abandoned before it was locked

    def _entries(self, *, strict: bool = False) -> Iterator[str]:
        """All that lies in the sub-folders. A folder that can't be listed counts as empty, unless
        `strict`, when only one that is gone does."""
        expected = FileNotFoundError if strict else OSError
        with contextlib.suppress(expected):
            for sub in filter(_SUB_FOLDER.fullmatch, os.listdir(self._root)):
                with contextlib.suppress(expected):
                    descriptor = os.open(sub, _OPEN_FOLDER, dir_fd=self._root)
                    try:
                        entries = os.listdir(descriptor)
                    finally:
                        os.close(descriptor)
                    for entry in entries:
                        yield f"{sub}/{entry}"

    def _expiry(self, name: str) -> float:
        """When a file expires, by its header alone; never, if it can't be read."""
        try:
            descriptor = os.open(name, _OPEN_FILE, dir_fd=self._root)
            try:
                return expiry(os.read(descriptor, HEADER_BYTES))
            finally:
                os.close(descriptor)
        except OSError:  # it counts and is evicted like others
            return NEVER

    def _remove_if_abandoned(self, name: str) -> None:
        """Remove a temporary file unless its writer lives, which holds a lock on it as long.

        Unlike a process id, a lock means the same to all containers that share the folder.
        """
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._root)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # held, or this file system has no locks
                if time.time() - os.fstat(descriptor).st_mtime < _ABANDONED_AFTER:
                    return
            os.unlink(name, dir_fd=self._root)
        finally:
            os.close(descriptor)


def _open_private_folder(path: Path) -> int:
    """A descriptor of the folder, which is made if need be, and must be nobody else's business."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if path.is_symlink():
            raise FolderRefused(f"{path} is a symbolic link; name the folder itself")
        descriptor = os.open(path, _OPEN_FOLDER)
    except OSError as error:
        raise FolderRefused(
            f"{path} can't be used for cached blocks ({error.strerror}); name a folder on a disk "
            "that this user may write to"
        ) from error
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid == os.geteuid() and not mode & 0o077:
        return descriptor
    os.close(descriptor)
    raise FolderRefused(
        f"{path} belongs to user {status.st_uid} and has mode {mode:04o}, but cached blocks are "
        f"for user {os.geteuid()} alone: whoever writes there decides what the model has read. "
        "Name a folder that doesn't exist yet, or chmod it to 0700"
    )
