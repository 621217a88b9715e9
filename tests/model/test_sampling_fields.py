"""No field is parsed and dropped: each one changes what a real model gives, or how it ends.

The walks go over the dataclasses themselves, so a field that is added without an entry here
fails. Each entry differs from its base in that field alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.config_file import from_tree
from engine.frontend import Engine
from engine.sampling import Constraint, SamplingParams
from engine.types import BeamScore, Domain, FinishReason, Fork, Request, TokenLogprobs
from tests import compile_cache
from tests.conftest import DATA
from tests.engines import Result, make_request, small_engine

LLAMA = DATA / "tiny" / "llama"
PROMPT = tuple(range(40, 60))
SPECIAL, EOS = 3, 2  # EOS is the model's own, as its config.json says


class Output(NamedTuple):
    """All that a caller sees of one generation."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    beams: tuple[BeamScore, ...]


class Change(NamedTuple):
    """A value of one field that must change the output of `base`.

    Either may be given as a function of the output so far: `base` of that without it, the
    value of that of `base`.
    """

    value: Any
    base: Mapping[str, Any] = {}
    holds: Callable[[Output, Output], bool] = lambda before, after: True


# Beams, and tokens that end some of them early.
SEARCH = {
    "temperature": 0.0,
    "seed": None,
    "beam_width": 4,
    "stop_token_ids": tuple(range(4, 128, 9)),
}
CHANGES: dict[str, Change] = {
    "max_tokens": Change(5, holds=lambda _, after: len(after.token_ids) == 5),
    "min_tokens": Change(
        9,
        {"logit_bias": ((EOS, 50.0),)},
        lambda before, after: len(before.token_ids) == 1 and len(after.token_ids) == 10,
    ),
    "temperature": Change(0.0),
    "top_k": Change(1),
    "top_p": Change(0.05),
    "min_p": Change(0.9),
    "repetition_penalty": Change(50.0),
    "presence_penalty": Change(90.0, holds=lambda _, after: repeats(after) == 0),
    "frequency_penalty": Change(
        -90.0, holds=lambda before, after: repeats(after) > repeats(before)
    ),
    "logit_bias": Change(((77, 100.0),), holds=lambda _, after: set(after.token_ids) == {77}),
    "allowed_token_ids": Change(
        (70, 71, 72), holds=lambda _, after: set(after.token_ids) <= {70, 71, 72}
    ),
    "bad_words": Change(
        lambda before: (before.text[4],),
        holds=lambda before, after: before.text[4] not in after.text,
    ),
    "stop": Change(
        lambda before: (before.text[4:6],),
        holds=lambda before, after: (
            after.text == before.text[: before.text.index(before.text[4:6])]
            and after.stop_reason == before.text[4:6]
        ),
    ),
    "stop_token_ids": Change(
        lambda before: (before.token_ids[6],),
        holds=lambda before, after: after.stop_reason == before.token_ids[6],
    ),
    "ignore_eos": Change(
        True,
        {"logit_bias": ((EOS, 50.0),)},
        lambda before, after: len(before.token_ids) == 1 and len(after.token_ids) == 24,
    ),
    "seed": Change(12),
    "logprobs": Change(2, holds=lambda _, after: len(after.logprobs) == len(after.token_ids)),
    "prompt_logprobs": Change(
        2, holds=lambda _, after: len(after.prompt_logprobs) == len(PROMPT) - 1
    ),
    "skip_special_tokens": Change(
        False,
        {"logit_bias": ((SPECIAL, 100.0),)},
        lambda before, after: before.text == "" and after.text == "<special>" * 24,
    ),
    "n": Change(
        3,
        {"ignore_eos": True},
        lambda before, after: len(after.token_ids) == 3 * len(before.token_ids),
    ),
    "beam_width": Change(
        4,
        {"temperature": 0.0, "seed": None},
        lambda before, after: before.beams == () and after.beams[0].logprob < 0,
    ),
    "length_penalty": Change(
        0.5,
        SEARCH,
        lambda before, after: (
            after.beams[0].logprob / after.beams[0].score
            == pytest.approx(len(after.token_ids) ** 0.5)
        ),
    ),
    "early_stopping": Change(True, SEARCH),
    "constraint": Change(
        Constraint("regex", "[A-C]{7}"),
        holds=lambda _, after: re.fullmatch("[A-C]{7}", after.text) is not None,
    ),
}


def repeats(output: Output) -> int:
    return len(output.token_ids) - len(set(output.token_ids))


