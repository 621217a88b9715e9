"""The tiny model on disk, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random llama and its byte tokenizer."""
    return tiny.write_model(tmp_path_factory.mktemp("model"))
