"""A cache of 8 bits: the engine holds what the rule says, and it costs what that explains.

The rule is written again in NumPy (`quantised.py`), beside a Llama in NumPy. SmolLM2's own
figures are in test_smollm2.py.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from engine.config import Architecture, CacheDtype
from engine.weights import open_checkpoint
from tests.conftest import DATA
from tests.engines import make_request, small_engine
from tests.model import numpy_llama
from tests.model.goldens import golden, through_engine
from tests.model.quantised import EIGHT_BITS, Holding, hold, largest_values, write_scales
from tests.model.sampler_oracle import log_softmax
from tests.weights.checkpoints import read_all

MODEL = DATA / "tiny" / "llama"


@functools.cache
def model() -> tuple[Architecture, dict[str, np.ndarray]]:
    checkpoint = open_checkpoint(MODEL)
    return checkpoint.architecture, read_all(checkpoint)


@pytest.fixture(scope="module")
def scales(tmp_path_factory: pytest.TempPathFactory) -> dict[CacheDtype, tuple[Path, np.ndarray]]:
    """By dtype, the file and the scales under which the golden sequences just fit."""
    folder = tmp_path_factory.mktemp("scales")
    largest = largest_values(*model(), golden("llama")["input_ids"])
    files = {dtype: folder / f"{dtype}.safetensors" for dtype in EIGHT_BITS}
    return {dtype: (file, write_scales(file, largest, dtype)) for dtype, file in files.items()}


def in_numpy(held: Holding) -> np.ndarray:
    """Log-probabilities [2, 48, V] of the golden sequences by the NumPy model."""
    sequences = golden("llama")["input_ids"]
    rows = [numpy_llama.forward(*model(), ids, held=held) for ids in sequences]
    return np.stack([log_softmax(row) for row in rows])


def in_engine(cache_dtype: CacheDtype, scales: Path | None, tensor: int = 1) -> np.ndarray:
    """The same by the engine, NaN where it wasn't asked."""
    options = {"cache_dtype": cache_dtype, "scales": scales, "tensor": tensor}
    return through_engine(MODEL, "llama", **options)[0]


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean over all that the engine was asked."""
    return float(np.nanmean(np.abs(ours - theirs)))


@functools.cache
def cost_of_products() -> float:
    """How far the engine may be from the NumPy model, which multiplies in float32.

    A bfloat16 cache is multiplied in bfloat16 too, and errs by that; and what it errs by turns
    roundings to 8 bits over in the next layer, which may cost as much again.
    """
    return 2 * error(in_engine("bfloat16", None), log_softmax(golden("llama")["logits"]))


@pytest.mark.parametrize("tensor", [1, 4])  # four: each KV head, and its scales, twice
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_quantised_cache_costs_what_its_rounding_explains(
    scales: dict[CacheDtype, tuple[Path, np.ndarray]], dtype: CacheDtype, tensor: int
) -> None:
    file, values = scales[dtype]
    ours, theirs = in_engine(dtype, file, tensor), in_numpy(hold(dtype, values))
    exact = log_softmax(golden("llama")["logits"])
    explained = error(np.where(np.isnan(ours), np.nan, theirs), exact)
    assert explained > cost_of_products(), "the NumPy model did not quantise"
    assert error(ours, theirs) < cost_of_products()
    assert error(ours, exact) < explained + cost_of_products()


def test_float8_without_scales_holds_values_as_they_are() -> None:
    arch, _ = model()
    ones = np.ones((arch.num_layers, 2, arch.num_kv_heads), np.float32)
    ours = in_engine("float8_e4m3fn", None)
    assert error(ours, in_numpy(hold("float8_e4m3fn", ones))) < cost_of_products()


@pytest.mark.parametrize("tensor", [1, 4])
def test_the_pool_holds_each_key_and_value_divided_by_its_scale(
    scales: dict[CacheDtype, tuple[Path, np.ndarray]], tensor: int
) -> None:
    """To the last bit, but where float32 sums in another order turn a rounding over."""
    arch, params = model()
    file, values = scales["int8"]
    prompt = golden("llama")["input_ids"][0]
    seen: list[np.ndarray] = []

    def look(layer: int, kind: str, x: np.ndarray) -> np.ndarray:
        seen.append(x / values[layer, "kv".index(kind)][:, None])
        return hold("int8", values)(layer, kind, x)

    numpy_llama.forward(arch, params, prompt, held=look)
    expected = np.stack(seen).reshape(arch.num_layers, 2, len(prompt), arch.num_kv_heads, -1)
    expected = np.repeat(expected, tensor // arch.num_kv_heads or 1, axis=3)

    engine = small_engine(MODEL, cache_dtype="int8", scales=file, tensor=tensor)
    blocks: list[np.ndarray] = []
    request = make_request("a", prompt, 1)
    engine.run_one(request, on_plan=lambda plan, _: blocks.append(plan.rows[0].block_ids))
    pool = np.asarray(engine.runner.kv_pool)
    assert pool.dtype == np.int8
    pool = pool.reshape(arch.num_layers, -1, *pool.shape[1:])[:, blocks[-1]]  # [L, b, K, B, 2H]
    held = pool.transpose(0, 1, 3, 2, 4).reshape(arch.num_layers, -1, pool.shape[2], 2, 8)
    held = held[:, : len(prompt)].transpose(0, 3, 1, 2, 4)
    np.testing.assert_allclose(held, expected, rtol=0, atol=0.5 + 0.25)
    assert (held == np.rint(expected)).mean() > 0.98
    assert np.abs(held).max() == 127
