"""Builds a `tokenizers.Tokenizer` from the vocabulary in a GGUF file.

Key names and values: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (Tokenizer);
what a pre-tokenizer's name stands for is defined by llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from engine.text.token_bytes import SPACE_MARK, TokenizerError

MAX_PIECE_CHARACTERS = 1024  # of a SentencePiece piece; splitting one takes quadratic time

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How byte-level BPE cuts a text into words before merging.

    Attributes:
      splits: regular expressions (Oniguruma), applied one after the other; each match and
        each gap between matches is a piece.
      nfc: text is brought to Unicode's composed form first.
      ignore_merges: a word that is a token is taken whole, whatever the merges say.
      add_bos: default of `tokenizer.ggml.add_bos_token`.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_LLAMA3 = PreTokenizer(
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,),
    ignore_merges=True,
    add_bos=True,
)
_QWEN2 = PreTokenizer((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,), nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What both kinds of models need of the metadata, checked."""

    tokens: list[str]
    ids: dict[str, int]
    types: list[int]


def build(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that the metadata describes, ready to encode and decode.

    Args:
      metadata: GGUF keys and values; arrays may be lists or NumPy arrays.

    Raises:
      TokenizerError: a key is missing or malformed, or its kind of tokenizer is unknown.
    """
    model = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _build_byte_level, "llama": _build_sentencepiece}
    if model not in builders:
        raise TokenizerError(
            f"tokenizer.ggml.model is {model!r}; supported are {', '.join(builders)}"
        )
    vocabulary = _read_vocabulary(metadata)
    try:
        tokenizer = builders[model](metadata, vocabulary)
        _add_tokens(tokenizer, metadata, vocabulary)
    except TokenizerError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise TokenizerError(f"tokenizer.ggml.* don't make a tokenizer: {error}") from error
    return tokenizer


def special_id(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    """`tokenizer.ggml.<name>_token_id`, or None if there is no such key.

    Raises:
      TokenizerError: it is not the id of a token.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    if (value := metadata.get(key)) is None:
        return None
    if not 0 <= int(value) < num_tokens:
        raise TokenizerError(f"{key} is {value}, but there are {num_tokens} tokens")
    return int(value)


def _build_byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}; supported are {', '.join(PRE_TOKENIZERS)}. "
            "A folder with the model's tokenizer.json works whatever its pre-tokenizer"
        )
    pre = PRE_TOKENIZERS[name]
    merges = []
    for merge in _array(metadata, "merges", str):
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise TokenizerError(f"tokenizer.ggml.merges has {merge!r:.80}; want two tokens")
        merges.append((left, right))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges)
    )
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(r), "isolated") for r in pre.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_bos_and_eos(tokenizer, metadata, vocabulary, add_bos=pre.add_bos)
    return tokenizer


