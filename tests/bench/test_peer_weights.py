"""The model as the peers get it: the same architecture, values and tokens as ours."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from benchmarks.peers import convert
from engine.text.tokenizer import Tokenizer
from engine.weights import WeightsError, open_checkpoint

SOME = (
    ("embed.weight", None),
    ("layers.q_proj.kernel", 3),
    ("layers.k_proj.kernel", 29),
    ("layers.down_proj.kernel", 0),
    ("layers.attn_norm.scale", 7),
    ("final_norm.scale", None),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


def test_a_hugging_face_folder_is_the_same_model(smollm2_gguf: Path, made: Path) -> None:
    ours = open_checkpoint(smollm2_gguf)
    folder = convert.hugging_face_folder(smollm2_gguf, made)
    theirs = open_checkpoint(folder)
    assert theirs.architecture == ours.architecture
    assert (theirs.bos_token_id, theirs.eos_token_ids) == (ours.bos_token_id, ours.eos_token_ids)
    for name, layer in SOME:
        rounded = ours.read(name, layer).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(theirs.read(name, layer).astype(ml_dtypes.bfloat16), rounded)
    assert ours.metadata is not None
    text = "In 2024, 1234 things; été \n\n<|im_start|>user"
    mine, other = Tokenizer.from_gguf(ours.metadata), Tokenizer.from_folder(folder)
    assert other.encode(text) == mine.encode(text)
    messages = [("user", "Hi 42")]
    assert other.apply_chat_template(messages) == mine.apply_chat_template(messages)
    written = folder.stat().st_mtime_ns
    assert convert.hugging_face_folder(smollm2_gguf, made).stat().st_mtime_ns == written


@pytest.mark.parametrize(("kind", "error"), [("bf16", 2**-8), ("q8_0", 2**-6)])
def test_a_gguf_file_of_another_type_is_the_same_model(
    kind: str, error: float, smollm2_gguf: Path, made: Path
) -> None:
    ours = open_checkpoint(smollm2_gguf)
    theirs = open_checkpoint(convert.gguf_file(smollm2_gguf, made, kind))
    assert theirs.architecture == ours.architecture
    assert theirs.metadata is not None
    assert ours.metadata is not None
    for key in ("tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        assert theirs.metadata[key] == ours.metadata[key]
    for name, layer in SOME:
        want, got = ours.read(name, layer), theirs.read(name, layer)
        if want.ndim == 1:
            np.testing.assert_array_equal(got, want)
        else:
            assert np.linalg.norm(got - want) < error * np.linalg.norm(want)


def test_a_model_that_is_no_gguf_file_is_refused(smollm2_gguf: Path, made: Path) -> None:
    folder = convert.hugging_face_folder(smollm2_gguf, made)
    with pytest.raises(WeightsError, match="GGUF"):
        convert.gguf_file(folder, made, "bf16")
