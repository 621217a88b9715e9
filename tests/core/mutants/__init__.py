"""Ways to break the core, each of which the simulation must notice.

A mutant is a function that patches one mistake into the running code; its name says which. Some
are this project's own, found by these tests and mended.
"""

from tests.core.mutants import beams, pool, reloading, scheduling, sharing
from tests.core.mutants.registry import BEAM_MUTANTS, MUTANTS, caught

__all__ = [
    "BEAM_MUTANTS",
    "MUTANTS",
    "beams",
    "caught",
    "pool",
    "reloading",
    "scheduling",
    "sharing",
]
