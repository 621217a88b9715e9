"""The tiny model on disk, once a session; and a step loop over a device that only pretends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.runtime.loop import EngineLoop
from tests.runtime import tiny
from tests.runtime.fake_runner import FakeRunner, Listener, start_loop


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random llama and its byte tokenizer."""
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def runner() -> FakeRunner:
    """A device that only pretends."""
    return FakeRunner()


@pytest.fixture
def running(runner: FakeRunner) -> Iterator[tuple[EngineLoop, Listener]]:
    """A step loop over it, and who listens to it."""
    engine_loop, listener = start_loop(runner)
    yield engine_loop, listener
    runner.gate.set()
    engine_loop.close()
