"""Where tests keep compiled programs: most of a run's time is XLA's, over the same small models.

A first run fills it, for both of its workers; later ones, in the same clone, take a fraction of the
time. `make clean` removes it.
"""

from __future__ import annotations

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = Path(__file__).resolve().parents[1] / ".pytest_cache" / "compiled"


def use() -> None:
    """Have this process keep its programs there, whatever a test set before."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if jax.config.jax_compilation_cache_dir != str(FOLDER):
        compilation_cache.reset_cache()  # jax stays with the first folder otherwise
    jax.config.update("jax_compilation_cache_dir", str(FOLDER))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
