"""Two hundred outputs in small: one for each of twenty schemas, among as many free ones."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from benchmarks import structured
from benchmarks.structured import Answer, Asked
from benchmarks.structured_schemas import SCHEMAS
from engine.sampling import SamplingParams
from engine.types import FinishReason
from tests.runtime.tiny import write_config, write_model


def test_every_output_validates_among_free_ones(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", write_model(tmp_path / "model"))
    assert structured.run(config, (), requests=20, rounds=1, folder=tmp_path) == 0
    [report] = tmp_path.glob("structured-*.json")
    found = json.loads(report.read_bytes())
    assert found["figures"]["outputs that validate"] == "20 of 20"
    assert int(found["figures"]["grammars compiled"]) >= 20  # some by two threads at once
    constrained, free = found["arms"]
    assert constrained["tokens"] == free["tokens"] > 20 * structured.FREE_TOKENS


@pytest.mark.parametrize("what", SCHEMAS)
def test_a_schema_is_one(what: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[what])


@pytest.mark.parametrize(
    ("text", "reason", "problem"),
    [
        ("[1]", FinishReason.STOP, ""),
        ("[1", FinishReason.LENGTH, "ended with length"),
        ("[1", FinishReason.STOP, "Expecting ',' delimiter"),
        ('["a"]', FinishReason.STOP, "'a' is not of type 'integer'"),
    ],
    ids=["right", "cut off", "no JSON", "another type"],
)
def test_what_is_wrong_is_told(text: str, reason: FinishReason, problem: str) -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    asked = [Asked("say", SamplingParams(), schema), Asked("say", SamplingParams())]
    found = structured.invalid(asked, [Answer(text, 3, reason), Answer("free", 3, reason)])
    assert len(found) == bool(problem)
    assert all(problem in each for each in found)
