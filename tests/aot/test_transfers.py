"""The host tier's transfers, compiled for a TPU: to and from pinned memory, without a copy of the
pool on the chip."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
from engine.aot.topologies import describe, prepare_environment
prepare_environment()
import json
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from engine.aot import hlo
from engine.runtime.host_pool import TransferPrograms

# Llama 3 8B's blocks of 16 tokens, on one chip and split over four.
layers, blocks, heads, block_size, width = 32, 512, 8, 16, 256
for chips in (1, 4):
    mesh = Mesh(np.array(describe("v6e:2x2").devices[:chips]), ("tensor",))
    pool = jax.ShapeDtypeStruct(
        (layers * blocks, heads, block_size, width),
        jnp.bfloat16,
        sharding=NamedSharding(mesh, PartitionSpec(None, "tensor")),
    )
    programs = TransferPrograms(pool, layers)
    elements = layers * blocks * heads * block_size * width // chips
    for name in ("gather", "scatter"):
        compiled = getattr(programs, f"lower_{name}")("tpu").compile()
        memory = compiled.memory_analysis()
        print(json.dumps({
            "name": name,
            "chips": chips,
            "pool": 2 * elements,
            "block": 2 * elements // blocks,
            "copies": hlo.pool_copies(
                compiled, num_elements=elements, num_bytes=2 * elements, smallest=elements // layers
            ),
            "temporary": memory.temp_size_in_bytes,
            "from_host": memory.host_argument_size_in_bytes,
            "to_host": memory.host_output_size_in_bytes,
            "on_host": memory.host_temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
        }))
"""


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux on x86-64 only"
)
def test_transfers_go_straight_between_the_pool_and_pinned_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    programs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["name"], one["chips"]) for one in programs] == [
        ("gather", 1),
        ("scatter", 1),
        ("gather", 4),
        ("scatter", 4),
    ]
    for one in programs:
        moved = 8 * one["block"]
        assert (one["to_host"], one["from_host"]) == (
            (moved, 0) if one["name"] == "gather" else (0, moved)
        )
        assert one["on_host"] == 0
        # What moves is gathered on the chip first, and that is all that it takes there.
        assert one["temporary"] < 1.3 * moved + 2**20
        if one["name"] == "scatter":
            assert one["copies"] == []
            assert one["aliased"] == one["pool"]
        else:  # it leaves the pool alone, so nothing is aliased
            assert one["copies"] == [f"only 0 of {one['pool']} bytes are aliased"]
