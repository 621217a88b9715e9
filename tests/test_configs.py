"""Every file in configs/ loads, and the arithmetic in its comments and in the table is true.

Memory sizes of the chips come from the published hardware pages, by the name of the file.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.config import Architecture, Config
from engine.config_file import load
from engine.memory_plan import MemoryPlan, plan
from tests.architectures import SMOLLM2_135M

FOLDER = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
TPU_CONFIGS = [path for path in CONFIGS if not path.stem.endswith("-cpu")]
GIB = 2**30
HBM = {"v5e": 16 * GIB, "v6e": 32 * GIB, "v5p": 95 * GIB}  # bytes a chip
CHIPS = {"v5e-8": 8, "v5e-4": 4, "v6e-8": 8, "v5p-16": 8}  # a v5p name counts TensorCores


def _slice(path: Path) -> str:
    return "-".join(path.stem.split("-")[-2:])


def _hbm(path: Path) -> int:
    return HBM[path.stem.split("-")[-2]]


def _architecture(config: Config) -> Architecture:
    return config.model.architecture or SMOLLM2_135M


def _plan(path: Path) -> MemoryPlan:
    hbm = _hbm(path) if path in TPU_CONFIGS else None
    config = load(path)
    return plan(config, _architecture(config), hbm=hbm)


def _stated(path: Path, what: str) -> str:
    match = re.search(rf"^#\s+{what}\s+([\d.]+) GiB", path.read_text(), re.MULTILINE)
    assert match, f"{path.name} doesn't state its {what}"
    return match[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads(path: Path) -> None:
    config = load(path)
    assert config.path == str(path)
    limit = config.model.max_model_len
    assert limit is not None
    assert limit <= _architecture(config).max_position


def test_the_issue_s_hardware_is_all_there() -> None:
    assert [path.stem for path in CONFIGS] == [
        "llama3-70b-v5p-16",
        "llama3-70b-v6e-8",
        "llama3-8b-v5e-8",
        "llama3-8b-v6e-8",
        "qwen3-8b-v5e-4",
        "smollm2-135m-cpu",
    ]


@pytest.mark.parametrize("path", TPU_CONFIGS, ids=lambda path: path.stem)
def test_a_tpu_config_fits_its_chips_and_uses_nearly_all_of_them(path: Path) -> None:
    config, made = load(path), _plan(path)
    assert config.mesh.data * config.mesh.tensor == CHIPS[_slice(path)]
    assert made.problems == ()
    assert made.kv_copies == 1
    assert made.available_bytes_per_chip is not None
    assert made.config_pool_bytes_per_chip > 0.9 * made.available_bytes_per_chip


@pytest.mark.parametrize("path", TPU_CONFIGS, ids=lambda path: path.stem)
def test_the_memory_stated_in_a_comment_is_what_the_plan_computes(path: Path) -> None:
    made, text = _plan(path), path.read_text()
    assert made.available_bytes_per_chip is not None
    for what, count in (
        ("weights", made.weight_bytes_per_chip),
        ("sampler", made.sampler_bytes_per_chip),
        ("headroom", made.headroom_bytes_per_chip),
        ("left", made.available_bytes_per_chip),
        ("pool", made.config_pool_bytes_per_chip),
    ):
        assert _stated(path, what) == f"{count / GIB:.2f}", what
    assert f"--hbm {_hbm(path) // GIB}GiB" in text
    assert f"{made.num_parameters:,} parameters" in text
    assert f"{made.config_blocks:,} blocks" in text
    assert f"A token takes {made.kv_bytes_per_token // 1024} KiB" in text
    assert f"holds {made.config_blocks * made.block_size:,} tokens" in text


@pytest.mark.parametrize("path", TPU_CONFIGS, ids=lambda path: path.stem)
def test_the_cache_a_sequence_gets_is_as_the_comment_says(path: Path) -> None:
    made = _plan(path)
    match = re.search(r"about ([\d,]+) tokens of cache each", path.read_text())
    assert match
    share = made.config_blocks * made.block_size / made.max_num_seqs
    assert int(match[1].replace(",", "")) == pytest.approx(share, rel=0.05)


def test_the_cpu_config_states_its_memory() -> None:
    path = FOLDER / "smollm2-135m-cpu.yaml"
    made, text = _plan(path), " ".join(path.read_text().replace("#", "").split())
    assert f"{made.weight_bytes / GIB:.2f} GiB of weights" in text
    assert f"{made.num_parameters:,} parameters" in text
    assert f"{made.sampler_bytes_per_chip / GIB:.2f} GiB of sampler state" in text
    assert f"{made.config_pool_bytes_per_chip / GIB:.2f} GiB of cache" in text
    assert f"{made.kv_bytes_per_token / 1024} KiB of cache" in text
    assert f"{made.config_blocks:,} blocks hold {made.num_tokens:,} tokens" in text
    assert made.lengths[-1].paged == 11  # "eleven sequences of max_model_len"
    assert f"{made.num_tokens // made.max_num_seqs} tokens each" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_table_in_the_readme_is_true(path: Path) -> None:
    config, made = load(path), _plan(path)
    assert config.cache.memory is not None
    chips = "a CPU" if made.hbm is None else f"{made.tensor} of {made.hbm // GIB} GiB"
    row = (
        f"| [`{path.name}`]({path.name}) | {chips} | {made.weight_bytes_per_chip / GIB:.2f} GiB "
        f"| {made.kv_bytes_per_token / 1024:g} KiB | {config.cache.memory // GIB} GiB "
        f"| {made.config_blocks * made.block_size:,} |"
    )
    assert row in (FOLDER / "README.md").read_text().splitlines()
