"""Programs that are compiled ahead, in threads."""

from __future__ import annotations

from typing import Any

import pytest

from engine.core.buckets import Bucket
from engine.runtime.programs import Programs

BUCKETS = (Bucket(1, 1, 8), Bucket(4, 4, 8), Bucket(32, 4, 8))


class Lowered:
    def __init__(self, what: Any, log: list[Any]):
        self.what, self.log = what, log

    def compile(self) -> str:
        self.log.append(self.what)
        if self.what == Bucket(4, 4, 8):
            raise MemoryError("too large")
        return f"program of {self.what}"


class FakeStep:
    """Stands in for the lowering of a model."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []

    def lower_forward(self, bucket: Bucket) -> Lowered:
        return Lowered(bucket, self.compiled)

    def lower_choose(self, num_seqs: int) -> Lowered:
        return Lowered(num_seqs, self.compiled)


@pytest.mark.parametrize("ahead", [False, True])
def test_each_program_is_compiled_once_whether_ahead_or_not(ahead: bool) -> None:
    step: Any = FakeStep()
    programs = Programs(step)
    if ahead:
        with programs:
            programs.begin((BUCKETS[0], BUCKETS[2]))
            found = programs.forward(BUCKETS[2])
        with programs:  # what was not begun before is begun now, and nothing twice
            programs.begin((BUCKETS[0], BUCKETS[2]))
            assert programs.forward(BUCKETS[0])
    else:
        found = programs.forward(BUCKETS[2])
        programs.forward(BUCKETS[0])
    assert found is programs.forward(BUCKETS[2])
    assert programs.choose(4) is programs.choose(4)
    assert programs.choose(1) == "program of 1"
    assert sorted(map(str, step.compiled)) == sorted(map(str, (BUCKETS[0], BUCKETS[2], 1, 4)))


def test_what_the_compiler_says_comes_to_whoever_asks_for_the_program() -> None:
    step: Any = FakeStep()
    with Programs(step) as programs:
        programs.begin(BUCKETS)
        assert programs.forward(BUCKETS[0])
        with pytest.raises(MemoryError, match="too large"):
            programs.forward(BUCKETS[1])
