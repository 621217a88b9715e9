"""Tokenizers from GGUF and from folders, against reference ids and naive re-implementations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling import InvalidRequest
from engine.text import Tokenizer, TokenizerError
from engine.text.gguf_vocabulary import MAX_PIECE_CHARACTERS

GOLDENS = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text())


@pytest.mark.parametrize("golden", GOLDENS, ids=[golden["text"][:20] for golden in GOLDENS])
def test_a_gguf_tokenizer_gives_the_reference_ids(golden: dict[str, Any], smollm2: Tokenizer):
    if golden["chat"]:
        ids = smollm2.apply_chat_template([("user", golden["text"])])
    else:
        ids = smollm2.encode(golden["text"])
    assert ids == golden["prompt_ids"]
    assert smollm2.decode(golden["output_ids"], False) == golden["output_text"]


def test_smollm_splits_digits_one_by_one(smollm2: Tokenizer):
    tokens = [smollm2.id_to_token(i) for i in smollm2.encode("in 2024, ٣٤ or Ⅷ")]
    assert tokens[:6] == ["in", "Ġ", "2", "0", "2", "4"]
    assert not any(sum(c.isdigit() for c in token or "") > 1 for token in tokens)


def test_smollm2_describes_itself(smollm2: Tokenizer):
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_id) == (1, 2)
    assert smollm2.eos_token_ids == {2}
    assert smollm2.special_ids == set(range(17))
    assert smollm2.id_to_token(2) == "<|im_end|>"
    assert smollm2.has_chat_template
    for beyond in (-1, 49152, 2**32, 2**70):
        assert smollm2.id_to_token(beyond) is None


def test_a_raw_prompt_may_write_control_tokens_out(smollm2: Tokenizer):
    assert smollm2.encode("<|im_start|>user") == [1, 4093]


def test_lists_and_arrays_of_metadata_give_the_same_tokenizer(smollm2_metadata: dict[str, Any]):
    arrays = dict(smollm2_metadata)
    for name in ("token_type",):
        arrays[f"tokenizer.ggml.{name}"] = np.asarray(
            smollm2_metadata[f"tokenizer.ggml.{name}"], np.int32
        )
    for name in ("tokens", "merges"):
        arrays[f"tokenizer.ggml.{name}"] = np.asarray(
            smollm2_metadata[f"tokenizer.ggml.{name}"], object
        )
    arrays["tokenizer.ggml.bos_token_id"] = np.uint32(1)
    text = "Résumé 🙂 <|im_end|> 1984"
    one, other = Tokenizer.from_gguf(arrays), Tokenizer.from_gguf(smollm2_metadata)
    assert one.encode(text) == other.encode(text)
    assert one.special_ids == other.special_ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0x3FFFF)))
def test_byte_level_text_survives_the_round_trip(text: str, smollm2: Tokenizer):
    # Up to U+3FFFF: SmolLM2 has no token for some bytes of what follows and of control characters.
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


def test_half_a_surrogate_pair_is_refused(smollm2: Tokenizer):
    with pytest.raises(InvalidRequest, match="prompt: has half of a surrogate pair at character 2"):
        smollm2.encode("ab\ud800")
    with pytest.raises(InvalidRequest, match="messages: has half"):
        smollm2.apply_chat_template([("user", "ab\ud800")])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "bert", "tokenizer.ggml.model is 'bert'; supported are gpt2, llama"),
        ("model", None, "tokenizer.ggml.model is None"),
        ("pre", "tekken", "tokenizer.ggml.pre is 'tekken'; supported are .*smollm.*qwen2"),
        ("pre", ["smollm"], "tokenizer.ggml.pre is "),
        ("merges", ["Ġt"], "merges has 'Ġt'; want two tokens"),
        ("merges", ["Ġ t he"], "want two tokens"),
        ("merges", ["qqq zzz"], "don't make a tokenizer: .*qqq"),
        ("merges", "Ġ t", "merges must be an array, but is a str"),
        ("merges", 7, "merges must be an array, but is a int"),
        ("tokens", [], "tokens is empty"),
        ("tokens", ["a", "b", "a"], "has 'a' twice, as 0 and 2"),
        ("tokens", ["a", 5], r"tokens\[1\] must be a str, but is a int"),
        ("token_type", [1, 1], "token_type has 2 values for 49152 tokens"),
        ("eos_token_id", 49152, "eos_token_id is 49152, but there are 49152 tokens"),
        ("bos_token_id", -1, "bos_token_id is -1"),
    ],
)
def test_malformed_metadata_is_named(
    key: str, value: Any, message: str, smollm2_metadata: dict[str, Any]
):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf({**smollm2_metadata, f"tokenizer.ggml.{key}": value})


def test_metadata_without_tokens_or_merges_is_named(smollm2_metadata: dict[str, Any]):
    for key in ("tokens", "merges"):
        rest = {k: v for k, v in smollm2_metadata.items() if k != f"tokenizer.ggml.{key}"}
        with pytest.raises(TokenizerError, match=f"has no tokenizer.ggml.{key}"):
            Tokenizer.from_gguf(rest)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "It's 1234 ok", ["It", "'s", "Ġ1234", "Ġok"]),
        ("smollm", "It's 1234 ok", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġok"]),
        ("llama-bpe", "IT'S 1234 ok", ["IT", "'S", "Ġ", "123", "4", "Ġok"]),
        ("qwen2", "IT'S 12 ok", ["IT", "'S", "Ġ", "1", "2", "Ġok"]),
        ("default", "a<=12 345!", ["a", "<=", "12", "Ġ", "345", "!"]),
    ],
)
def test_each_pre_tokenizer_cuts_words_its_own_way(pre: str, text: str, words: list[str]):
    # With each word a token made by a chain of merges, tokens show the words.
    tokens = [chr(c) for c in range(0x21, 0x7F)] + ["Ġ"]
    merges = []
    for whole in ("It", "'s", "'S", "IT", "Ġ1234", "1234", "12", "123", "Ġok", "<=", "345"):
        for end in range(2, len(whole) + 1):
            merge = f"{whole[: end - 1]} {whole[end - 1]}"
            if merge not in merges:
                merges.append(merge)
                tokens.append(whole[:end])
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": list(dict.fromkeys(tokens)),
            "tokenizer.ggml.merges": merges,
        }
    )
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode(text)] == words


def test_qwen2_composes_characters_and_gpt2_does_not(smollm2_metadata: dict[str, Any]):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    qwen = Tokenizer.from_gguf({**smollm2_metadata, "tokenizer.ggml.pre": "qwen2"})
    gpt2 = Tokenizer.from_gguf({**smollm2_metadata, "tokenizer.ggml.pre": "gpt-2"})
    assert qwen.encode(decomposed) == qwen.encode(composed)
    assert gpt2.encode(decomposed) != gpt2.encode(composed)


def test_the_beginning_token_is_added_as_the_file_says(smollm2_metadata: dict[str, Any]):
    for changes, before, after in (
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "pre": "llama-bpe"}, [], []),
    ):
        keys = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        tokenizer = Tokenizer.from_gguf(smollm2_metadata | keys)
        plain = tokenizer.encode("hello", add_special_tokens=False)
        assert tokenizer.encode("hello") == before + plain + after
    without = {k: v for k, v in smollm2_metadata.items() if not k.endswith("add_bos_token")}
    llama = Tokenizer.from_gguf({**without, "tokenizer.ggml.pre": "llama-bpe"})
    assert llama.encode("hello")[0] == 1  # llama.cpp's default for this pre-tokenizer


def test_user_defined_tokens_are_found_in_text_but_are_not_special(
    smollm2_metadata: dict[str, Any],
):
    types = list(smollm2_metadata["tokenizer.ggml.token_type"])
    types[3] = 4
    tokenizer = Tokenizer.from_gguf({**smollm2_metadata, "tokenizer.ggml.token_type": types})
    assert tokenizer.encode("<repo_name>") == [3]
    assert tokenizer.decode([3]) == "<repo_name>"
    assert 3 not in tokenizer.special_ids


# SentencePiece


def naive_sentencepiece(text: str, metadata: dict[str, Any]) -> list[int]:
    """Merge the adjacent pair that makes the best-scored piece, until there is none."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types, scores = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.scores"]
    score = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == 1}
    prefix = " " if metadata.get("tokenizer.ggml.add_space_prefix", True) and text else ""
    symbols = list((prefix + text).replace(" ", "▁"))
    while True:
        pairs = [
            (-score[symbols[i] + symbols[i + 1]], i)
            for i in range(len(symbols) - 1)
            if symbols[i] + symbols[i + 1] in score
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids: list[int] = []
    for symbol in symbols:
        spelled = [symbol] if symbol in score else [f"<0x{b:02X}>" for b in symbol.encode()]
        ids += [tokens.index(token) for token in spelled]
    return ids


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("  theca sbnxé🙂")) | st.text(st.characters(codec="utf-8")),
    add_space=st.booleans(),
)
def test_sentencepiece_merges_the_best_scored_pair_first(
    text: str, add_space: bool, sentencepiece_metadata: Callable[..., dict[str, Any]]
):
    metadata = sentencepiece_metadata(add_space_prefix=add_space)
    tokenizer = _cached_sentencepiece(add_space, sentencepiece_metadata)
    if any(token in text for token in ("<unk>", "<s>", "</s>")):
        return  # taken as control tokens, which is tested apart
    assert tokenizer.encode(text, add_special_tokens=False) == naive_sentencepiece(text, metadata)


