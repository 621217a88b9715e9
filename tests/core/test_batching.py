"""Batches against a layout written with plain loops, and the closed set of their shapes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import BucketConfig, SchedulerConfig
from engine.core.batching import Batch, build, choose_bucket, empty, neutral_sampling
from engine.core.buckets import Bucket, bucket_set
from engine.sampling import SamplingParams
from engine.types import PlanRow, Request, StepPlan
from tests.core.driver import Driver, make_request

SINK = 99


def make_row(
    start: int,
    num_tokens: int,
    *,
    known: bool = True,
    samples: bool = True,
    slot: int = 0,
    output_position: int = 0,
    seed: int = 0,
    temperature: float = 0.0,
    **sampling: Any,
) -> PlanRow:
    """A row in the middle of a sequence, in blocks of 4."""
    prompt = tuple(range(100, 100 + start + num_tokens))
    params = SamplingParams(temperature=temperature, **sampling)
    return PlanRow(
        Request("r", prompt, params, max_tokens=9, seed=seed),
        slot,
        start,
        num_tokens,
        prompt[start:] if known else (),
        np.arange(7, 7 + -(-(start + num_tokens) // 4), dtype=np.int32),
        samples,
        output_position,
        None,
    )


# The layout, once more: slow, one element at a time, straight from the words in types.py.


def naive_layout(plan: StepPlan, bucket: Bucket, sink_slot: int) -> dict[str, np.ndarray]:
    num_tokens, num_seqs, num_blocks = bucket
    out: dict[str, Any] = {
        "token_ids": [0] * num_tokens,
        "positions": [0] * num_tokens,
        "token_rows": [num_seqs] * num_tokens,
        "query_starts": [0] * (num_seqs + 1),
        "kv_lens": [0] * num_seqs,
        "block_tables": [[0] * num_blocks for _ in range(num_seqs)],
        "slots": [sink_slot] * num_seqs,
        "samples": [False] * num_seqs,
        "logits_tokens": [0] * num_seqs,
        "temperature": [0.0] * num_seqs,
        "top_k": [0] * num_seqs,
        "top_p": [1.0] * num_seqs,
        "min_p": [0.0] * num_seqs,
        "repetition_penalty": [1.0] * num_seqs,
        "presence_penalty": [0.0] * num_seqs,
        "frequency_penalty": [0.0] * num_seqs,
        "edits": [False] * num_seqs,
        "bans_stops": [False] * num_seqs,
        "wants_logprobs": [False] * num_seqs,
        "constrained": [False] * num_seqs,
        "seeds": [[0, 0] for _ in range(num_seqs)],
        "output_positions": [0] * num_seqs,
        "prompt_indices": [0] * num_tokens,
        "prompt_targets": [0] * num_tokens,
    }
    special, prompt_entries, at = [], [], 0
    for index, row in enumerate(plan.rows):
        sampling = row.request.sampling
        for offset in range(row.num_tokens):
            position = row.start + offset
            out["token_ids"][at] = row.token_ids[offset] if row.token_ids else -1
            out["positions"][at] = position
            out["token_rows"][at] = index
            if sampling.prompt_logprobs is not None and position + 1 < len(row.request.prompt_ids):
                prompt_entries.append((at, row.request.prompt_ids[position + 1]))
            at += 1
        out["query_starts"][index + 1] = at
        out["kv_lens"][index] = row.start + row.num_tokens if row.num_tokens else 0
        source = index if row.logits_of is None else row.logits_of
        out["logits_tokens"][index] = out["query_starts"][source + 1] - 1
        for column in range(len(row.block_ids)):
            out["block_tables"][index][column] = row.block_ids[column]
        out["slots"][index] = row.slot
        out["samples"][index] = row.samples
        out["output_positions"][index] = row.output_position
        needs_more_than_argmax = (
            sampling.temperature > 0
            or sampling.edits_logits
            or sampling.logprobs is not None
            or sampling.prompt_logprobs is not None
            or sampling.constraint is not None
        )
        if row.samples and needs_more_than_argmax:
            special.append(index)
            for name in ("temperature", "top_k", "top_p", "min_p"):
                out[name][index] = getattr(sampling, name)
            for name in ("repetition", "presence", "frequency"):
                out[f"{name}_penalty"][index] = getattr(sampling, f"{name}_penalty")
            out["edits"][index] = sampling.edits_logits
            out["bans_stops"][index] = row.output_position < sampling.min_tokens
            out["wants_logprobs"][index] = sampling.logprobs is not None
            out["constrained"][index] = sampling.constraint is not None
            high, low = divmod(row.request.seed, 2**32)
            out["seeds"][index] = [low, high]
    if not special:  # nobody looks at them
        out["output_positions"] = [0] * num_seqs
    for index in range(len(plan.rows), num_seqs):
        out["query_starts"][index + 1] = at
    for entry, (index, target) in enumerate(prompt_entries):
        out["prompt_indices"][entry], out["prompt_targets"][entry] = index, target
    counts = {
        "num_special": len(special),
        "num_prompt_logprobs": len(prompt_entries),
        "special_rows": special + [num_seqs - 1] * (num_seqs - len(special)),
    }
    return {name: np.array(value) for name, value in (out | counts).items()}


def flat(batch: Batch) -> dict[str, np.ndarray]:
    """All arrays of a batch by name."""
    arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    sampling = arrays.pop("sampling")
    return arrays | {f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling)}


def assert_same(batch: Batch, expected: dict[str, np.ndarray]) -> None:
    arrays = flat(batch)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        if array.dtype == np.float32:
            np.testing.assert_array_equal(array, expected[name].astype(np.float32), err_msg=name)
        else:
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def random_plan(rng: random.Random) -> StepPlan:
    rows = []
    for slot in range(rng.randint(1, 6)):
        num_tokens = rng.choice((1, 1, 1, 2, 5, 9))
        row = make_row(
            rng.randint(0, 12),
            num_tokens,
            known=num_tokens > 1 or rng.random() < 0.5,
            samples=rng.random() < 0.7,
            slot=slot * 3 % 7,
            output_position=rng.randint(0, 4),
            seed=rng.getrandbits(64),
            temperature=rng.choice((0.0, 0.7)),
            top_k=rng.choice((0, 50)),
            top_p=rng.choice((1.0, 0.9)),
            min_p=rng.choice((0.0, 0.05)),
            repetition_penalty=rng.choice((1.0, 1.3)),
            presence_penalty=rng.choice((0.0, 0.3)),
            frequency_penalty=rng.choice((0.0, -0.2)),
            min_tokens=rng.choice((0, 2)),
            logprobs=rng.choice((None, 0, 3)),
            prompt_logprobs=rng.choice((None, None, 1)),
        )
        # A prompt that ends in the middle of the row's positions, or before them.
        cut = rng.randint(1, row.start + row.num_tokens)
        request = dataclasses.replace(row.request, prompt_ids=row.request.prompt_ids[:cut])
        rows.append(row._replace(request=request))
    for slot in range(rng.choice((0, 0, 2))):  # that part from one of those
        source = rng.randrange(len(rows))
        row = make_row(rng.randint(1, 9), 0, known=False, slot=7 + slot, temperature=0.7, seed=slot)
        rows.append(row._replace(logits_of=source, history=()))
    return StepPlan(step=0, rows=tuple(rows))


@pytest.mark.parametrize("seed", range(200))
def test_a_batch_equals_the_layout_written_with_loops(seed: int):
    rng = random.Random(seed)
    plan = random_plan(rng)
    scheduler = SchedulerConfig(max_num_seqs=8, max_step_tokens=64)
    buckets = bucket_set(BucketConfig(), scheduler, num_blocks=rng.randint(6, 9))
    batch = build(plan, buckets, SINK)
    assert_same(batch, naive_layout(plan, choose_bucket(plan, buckets), SINK))


def test_an_empty_batch_is_all_padding():
    bucket = Bucket(8, 4, 3)
    assert_same(empty(bucket, SINK), naive_layout(StepPlan(0, ()), bucket, SINK))


def test_arrays_have_the_dtypes_that_the_programs_are_compiled_for():
    for arrays in (
        flat(empty(Bucket(8, 4, 3), SINK)),
        flat(build(random_plan(random.Random(1)), (Bucket(64, 8, 6),), SINK)),
    ):
        for name, array in arrays.items():
            expected = {
                "samples": np.bool_,
                "edits": np.bool_,
                "bans_stops": np.bool_,
                "wants_logprobs": np.bool_,
                "constrained": np.bool_,
                "seeds": np.uint32,
                "temperature": np.float32,
                "top_p": np.float32,
                "min_p": np.float32,
            }.get(name, np.float32 if name.endswith("penalty") else np.int32)
            assert array.dtype == expected, name


def test_padded_rows_and_tokens_hold_neutral_values():
    batch = build(StepPlan(0, (make_row(2, 3),)), (Bucket(8, 4, 3),), SINK)
    assert batch.token_rows.tolist() == [0, 0, 0, 4, 4, 4, 4, 4]
    assert batch.query_starts.tolist() == [0, 3, 3, 3, 3]
    assert batch.kv_lens.tolist() == [5, 0, 0, 0]
    assert batch.slots.tolist() == [0, SINK, SINK, SINK]
    assert batch.samples.tolist() == [True, False, False, False]
    assert batch.block_tables.tolist() == [[7, 8, 0], [0] * 3, [0] * 3, [0] * 3]


def test_a_token_the_host_does_not_know_is_left_to_the_slot():
    batch = build(StepPlan(0, (make_row(5, 1, known=False),)), (Bucket(1, 1, 2),), SINK)
    assert batch.token_ids.tolist() == [-1]


def test_a_row_that_parts_from_another_samples_from_its_logits_and_has_no_tokens():
    parting = make_row(5, 0, known=False, slot=3)._replace(logits_of=1, history=())
    plan = StepPlan(0, (make_row(7, 1), make_row(2, 3), parting, parting))
    batch = build(plan, (Bucket(8, 4, 3),), SINK)
    assert batch.query_starts.tolist() == [0, 1, 4, 4, 4]
    assert batch.kv_lens.tolist() == [8, 5, 0, 0]
    assert batch.logits_tokens.tolist() == [0, 3, 3, 3]


def test_rows_that_only_sample_fit_beside_single_tokens_and_beside_prompts():
    """As many rows as there may be, in steps of as few tokens as there may be."""
    config = SchedulerConfig(max_num_seqs=4, max_step_tokens=4)
    buckets = bucket_set(BucketConfig(), config, num_blocks=3)
    parting = make_row(5, 0, known=False)._replace(logits_of=0, history=())
    for num_tokens, expected in ((1, Bucket(4, 4, 3)), (4, Bucket(5, 4, 3))):
        plan = StepPlan(0, (make_row(2, num_tokens), parting, parting, parting))
        assert choose_bucket(plan, buckets) == expected


def test_a_plain_greedy_row_costs_the_sampler_nothing():
    rows = (make_row(3, 1), make_row(4, 1, temperature=0.5), make_row(5, 1))
    sampling = build(StepPlan(0, rows), (Bucket(4, 4, 2),), SINK).sampling
    assert int(sampling.num_special) == 1
    assert sampling.special_rows.tolist() == [1, 3, 3, 3]


def test_plain_batches_share_what_they_ask_of_the_sampler_and_nobody_can_write_to_it():
    rows = make_row(3, 1), make_row(3, 1, temperature=0.5), make_row(4, 1, slot=1)
    batches = [build(StepPlan(0, (row,)), (Bucket(4, 4, 2),), SINK).sampling for row in rows]
    assert batches[0] is batches[2] is neutral_sampling(4)
    assert batches[1].num_special == 1
    for field in dataclasses.fields(batches[0]):
        assert not getattr(batches[0], field.name).flags.writeable


def test_a_row_that_does_not_sample_yet_is_not_special():
    rows = (make_row(0, 3, samples=False, temperature=0.5),)
    sampling = build(StepPlan(0, rows), (Bucket(4, 3, 2),), SINK).sampling
    assert int(sampling.num_special) == 0
    assert not sampling.temperature.any()


def test_a_seed_is_split_into_low_and_high_word():
    rows = (make_row(3, 1, temperature=1.0, seed=0x0123456789ABCDEF),)
    sampling = build(StepPlan(0, rows), (Bucket(1, 1, 1),), SINK).sampling
    assert sampling.seeds.tolist() == [[0x89ABCDEF, 0x01234567]]
    rows = (make_row(3, 1, temperature=1.0, seed=2**64 - 1),)
    sampling = build(StepPlan(0, rows), (Bucket(1, 1, 1),), SINK).sampling
    assert sampling.seeds.tolist() == [[2**32 - 1, 2**32 - 1]]


def test_prompt_targets_are_the_next_prompt_tokens_and_stop_with_the_prompt():
    first = make_row(0, 3, prompt_logprobs=0)  # tokens 100 101 102
    other = make_row(2, 2)
    batch = build(StepPlan(0, (other, first)), (Bucket(8, 4, 1),), SINK)
    count = int(batch.num_prompt_logprobs)
    assert batch.prompt_indices[:count].tolist() == [2, 3]
    assert batch.prompt_targets[:count].tolist() == [101, 102]


# Buckets.


def test_default_buckets_grow_fourfold_up_to_the_limits():
    buckets = bucket_set(
        BucketConfig(), SchedulerConfig(max_num_seqs=64, max_step_tokens=512), num_blocks=9
    )
    assert [tuple(bucket[:2]) for bucket in buckets] == [
        *[(1, 1), (4, 4), (16, 16)],
        *[(32, 16), (64, 64), (128, 16), (128, 64), (512, 16), (512, 64)],
    ]
    assert {bucket.num_blocks for bucket in buckets} == {9}


def test_buckets_are_as_configured():
    config = BucketConfig(decode_seqs=(2, 8), prefill_tokens=(20, 40), prefill_seqs=(8,))
    buckets = bucket_set(config, SchedulerConfig(max_num_seqs=8, max_step_tokens=40), 3)
    assert buckets == (Bucket(2, 2, 3), Bucket(8, 8, 3), Bucket(20, 8, 3), Bucket(40, 8, 3))


def sizes_up_to(limit: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Nothing, or sizes that rise to the limit, as configs may give them."""
    some = st.sets(st.integers(1, limit)).map(lambda sizes: tuple(sorted(sizes | {limit})))
    return st.just(()) | some


