"""Where mutants are kept, and how one is made."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator

import pytest

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]
NOTHING = "(lambda *_, **__: None)("  # in the place of a call that is to be left out
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


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """What runs within must notice the mutant, by itself and not because its source is broken.

    Raises:
      AssertionError: it did not, or with an error that any slip in the mutant's text would give.
    """
    with pytest.raises(AssertionError, match="run_random") as info:
        yield
    cause = info.value.__cause__
    broken = (
        isinstance(cause, (TypeError, NameError, AttributeError)) or type(cause) is RuntimeError
    )
    assert not broken, f"this mutant makes no sense: {cause!r}"


def rewrite(patch: Patch, owner: object, name: str, old: str, new: str) -> None:
    """Replace one piece of a function's source text."""
    function = inspect.unwrap(getattr(owner, name))
    source = getattr(function, "mutated_source", None)
    if source is None:
        source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}"
    namespace: dict[str, object] = {}
    source = source.replace(old, new)
    if inspect.isclass(owner):  # outside of its body there is no class to be found by itself
        source = source.replace("super()", f"super({owner.__name__}, self)")
    exec(compile(source, f"<mutant of {name}>", "exec"), function.__globals__, namespace)
    changed = namespace[name]
    changed.mutated_source = source  # type: ignore[attr-defined]
    patch.setattr(owner, name, changed)
