"""Where mutants are kept, and how one is made."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable

import pytest

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]
MUTANTS: dict[str, Mutant] = {}
BEAM_MUTANTS: dict[str, Mutant] = {}  # of what only searches meet


def mutant(function: Mutant) -> Mutant:
    """Add to the list; the function's name says what goes wrong."""
    MUTANTS[function.__name__] = function
    return function


def beam_mutant(function: Mutant) -> Mutant:
    """Add to the list of those that only searches meet."""
    BEAM_MUTANTS[function.__name__] = function
    return function


def rewrite(patch: Patch, owner: object, name: str, old: str, new: str) -> None:
    """Replace one piece of a function's source text."""
    function = inspect.unwrap(getattr(owner, name))
    source = getattr(function, "mutated_source", None)
    if source is None:
        source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}"
    namespace: dict[str, object] = {}
    source = source.replace(old, new)
    exec(compile(source, f"<mutant of {name}>", "exec"), function.__globals__, namespace)
    changed = namespace[name]
    changed.mutated_source = source  # type: ignore[attr-defined]
    patch.setattr(owner, name, changed)
