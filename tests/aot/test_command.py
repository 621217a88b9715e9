"""`python -m engine.aot`: what it refuses, and with libtpu a kernel a generation, a whole step and
the schedule."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.aot.topologies import GENERATIONS, AotError, generation

ROOT = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="libtpu exists for Linux on x86-64 only",
)


def run(
    *arguments: str, module: str = "engine.aot", **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as libtpu's settings must not leak into this one."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.aot
@needs_libtpu
def test_a_kernel_a_generation_and_a_whole_step_compile_and_copy_nothing() -> None:
    done = run("--small", "--kernels", "--programs")
    assert done.returncode == 0, done.stdout + done.stderr
    for known in GENERATIONS:
        assert re.search(rf"^{known.smallest} .* [\d.]+ \+ [\d.]+ MiB of VMEM", done.stdout, re.M)
    for step in ("decode: 256 tokens", "prefill: 2048 tokens"):
        assert f"llama3-8b-v5e-8 on v5e:2x4, {step} of 256 sequences" in done.stdout
    assert done.stdout.count("weights 1.87, KV 12.00, sampler 0.28") == 2
    assert done.stdout.count("6144 blocks,") == 2
    assert "2 all-reduce a layer" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("aot: 2 programs, 5 kernels, 0 KV-sized copies, 0 failures"), last


@pytest.mark.slow
@pytest.mark.aot
@needs_libtpu
def test_a_decode_s_schedule_stays_within_its_limits() -> None:
    done = run(module="engine.aot.schedule")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("(limit ") == 2 * 6


@pytest.mark.aot
@needs_libtpu
def test_a_schedule_over_its_limits_fails(tmp_path: Path) -> None:
    limits = tmp_path / "limits.yaml"
    limits.write_text(
        "- {num_heads: 8, num_kv_heads: 1, block_size: 128, max_bundles: 0.01, max_spills: 99}\n"
    )
    done = run("--limits", str(limits), module="engine.aot.schedule")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^8/1 heads, blocks of 128 .*\(limit 0.01\).* FAILED$", done.stdout, re.M)


COPIES_THE_POOL = """
from engine.aot.topologies import one_chip, prepare_environment
prepare_environment()
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from engine.aot import hlo

mesh = one_chip("v5e:2x2")
shape = (8, 64, 4, 128, 256)
pool = jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
)

def through_the_layers(pool):
    def layer(carry, pool):
        return carry + 1, pool.at[carry, 0, 3].set(1.0)
    return jax.lax.scan(layer, 0, pool)[1]

def in_place(pool):
    def layer(pool, index):
        return pool.at[index, 5, 0, 3].set(1.0), None
    return jax.lax.scan(layer, pool, jnp.arange(8))[0]

for program in (through_the_layers, in_place):
    traced = jax.jit(program, donate_argnums=0).trace(pool)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    size = 8 * 64 * 4 * 128 * 256
    found = hlo.pool_copies(
        compiled, num_elements=size, num_bytes=2 * size, smallest=size // 8
    )
    print(program.__name__, len(found), "; ".join(found))
"""


@pytest.mark.aot
@needs_libtpu
def test_a_tpu_program_that_copies_the_pool_is_found_out() -> None:
    """As scan input and output the pool is copied; as a carry it is not."""
    command = [sys.executable, "-c", COPIES_THE_POOL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    copied, in_place = done.stdout.splitlines()
    assert re.match(r"through_the_layers [1-9]", copied), copied
    assert in_place.strip() == "in_place 0"


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v9:2x2", "2x4", ""])
def test_what_is_no_topology_is_refused_with_an_example(topology: str) -> None:
    with pytest.raises(AotError, match=r"write GENERATION:SHAPE, such as v5e:2x4"):
        generation(topology)


@pytest.mark.slow
@pytest.mark.aot
@needs_libtpu
def test_a_config_that_the_topology_can_t_hold_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    """Too few chips, a shape that doesn't exist, and a cache larger than the memory."""
    small = ROOT / "configs" / "llama3-8b-v5e-8.yaml"
    large = tmp_path / "large.yaml"
    large.write_text(small.read_text().replace("memory: 96GiB", "memory: 136GiB"))
    tiny = tmp_path / "config.yaml"
    tiny.write_text(small.read_text().replace("num_layers: 32", "num_layers: 1"))
    done = run(
        *("--config", str(tiny), "--topology", "v5e:2x2"),
        *("--config", str(tiny), "--topology", "v5e:3x5"),
        *("--config", str(large), "--topology", "v5e:2x4"),
    )
    assert done.returncode == 1
    assert "mesh.tensor is 8, but there are 4 devices (TPU v5 lite)" in done.stdout
    assert "libtpu doesn't know the topology 'v5e:3x5'" in done.stdout
    assert re.search(r"Ran out of memory|lower cache.memory to at most", done.stdout), done.stdout
    assert "aot: 6 programs, 0 kernels, 0 KV-sized copies, 6 failures" in done.stdout


def test_a_config_needs_its_topology() -> None:
    done = run("--config", "configs/llama3-8b-v5e-8.yaml")
    assert done.returncode == 2
    assert "every --config needs a --topology" in done.stderr


def test_without_libtpu_the_way_out_is_named(tmp_path: Path) -> None:
    """An import hook stands for a machine without it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: (\n"
        "    None if name == 'libtpu' else find(name, *rest)\n"
        ")\n"
    )
    for module in ("engine.aot", "engine.aot.schedule"):
        done = run(module=module, PYTHONPATH=str(tmp_path))
        assert done.returncode == 2
        assert "pip install 'octavo[tpu]'" in done.stderr