def _build_sentencepiece(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary
) -> tokenizers.Tokenizer:
    scores = _array(metadata, "scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise TokenizerError(
            f"tokenizer.ggml.scores has {len(scores)} values for {len(vocabulary.tokens)} tokens"
        )
    unknown = special_id(metadata, "unknown", len(vocabulary.tokens))
    if unknown is None and TokenType.UNKNOWN in vocabulary.types:
        unknown = vocabulary.types.index(TokenType.UNKNOWN)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_from_scores(vocabulary, scores),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in vocabulary.types,
        )
    )
    add_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE_MARK), spaces]) if add_space else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if add_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_bos_and_eos(tokenizer, metadata, vocabulary, add_bos=True)
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, the best-scored piece first.

    SentencePiece merges the adjacent pair that makes the best-scored piece; a list of merges
    in the order of those scores does the same (transformers: `generate_merges`). Where one
    piece can be made in several ways, the longer left half comes first. Control, unknown and
    byte tokens are no pieces: text must not be able to spell one.
    """
    pieces = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    merges: list[tuple[float, int, str, str]] = []
    for piece, score in zip(vocabulary.tokens, scores, strict=True):
        if piece not in pieces:
            continue
        if math.isnan(score):
            raise TokenizerError(f"tokenizer.ggml.scores has NaN for token {piece!r:.80}")
        if len(piece) > MAX_PIECE_CHARACTERS:
            raise TokenizerError(
                f"token {piece!r:.40}… has {len(piece)} characters; at most "
                f"{MAX_PIECE_CHARACTERS} are supported"
            )
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-score, -cut, left, right))
    merges.sort(key=lambda merge: merge[:2])  # stable: equal scores stay in order of their ids
    return [(left, right) for _, _, left, right in merges]


def _read_vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _array(metadata, "tokens", str)
    if not tokens:
        raise TokenizerError("tokenizer.ggml.tokens is empty")
    ids: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        if ids.setdefault(token, token_id) != token_id:
            raise TokenizerError(
                f"tokenizer.ggml.tokens has {token!r:.80} twice, as {ids[token]} and {token_id}"
            )
    if "tokenizer.ggml.token_type" in metadata:
        types = _array(metadata, "token_type", int)
    else:
        types = [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(
            f"tokenizer.ggml.token_type has {len(types)} values for {len(tokens)} tokens"
        )
    return _Vocabulary(tokens, ids, types)


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any], vocabulary: _Vocabulary
) -> None:
    """Declare the tokens that are matched in a text as they stand, before any splitting."""
    num_tokens = len(vocabulary.tokens)
    named = {
        special_id(metadata, name, num_tokens) for name in ("bos", "eos", "eot", "eom", "padding")
    }
    added = []
    for token_id, kind in enumerate(vocabulary.types):
        special = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token_id in named
        if special or kind == TokenType.USER_DEFINED:
            token = vocabulary.tokens[token_id]
            added.append(AddedToken(token, special=special, normalized=False))
    tokenizer.add_tokens(added)


def _add_bos_and_eos(
    tokenizer: tokenizers.Tokenizer,
    metadata: Mapping[str, Any],
    vocabulary: _Vocabulary,
    *,
    add_bos: bool,
) -> None:
    """Make `encode` put the beginning and end tokens around a text, if the file says so."""
    around: dict[str, int] = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        token_id = special_id(metadata, name, len(vocabulary.tokens))
        if token_id is not None and metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            around[name] = token_id
    if not around:
        return
    pieces: dict[str, list[dict[str, Any]]] = {
        name: [{"SpecialToken": {"id": vocabulary.tokens[token_id], "type_id": 0}}]
        for name, token_id in around.items()
    }
    text = {"A": {"id": "A", "type_id": 0}, "B": {"id": "B", "type_id": 0}}
    single = [*pieces.get("bos", []), {"Sequence": text["A"]}, *pieces.get("eos", [])]
    second = [*pieces.get("bos", []), {"Sequence": text["B"]}, *pieces.get("eos", [])]
    processor = processors.TemplateProcessing()
    # The constructor parses "token:type" strings, which a token with a colon would break.
    processor.__setstate__(
        json.dumps(
            {
                "type": "TemplateProcessing",
                "single": single,
                "pair": single + second,
                "special_tokens": {
                    vocabulary.tokens[token_id]: {
                        "id": vocabulary.tokens[token_id],
                        "ids": [token_id],
                        "tokens": [vocabulary.tokens[token_id]],
                    }
                    for token_id in around.values()
                },
            }
        ).encode()
    )
    tokenizer.post_processor = processor


def _array[T: (str, int, float)](metadata: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    """A metadata array as a list of `kind`; NumPy arrays become Python values."""
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise TokenizerError(f"the file has no {key}, so its text can't be tokenised")
    value = metadata[key]
    values: Iterable[Any] = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TokenizerError(f"{key} must be an array, but is a {type(value).__name__}")
    values = list(values)
    accepted = (int, float) if kind is float else (kind,)
    for index, item in enumerate(values):
        if not isinstance(item, accepted):
            raise TokenizerError(
                f"{key}[{index}] must be a {kind.__name__}, but is a {type(item).__name__}"
            )
    return values