_SENTENCEPIECE: dict[bool, Tokenizer] = {}


def _cached_sentencepiece(
    add_space: bool, sentencepiece_metadata: Callable[..., dict[str, Any]]
) -> Tokenizer:
    if add_space not in _SENTENCEPIECE:
        metadata = sentencepiece_metadata(add_space_prefix=add_space)
        _SENTENCEPIECE[add_space] = Tokenizer.from_gguf(metadata)
    return _SENTENCEPIECE[add_space]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁<")), add_space=st.booleans())
def test_sentencepiece_text_survives_the_round_trip(
    text: str, add_space: bool, sentencepiece_metadata: Callable[..., dict[str, Any]]
):
    tokenizer = _cached_sentencepiece(add_space, sentencepiece_metadata)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_starts_a_text_with_bos_and_a_space(
    sentencepiece_metadata: Callable[..., dict[str, Any]],
):
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode("the cat")]
    assert tokens == ["<s>", "▁the", "▁cat"]
    assert tokenizer.special_ids == {0, 1, 2}


def test_scores_can_be_a_float32_array(sentencepiece_metadata: Callable[..., dict[str, Any]]):
    metadata = sentencepiece_metadata()
    scores = np.asarray(metadata["tokenizer.ggml.scores"], np.float32)
    other = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.scores": scores})
    assert other.encode("the cat sat") == Tokenizer.from_gguf(metadata).encode("the cat sat")


