"""A tiny engine to measure: random weights, a tokenizer of single bytes, few shapes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine import config_file
from engine.frontend import Engine
from tests import compile_cache

VOCAB_SIZE = 128

CONFIG = """
model:
  source: model
  name: tiny
  dtype: float32
  max_model_len: 128
cache:
  block_size: 16
  num_blocks: 32
scheduler:
  max_num_seqs: 4
  max_step_tokens: 32
  max_waiting: 8
buckets:
  decode_seqs: [4]
  prefill_tokens: [32]
  prefill_seqs: [4]
compile_cache: %s
"""


@pytest.fixture(scope="session")
def tiny_config(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file of a model that loads and compiles in a few seconds."""
    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(tiny_models / "llama", folder / "model")
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB_SIZE]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    path = folder / "tiny.yaml"
    path.write_text(CONFIG % compile_cache.FOLDER)
    return path


@pytest.fixture(scope="session")
def tiny_engine(tiny_config: Path) -> Iterator[Engine]:
    engine = Engine.from_config(config_file.load(tiny_config))
    yield engine
    engine.close()
