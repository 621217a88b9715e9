"""What rows of a batch are to each other: draws, histories, log-probabilities, and their cost."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.core import batching
from engine.core.buckets import Bucket
from engine.model import sampler
from engine.runtime.slots import slot_state
from engine.sampling import MAX_LOGPROBS, Constraint
from engine.types import Request
from tests.conftest import DATA
from tests.engines import Result, make_request, small_engine
from tests.model.sampler_bench import (
    NUM_SLOTS,
    Row,
    choose,
    random_logits,
    request,
    sample,
    set_slot,
    tokens,
)
from tests.model.sampler_oracle import distribution, edit, log_softmax

# A seed names a draw --------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    """Not on row, slot, bucket or neighbours."""
    values = random_logits(1, 300)[0]
    made = request(temperature=2.0, seed=2**63 + 12345)
    history = (5, 6)
    [expected] = tokens(values[None], [Row(made, history)], num_seqs=8)
    others = [
        Row(request(temperature=1.0, seed=1)),
        Row(request()),
        Row(request(temperature=9.0, seed=made.seed, repetition_penalty=2.0), (1,)),
        Row(request(temperature=2.0, seed=9), samples=False),
    ]
    for place in range(5):
        rows = [*others[:place], Row(made, history, slot=7), *others[place:]]
        logits = random_logits(5, 300, seed=place + 1)
        logits[place] = values
        assert tokens(logits, rows, num_seqs=8)[place] == expected
    assert tokens(logits, rows)[4] == expected  # a bucket without padding


def test_each_seed_and_each_position_makes_another_draw() -> None:
    """The whole 64 bits of a seed count."""
    values = np.zeros((8, 100_000), np.float32)
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1, 12345]
    drawn = {
        token
        for position in range(4)
        for token in tokens(
            values,
            [
                Row(dataclasses.replace(request(temperature=1.0), seed=seed), (0,) * position)
                for seed in seeds
            ],
        )
    }
    assert len(drawn) >= 31  # 32 draws of 100,000: one pair alike has a chance of 1 in 200


@pytest.fixture(scope="module")
def crowded() -> tuple[list[Request], dict[str, Result]]:
    """Requests that sample with every edit, and what each gives when it runs alone."""
    engine = small_engine(DATA / "tiny" / "llama")
    requests = [
        make_request(
            f"r{index}",
            [(7 * index + step) % 128 for step in range(9 + index)],
            20,
            temperature=1.5,
            top_p=0.9,
            seed=1000 + index,
            frequency_penalty=0.5,
            repetition_penalty=1.1,
            bad_words=("x",),
            bad_word_ids=((index,), (3, 4), (50 + index, 51, 52)),
            min_tokens=5,
            stop_ids=frozenset({2}),
            logprobs=3,
        )
        for index in range(6)
    ]
    return requests, {each.request_id: engine.run_one(each) for each in requests}


def test_draws_survive_preemption_and_company(
    crowded: tuple[list[Request], dict[str, Result]],
) -> None:
    """A pool so small that sequences are preempted; history, counts and draws go on."""
    requests, alone = crowded
    engine = small_engine(DATA / "tiny" / "llama")
    limits = dataclasses.replace(engine.limits, num_blocks=8)
    preempted: list[str] = []
    results = engine.run(
        requests, limits=limits, on_plan=lambda plan, batch: preempted.extend(plan.preempted)
    )
    assert preempted, "the pool was not small enough"
    for request_id, result in results.items():
        assert result.token_ids == alone[request_id].token_ids
        assert result.finish_reason == alone[request_id].finish_reason


# Log-probabilities ----------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits_for_chosen_and_likeliest_tokens() -> None:
    logits = random_logits(4, 100) * 5
    rows = [
        Row(request(logprobs=5)),
        Row(request(logprobs=0, temperature=3.0, seed=3, top_k=50)),
        Row(request(logprobs=20, temperature=0.0, logit_bias=((42, 100.0),))),
        Row(request()),
    ]
    sampled, _ = choose(logits, rows)
    expected = log_softmax(logits)
    for row in range(3):
        token = sampled.token_ids[row]
        np.testing.assert_allclose(sampled.logprobs[row], expected[row, token], atol=1e-5)
        order = np.argsort(-logits[row], kind="stable")[:MAX_LOGPROBS]
        assert sampled.top_ids[row].tolist() == order.tolist()
        np.testing.assert_allclose(sampled.top_logprobs[row], expected[row, order], atol=1e-5)
    assert sampled.token_ids[2] == 42
    assert not sampled.top_logprobs[3].any(), "a row that didn't ask was served"


def test_each_prompt_logprob_is_of_the_next_prompt_token() -> None:
    """Across chunks and beside other rows, each with as many of the likeliest as it asked for."""
    engine = small_engine(DATA / "tiny" / "llama")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, size).tolist() for size in (45, 3, 1, 20)]
    requests = [
        make_request(f"r{count}", prompt, 3, prompt_logprobs=count, logprobs=1)
        for count, prompt in zip((4, 0, 2, None), prompts, strict=True)
    ]
    results = engine.run(requests)
    for made, prompt in zip(requests, prompts, strict=True):
        result, count = results[made.request_id], made.sampling.prompt_logprobs
        entries = result.prompt_logprobs
        if count is None:
            assert entries == ()
            continue
        assert [entry.token_id for entry in entries] == prompt[1:]
        assert all(len(entry.top) == count for entry in entries)
        for entry in entries:
            assert [value for _, value in entry.top] == sorted(
                (value for _, value in entry.top), reverse=True
            )
            if entry.token_id in dict(entry.top):
                assert dict(entry.top)[entry.token_id] == entry.logprob
    # The same text as output: a token's log-probability is the same wherever it stands.
    whole = (*prompts[0], *results["r4"].token_ids)
    again = engine.run_one(make_request("again", whole, 1, prompt_logprobs=0))
    written = [entry.logprob for entry in results["r4"].logprobs]
    read = [entry.logprob for entry in again.prompt_logprobs[len(prompts[0]) - 1 :]]
    np.testing.assert_allclose(read, written, rtol=0, atol=1e-5)
    assert len(read) == len(written) == 3


# What rows do to each other, and what they cost -----------------------------------------


def test_rows_that_ask_for_nothing_are_left_alone_by_those_that_ask_for_everything() -> None:
    logits = random_logits(6, 64)
    greedy, special = Row(request()), edit_everything()
    rows = [greedy, special, greedy, special, greedy, special]
    chosen = tokens(logits, rows)
    assert chosen[::2] == logits[::2].argmax(axis=1).tolist()
    for index in (1, 3, 5):
        [alone] = tokens(logits[index : index + 1], [special], num_seqs=6)
        assert chosen[index] == alone


def edit_everything() -> Row:
    return Row(
        request(
            temperature=1.3,
            top_k=40,
            top_p=0.95,
            min_p=0.001,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias=((3, 5.0),),
            allowed_token_ids=tuple(range(60)),
            bad_words=("x",),
            bad_word_ids=((1, 2), (3,)),
            min_tokens=2,
            stop_ids=frozenset({9}),
            logprobs=20,
            seed=77,
        ),
        (1,),
    )


def test_only_the_slots_of_rows_that_sample_change() -> None:
    logits = random_logits(4, 64)
    state = sampler.initial_state(NUM_SLOTS + 1, 64)
    everything = edit_everything()
    for slot in range(NUM_SLOTS):
        new = slot_state(everything.request, everything.history, 64)
        state = set_slot(state, np.int32(slot), new)
    before = jax.tree.map(np.asarray, state)
    rows = [
        Row(request(), slot=2, is_new=False),
        Row(everything.request, slot=6, samples=False, is_new=False),
        Row(everything.request, (1,), slot=4, is_new=False),
        Row(request(), slot=0, samples=False, is_new=False),
    ]
    sampled, state = choose(logits, rows, num_seqs=8, state=state)
    for name, old, new in zip(before._fields, before, map(np.asarray, state), strict=True):
        untouched = [slot for slot in range(NUM_SLOTS) if slot not in (2, 4)]
        np.testing.assert_array_equal(new[untouched], old[untouched], err_msg=name)
    for slot, row in ((2, 0), (4, 2)):
        token = int(sampled.token_ids[row])
        assert np.asarray(state.recent)[slot].tolist() == [*before.recent[slot][1:], token]
        added = np.asarray(state.output_counts)[slot] - before.output_counts[slot]
        assert np.flatnonzero(added).tolist() == [token]
        assert added[token] == 1


def test_setting_a_slot_leaves_nothing_of_its_last_owner() -> None:
    state = sampler.initial_state(3, 64)
    everything = edit_everything()
    used = slot_state(everything.request, everything.history, 64)
    fresh = slot_state(request(min_tokens=1), (), 64)
    for row in (used, fresh):
        state = set_slot(state, np.int32(1), row)
    for name, array, new in zip(state._fields, state, fresh, strict=True):
        np.testing.assert_array_equal(np.asarray(array)[1], new, err_msg=name)


def computations(hlo: str) -> dict[str, list[str]]:
    """Lines of each computation of an HLO module; the entry's name is ENTRY."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "ENTRY" if match[1] else match[2]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def reachable(parts: dict[str, list[str]], *, through_branches: bool) -> list[str]:
    """Every line that the entry can reach, with or without the branches of conditionals."""
    lines, todo, seen = [], ["ENTRY"], {"ENTRY"}
    while todo:
        for line in parts[todo.pop()]:
            lines.append(line)
            if " conditional(" in line and not through_branches:
                continue
            for name in re.findall(r"%([\w.\-]+)", line):
                if name in parts and name not in seen:
                    seen.add(name)
                    todo.append(name)
    return lines


