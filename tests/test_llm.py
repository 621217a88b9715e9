"""Generation in one's own process: order, parameters a prompt, errors, and closing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.frontend import Engine, EngineStopped
from engine.llm import LLM, Completion, as_prompt
from engine.loading import LoadedEngine
from engine.sampling import InvalidRequest, SamplingParams
from engine.text import Message
from engine.types import FinishReason
from tests.runtime import tiny
from tests.runtime.tiny import random_ids

GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    config = tiny.write_config(folder / "config.yaml", folder)
    told: list[tuple[Any, ...]] = []
    with LLM.from_config(
        config,
        overrides=["model.name=tiny-one", "scheduler.max_waiting=4"],
        progress=lambda *step: told.append(step),
    ) as llm:
        assert {what for what, _, _ in told} == {"Loading weights", "Compiling"}
        assert told[-1] == ("Compiling", 2, 2)
        yield llm


@pytest.fixture
def loaded(llm: LLM) -> LoadedEngine:
    """The parts of it, for a second engine with limits of its own."""
    return llm.engine._loaded


def settle(llm: LLM) -> None:
    """Wait until nothing runs any more, and check that every block is back."""
    while (stats := llm.engine.stats()).running or stats.waiting:
        pass
    assert stats.owned_blocks == 0


def test_the_config_and_the_overrides_count(llm: LLM) -> None:
    assert llm.model_info().name == "tiny-one"
    assert llm.engine.config.scheduler.max_waiting == 4


def test_completions_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    # The first take longest.
    prompts = [random_ids(5 + i, seed=i) for i in range(4)]
    params = [dataclasses.replace(GREEDY, max_tokens=40 - 10 * i) for i in range(4)]
    together = llm.generate(prompts, params)
    assert [len(completion.token_ids) for completion in together] == [40, 30, 20, 10]
    for prompt, each, completion in zip(prompts, params, together, strict=True):
        [alone] = llm.generate([prompt], each)
        assert completion.token_ids == alone.token_ids


def test_a_completion_has_everything_that_its_deltas_had(llm: LLM) -> None:
    letters = tuple(range(97, 123))
    asked = dataclasses.replace(GREEDY, allowed_token_ids=letters, logprobs=1, prompt_logprobs=0)
    [whole] = llm.generate(["Hello"], asked)
    assert whole.text == bytes(whole.token_ids).decode()
    assert [entry.token_id for entry in whole.logprobs] == list(whole.token_ids)
    assert [entry.token_id for entry in whole.prompt_logprobs] == list(b"ello")
    assert (whole.finish_reason, whole.stop_reason) == (FinishReason.LENGTH, None)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 10)
    [stopped] = llm.generate(["Hello"], dataclasses.replace(asked, stop=(whole.text[3:5],)))
    assert stopped.text == whole.text[: whole.text.index(whole.text[3:5])]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, whole.text[3:5])


def test_prompts_may_be_text_ids_arrays_and_chats(llm: LLM) -> None:
    prompts: list[Any] = [
        "Hello",
        [72, 101, 108, 108, 111],
        np.frombuffer(b"Hello", np.uint8),
        [{"role": "user", "content": "Hello"}],
        [Message("user", "Hello")],
    ]
    text, ids, array, chat, messages = llm.generate(prompts, GREEDY)
    assert text.token_ids == ids.token_ids == array.token_ids
    assert chat.token_ids == messages.token_ids
    assert chat.usage.prompt_tokens == len("user:Hello" + "assistant:") + 3


def test_without_parameters_the_defaults_are_taken(llm: LLM) -> None:
    [completion] = llm.generate([random_ids(500)])
    assert len(completion.token_ids) <= 12  # as far as the model's 512 tokens go


def test_no_prompts_make_no_completions(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_one_bad_prompt_is_an_error_and_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="300 is not a token id"):
        llm.generate(["Hello", [300], "there"], LONG)
    settle(llm)
    wrong_prompts: tuple[tuple[Any, str], ...] = (
        ([{"role": "user"}], "each must have a role and a content"),
        ([{"role": "user", "content": "x", "name": "y"}], "and nothing else"),
        ([{"role": "user", "content": "x"}, "y"], "each must have a role and a content"),
        ([], "is empty"),
        ("", "is empty"),
    )
    for wrong, message in wrong_prompts:
        with pytest.raises(InvalidRequest, match=message):
            llm.generate([wrong], GREEDY)
    assert len(llm.generate(["Hello"], GREEDY)[0].token_ids) == 10


def test_generate_each_gives_every_result_and_every_error(llm: LLM) -> None:
    prompts: list[Any] = ["Hello", [300], "there", [], "x" * 600]
    results = dict(llm.generate_each((prompt, GREEDY) for prompt in prompts))
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert [isinstance(results[i], Completion) for i in range(5)] == [True, False, True] + [
        False
    ] * 2
    assert all(isinstance(results[i], InvalidRequest) for i in (1, 3, 4))


def test_more_requests_than_may_wait_are_all_served(llm: LLM) -> None:
    """Eight run and four may wait: the others come back when there is room."""
    sampling = dataclasses.replace(GREEDY, ignore_eos=True)
    completions = llm.generate([random_ids(3, seed=i) for i in range(14)], sampling)
    assert [len(completion.token_ids) for completion in completions] == [10] * 14


def test_requests_are_read_as_room_comes(llm: LLM) -> None:
    read: list[int] = []

    def requests() -> Iterator[tuple[str, SamplingParams]]:
        for number in range(20):
            read.append(number)
            yield "Hello", GREEDY

    for count, (index, _) in enumerate(llm.generate_each(requests(), max_pending=3)):
        assert len(read) <= count + 3
        assert index in read


def test_leaving_early_aborts_the_rest(llm: LLM) -> None:
    results = llm.generate_each([("Hello", GREEDY), *[("there", LONG)] * 3])
    assert next(results)[0] == 0
    results.close()
    settle(llm)


def test_an_error_of_the_source_reaches_the_caller(llm: LLM) -> None:
    def requests() -> Iterator[tuple[str, SamplingParams]]:
        yield "Hello", LONG
        raise KeyError("the file ends here")

    with pytest.raises(KeyError, match="the file ends here"):
        list(llm.generate_each(requests()))
    settle(llm)


async def test_it_works_where_an_event_loop_runs(llm: LLM) -> None:
    await asyncio.sleep(0)
    [completion] = llm.generate(["Hello"], GREEDY)
    assert len(completion.token_ids) == 10


def test_misuse_is_explained(llm: LLM) -> None:
    with pytest.raises(TypeError, match="give a list of prompts"):
        llm.generate("Hello")
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling parameters"):
        llm.generate(["a", "b"], [GREEDY])


def test_closing_twice_is_fine_and_afterwards_it_serves_nothing(loaded: LoadedEngine) -> None:
    second = LLM(Engine(loaded))
    assert second.generate(["Hello"], GREEDY)
    second.close()
    second.close()
    assert not second._thread.is_alive()


def test_a_step_that_failed_is_an_error_of_its_prompts(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = llm.engine._loaded.runner
    launch = runner.launch

    def failing(plan: Any, batch: Any) -> Any:
        monkeypatch.setattr(runner, "launch", launch)
        raise RuntimeError("the device hiccuped")

    monkeypatch.setattr(runner, "launch", failing)
    with pytest.raises(RuntimeError, match="the step that carried this request failed"):
        llm.generate(["Hello"], GREEDY)
    assert len(llm.generate(["Hello"], GREEDY)[0].token_ids) == 10


def test_an_engine_that_died_is_an_error_and_no_endless_wait(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    second = LLM(Engine(loaded))
    with monkeypatch.context() as patch:
        patch.setattr(loaded.runner, "launch", broken)
        patch.setattr(loaded.runner, "reset", broken)
        with pytest.raises(RuntimeError):
            second.generate(["Hello"], GREEDY)
    loaded.runner.reset()
    with pytest.raises(EngineStopped, match="its log says why"):
        second.generate(["Hello"] * 3, GREEDY)
    second.close()


def test_as_prompt_keeps_what_is_in_form() -> None:
    assert as_prompt("x") == "x"
    assert as_prompt([1, 2]) == (1, 2)
    assert as_prompt([{"role": "user", "content": "x"}]) == (Message("user", "x"),)
    assert as_prompt([]) == ()
