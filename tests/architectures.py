"""Architectures that tests need without the model's files, as published."""

from __future__ import annotations

from pathlib import Path

from engine.config import Architecture
from engine.config_file import load

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

SMOLLM2_135M = Architecture(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    rope_theta=100_000.0,
    tie_embeddings=True,
)


def _stated(name: str) -> Architecture:
    architecture = load(CONFIGS / name).model.architecture
    assert architecture is not None
    return architecture


LLAMA_8B = _stated("llama3-8b-v5e-8.yaml")
LLAMA_70B = _stated("llama3-70b-v6e-8.yaml")
QWEN3_8B = _stated("qwen3-8b-v5e-4.yaml")