@pytest.mark.parametrize("num_seqs", [1, 8])
def test_nobody_pays_for_a_sort_and_plain_rows_pay_for_an_argmax_alone(num_seqs: int) -> None:
    """A single row is a case of its own: there, nothing depends on the loop's index."""
    vocab = 5000
    batch = batching.empty(Bucket(num_seqs, num_seqs, 1), num_seqs)
    state = sampler.initial_state(num_seqs + 1, vocab)
    logits = jax.ShapeDtypeStruct((num_seqs, vocab), jnp.float32)
    hlo = sample.lower(logits, batch, state, batching.masks(num_seqs, vocab)).compile().as_text()
    assert hlo is not None
    parts = computations(hlo)

    def uses(pattern: str, *, through_branches: bool) -> bool:
        lines = reachable(parts, through_branches=through_branches)
        return any(re.search(pattern, line, re.IGNORECASE) for line in lines)

    top_k = r'" ?topk|\btopk\('
    assert uses(top_k, through_branches=True), "the pattern no longer fits the compiler's text"
    assert not uses(top_k, through_branches=False)
    assert not uses(r"\bsort\(", through_branches=True)
    for what in (r" while\(", r" exponential\(", r" log\("):
        assert uses(what, through_branches=True)
        assert not uses(what, through_branches=False)


