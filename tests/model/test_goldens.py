"""Every architecture against logits and tokens of transformers, from every weight format."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine.config import Backend
from engine.model.attention import Attention, Ragged, kv_pool_shape
from engine.model.decoder import Decoder
from engine.weights import convert, open_checkpoint
from pallas_kernels import native
from tests.conftest import DATA, TINY_MODELS
from tests.engines import load_decoder, make_request, small_engine
from tests.model.goldens import GOLDEN_TOLERANCE, golden, through_engine
from tests.weights.checkpoints import (
    LLAMA,
    random_tensors,
    read_folder,
    write_folder,
    write_gguf,
)

BLOCK_SIZE = 8
# The same program but for the order of some sums: a few units in the last place of ten.
BACKEND_TOLERANCE = 2e-5
NATIVE: tuple[Backend, ...] = () if native.unavailable() else ("cpu",)
BACKENDS: tuple[Backend, ...] = ("xla", "reference", *NATIVE)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory):
    """(model, format) -> a checkpoint; GGUF and native ones are written on first use."""

    @functools.cache
    def source(name: str, format_: str) -> Path:
        folder = DATA / "tiny" / name
        if format_ == "safetensors":
            return folder
        target = tmp_path_factory.mktemp(f"{name}-{format_}") / f"model.{format_}"
        if format_ == "gguf":
            return write_gguf(target, *read_folder(folder))
        convert(folder, target, dtype="float32")
        return target

    return source


@functools.partial(jax.jit, static_argnames=("definition", "attention"))
def _step(definition, weights, tokens, pool, ragged, attention):
    model = nnx.merge(definition, weights)
    hidden, pool = model(tokens, pool, ragged, attention)
    return model.logits(hidden)[0], pool


def forward(
    model: Decoder, token_ids: np.ndarray, chunks: tuple[int, ...], backend: Backend
) -> np.ndarray:
    """Logits [sequences, positions, V] of equally long sequences, `chunks` positions a step.

    Blocks lie in a shuffled order, and nothing was ever written to those that are not used.
    """
    num_seqs, length = token_ids.shape
    assert sum(chunks) == length
    assert backend != "auto"
    arch = model.arch
    width = -(-length // BLOCK_SIZE)
    num_blocks = num_seqs * width + 3
    tables = np.random.default_rng(0).permutation(num_blocks)[: num_seqs * width]
    shape = kv_pool_shape(
        num_layers=arch.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=arch.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=arch.head_dim,
        backend=backend,
    )
    pool = jnp.full(shape, jnp.nan, jnp.float32)
    definition, weights = nnx.split(model)
    parts, start = [], 0
    for chunk in chunks:
        ragged = Ragged(
            token_rows=jnp.repeat(jnp.arange(num_seqs, dtype=jnp.int32), chunk),
            positions=jnp.tile(jnp.arange(start, start + chunk, dtype=jnp.int32), num_seqs),
            query_starts=jnp.arange(num_seqs + 1, dtype=jnp.int32) * chunk,
            kv_lens=jnp.full(num_seqs, start + chunk, jnp.int32),
            block_tables=jnp.asarray(tables.reshape(num_seqs, width), jnp.int32),
        )
        tokens = jnp.asarray(token_ids[:, start : start + chunk].reshape(-1), jnp.int32)
        logits, pool = _step(definition, weights, tokens, pool, ragged, Attention(backend))
        parts.append(np.asarray(logits).reshape(num_seqs, chunk, -1))
        start += chunk
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_logit_is_the_references_by_every_backend_from_every_format(
    name: str, sources
) -> None:
    reference = golden(name)
    ids = reference["input_ids"]

    def logits(format_: str, backend: Backend) -> np.ndarray:
        return forward(load_decoder(open_checkpoint(sources(name, format_))), ids, (48,), backend)

    plain = logits("safetensors", "xla")
    np.testing.assert_allclose(plain, reference["logits"], rtol=0, atol=GOLDEN_TOLERANCE)
    oracle = logits("safetensors", "reference")
    np.testing.assert_allclose(oracle, reference["logits"], rtol=0, atol=GOLDEN_TOLERANCE)
    np.testing.assert_allclose(plain, oracle, rtol=0, atol=BACKEND_TOLERANCE)
    for backend in NATIVE:
        by_native = logits("safetensors", backend)
        np.testing.assert_allclose(by_native, reference["logits"], rtol=0, atol=GOLDEN_TOLERANCE)
        np.testing.assert_allclose(by_native, plain, rtol=0, atol=BACKEND_TOLERANCE)
    np.testing.assert_array_equal(logits("orbax", "xla"), plain)
    gguf = logits("gguf", "xla")
    np.testing.assert_allclose(gguf, reference["logits"], rtol=0, atol=GOLDEN_TOLERANCE)
    # GGUF states the llama3 rope scaling as float32 factors of each frequency.
    np.testing.assert_allclose(gguf, plain, rtol=0, atol=1e-4 if name == "llama3_rope" else 0)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tokens_and_logprobs_through_scheduler_and_runner_are_the_references(name: str) -> None:
    reference = golden(name)
    logprobs, results = through_engine(DATA / "tiny" / name, name)
    assert results[2].token_ids == tuple(reference["greedy_ids"].tolist())
    expected = np.asarray(jax.nn.log_softmax(reference["logits"], axis=-1))
    seen = np.isfinite(logprobs)
    np.testing.assert_allclose(logprobs[seen], expected[seen], rtol=0, atol=GOLDEN_TOLERANCE)
    best = reference["logits"][:, -1].argmax(axis=-1)
    assert [result.token_ids for result in results[:2]] == [(token,) for token in best]


@pytest.mark.parametrize("format_", ["gguf", "orbax"])
def test_greedy_tokens_of_a_converted_model_are_the_references(format_: str, sources) -> None:
    engine = small_engine(sources("qwen3", format_))
    request = make_request("greedy", golden("qwen3")["greedy_prompt"], 24)
    expected = tuple(golden("qwen3")["greedy_ids"].tolist())
    assert engine.run_one(request).token_ids == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunked_prefill_equals_a_whole_one(backend: Backend) -> None:
    model = load_decoder(open_checkpoint(DATA / "tiny" / "llama"))
    ids = golden("llama")["input_ids"]
    whole = forward(model, ids, (48,), backend)
    for chunks in ((13, 13, 13, 9), (1, 1, 13, 1, 13, 9, 9, 1)):
        chunked = forward(model, ids, chunks, backend)
        np.testing.assert_allclose(chunked, whole, rtol=0, atol=BACKEND_TOLERANCE)


# Without llama3_rope, which is the program of llama with other angles.
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_two_devices_equal_one(name: str) -> None:
    """Heads, feed-forward and vocabulary split; sums over both devices may round otherwise."""
    source = DATA / "tiny" / name
    one, alone = through_engine(source, name)
    two, split = through_engine(source, name, tensor=2)
    assert_equal(two, one)
    assert [result.token_ids for result in split] == [result.token_ids for result in alone]


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    both = np.isfinite(ours) & np.isfinite(theirs)
    assert (both.sum(axis=-1) >= 19).all()  # the 20th may change places with the 21st
    np.testing.assert_allclose(ours[both], theirs[both], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_four_devices_that_hold_two_kv_heads_twice_equal_one(name: str) -> None:
    source = DATA / "tiny" / name
    one, alone = through_engine(source, name)
    four, split = through_engine(source, name, tensor=4)
    pool = small_engine(source, tensor=4).runner.kv_pool
    assert pool.shape[1] == 4
    assert {shard.data.shape[1] for shard in pool.addressable_shards} == {1}
    assert_equal(four, one)
    assert [result.token_ids for result in split] == [result.token_ids for result in alone]


@pytest.mark.parametrize("tensor", [2, 4])
def test_devices_that_all_hold_the_one_kv_head_equal_one(tensor: int, tmp_path: Path) -> None:
    config = LLAMA | {"num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 1}
    tensors = random_tensors(config)
    for values in tensors.values():  # so that activations stay near one, as a model's do
        values *= values.shape[-1] ** -0.5 if values.ndim == 2 else 1
    source = write_folder(tmp_path / "model", config, tensors)
    prompt = np.random.default_rng(0).integers(0, config["vocab_size"], 40)
    request = make_request("a", prompt, 12, logprobs=10, prompt_logprobs=10, ignore_eos=True)
    alone = small_engine(source).run_one(request)
    split = small_engine(source, tensor=tensor).run_one(request)
    assert split.token_ids == alone.token_ids
    for ours, theirs in zip(
        split.prompt_logprobs + split.logprobs,
        alone.prompt_logprobs + alone.logprobs,
        strict=True,
    ):
        found, expected = dict(ours.top), dict(theirs.top)
        both = found.keys() & expected.keys()
        assert len(both) >= 9
        assert all(found[token] == pytest.approx(expected[token], abs=1e-5) for token in both)
