"""The package as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

import engine.text


def test_importing_the_package_loads_no_library():
    code = (
        "import sys, engine.text; "
        "print([name for name in ('tokenizers', 'jinja2', 'jax') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_can_be_loaded():
    for name in engine.text.__all__:
        assert getattr(engine.text, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = engine.text.nothing
