"""Runs `octavo` in this process, which is quicker than a new one and shows the same."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from engine import cli


class Ended(NamedTuple):
    """How a command ended: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str


class CommandLine:
    """Calls the command line's entry point as a shell would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["octavo", *map(str, arguments)])
        self._monkeypatch.setenv("COLUMNS", "100")
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *self._capsys.readouterr())
