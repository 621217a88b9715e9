"""Beam search as its users see it: what is found, in which order, and what it can't go with."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import frontend
from engine.client import _delta
from engine.config_file import from_tree
from engine.frontend import Engine
from engine.generate import generate_file
from engine.llm import LLM
from engine.loading import LoadedEngine, load_engine
from engine.runtime.event_log import LogError
from engine.runtime.replay import replay
from engine.sampling import Constraint, InvalidRequest, SamplingParams
from engine.serve import convert
from engine.types import BeamScore, FinishReason
from tests.runtime import tiny
from tests.steps import by_hand
from tests.test_engine import assert_idle, until_idle, with_limits
from tests.test_samples import ask, text, tokens

NUM_TOKENS = 12
BEAMS = SamplingParams(beam_width=4, n=3, max_tokens=NUM_TOKENS, ignore_eos=True)
LONG = dataclasses.replace(BEAMS, max_tokens=200)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    return load_engine(from_tree(tiny.config_tree(folder)))


@pytest.fixture
def engine(loaded: LoadedEngine) -> Iterator[Engine]:
    engine = Engine(loaded)
    yield engine
    engine.close()
    assert_idle(engine)


async def test_the_best_outputs_come_whole_and_best_first(engine: Engine) -> None:
    found = await ask(engine, BEAMS)
    assert sorted(found) == [0, 1, 2]
    scores = []
    for deltas in found.values():
        [delta] = deltas
        assert len(delta.token_ids) == NUM_TOKENS
        assert delta.finish_reason is FinishReason.LENGTH
        assert delta.text == engine.tokenizer.decode(delta.token_ids)
        assert delta.beam is not None
        assert delta.beam.score == pytest.approx(delta.beam.logprob / NUM_TOKENS)
        scores.append(delta.beam.score)
    assert scores == sorted(scores, reverse=True)
    assert len({tokens(deltas) for deltas in found.values()}) == 3
    stats = engine.stats()
    assert (stats.finished, stats.generated_tokens) == ({"length": 3}, 3 * NUM_TOKENS)


async def test_a_beam_is_at_least_as_likely_as_what_greedy_choice_gives(engine: Engine) -> None:
    greedy = SamplingParams(temperature=0.0, logprobs=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    [deltas] = (await ask(engine, greedy)).values()
    alone = sum(entry.logprob for delta in deltas for entry in delta.logprobs)
    [best] = (await ask(engine, BEAMS))[0]
    assert best.beam is not None
    assert best.beam.logprob >= alone - 1e-4


async def test_a_stop_token_ends_an_output_and_is_not_part_of_its_text(engine: Engine) -> None:
    [best] = (await ask(engine, BEAMS))[0]
    stop = best.token_ids[4]
    found = await ask(engine, dataclasses.replace(BEAMS, stop_token_ids=(stop,)))
    ended = [deltas[0] for deltas in found.values() if deltas[0].stop_reason is not None]
    assert ended
    for delta in ended:
        assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, stop)
        assert delta.token_ids.index(stop) == len(delta.token_ids) - 1
        assert delta.text == engine.tokenizer.decode(delta.token_ids[:-1])


async def test_searches_beside_other_requests_change_nothing(engine: Engine) -> None:
    drawn = SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True)
    other = dataclasses.replace(BEAMS, beam_width=3, length_penalty=0.2, n=1)
    alone = [await ask(engine, sampling) for sampling in (BEAMS, drawn, other)]
    together = await asyncio.gather(*(ask(engine, s) for s in (BEAMS, drawn, other)))
    for ours, theirs in zip(together, alone, strict=True):
        assert {index: tokens(d) for index, d in ours.items()} == {
            index: tokens(d) for index, d in theirs.items()
        }
        assert {index: text(d) for index, d in ours.items()} == {
            index: text(d) for index, d in theirs.items()
        }


async def until_running(engine: Engine, count: int) -> None:
    while engine.stats().running < count:
        await asyncio.sleep(0.002)


async def test_leaving_the_stream_ends_the_search(engine: Engine) -> None:
    with by_hand(engine) as allow:
        allow(5)
        async with contextlib.aclosing(engine.generate("Hello", LONG)) as stream:
            task = asyncio.ensure_future(anext(stream))
            await until_running(engine, 4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until_idle(engine)
    assert engine.stats().finished == {"abort": 3}


async def test_an_abort_ends_the_search_and_says_so(engine: Engine) -> None:
    with by_hand(engine) as allow:
        allow(5)
        task = asyncio.create_task(ask(engine, LONG, request_id="mine"))
        await until_running(engine, 4)
        assert engine.abort("mine")
        reasons = [deltas[-1].finish_reason for deltas in (await task).values()]
    assert reasons == [FinishReason.ABORT] * 3
    await until_idle(engine)


async def test_a_deadline_ends_the_search(engine: Engine) -> None:
    found = await ask(engine, LONG, timeout=0.05)
    assert [deltas[-1].finish_reason for deltas in found.values()] == [FinishReason.DEADLINE] * 3


async def test_beams_count_one_by_one_against_the_queue_s_limit(loaded: LoadedEngine) -> None:
    engine = Engine(with_limits(loaded, max_waiting=3))
    try:
        with pytest.raises(InvalidRequest, match="beam_width: 4 sequences wait at once, but at m"):
            await ask(engine, BEAMS)
        assert len(await ask(engine, dataclasses.replace(BEAMS, beam_width=3))) == 3
    finally:
        engine.close()
    assert_idle(engine)


def test_a_search_in_a_small_pool_replays_from_the_event_log(
    loaded: LoadedEngine, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    plain = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    requests = [(prompt, plain) for prompt in ("one", "two", "three", "four")]
    requests.append(("Hello", dataclasses.replace(BEAMS, max_tokens=100)))
    with LLM(Engine(loaded)) as llm:
        alone = [llm.generate([prompt], sampling)[0] for prompt, sampling in requests]
    with LLM(Engine(with_limits(loaded, num_blocks=28), record=str(log))) as llm:
        together = llm.generate(*zip(*requests, strict=True))
        assert llm.engine.stats().preemptions >= 4
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert [each.token_ids for each in ours.others] == [
            each.token_ids for each in theirs.others
        ]
    replayed = replay(log, check=True)
    assert (replayed.requests, replayed.tokens) == (5, 7 * 100)
    (tmp_path / "damaged.jsonl").write_text(
        re.sub(r'("beams":\[\[\d+,\[)', r"\1[0,0.0],", log.read_text(), count=1)
    )
    with pytest.raises(LogError, match=r"step \d+ (has the same rows with other|differs)"):
        replay(tmp_path / "damaged.jsonl")


def test_lines_of_a_file_say_how_likely_their_outputs_are(
    loaded: LoadedEngine, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hello", "beam_width": 3, "n": 2, "max_tokens": 4}\n')
    assert generate_file(lambda: LLM(Engine(loaded)), source, output) == 0
    line = json.loads(output.read_text())
    [other] = line["others"]
    assert line["beam"]["score"] >= other["beam"]["score"]
    assert line["beam"].keys() == {"logprob", "score"}


def test_a_score_survives_the_wire() -> None:
    delta = frontend.Delta(
        index=1,
        text="text",
        token_ids=(1, 2),
        logprobs=(),
        prompt_logprobs=(),
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
        usage=frontend.Usage(3, 0, 2),
        beam=BeamScore(-1.5, -0.75),
    )
    [response] = convert.responses_from_delta("name", delta)
    assert _delta(response).beam == delta.beam
    [response] = convert.responses_from_delta("name", dataclasses.replace(delta, beam=None))
    assert _delta(response).beam is None


# A value of each field that says something else than its default.
REFUSED: dict[str, Any] = {
    "min_tokens": 1,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.5,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": ((1, 1.0),),
    "allowed_token_ids": (1,),
    "bad_words": ("word",),
    "stop": ("stop",),
    "constraint": Constraint("json_object"),
    "seed": 0,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "n": 5,
    "beam_width": 21,
    "length_penalty": 11.0,
    "early_stopping": 1,
}
TAKEN: dict[str, Any] = {
    "max_tokens": 3,
    "temperature": 0.0,
    "stop_token_ids": (1,),
    "ignore_eos": True,
    "skip_special_tokens": False,
    "n": 4,
    "length_penalty": -10.0,
    "early_stopping": True,
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_does_not_go_with_beams_is_refused_by_its_name(field: str) -> None:
    fields: dict[str, Any] = {"beam_width": 4, field: REFUSED[field]}
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields)
    assert caught.value.field == field
    assert len(caught.value.message) > 10


def test_every_other_field_goes_with_beams() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == REFUSED.keys() | TAKEN.keys()
    fields: dict[str, Any] = {"beam_width": 4, **TAKEN}
    assert SamplingParams(**fields).is_greedy


@pytest.mark.parametrize("fields", [{"length_penalty": 2.0}, {"early_stopping": True}])
def test_fields_of_a_search_are_refused_without_one(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"is for beam search; set beam_width above 1"):
        SamplingParams(**fields)


@pytest.mark.parametrize("width", [0, -1, 21, 2.0, True, "2"])
def test_a_width_is_a_number_of_beams(width: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"beam_width: .* whole number in \[1, 20\]"):
        SamplingParams(beam_width=width)


async def test_beams_must_have_enough_tokens_to_go_on_with(engine: Engine) -> None:
    sampling = SamplingParams(beam_width=5, stop_token_ids=tuple(range(16)), ignore_eos=True)
    with pytest.raises(InvalidRequest, match="beam_width: 5 beams and 16 tokens that end them"):
        await ask(engine, sampling)
    assert len(await ask(engine, dataclasses.replace(sampling, beam_width=4, max_tokens=2))) == 1
    with pytest.raises(InvalidRequest, match="beam_width: 9 beams of a prompt run at once"):
        await ask(engine, dataclasses.replace(BEAMS, beam_width=9))
