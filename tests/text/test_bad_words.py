"""Bad words as token sequences."""

from __future__ import annotations

import pytest

from engine.sampling import MAX_BAD_WORDS, InvalidRequest
from engine.text import Tokenizer, bad_word_ids


def test_a_word_is_banned_at_the_start_and_after_a_space(smollm2: Tokenizer):
    ids = bad_word_ids(smollm2, ["cat"])
    assert [[smollm2.id_to_token(i) for i in sequence] for sequence in ids] == [["cat"], ["Ġcat"]]


def test_a_leading_space_changes_nothing(smollm2: Tokenizer):
    assert bad_word_ids(smollm2, ["  cat"]) == bad_word_ids(smollm2, ["cat"])
    assert bad_word_ids(smollm2, [" cat", "cat"]) == bad_word_ids(smollm2, ["cat"])


def test_spaces_alone_can_be_banned(smollm2: Tokenizer):
    assert bad_word_ids(smollm2, [" "]) == ((smollm2.encode(" ")[0],),)


def test_no_beginning_token_slips_into_a_bad_word(sentencepiece_metadata):
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    assert tokenizer.encode("cat")[0] == tokenizer.bos_token_id
    assert all(tokenizer.bos_token_id not in ids for ids in bad_word_ids(tokenizer, ["cat"]))


def test_a_long_bad_word_is_refused(smollm2: Tokenizer):
    with pytest.raises(InvalidRequest, match=r"bad_words: .* takes \d+ tokens, but at most 8"):
        bad_word_ids(smollm2, ["one two three four five six seven eight nine"])


def test_too_many_sequences_are_refused(smollm2: Tokenizer):
    words = [f"a{i}" for i in range(10, 10 + MAX_BAD_WORDS)]
    assert len(bad_word_ids(smollm2, words[: MAX_BAD_WORDS // 2])) == MAX_BAD_WORDS
    with pytest.raises(InvalidRequest, match=r"make 128 token sequences .* at most 64"):
        bad_word_ids(smollm2, words)
