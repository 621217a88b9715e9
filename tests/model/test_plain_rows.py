"""What a step computes although nobody asked: read off the compiled program.

XLA moves what doesn't depend on a loop's index in front of the loop. In buckets of few rows that
was all of the prompt log-probabilities: a second product with the vocabulary, and a sort of it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.core.buckets import Bucket
from tests.engines import small_engine

BUCKETS = (Bucket(1, 1, 4), Bucket(4, 4, 4), Bucket(16, 16, 4), Bucket(32, 4, 4))


def always_computed(program: str) -> list[str]:
    """The instructions of the entry computation: those that no condition and no loop guards."""
    match = re.search(r"^ENTRY .*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL)
    assert match, "the program has no entry computation"
    return match.group(1).splitlines()


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_a_step_sorts_no_vocabulary_unless_asked_to(tiny_models: Path, bucket: Bucket) -> None:
    engine = small_engine(tiny_models / "llama")
    program = engine.runner.compile(bucket).as_text() or ""
    top_k = re.compile(r" (sort|custom-call)\(.*op_name=\"[^\"]*top_k")
    assert [line for line in program.splitlines() if top_k.search(line)], "the check sees none"
    assert [line for line in always_computed(program) if top_k.search(line)] == []
