"""Structured output through a whole engine: with every other field, among other requests."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema
import pytest

from engine.config_file import from_tree
from engine.frontend import Delta, Engine
from engine.loading import LoadedEngine, load_engine
from engine.runtime.news import BudgetSpent
from engine.sampling import Constraint, InvalidRequest, SamplingParams
from engine.types import FinishReason
from tests.runtime import tiny
from tests.steps import by_hand

REGEX = "[a-f]{2}(-[0-9]{2}){1,12}"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "scores": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 4,
        },
    },
    "required": ["name", "scores"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    return load_engine(from_tree(tiny.config_tree(folder)))


@pytest.fixture(scope="module")
def engine(loaded: LoadedEngine) -> Iterator[Engine]:
    engine = Engine(loaded)
    yield engine
    assert engine.stats().compiles_after_warmup == 0
    engine.close()


@dataclasses.dataclass
class Answer:
    """One sample, put together from its deltas."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Any, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        """Take in what came."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


async def collect(deltas: AsyncIterator[Delta], count: int = 1) -> list[Answer]:
    answers = [Answer() for _ in range(count)]
    async for delta in deltas:
        answers[delta.index].add(delta)
    return answers


async def ask(engine: Engine, **fields: Any) -> Answer:
    given: dict[str, Any] = {"max_tokens": 64, "seed": 3} | fields
    [answer] = await collect(engine.generate("Hello", SamplingParams(**given)))
    return answer


def regex(text: str = REGEX) -> Constraint:
    return Constraint("regex", text)


def assert_whole(answer: Answer, pattern: str = REGEX) -> None:
    """It matches, and ended because it could, by a token that is not part of the text."""
    assert re.fullmatch(pattern, answer.text), answer.text
    assert answer.finish_reason is FinishReason.STOP
    assert answer.stop_reason == answer.token_ids[-1] == tiny.EOS
    assert bytes(answer.token_ids[:-1]).decode() == answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 3, "top_p": 0.5, "min_p": 0.01},
        {"repetition_penalty": 50.0, "presence_penalty": 100.0, "frequency_penalty": 100.0},
        {"temperature": 0.0, "repetition_penalty": 0.01, "frequency_penalty": -100.0},
        {"logit_bias": tuple((token, 100.0) for token in range(ord("g"), 256))},
        {"temperature": 0.0, "logit_bias": ((tiny.EOS, 100.0), (ord("x"), 100.0))},
        {"logit_bias": tuple((token, -100.0) for token in b"abcdef-0123456789")},
        {"logprobs": 5, "prompt_logprobs": 2},
        {"stop": ("no such text",), "stop_token_ids": (ord("z"),)},
    ],
    ids=lambda fields: "-".join(fields),
)
async def test_whatever_else_is_asked_the_output_matches(
    engine: Engine, fields: dict[str, Any]
) -> None:
    for seed in range(3):
        assert_whole(await ask(engine, constraint=regex(), **{"seed": seed} | fields))


async def test_samples_follow_one_grammar_each_in_its_own_way(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=64, n=5, seed=1, constraint=regex())
    answers = await collect(engine.generate("Hello", sampling), 5)
    for answer in answers:
        assert_whole(answer)
    assert len({answer.text for answer in answers}) > 1
    for index, answer in enumerate(answers):
        assert answer == await ask(engine, seed=1 + index, constraint=regex())


async def test_an_output_of_a_schema_validates(engine: Engine) -> None:
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    texts = set()
    for seed in range(8):
        answer = await ask(engine, seed=seed, max_tokens=100, constraint=constraint)
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        texts.add(answer.text)
    assert len(texts) > 4


async def test_where_one_text_is_possible_it_is_the_output(engine: Engine) -> None:
    """Also with a bias that would have anything else."""
    text = '{"only": ["this", 1.5]}'
    for constraint in (
        Constraint("choice", choices=(text,)),
        regex(re.escape(text)),
        Constraint("lark", f"start: {json.dumps(text)}"),
        Constraint("ebnf", f"root ::= {json.dumps(text)}"),
    ):
        answer = await ask(engine, constraint=constraint, logit_bias=((65, 100.0),))
        assert_whole(answer, re.escape(text))


async def test_a_choice_is_made_by_what_the_model_finds_likely(engine: Engine) -> None:
    """The greedy output among choices of one token is the likeliest of those tokens."""
    free = await ask(engine, temperature=0.0, max_tokens=1, logprobs=20)
    candidates = [entry for entry in free.logprobs[0].top if 33 <= entry[0] < 127]
    assert len(candidates) > 1
    choices = tuple(chr(token) for token, _ in reversed(candidates))
    answer = await ask(engine, temperature=0.0, constraint=Constraint("choice", choices=choices))
    assert answer.text == chr(candidates[0][0])


async def test_a_grammar_of_everything_changes_nothing(engine: Engine) -> None:
    everything = Constraint("lark", "start: <[*]>*")
    cases: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 1.5, "seed": 8},
        {"top_k": 9, "seed": 9},
    )
    for fields in cases:
        free = await ask(engine, logprobs=2, **fields)
        assert await ask(engine, logprobs=2, constraint=everything, **fields) == free


