"""Incremental detokenisation, against decoding everything at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import Detokenizer, Tokenizer, gguf_vocabulary

REPLACEMENT = "\ufffd"


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The `tokenizers` library's own decoder."""
    return gguf_vocabulary.build(smollm2_metadata)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_metadata: Callable[..., dict[str, Any]]) -> Tokenizer:
    return Tokenizer.from_gguf(sentencepiece_metadata())


@pytest.fixture(scope="session")
def sentencepiece_reference(
    sentencepiece_metadata: Callable[..., dict[str, Any]],
) -> tokenizers.Tokenizer:
    return gguf_vocabulary.build(sentencepiece_metadata())


def stream(detokenizer: Detokenizer, pieces: list[list[int]]) -> list[str]:
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]


def cut(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """The ids in consecutive pieces; each cut is the length of one."""
    pieces, position = [], 0
    for length in cuts:
        pieces.append(ids[position : position + length])
        position += length
    return [*pieces, ids[position:]]


# Special tokens, single bytes, and the rest: all kinds should be frequent.
IDS = st.integers(0, 16) | st.integers(17, 272) | st.integers(0, 49151)
CUTS = st.lists(st.integers(0, 4), max_size=12)


@settings(max_examples=500, deadline=None)
@given(
    prompt=st.lists(IDS, max_size=6), ids=st.lists(IDS, max_size=24), cuts=CUTS, skip=st.booleans()
)
def test_pieces_add_up_to_the_whole_decoding(
    prompt: list[int],
    ids: list[int],
    cuts: list[int],
    skip: bool,
    smollm2: Tokenizer,
    smollm2_reference: tokenizers.Tokenizer,
):
    text = "".join(stream(Detokenizer(smollm2, prompt, skip), cut(ids, cuts)))
    whole = smollm2_reference.decode(prompt + ids, skip_special_tokens=skip)
    assert smollm2.decode(prompt + ids, skip) == whole
    assert whole.endswith(text)
    # Before it comes the prompt's text, without a character that the prompt left unfinished.
    before = whole[: len(whole) - len(text)]
    prompt_text = smollm2_reference.decode(prompt, skip_special_tokens=skip)
    assert prompt_text in (before, before + REPLACEMENT)


# SmolLM2's vocabulary has no token for some control characters and bytes of U+40000 and above.
TEXT = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x3FFFF, exclude_categories=["Cs"]).filter(
        lambda character: character not in REPLACEMENT + "▁<"
    )
)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, cuts=CUTS)
@pytest.mark.parametrize("kind", ["smollm2", "sentencepiece"])
def test_no_piece_of_valid_text_has_half_a_character(
    text: str, cuts: list[int], kind: str, smollm2: Tokenizer, sentencepiece: Tokenizer
):
    tokenizer = smollm2 if kind == "smollm2" else sentencepiece
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(Detokenizer(tokenizer), cut(ids, cuts))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, at=st.integers(0, 30), skip=st.booleans())
def test_sentencepiece_goes_on_after_a_prompt_as_the_library_does(
    text: str,
    at: int,
    skip: bool,
    sentencepiece: Tokenizer,
    sentencepiece_reference: tokenizers.Tokenizer,
):
    ids = sentencepiece.encode(text)
    whole = sentencepiece_reference.decode(ids, skip_special_tokens=skip)
    pieces = stream(Detokenizer(sentencepiece, ids[:at], skip), [[i] for i in ids[at:]])
    assert whole.endswith("".join(pieces))
    if at <= 1:  # an empty prompt, or nothing but <s>, which has no text if it is skipped
        before = "" if skip or at == 0 else "<s>"
        assert before + "".join(pieces) == whole


def test_a_space_is_dropped_at_the_start_of_a_text_only(sentencepiece: Tokenizer):
    the, cat = sentencepiece.encode("the cat", add_special_tokens=False)
    assert stream(Detokenizer(sentencepiece), [[the], [cat]]) == ["the", " cat", ""]
    assert stream(Detokenizer(sentencepiece, [the]), [[cat]]) == [" cat", ""]
    assert stream(Detokenizer(sentencepiece, [1]), [[cat]]) == ["cat", ""]  # after <s>


def test_a_character_waits_for_its_last_byte(sentencepiece: Tokenizer):
    ids = [3 + byte for byte in "🙂".encode()]  # byte tokens follow three others
    assert stream(Detokenizer(sentencepiece), [[i] for i in ids]) == ["", "", "", "🙂", ""]
    # One that the prompt began is finished by the output.
    assert stream(Detokenizer(sentencepiece, ids[:3]), [ids[3:]]) == ["🙂", ""]


def test_an_unfinished_character_shows_at_the_end(sentencepiece: Tokenizer):
    ids = [3 + byte for byte in "a🙂".encode()]
    assert stream(Detokenizer(sentencepiece), [ids[:-1]]) == ["a", REPLACEMENT]


def test_a_wrong_byte_costs_one_character_and_no_neighbour(sentencepiece: Tokenizer):
    ids = [3 + byte for byte in "é".encode() + b"\xff" + "é".encode()]
    assert "".join(stream(Detokenizer(sentencepiece), [[i] for i in ids])) == "é\ufffdé"


def test_bytes_that_never_make_a_character_are_not_held_back(smollm2: Tokenizer):
    lead = next(i for i in range(smollm2.vocab_size) if smollm2.token_bytes[i] == b"\xe2")
    detokenizer = Detokenizer(smollm2)
    emitted = 0
    for pushed in range(1, 200):
        emitted += len(detokenizer.push([lead]))
        assert emitted == pushed - 1  # only the last may still become a character


def test_special_tokens_are_left_out_or_kept(smollm2: Tokenizer):
    ids = [*smollm2.encode("hi"), 2]
    assert "".join(stream(Detokenizer(smollm2), [ids])) == "hi"
    assert "".join(stream(Detokenizer(smollm2, (), False), [ids])) == "hi<|im_end|>"


def test_ids_without_a_token_have_no_text(smollm2: Tokenizer):
    ids = smollm2.encode("hi")
    assert smollm2.decode([49152, -1, *ids, 2**40]) == "hi"
