"""Several samples in one stream: each ends in its own way, and all of them with the stream."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config_file import from_tree
from engine.frontend import Engine
from engine.llm import LLM
from engine.loading import LoadedEngine, load_engine
from engine.runtime.replay import replay
from engine.sampling import InvalidRequest, SamplingParams
from engine.streams import Delta
from engine.types import FinishReason
from tests.runtime import tiny
from tests.steps import by_hand
from tests.test_engine import assert_idle, until_idle, with_limits

NUM_TOKENS = 24
DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=NUM_TOKENS, ignore_eos=True)
FOUR = dataclasses.replace(DRAWN, n=4)
LONG = dataclasses.replace(FOUR, max_tokens=400)


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


async def ask(engine: Engine, sampling: SamplingParams, **options: Any) -> dict[int, list[Delta]]:
    """The deltas of each sample."""
    samples: dict[int, list[Delta]] = defaultdict(list)
    async for delta in engine.generate("Hello", sampling, **options):
        samples[delta.index].append(delta)
    for deltas in samples.values():
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason is not None
        total = deltas[-1].usage.completion_tokens
        assert sum(len(delta.token_ids) for delta in deltas) == total
    return dict(samples)


def tokens(deltas: list[Delta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_sample_i_is_the_request_with_seed_plus_i(engine: Engine) -> None:
    samples = await ask(engine, FOUR)
    assert sorted(samples) == [0, 1, 2, 3]
    for index, deltas in samples.items():
        [alone] = (await ask(engine, dataclasses.replace(DRAWN, seed=7 + index))).values()
        assert tokens(deltas) == tokens(alone)
        assert text(deltas) == text(alone) == engine.tokenizer.decode(tokens(deltas))
    assert len({tokens(deltas) for deltas in samples.values()}) == 4


async def test_the_largest_seed_is_followed_by_zero(engine: Engine) -> None:
    samples = await ask(engine, dataclasses.replace(DRAWN, seed=2**64 - 1, n=2))
    [alone] = (await ask(engine, dataclasses.replace(DRAWN, seed=0))).values()
    assert tokens(samples[1]) == tokens(alone)


async def test_a_stop_string_ends_its_own_sample_only(engine: Engine) -> None:
    letters = tuple(range(ord("a"), ord("z") + 1))
    sampling = dataclasses.replace(FOUR, allowed_token_ids=letters)
    before = {index: text(deltas) for index, deltas in (await ask(engine, sampling)).items()}
    stop = before[2][5:8]
    assert [stop in other for other in before.values()] == [False, False, True, False]
    after = await ask(engine, dataclasses.replace(sampling, stop=(stop,)))
    for index, deltas in after.items():
        if index == 2:
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, stop)
            assert text(deltas) == before[2][: before[2].index(stop)]
        else:
            assert deltas[-1].finish_reason is FinishReason.LENGTH
            assert text(deltas) == before[index]


async def test_prompt_log_probabilities_come_once(engine: Engine) -> None:
    samples = await ask(engine, dataclasses.replace(FOUR, prompt_logprobs=1, logprobs=1))
    counts = [sum(len(d.prompt_logprobs) for d in samples[index]) for index in range(4)]
    assert counts == [len("Hello") - 1, 0, 0, 0]
    for deltas in samples.values():
        assert sum(len(delta.logprobs) for delta in deltas) == NUM_TOKENS


async def test_leaving_the_stream_ends_all_samples(engine: Engine) -> None:
    with by_hand(engine) as allow:
        allow(5)
        async with contextlib.aclosing(engine.generate("Hello", LONG)) as stream:
            async for _ in stream:
                break
        await until_idle(engine)
    assert engine.stats().finished == {"abort": 4}


async def test_an_abort_ends_all_samples_and_says_so(engine: Engine) -> None:
    with by_hand(engine) as allow:
        allow(5)
        task = asyncio.create_task(ask(engine, LONG, request_id="mine"))
        while not engine.stats().generated_tokens:
            await asyncio.sleep(0.002)
        assert engine.abort("mine")
        reasons = [deltas[-1].finish_reason for deltas in (await task).values()]
    assert reasons == [FinishReason.ABORT] * 4
    await until_idle(engine)


async def test_a_deadline_ends_all_samples(engine: Engine) -> None:
    samples = await ask(engine, LONG, timeout=0.05)
    assert {deltas[-1].finish_reason for deltas in samples.values()} == {FinishReason.DEADLINE}
    assert sorted(samples) == [0, 1, 2, 3]


async def test_more_samples_than_sequences_that_run_are_refused(engine: Engine) -> None:
    most = engine._loop.limits.max_num_seqs
    assert len(await ask(engine, dataclasses.replace(DRAWN, n=most, max_tokens=2))) == most
    with pytest.raises(InvalidRequest, match=rf"n: {most + 1} samples .* at most {most} seq"):
        await ask(engine, dataclasses.replace(DRAWN, n=most + 1))


async def test_samples_count_one_by_one_against_the_queue_s_limit(loaded: LoadedEngine) -> None:
    engine = Engine(with_limits(loaded, max_waiting=3))
    try:
        with pytest.raises(InvalidRequest, match="n: 4 sequences wait at once, but at most 3"):
            await ask(engine, FOUR)
        assert len(await ask(engine, dataclasses.replace(FOUR, n=3))) == 3
    finally:
        engine.close()
    assert_idle(engine)


def test_a_completion_brings_its_other_samples(loaded: LoadedEngine, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    with LLM(Engine(loaded, record=str(log))) as llm:
        [both] = llm.generate(["Hello"], FOUR)
        alone = llm.generate(
            ["Hello"] * 4, [dataclasses.replace(DRAWN, seed=7 + index) for index in range(4)]
        )
    samples = [both, *both.others]
    assert [each.token_ids for each in samples] == [each.token_ids for each in alone]
    assert [each.text for each in samples] == [each.text for each in alone]
    assert [len(each.others) for each in samples] == [3, 0, 0, 0]
    replayed = replay(log, check=True)
    assert (replayed.requests, replayed.tokens) == (5, 8 * NUM_TOKENS)