@st.composite
def bucket_cases(draw: st.DrawFn) -> tuple[SchedulerConfig, BucketConfig]:
    seqs = draw(st.integers(1, 20))
    tokens = draw(st.integers(seqs, 60))
    buckets = BucketConfig(
        decode_seqs=draw(sizes_up_to(seqs)),
        prefill_tokens=draw(sizes_up_to(tokens)),
        prefill_seqs=draw(sizes_up_to(seqs)),
    )
    return SchedulerConfig(max_num_seqs=seqs, max_step_tokens=tokens), buckets


@settings(deadline=None, derandomize=True)
@given(bucket_cases())
def test_every_step_that_the_limits_allow_fits_a_bucket_and_gets_the_smallest(
    case: tuple[SchedulerConfig, BucketConfig],
):
    limits, config = case
    buckets = bucket_set(config, limits, num_blocks=1)
    single, longer = make_row(0, 1), make_row(0, 2)
    for num_rows in range(1, limits.max_num_seqs + 1):
        for num_tokens in range(num_rows, limits.max_step_tokens + 1):
            last = longer._replace(num_tokens=num_tokens - num_rows + 1)
            plan = StepPlan(0, (single,) * (num_rows - 1) + (last,))
            # Programs for one token a row have as many tokens as rows, and take nothing else.
            allowed = [
                bucket
                for bucket in buckets
                if bucket.num_tokens >= num_tokens
                and bucket.num_seqs >= num_rows
                and (num_tokens == num_rows or bucket.num_tokens > bucket.num_seqs)
            ]
            assert choose_bucket(plan, buckets) == min(allowed)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    case=bucket_cases(),
    prompts=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    block_size=st.integers(1, 8),
)
def test_every_plan_of_the_scheduler_can_be_built(
    case: tuple[SchedulerConfig, BucketConfig], prompts: list[int], block_size: int
):
    config, bucket_config = case
    driver = Driver(
        num_blocks=-(-60 // block_size) + 2,
        block_size=block_size,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=config.max_step_tokens,
        max_model_len=60,
    )
    buckets = bucket_set(bucket_config, config, -(-60 // block_size))
    driver.admit(
        *(make_request(str(n), length, max_tokens=100) for n, length in enumerate(prompts))
    )
    for plan in driver.run():
        if plan.rows:
            batch = build(plan, buckets, config.max_num_seqs)
            assert_same(
                batch, naive_layout(plan, choose_bucket(plan, buckets), config.max_num_seqs)
            )


def test_a_plan_that_fits_no_bucket_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="3 tokens of 1 sequences fit none"):
        choose_bucket(StepPlan(0, (make_row(0, 3),)), (Bucket(2, 1, 1),))
