"""The sampler's edits, filters and draws against sampling by the book, for every feature."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model import sampler
from tests.model.sampler_bench import Row, choose, random_logits, request, tokens
from tests.model.sampler_oracle import distribution, edit

F32 = 2.0**-24  # unit roundoff

# Greedy rows and edits ------------------------------------------------------------------


def test_a_greedy_row_takes_the_first_of_the_most_likely() -> None:
    logits = random_logits(4, 50)
    logits[2, [7, 31]] = 100.0
    expected = [*logits[:2].argmax(axis=1).tolist(), 7, int(logits[3].argmax())]
    assert tokens(logits, [Row(request())] * 4) == expected


VOCAB = 12  # so few that histories repeat themselves
ids = st.integers(0, VOCAB - 1)
penalties = st.sampled_from([0.0, 0.5, 2.0, -1.5])


@st.composite
def edits(draw: st.DrawFn) -> Row:
    """A request with random edits, in the middle of its output."""
    history = tuple(draw(st.lists(ids, max_size=12)))
    words = draw(st.lists(st.lists(ids, min_size=1, max_size=4), max_size=3))
    for length in draw(st.lists(st.integers(1, 7), max_size=2)):  # words that are about to match
        if length <= len(history):
            words.append([*history[-length:], draw(ids)])
    made = request(
        prompt_ids=draw(st.lists(ids, min_size=1, max_size=8)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5, 3.0])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        logit_bias=tuple(
            draw(st.dictionaries(ids, st.floats(-3, 3, width=32), max_size=4)).items()
        ),
        allowed_token_ids=draw(
            st.none() | st.lists(ids, min_size=6, max_size=VOCAB, unique=True).map(tuple)
        ),
        bad_word_ids=tuple(map(tuple, words)),
        bad_words=("given as tokens",) if words else (),
        min_tokens=draw(st.integers(0, 14)),
        max_tokens=20,
        stop_ids=frozenset(draw(st.lists(ids, max_size=2))),
    )
    return Row(made, history)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.lists(edits(), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    level=st.sampled_from([-6.0, 0.0, 6.0]),
)
def test_edits_change_logits_as_the_book_says(rows: list[Row], seed: int, level: float) -> None:
    logits = random_logits(4, VOCAB, seed) + np.float32(level)
    chosen = tokens(logits, rows)
    for row, values, token in zip(rows, logits, chosen, strict=True):
        scores = edit(values, row.request, row.history)
        if not np.isfinite(scores).any():
            continue
        assert np.isfinite(scores[token]), "a banned token was chosen"
        # Float32 may take another token only if it is as good but for rounding.
        largest = np.abs(scores[np.isfinite(scores)]).max()
        assert scores[token] >= scores.max() - 8 * F32 * max(largest, 1.0)


@pytest.mark.parametrize(
    ("history", "is_banned"),
    [
        ((), False),
        ((3,), False),
        ((4,), False),
        ((3, 4), True),
        ((3, 4, 9), False),
        ((9, 3, 4), True),
    ],
)
def test_a_bad_word_bans_its_last_token_only_after_the_ones_before_it(
    history: tuple[int, ...], is_banned: bool
) -> None:
    logits = np.zeros((1, 10), np.float32)
    logits[0, 5], logits[0, 6] = 2.0, 1.0
    row = Row(request(bad_words=("abc",), bad_word_ids=((3, 4, 5),)), history)
    assert tokens(logits, [row]) == [6 if is_banned else 5]


def test_a_repetition_penalty_pushes_logits_down_whatever_their_sign() -> None:
    for level in (-10.0, 10.0):
        logits = np.full((1, 10), level, np.float32)
        logits[0, [1, 7, 5]] += (0.5, 0.4, 0.3)  # 1 is in the prompt, 7 in the output
        made = request(repetition_penalty=1.2)
        assert tokens(logits, [Row(made, (7,))]) == [5]


def test_a_frequency_penalty_counts_and_a_presence_penalty_does_not() -> None:
    logits = np.zeros((1, 10), np.float32)
    logits[0, [7, 5]] = 4.0, 2.5
    history = (7, 5, 7, 7)
    assert tokens(logits, [Row(request(presence_penalty=1.0), history)]) == [7]
    assert tokens(logits, [Row(request(frequency_penalty=1.0), history)]) == [5]
    assert tokens(logits, [Row(request(frequency_penalty=1.0), (7,))]) == [7]


def test_the_longest_bad_word_and_the_most_of_them_are_banned() -> None:
    history = tuple(range(20, 27))
    words = ((*history, 5), *((token,) for token in range(30, 92)), (*history[1:], 6))
    assert len(words) == 64
    logits = np.zeros((1, 100), np.float32)
    logits[0, [5, 6, 7]] = 3.0, 2.0, 1.0
    logits[0, 30:92] = 9.0
    made = request(bad_words=("x",), bad_word_ids=words)
    assert tokens(logits, [Row(made, history)]) == [7]
    assert tokens(logits, [Row(made, (1, *history[1:]))]) == [5]


def test_the_device_remembers_what_it_sampled_as_a_resumed_slot_is_told() -> None:
    """Eight steps on the device equal eight slots set from the history the host has by then."""
    made = request(
        bad_words=("x",),
        bad_word_ids=((7, 8), (8, 9, 9), (9, 7, 7)),
        frequency_penalty=0.7,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        min_tokens=6,
        max_tokens=9,
        stop_ids=frozenset({4}),
    )
    logits = random_logits(9, 12, seed=5)
    logits[:, [7, 8, 9]] += 9
    logits[:, 4] += 30
    history: tuple[int, ...] = ()
    state = None
    for step in range(9):
        row = Row(made, history, slot=3, is_new=step == 0)
        sampled, state = choose(logits[step : step + 1], [row], state=state)
        resumed = dataclasses.replace(row, slot=5, is_new=True)
        assert tokens(logits[step : step + 1], [resumed]) == sampled.token_ids.tolist()
        scores = edit(logits[step], made, history)
        assert int(np.argmax(scores)) == sampled.token_ids[0]
        history += (int(sampled.token_ids[0]),)
    assert 4 in history[6:]
    assert 4 not in history[:6]


def test_bans_never_let_a_token_through_that_is_not_allowed() -> None:
    """Even if everything that is allowed is banned for the moment."""
    logits = random_logits(1, 30)
    for fields in (
        {"min_tokens": 4, "stop_ids": frozenset({11})},
        {"bad_words": ("x",), "bad_word_ids": ((11,), (12,), (3, 11))},
        {"logit_bias": ((11, -100.0), (5, 100.0))},
    ):
        for temperature in (0.0, 1.0, 100.0):
            made = request(allowed_token_ids=(11,), temperature=temperature, **fields)
            rows = [Row(dataclasses.replace(made, seed=seed), (3,)) for seed in range(8)]
            assert tokens(logits.repeat(8, axis=0), rows) == [11] * 8


# Filters and draws ----------------------------------------------------------------------

# Probabilities with a tie at the second place and one at the end.
TIED = np.log(np.array([0.05, 0.25, 0.3, 0.25, 0.1, 0.025, 0.025]))
NEARLY_TIED = TIED - 1e-5 * (np.arange(7) == 3)
SKEWED = np.log(0.7 ** np.arange(24))
FLAT = np.zeros(300)

DRAWS = {
    "plain": (SKEWED, {}),
    "hot": (SKEWED, {"temperature": 3.0}),
    "cold": (SKEWED, {"temperature": 0.25}),
    "top-k": (SKEWED, {"top_k": 3}),
    "top-k of more than there are": (TIED, {"top_k": 1000}),
    "top-k with a tie at the k-th": (TIED, {"top_k": 2}),
    "top-k with nearly a tie at the k-th": (NEARLY_TIED, {"top_k": 2}),
    "top-p with nearly a tie at the edge": (NEARLY_TIED, {"top_p": 0.5}),
    "top-p": (SKEWED, {"top_p": 0.8}),
    "top-p with a tie at the edge": (TIED, {"top_p": 0.5}),
    "top-p just reached": (TIED, {"top_p": 0.7999}),
    "top-p just missed": (TIED, {"top_p": 0.8001}),
    "top-p of nearly all": (TIED, {"top_p": 0.99999994}),
    "top-p of nearly nothing": (TIED, {"top_p": 1e-9}),
    "min-p": (TIED, {"min_p": 0.2}),
    "min-p of one": (TIED, {"min_p": 1.0}),
    "min-p counts after the temperature": (TIED, {"min_p": 0.2, "temperature": 2.0}),
    "top-p of what top-k leaves": (SKEWED, {"top_k": 4, "top_p": 0.7}),
    "all at once": (SKEWED, {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5}),
    "more tokens than one row of the table": (FLAT, {}),
    "filters after edits": (SKEWED, {"top_k": 3, "logit_bias": ((20, 8.0), (0, -9.0))}),
}
NUM_SEEDS, NUM_POSITIONS = 64, 32


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_the_distribution_of_the_book(name: str) -> None:
    """Pearson's chi-square over 2,048 draws; seeds are fixed, so this passes or it doesn't."""
    values, fields = DRAWS[name]
    made = request(**{"temperature": 1.0, **fields})
    expected = distribution(edit(values, made, ()), made)
    logits = np.tile(values.astype(np.float32), (NUM_SEEDS, 1))
    drawn = []
    for position in range(NUM_POSITIONS):
        rows = [
            Row(dataclasses.replace(made, seed=seed * 2**33 + seed), (0,) * position)
            for seed in range(NUM_SEEDS)
        ]
        drawn += tokens(logits, rows, num_slots=NUM_SEEDS)
    counts = np.bincount(drawn, minlength=len(values))
    assert not counts[expected == 0].any(), "a token was drawn that the filters exclude"
    mean = expected * len(drawn)
    rare = mean < 5  # too few for the approximation: they count as one token
    observed, mean = (np.array([*each[~rare], each[rare].sum()]) for each in (counts, mean))
    observed, mean = observed[mean > 0], mean[mean > 0]
    chi_square = float(((observed - mean) ** 2 / mean).sum())
    freedom = len(mean) - 1
    # Wilson & Hilferty (1931): four deviations, or one right sampler in 30,000.
    limit = freedom * (1 - 2 / (9 * max(freedom, 1)) + 4 * (2 / (9 * max(freedom, 1))) ** 0.5) ** 3
    assert chi_square <= limit


sampled_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-40, 1e-6, 0.3, 1.0, 7.0, 100.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, 200, 2**31 - 1]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 1e-30]),
        "min_p": st.sampled_from([0.0, 1e-3, 0.2, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    params=st.lists(sampled_params, min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.01, 1.0, 1000.0]),
)
def test_only_tokens_that_pass_the_filters_are_drawn(
    params: list[dict[str, Any]], seed: int, scale: float
) -> None:
    logits = random_logits(4, 200, seed) * np.float32(scale)
    rows = [Row(request(**fields)) for fields in params]
    for row, values, token in zip(rows, logits, tokens(logits, rows), strict=True):
        expected = distribution(values.astype(np.float64), row.request)
        # In float32, neighbours of a threshold may count as equal to it.
        nearly = expected[expected > 0].min() * (1 - 1e-5)
        weights = np.exp(
            (values - values.max()).astype(np.float64) / row.request.sampling.temperature
        )
        assert (
            weights[token] / weights.sum() >= nearly * weights[expected > 0].sum() / weights.sum()
        )


def test_top_k_of_one_is_greedy() -> None:
    logits = random_logits(8, 500)
    rows = [Row(request(temperature=5.0, top_k=1, seed=seed)) for seed in range(8)]
    assert tokens(logits, rows) == logits.argmax(axis=1).tolist()


def test_parameters_at_their_limits_are_taken() -> None:
    """The largest of everything that SamplingParams lets through fits the device state."""
    made = request(
        temperature=1.0,
        logit_bias=tuple((token, 100.0) for token in range(1024)),
        stop_ids=frozenset(range(sampler.MAX_STOP_IDS)),
        bad_words=("x",),
        bad_word_ids=tuple((token,) * 8 for token in range(64)),
        seed=2**64 - 1,
    )
    [token] = tokens(random_logits(1, 2000), [Row(made)])
    assert token < 1024
