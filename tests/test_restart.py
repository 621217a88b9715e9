"""An engine with a disk tier, closed and started again from its config alone."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import Config, ConfigError
from engine.config_file import from_tree, load
from engine.core.costs import compute_ns
from engine.frontend import Engine, EngineStats
from engine.loading import make_limits
from engine.runtime.tiers import open_disk_tier
from engine.sampling import SamplingParams
from tests.runtime import tiny

DISK = {"cache.host_memory": "1MiB", "cache.disk_path": "blocks", "cache.disk_size": "64MiB"}
SAMPLING = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def one_life(config: Config) -> tuple[tuple[int, ...], int, EngineStats]:
    """The tokens of one answer, how many of its prompt's were cached, and the figures."""
    engine = Engine.from_config(config)

    async def answer() -> tuple[tuple[int, ...], int]:
        tokens: tuple[int, ...] = ()
        cached = 0
        async for delta in engine.generate(tiny.random_ids(300), SAMPLING):
            tokens += delta.token_ids
            cached = delta.usage.cached_tokens if delta.usage else cached
        return tokens, cached

    try:
        return *asyncio.run(answer()), engine.stats()
    finally:
        engine.close()


def test_a_restart_finds_its_blocks_and_says_what_swapping_costs(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine")
    config = load(tiny.write_config(tmp_path / "a.yaml", model, **DISK, **{"cache.swap": "always"}))
    tokens, cached, stats = one_life(config)
    assert (cached, stats.restored_blocks, stats.disk_read_bytes) == (0, 0, 0)
    assert len(list((tmp_path / "blocks").glob("*/*.blk"))) >= 18
    assert "19 blocks written at the end, 0 left out" in caplog.text
    assert "swapping:" not in caplog.text
    again, cached, stats = one_life(config)
    assert (again, cached) == (tokens, 288)
    assert (stats.restored_blocks, stats.disk_read_bytes) == (18, 18 * 8192)
    measured = load(Path(config.path), ["cache.swap=auto"])
    again, _, stats = one_life(measured)
    assert again == tokens
    assert "GB/s" in caplog.text
    assert "tokens/s. A block comes back in" in caplog.text


def test_what_is_measured_decides_and_is_part_of_the_limits(model: Path) -> None:
    memory = {"cache.host_memory": "1MiB"}
    engine = Engine.from_config(from_tree(tiny.config_tree(model, **memory)))
    limits = engine._loaded.limits
    engine.close()
    assert min(limits.transfer_ns, limits.swap_in_ns, limits.swap_out_ns, limits.attend_ps) >= 1
    assert compute_ns(limits, 0, 1) > 16 * 100  # no machine computes ten million tokens a second
    config = from_tree(tiny.config_tree(model, **memory, **{"cache.swap": "always"}))
    engine = Engine.from_config(config)
    assert engine._loaded.limits.compute_ns == 0
    engine.close()


def layout(
    tmp_path: Path,
    weights: str = "weights",
    backend: Any = "xla",
    products: Any = "xla",
    **changes: Any,
) -> Any:
    """The identity of the blocks that a config's engine writes."""
    tree = tiny.config_tree(Path("x"), **(DISK | changes))
    config = from_tree(tree, path=str(tmp_path / "a.yaml"))
    scales = np.ones((2, 2, 2), np.float32) if changes.get("cache.dtype") == "int8" else None
    limits = make_limits(config, tiny.ARCH, weights, backend=backend, scales=scales)
    disk = open_disk_tier(config, limits, tiny.ARCH, backend, products)
    assert disk is not None
    disk.close()
    return disk.layout


def test_what_decides_a_block_s_bytes_is_in_its_file_s_identity(tmp_path: Path) -> None:
    layouts = [
        layout(tmp_path),
        layout(tmp_path, weights="others"),
        layout(tmp_path, backend="tpu"),
        layout(tmp_path, backend="reference"),
        layout(tmp_path, products="cpu"),
        layout(tmp_path, **{"model.dtype": "bfloat16"}),
        layout(tmp_path, **{"cache.dtype": "bfloat16"}),
        layout(tmp_path, **{"cache.dtype": "int8"}),
        layout(tmp_path, **{"cache.block_size": 32}),
        layout(tmp_path, **{"mesh.tensor": 2}),
    ]
    assert len({one.digest() for one in layouts}) == len(layouts)
    assert layout(tmp_path, **{"cache.num_blocks": 99}).digest() == layouts[0].digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache.disk_size": 8000}, r"cache.disk_size is 8000 bytes, but .* one block takes 8324"),
        ({"cache.disk_path": "a.yaml"}, r"cache.disk_path: .*a.yaml can't be used"),
    ],
)
def test_a_folder_that_can_t_be_used_is_refused_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(ConfigError, match=message):
        layout(tmp_path, **changes)
