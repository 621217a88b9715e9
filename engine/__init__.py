"""Octavo: a paged LLM inference engine for JAX.

Importing this package costs nothing: no jax, no numpy. Reading order:
``types`` (the vocabulary), ``config``, ``core`` (the scheduler), ``model``,
``runtime`` (the step loop), ``serve``. ``docs/architecture.md`` walks one request
through them.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "Constraint", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.sampling import Constraint, SamplingParams


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that `import engine` stays free."""
    if name == "LLM":
        from engine.llm import LLM

        return LLM
    if name in ("Constraint", "SamplingParams"):
        from engine import sampling

        return getattr(sampling, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
