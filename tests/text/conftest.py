"""Tokenizers to test with: the real one, a small trained one, and a hand-made SentencePiece."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from engine.text import Tokenizer
from engine.weights.gguf_file import read_index

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_gguf: Path) -> dict[str, Any]:
    return dict(read_index(smollm2_gguf).metadata)


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata)


@pytest.fixture
def trained_folder(tmp_path: Path) -> Path:
    """A model folder with a byte-level BPE trained here, with <s> before a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the cat sat on the mat", "a paged cache holds the keys and the values"] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


PIECES = (
    "▁t", "he", "▁the", "▁c", "at", "▁cat", "▁s", "▁sat", "▁▁", "▁▁▁▁", "</", "s>", "an",
    "▁an", "ana", "▁b", "▁ban", "nan", "na",
)  # fmt: skip


@pytest.fixture(scope="session")
def sentencepiece_metadata() -> Callable[..., dict[str, Any]]:
    """Makes GGUF metadata of a SentencePiece vocabulary; keyword arguments replace keys."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    characters = sorted({character for piece in PIECES for character in piece} | set("bnxyz"))
    for rank, piece in enumerate([*PIECES, *characters]):
        tokens.append(piece)
        types.append(1)
        scores.append(-float(rank))

    def make(**changes: Any) -> dict[str, Any]:
        metadata = {
            "model": "llama",
            "tokens": tokens,
            "token_type": types,
            "scores": scores,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
        return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}

    return make