def write_tokenizer(folder: Path) -> None:
    """128 tokens: four special ones and, for the rest, printable ASCII and pairs of it."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    pairs = [(characters[index], characters[index + 1]) for index in range(29)]
    special = ["<unknown>", "<s>", "</s>", "<special>"]
    tokens = [*special, *characters, *(first + second for first, second in pairs)]
    assert len(set(tokens)) == 128
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A whole engine, tokenizer and step loop included, over a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(LLAMA / name, folder)
    write_tokenizer(folder)
    engine = Engine.from_config(
        from_tree(
            {
                "model": {"source": str(folder), "dtype": "float32", "max_model_len": 128},
                "cache": {"block_size": 8, "num_blocks": 64},
                "scheduler": {"max_num_seqs": 4, "max_step_tokens": 32},
                "buckets": {
                    "decode_seqs": [4],
                    "prefill_tokens": [32],
                    "prefill_seqs": [4],
                },
                "compile_cache": str(compile_cache.FOLDER),
            }
        )
    )
    yield engine
    engine.close()


def generate(engine: Engine, fields: Mapping[str, Any], **options: Any) -> Output:
    async def run() -> Output:
        deltas = [
            delta async for delta in engine.generate(PROMPT, SamplingParams(**fields), **options)
        ]
        return Output(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
            prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
            finish_reason=deltas[-1].finish_reason,
            stop_reason=deltas[-1].stop_reason,
            beams=tuple(delta.beam for delta in deltas if delta.beam is not None),
        )

    return asyncio.run(run())


BASE = {"max_tokens": 24, "temperature": 1.0, "seed": 11}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_each_sampling_field_changes_the_output(name: str, engine: Engine) -> None:
    assert name in CHANGES, f"say here what SamplingParams.{name} changes"
    change = CHANGES[name]
    base: dict[str, Any] = {**BASE, **change.base}
    before = generate(engine, base)
    assert generate(engine, base) == before, "the same request gives something else"
    value = change.value(before) if callable(change.value) else change.value
    assert value != getattr(SamplingParams(**base), name)
    after = generate(engine, {**base, name: value})
    assert after != before
    assert change.holds(before, after)


def test_no_entry_is_left_of_a_field_that_is_gone() -> None:
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(SamplingParams)}


# Fields of Request, as the scheduler and the runner read them: two requests run side by side,
# the second with the field changed. What is returned must differ.
LONG = tuple(range(60, 100))  # two steps long, so that its neighbour may find its blocks
SAMPLED = {"temperature": 1.0, "max_tokens": 12, "seed": 5}
REQUESTS: dict[str, tuple[dict[str, Any], Any]] = {
    "prompt_ids": (SAMPLED, tuple(range(80, 120))),
    "sampling": (SAMPLED, SamplingParams(temperature=0.0)),
    "max_tokens": (SAMPLED, 3),
    "seed": (SAMPLED, 6),
    "stop_ids": (SAMPLED, frozenset(range(64))),
    "bad_word_ids": (
        {**SAMPLED, "temperature": 0.0, "bad_words": ("half of the tokens",)},
        tuple((token,) for token in range(64)),
    ),
    "domain": (SAMPLED, Domain("somebody else")),
    "priority": (SAMPLED, -1),
    "forks": (SAMPLED, (Fork("third", 7),)),
}
ELSEWHERE = {
    "request_id": "names the output: test_results_go_to_the_request_of_their_id",
    "deadline": "is the loop's: test_a_deadline_ends_a_request",
    "cache_ttl": "tests/core/test_retention.py: test_blocks_stay_for_their_time_to_live",
    "is_public": "tests/core/test_retention.py: test_every_domain_shares_a_public_prefix",
    "matchers": "tests/runtime/test_constraints.py: what they are asked, and when",
    "is_private": "tests/core/test_retention.py: test_a_private_request_leaves_nothing",
}


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(Request) if field.init]
)
def test_each_request_field_changes_the_result(name: str) -> None:
    if name in ELSEWHERE:
        return
    assert name in REQUESTS, f"say here what Request.{name} changes"
    fields, value = REQUESTS[name]
    first = make_request("first", LONG, **fields)
    same = dataclasses.replace(first, request_id="second")
    other = dataclasses.replace(same, **{name: value})
    assert getattr(same, name) != value
    assert run_pair(first, same) != run_pair(first, other)


def run_pair(first: Request, second: Request) -> tuple[Result, Result, list[str]]:
    """Results of two requests that arrive in this order, and who was started first."""
    order: list[str] = []
    engine = small_engine(LLAMA)
    results = engine.run(
        [first, second],
        on_plan=lambda plan, batch: order.extend(row.request.request_id for row in plan.rows),
    )
    return results["first"], results["second"], list(dict.fromkeys(order))


def test_results_go_to_the_request_of_their_id() -> None:
    engine = small_engine(LLAMA)
    requests = [make_request(f"r{token}", [token] * 5) for token in (5, 6, 7)]
    alone = {each.request_id: engine.run_one(each) for each in requests}
    assert len({result.token_ids for result in alone.values()}) == 3
    together = engine.run(requests)
    assert {name: result.token_ids for name, result in together.items()} == {
        name: result.token_ids for name, result in alone.items()
    }


def test_a_deadline_ends_a_request(engine: Engine) -> None:
    fields = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True}
    assert generate(engine, fields).finish_reason is FinishReason.LENGTH
    late = generate(engine, fields, timeout=1e-6)
    assert late.finish_reason is FinishReason.DEADLINE
    assert len(late.token_ids) < 100


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"min_tokens": 1},
        {"logit_bias": ((1, 1.0),)},
        {"allowed_token_ids": (1,)},
        {"bad_words": ("x",)},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"temperature": 0.1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_request_that_needs_more_than_an_argmax_has_a_sampler_row(fields: dict[str, Any]) -> None:
    assert make_request("plain", (1,)).sampler_row is None
    assert make_request("special", (1,), **fields).sampler_row is not None
