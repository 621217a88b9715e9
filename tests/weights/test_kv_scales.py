"""Files of scales for an 8-bit cache: what is written reads back, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from engine.config import CacheDtype, ConfigError
from engine.config_file import from_tree
from engine.weights.kv_scales import (
    LARGEST,
    encode_scales,
    load_scales,
    read_scales,
    scales_fingerprint,
    scales_of,
)
from tests.architectures import SMOLLM2_135M as ARCH

SHAPE = (ARCH.num_layers, 2, ARCH.num_kv_heads)
GOOD = np.random.default_rng(0).uniform(0.01, 2, SHAPE).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "scales.safetensors"
    path.write_bytes(encode_scales(GOOD, "int8"))
    return path


def with_one(value: float) -> np.ndarray:
    scales = GOOD.copy()
    scales[3, 1, 2] = value
    return scales


def test_scales_read_back_as_they_were_written(path: Path) -> None:
    found = read_scales(path, ARCH, "int8")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, GOOD)


def test_a_file_of_another_maker_that_does_not_say_its_dtype_is_taken(path: Path) -> None:
    path.write_bytes(save({"kv_scales": GOOD}))
    np.testing.assert_array_equal(read_scales(path, ARCH, "float8_e4m3fn"), GOOD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file that can be read"),
        (b"\x80\x04K\x01.", "is not a safetensors file that can be read"),  # a pickle
        (b"\xff" * 64, "is not a safetensors file that can be read"),
        (encode_scales(GOOD, "int8")[:-4], "is not a safetensors file that can be read"),
        (save({}), "holds nothing instead of 'kv_scales'"),
        (save({"x": GOOD}), "holds 'x' instead of 'kv_scales'"),
        (save({"kv_scales": GOOD, "x": GOOD}), "holds 'kv_scales', 'x' instead of"),
        (save({"kv_scales": GOOD.astype(np.float64)}), r"is F64 \[30, 2, 3\], but .* F32 \[30, 2"),
        (save({"kv_scales": GOOD[:, :, :1]}), r"is F32 \[30, 2, 1\], .* \(layers, keys and"),
        (encode_scales(GOOD[1:], "int8"), r"is F32 \[29, 2, 3\], but this model needs"),
        (
            encode_scales(GOOD, "float8_e4m3fn"),
            "for a cache of float8_e4m3fn, .*cache.dtype is int8",
        ),
        (encode_scales(with_one(0.0), "int8"), "layer 3, values, KV head 2 is 0.0; .* 1e-20"),
        (encode_scales(with_one(-1.0), "int8"), "layer 3, values, KV head 2 is -1.0"),
        (encode_scales(with_one(np.nan), "int8"), "layer 3, values, KV head 2 is nan"),
        (encode_scales(with_one(np.inf), "int8"), "layer 3, values, KV head 2 is inf"),
        # Finite and above zero, but 1 / 1e-45 is infinite, and 0 times that is no number …
        (encode_scales(with_one(1e-45), "int8"), r"KV head 2 is 1e-45; .* from 1e-20 to 1e\+20"),
        (encode_scales(with_one(1e-38), "int8"), r"KV head 2 is 1e-38; .* from 1e-20 to 1e\+20"),
        # … and everything divided by 3e38 is 0.
        (encode_scales(with_one(3e38), "int8"), r"KV head 2 is 3e\+38; .* from 1e-20 to 1e\+20"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    path: Path, content: bytes, message: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"cache.scales: {path}: .*{message}.*octavo calibrate"):
        read_scales(path, ARCH, "int8")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file; make one with `octavo cal"):
        read_scales(tmp_path / "none", ARCH, "int8")
    with pytest.raises(ConfigError, match="is not a file"):
        read_scales(tmp_path, ARCH, "int8")


def config(path: Path, **cache: Any) -> Any:
    tree = {"model": {"source": "x"}, "cache": {"num_blocks": 8, **cache}}
    return dataclasses.replace(from_tree(tree), path=str(path.parent / "config.yaml"))


def test_a_config_names_the_file_from_its_own_folder(path: Path) -> None:
    scales = load_scales(config(path, dtype="int8", scales="scales.safetensors"), ARCH)
    np.testing.assert_array_equal(scales, GOOD)
    assert load_scales(config(path), ARCH) is None
    assert load_scales(config(path, dtype="float8_e4m3fn"), ARCH) is None


def test_int8_without_scales_says_how_to_make_them(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"octavo calibrate --config .*config\.yaml --output"):
        load_scales(config(path, dtype="int8"), ARCH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_that_is_not_quantised_takes_no_scales(dtype: str) -> None:
    cache = {"num_blocks": 8, "dtype": dtype, "scales": "scales.safetensors"}
    with pytest.raises(ConfigError, match=f"cache.scales is .* held in {dtype}, which takes none"):
        from_tree({"model": {"source": "x"}, "cache": cache})
    del cache["dtype"]  # the model's
    with pytest.raises(ConfigError, match="held in bfloat16, which takes none"):
        from_tree({"model": {"source": "x"}, "cache": cache})


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_the_largest_value_seen_is_the_largest_that_the_dtype_holds(dtype: CacheDtype) -> None:
    info = np.iinfo(np.int8) if dtype == "int8" else ml_dtypes.finfo(ml_dtypes.float8_e4m3fn)
    assert LARGEST[dtype] == float(info.max)
    largest = np.random.default_rng(0).uniform(1e-3, 1e3, SHAPE)
    scales = scales_of(largest, dtype)
    np.testing.assert_allclose(largest / scales, float(info.max), rtol=1e-6)


def test_scales_that_are_found_are_scales_that_are_taken(path: Path) -> None:
    for value in (0.0, 1e-45, 1e-20, 1.0, 1e20):
        path.write_bytes(encode_scales(scales_of(np.full(SHAPE, value), "int8"), "int8"))
        assert (read_scales(path, ARCH, "int8") > 0).all()
    for value in (np.nan, np.inf, 3e38):
        message = rf"layer 3 .* {re.escape(f'{value:.3g}')}, .*model\.dtype=float32"
        with pytest.raises(ValueError, match=message):
            scales_of(with_one(value), "int8")


def test_scales_on_the_edges_of_the_band_are_taken(path: Path) -> None:
    for value in (1e-20, 1e20):
        path.write_bytes(encode_scales(with_one(value), "int8"))
        assert read_scales(path, ARCH, "int8")[3, 1, 2] == np.float32(value)


def test_fingerprints_tell_scales_apart() -> None:
    prints = [scales_fingerprint(s) for s in (None, GOOD, with_one(1.0), np.ones(SHAPE))]
    assert len(set(prints)) == 4
    assert scales_fingerprint(GOOD.copy()) == prints[1]
