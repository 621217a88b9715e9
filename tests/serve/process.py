"""`octavo serve --http` in a process of its own, as users run it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.conftest import ROOT


@contextlib.contextmanager
def http_server(config: Path, overrides: Sequence[str] = ()) -> Iterator[str]:
    """The URL below which the API is, on a free port of this machine."""
    command = [sys.executable, "-m", "engine", "serve", "-c", str(config), "--http", "0"]
    command += [part for each in ("server.port=0", *overrides) for part in ("--set", each)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.match(r"OpenAI API: (http://\S+/)v1$", line):
                    yield found[1].removesuffix("/")
                    return
            raise RuntimeError(f"the server did not start; it ended with {process.wait()}")
        finally:
            process.terminate()
