"""`python -m engine.aot`: what it refuses, and with libtpu a kernel a generation, a whole step and
the schedule."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import msgspec
import pytest

from engine.aot import __main__ as command
from engine.aot import bundles, report, schedule
from engine.aot.topologies import GENERATIONS, AotError, generation
from tests.runtime import tiny

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
        timeout=800,
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


def printed_by(code: str) -> list[str]:
    """The lines that a script prints in a process of its own, where libtpu may be set up."""
    script = [sys.executable, "-c", code]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


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
    copied, in_place = printed_by(COPIES_THE_POOL)
    assert re.match(r"through_the_layers [1-9]", copied), copied
    assert in_place.strip() == "in_place 0"


COPIES_BLOCKS = """
from engine.aot.topologies import one_chip, prepare_environment
prepare_environment()
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from engine.aot import hlo
from engine.runtime.block_copies import copy_blocks

layers, blocks = 8, 256
shape = (layers * blocks, 2, 128, 256)
elements = layers * blocks * 2 * 128 * 256  # of bfloat16: 256 MiB
replicated = NamedSharding(one_chip("v6e:2x2"), PartitionSpec())
pool = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated)

def by_layer(pool, sources, targets):
    return copy_blocks(pool, sources, targets, jnp.int32(9), num_layers=layers)

def at_once(pool, sources, targets):
    first = jnp.arange(layers)[:, None] * blocks
    return pool.at[first + targets].set(pool[first + sources])

for program, copies in ((by_layer, 16), (at_once, blocks // 2)):
    numbers = jax.ShapeDtypeStruct((copies,), jnp.int32, sharding=replicated)
    traced = jax.jit(program, donate_argnums=0).trace(pool, numbers, numbers)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    found = hlo.pool_copies(
        compiled, num_elements=elements, num_bytes=2 * elements, smallest=elements // layers
    )
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(program.__name__, temporary, "; ".join(found) or "nothing")
"""


@pytest.mark.aot
@needs_libtpu
def test_whole_blocks_are_copied_inside_the_donated_pool_layer_by_layer() -> None:
    """As docs/kernels.md says, and the reason that there is no kernel for it."""
    by_layer, at_once = (line.split(maxsplit=2) for line in printed_by(COPIES_BLOCKS))
    name, temporary, copied = by_layer
    assert (name, copied) == ("by_layer", "nothing")
    assert int(temporary) < 2**20
    name, temporary, copied = at_once  # what would be found otherwise: half of the pool, gathered
    assert int(temporary) >= 2**27
    assert "gather makes" in copied


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "gpu"), "argument --backend: invalid choice: 'gpu' (choose from"),
        (("--jobs", "0"), "argument --jobs: 0 is not a number of processes; at least 1 is needed"),
        (("--jobs", "x"), "argument --jobs: invalid int value: 'x'"),
    ],
)
def test_an_option_that_means_nothing_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    def not_refused() -> None:
        raise AssertionError

    monkeypatch.setattr(command, "prepare_environment", not_refused)
    with pytest.raises(SystemExit) as ended:
        command.main(list(arguments))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


ONE_TOKEN = {"max_step_tokens": 1, "max_num_seqs": 1}


@pytest.mark.parametrize(
    ("changes", "which", "problem"),
    [
        ({"model.source": "missing.gguf"}, 0, "missing.gguf: there is no such file or folder"),
        ({"scheduler": ONE_TOKEN, "buckets": {}}, 1, "no prefill bucket, .*max_step_tokens"),
        ({"mesh.tensor": 64}, 0, "mesh.tensor is 64, but there are 4 devices"),
    ],
)
def test_a_config_that_can_t_be_compiled_is_a_failure_with_its_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    which: int,
    problem: str,
) -> None:
    """This process's devices stand for those of a topology."""
    folder = tiny.write_model(tmp_path / "model")
    config = tmp_path / "config.yaml"
    config.write_bytes(msgspec.yaml.encode(tiny.config_tree(folder, **changes)))
    devices = types.SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(report, "describe", lambda _: devices)
    outcome = report.program(config, "v5e:2x2", which, "xla")
    assert outcome.report == f"config on v5e:2x2, {('decode', 'prefill')[which]}"
    [found] = outcome.problems
    assert re.search(problem, found)
    assert "\n" not in found


def test_a_schedule_that_the_compiler_refuses_fails_and_the_next_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = tmp_path / "limits.yaml"
    program = "- {num_heads: 8, num_kv_heads: 1, block_size: %d, max_bundles: 9, max_spills: 9}\n"
    limits.write_text(program % 16 + program % 32)

    def count(decode: schedule.Decode, folder: Path) -> schedule.Counted:
        if decode.block_size == 16:
            raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile\n and so on")
        cost = bundles.TokenCost(attend=1.0, issue=0.0, wait=0.0, block=0.0, spills=0)
        return schedule.Counted(cost, bundles.Loop("0", 0))

    monkeypatch.setattr(schedule, "prepare_environment", lambda **_: None)
    monkeypatch.setattr(schedule, "count", count)
    assert schedule.main(["--limits", str(limits)]) == 1
    _, refused, counted = capsys.readouterr().out.splitlines()
    assert refused.endswith("FAILED: INTERNAL: Mosaic failed to compile and so on")
    assert re.search(r" 1\.000 \(limit 9\.0\)", counted)


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