async def test_log_probabilities_are_the_model_s_before_the_mask(engine: Engine) -> None:
    free = await ask(engine, temperature=0.0, max_tokens=1, logprobs=20)
    answer = await ask(engine, temperature=0.0, logprobs=20, constraint=regex())
    assert answer.logprobs[0].top == free.logprobs[0].top
    assert answer.logprobs[0].logprob < 0


async def test_equal_seeds_make_equal_outputs_and_others_do_not(engine: Engine) -> None:
    first, again = [await ask(engine, seed=5, constraint=regex()) for _ in range(2)]
    assert first == again
    assert len({(await ask(engine, seed=seed, constraint=regex())).text for seed in range(6)}) > 1


async def test_neighbours_without_a_constraint_draw_what_they_would_alone(engine: Engine) -> None:
    neighbours: list[dict[str, Any]] = [
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 1.0, "seed": 4, "ignore_eos": True},
        {"temperature": 0.7, "seed": 6, "frequency_penalty": 0.5, "ignore_eos": True},
    ]
    alone = [await ask(engine, **fields) for fields in neighbours]
    together = await asyncio.gather(
        *(ask(engine, **fields) for fields in neighbours),
        *(ask(engine, seed=seed, constraint=regex()) for seed in range(4)),
    )
    assert together[:3] == alone
    for answer in together[3:]:
        assert_whole(answer)


async def test_a_stop_string_and_a_stop_token_end_it_early(engine: Engine) -> None:
    whole = await ask(engine, constraint=regex())
    assert len(whole.text) >= 5
    stopped = await ask(engine, constraint=regex(), stop=("-",))
    assert (stopped.text, stopped.stop_reason) == (whole.text[:2], "-")
    stopped = await ask(engine, constraint=regex(), stop_token_ids=(ord("-"),))
    assert (stopped.text, stopped.stop_reason) == (whole.text[:2], ord("-"))


async def test_max_tokens_cuts_it_off(engine: Engine) -> None:
    whole = await ask(engine, constraint=regex())
    cut = await ask(engine, constraint=regex(), max_tokens=4)
    assert cut.finish_reason is FinishReason.LENGTH
    assert cut.text == whole.text[:4]


async def test_text_streams_as_it_is_generated(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=64, seed=3, constraint=regex("[a-z]{40}"))
    deltas = [delta async for delta in engine.generate("Hello", sampling)]
    assert len(deltas) > 5


async def test_a_bad_grammar_fails_its_own_request(engine: Engine) -> None:
    results = await asyncio.gather(
        ask(engine, constraint=regex("a(b")),
        ask(engine, constraint=regex()),
        ask(engine, temperature=0.0),
        return_exceptions=True,
    )
    refused, kept, free = results
    assert isinstance(refused, InvalidRequest)
    assert refused.field == "constraint"
    assert "unclosed group" in refused.message
    assert isinstance(kept, Answer)
    assert_whole(kept)
    assert isinstance(free, Answer)


async def test_a_burst_with_few_new_grammars_is_served_with_as_many_trials(
    engine: Engine, loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than a tenant may have trials, of which most wait for another's."""
    tried: list[Constraint] = []
    try_out = loaded.grammars._tried

    def count(constraint: Constraint) -> Any:
        tried.append(constraint)
        return try_out(constraint)

    monkeypatch.setattr(loaded.grammars, "_tried", count)
    monkeypatch.setattr(engine._readers._new_grammars, "_most", 3)
    constraints = [regex(f"burst{number}") for number in range(3)]
    answers = await asyncio.gather(*(ask(engine, constraint=each) for each in constraints * 15))
    assert [answer.text for answer in answers[:3]] == ["burst0", "burst1", "burst2"]
    assert {answer.text for answer in answers} == {"burst0", "burst1", "burst2"}
    assert sorted(each.text for each in tried) == ["burst0", "burst1", "burst2"]


async def test_an_output_that_can_not_be_followed_ends_with_its_reason(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ambiguous = Constraint("lark", "start: a\na: a a a | /[a-z]/")
    fields: dict[str, Any] = {"max_tokens": 480, "logit_bias": ((tiny.EOS, -100.0),), "seed": 1}
    results = await asyncio.gather(
        collect(engine.generate("a", SamplingParams(constraint=ambiguous, n=2, **fields)), 2),
        ask(engine, constraint=regex()),
        return_exceptions=True,
    )
    broken, kept = results
    assert isinstance(broken, BudgetSpent)
    assert "milliseconds a token" in str(broken)
    assert isinstance(kept, Answer)
    assert_whole(kept)
    while engine.stats().running:
        await asyncio.sleep(0.001)
    assert engine.stats().owned_blocks == 0


async def test_a_reader_that_leaves_takes_its_matcher_along(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=400, n=2, seed=3, constraint=regex("[a-z]{400}"))
    with by_hand(engine) as allow:
        allow(3)
        stream = engine.generate("Hello", sampling)
        await anext(stream)
        await stream.aclose()
    while engine.stats().running:
        await asyncio.sleep(0.001)
    assert engine._loop._constraints._matchers == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 2},
        {"allowed_token_ids": (65,)},
        {"bad_words": ("a",)},
        {"ignore_eos": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_could_contradict_a_constraint_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="does not go with a constraint") as caught:
        SamplingParams(constraint=regex(), **fields)
    assert caught.value.field in fields