def test_malformed_scores_are_named(sentencepiece_metadata: Callable[..., dict[str, Any]]):
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = list(metadata["tokenizer.ggml.scores"])
    scores[-1] = float("nan")
    with pytest.raises(TokenizerError, match=f"NaN for token '{tokens[-1]}'"):
        Tokenizer.from_gguf(sentencepiece_metadata(scores=scores))
    with pytest.raises(TokenizerError, match="scores has 3 values"):
        Tokenizer.from_gguf(sentencepiece_metadata(scores=[0.0] * 3))
    huge = [*tokens[:-1], "x" * (MAX_PIECE_CHARACTERS + 1)]
    with pytest.raises(TokenizerError, match="has 1025 characters; at most 1024"):
        Tokenizer.from_gguf(sentencepiece_metadata(tokens=huge))


# Folders


def test_a_folder_gives_what_its_tokenizer_json_gives(trained_folder: Path):
    tokenizer = Tokenizer.from_folder(trained_folder)
    reference = tokenizers.Tokenizer.from_file(str(trained_folder / "tokenizer.json"))
    for text in ("the cat sat", "Ünïcödé 🙂 <|im_end|> 12", ""):
        for add in (True, False):
            ids = reference.encode(text, add_special_tokens=add).ids
            assert tokenizer.encode(text, add) == ids
            assert tokenizer.decode(ids) == reference.decode(ids)
            assert tokenizer.decode(ids, False) == reference.decode(ids, skip_special_tokens=False)
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer.encode("cat")[0] == 0


def test_the_end_tokens_of_generation_config_count_too(trained_folder: Path):
    for value, expected in ((1, {1, 2}), ([1, 0], {0, 1, 2}), (None, {2})):
        (trained_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert Tokenizer.from_folder(trained_folder).eos_token_ids == expected


def test_special_tokens_may_come_from_their_own_map(trained_folder: Path):
    (trained_folder / "tokenizer_config.json").unlink()
    special = {"eos_token": {"content": "the"}, "pad_token": "not in the vocabulary"}
    (trained_folder / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = Tokenizer.from_folder(trained_folder)
    assert tokenizer.eos_token_id in tokenizer.special_ids  # tokenizer.json had it as plain text
    assert tokenizer.id_to_token(tokenizer.eos_token_id or 0) == "the"
    assert tokenizer.bos_token_id is None
    assert not tokenizer.has_chat_template


def test_truncation_in_tokenizer_json_cuts_no_prompt(trained_folder: Path):
    file = trained_folder / "tokenizer.json"
    reference = tokenizers.Tokenizer.from_file(str(file))
    whole = reference.encode("the cat sat on the mat").ids
    reference.enable_truncation(3)
    reference.enable_padding(length=64)
    reference.save(str(file))
    assert Tokenizer.from_folder(trained_folder).encode("the cat sat on the mat") == whole


def test_chat_template_files_are_found_where_transformers_looks(trained_folder: Path):
    def rendered() -> str:
        tokenizer = Tokenizer.from_folder(trained_folder)
        return tokenizer.decode(tokenizer.apply_chat_template([("user", "cat")]), False)

    assert rendered() == "<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]
    (trained_folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert rendered() == "listed"
    (trained_folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    (trained_folder / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", "can't read .*tokenizer.json"),
        ("tokenizer.json", '{"model": {}}', "can't read .*tokenizer.json"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json must hold a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "can't read .*tokenizer_config.json"),
        ("generation_config.json", "no", "can't read .*generation_config.json"),
    ],
)
def test_a_malformed_file_is_named(file: str, text: str, message: str, trained_folder: Path):
    (trained_folder / file).write_text(text)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(trained_folder)


def test_a_folder_without_tokenizer_json_says_so(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; a model folder needs one"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (None, "has no decoder"),
        (tokenizers.decoders.WordPiece(), "a step .*WordPiece.* not supported"),
        (tokenizers.decoders.Strip(" ", 1, 0), "strips every token"),
    ],
)
def test_a_decoder_without_bytes_for_each_token_is_refused(
    decoder: Any, message: str, trained_folder: Path
):
    file = trained_folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["decoder"] = None if decoder is None else json.loads(decoder.__getstate__())
    file.write_text(json.dumps(tree))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(trained_folder)