# Masks ----------------------------------------------------------------------------------


def constrained(**fields: Any) -> Request:
    return request(constraint=Constraint("json_object"), **fields)


def masks_of_every_kind(vocab: int, seed: int) -> list[tuple[int, ...]]:
    """Few tokens, many, one in the last word, one that is the least likely."""
    rng = np.random.default_rng(seed)
    few, many = (np.flatnonzero(rng.random(vocab) < part).tolist() for part in (0.05, 0.9))
    return [(*few, 1), tuple(many), (vocab - 1,), (0,)]


@pytest.mark.parametrize("vocab", [64, 100, 1000])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 100.0},
        {"repetition_penalty": 3.0, "presence_penalty": 50.0, "frequency_penalty": -50.0},
        {"temperature": 1.0, "logit_bias": tuple((token, 100.0) for token in range(2, 60))},
    ],
    ids=lambda fields: "-".join(fields) or "greedy",
)
def test_a_masked_row_chooses_as_if_there_were_no_other_tokens(
    vocab: int, fields: dict[str, Any]
) -> None:
    logits = random_logits(4, vocab) * 10
    logits[3, 0] = -1e30  # allowed, and yet what a ban would make of it
    history = (3, 3, 7)
    made = [dataclasses.replace(constrained(**fields), seed=seed) for seed in range(4)]
    for turn in range(8):
        allowed = masks_of_every_kind(vocab, turn)
        rows = [
            Row(each, history[: turn % 4], allowed=tokens_)
            for each, tokens_ in zip(made, allowed, strict=True)
        ]
        for row, values, token in zip(rows, logits, tokens(logits, rows), strict=True):
            assert row.allowed is not None
            scores = edit(values, row.request, row.history)
            scores[[token for token in range(vocab) if token not in row.allowed]] = -np.inf
            if row.request.sampling.temperature == 0:
                assert scores[token] >= scores.max() - 1e-3
            else:
                assert distribution(scores, row.request)[token] > 0 or len(row.allowed) == 1
                assert token in row.allowed


def test_a_mask_leaves_a_draw_to_its_seed_and_its_logits() -> None:
    """Where what is likely is allowed, the draw is the one without a mask."""
    logits = np.full((1, 500), -200.0, np.float32)
    logits[0, 100:200] = random_logits(1, 100)[0]
    for seed in range(5):
        plain = dataclasses.replace(request(temperature=1.0), seed=seed)
        masked = dataclasses.replace(constrained(temperature=1.0), seed=seed)
        allowed = tuple(range(50, 300))
        assert tokens(logits, [Row(plain)]) == tokens(logits, [Row(masked, allowed=allowed)])


def test_a_mask_is_its_own_row_s_alone() -> None:
    """Rows that are not constrained don't read theirs, whatever is in it."""
    logits = random_logits(3, 200)
    rows = [Row(request()), Row(constrained(), allowed=(9,)), Row(request(temperature=1.0))]
    free = tokens(logits, [rows[0], Row(request()), rows[2]])
    shut = [dataclasses.replace(row, allowed=()) for row in (rows[0], rows[2])]
    assert tokens(logits, [shut[0], rows[1], shut[1]]) == [free[0], 9, free[2]]
