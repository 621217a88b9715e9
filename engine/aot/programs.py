"""Whole engine steps of a config, compiled for the topology it is meant for.

The program is `engine.runtime.step.Step`'s, which the runner compiles too; weights, pool and
state are shapes, so that 70B compiles on a laptop.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from engine.aot import hlo
from engine.aot.topologies import AotError, first_lines, generation
from engine.backends import check_attention, resolve_attention, resolve_products
from engine.config import Architecture, Backend, Config, resolve_source
from engine.core.buckets import Bucket
from engine.loading import make_limits, runner_shape
from engine.memory_plan import kv_copies
from engine.model.attention import Attention
from engine.model.decoder import abstract_decoder
from engine.model.products import Products
from engine.runtime.mesh import kv_scales_sharding, make_mesh, weight_shardings
from engine.runtime.step import Step
from engine.weights import open_checkpoint, with_kv_copies


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One compiled step: its two programs, of which one runs at a time. Bytes are of one chip.

    Attributes:
      topology, bucket: what was compiled, and for what.
      seconds: of tracing and compiling.
      weight_bytes, kv_bytes, state_bytes, temp_bytes: what it holds while it runs; the state is
        the sampler's.
      peak_bytes: of the program that needs more: arguments, outputs and temporaries, less the
        outputs that take the place of arguments, and the code; and what the other one holds.
      hbm_bytes: what a program may use at most.
      num_blocks: of the pool. num_blocks_that_fit: if it took all the memory left.
      collectives: by kind, and by how often they run.
      vmem_bytes: vector memory used by each attention kernel.
      copies: why it may copy the KV pool; empty if it doesn't.
    """

    topology: str
    bucket: Bucket
    seconds: float
    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    temp_bytes: int
    peak_bytes: int
    hbm_bytes: int
    num_blocks: int
    num_blocks_that_fit: int
    collectives: hlo.Collectives
    vmem_bytes: dict[str, int]
    copies: list[str]

    @property
    def fits(self) -> bool:
        """Whether the memory of a chip holds it."""
        return self.peak_bytes <= self.hbm_bytes

    @property
    def problems(self) -> list[str]:
        """What must not be."""
        found = [f"KV-sized copy: {copy}" for copy in self.copies]
        if not self.fits:
            found.append(
                f"needs {self.peak_bytes} bytes of a chip's {self.hbm_bytes}; lower cache.memory "
                f"to at most {self.num_blocks_that_fit} blocks"
            )
        return found


def step_of(
    config: Config, devices: Sequence[jax.Device], backend: Backend = "auto"
) -> tuple[Step, tuple[Bucket, ...]]:
    """The step that an engine with this config runs on devices, and its buckets, from shapes.

    Args:
      config: states `model.architecture`, or its model is at hand.
      devices: of a described topology, or of this process.
      backend: of attention, instead of the config's.

    Raises:
      ConfigError: the config asks for what the devices or the kernels don't have.
    """
    arch = _architecture(config)
    tensor = config.mesh.tensor
    if backend != "auto":
        attention = dataclasses.replace(config.attention, backend=backend)
        config = dataclasses.replace(config, attention=attention)
    resolved = resolve_attention(config, devices[0]).backend
    limits = make_limits(config, arch, "", backend=resolved)
    mesh = make_mesh(config.mesh, arch, devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # names the kernels' target
        check_attention(config, arch, resolved, devices[0])
    arch = with_kv_copies(arch, kv_copies(arch, tensor))
    multiplied = resolve_products(config, arch, devices[0]).backend
    products = Products(multiplied, config.model.quantization)
    model = abstract_decoder(arch, jnp.dtype(config.model.dtype), products)
    kv_scales = None
    if config.cache.scales or config.cache_dtype == "int8":
        kv_scales = jax.ShapeDtypeStruct(
            (arch.num_layers, 2, arch.num_kv_heads), jnp.float32, sharding=kv_scales_sharding(mesh)
        )
    shape = runner_shape(config, limits)
    weights = products.packed(weight_shardings(model, mesh))
    return Step(model, weights, mesh, Attention(resolved, mesh), shape, kv_scales), shape.buckets


def largest_buckets(buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    """The decode bucket and the prefill bucket that need the most memory."""
    decodes = [bucket for bucket in buckets if bucket.num_tokens == bucket.num_seqs]
    prefills = [bucket for bucket in buckets if bucket.num_tokens > bucket.num_seqs]
    return tuple(group[-1] for group in (decodes, prefills) if group)


def compile_program(step: Step, bucket: Bucket, topology: str) -> Program:
    """Compile one bucket and read what the compiler says about it.

    Raises:
      AotError: it doesn't fit the chip, or the compiler refuses it.
    """
    mesh = step.kv_pool.sharding.mesh
    start = time.perf_counter()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # names the kernels' target
            forward = step.lower_forward(bucket, "tpu").compile()
            choose = step.lower_choose(bucket.num_seqs, "tpu").compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise AotError(first_lines(error)) from None
    seconds = time.perf_counter() - start
    text, choosing = forward.as_text(), choose.as_text()
    assert text
    assert choosing
    weight_bytes = bytes_per_chip(step.weights)
    kv_bytes, state_bytes = bytes_per_chip(step.kv_pool), bytes_per_chip(step.state)
    peak = max(
        _peak_bytes(forward) + state_bytes - bytes_per_chip(step.state.recent),
        _peak_bytes(choose) + weight_bytes + kv_bytes,
    )
    num_layers = step.num_layers
    pool_elements = math.prod(step.kv_pool.sharding.shard_shape(step.kv_pool.shape))
    num_blocks = step.kv_pool.shape[0] // num_layers
    hbm_bytes = generation(topology).hbm_bytes
    copies = hlo.pool_copies(
        forward,
        num_elements=pool_elements,
        num_bytes=kv_bytes,
        smallest=pool_elements // num_layers,
        weight_shapes={
            weight.sharding.shard_shape(weight.shape) for weight in jax.tree.leaves(step.weights)
        },
    )
    return Program(
        topology=topology,
        bucket=bucket,
        seconds=seconds,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        state_bytes=state_bytes,
        temp_bytes=max(_memory(forward).temp_size_in_bytes, _memory(choose).temp_size_in_bytes),
        peak_bytes=peak,
        hbm_bytes=hbm_bytes,
        num_blocks=num_blocks,
        num_blocks_that_fit=(hbm_bytes - peak + kv_bytes) // (kv_bytes // num_blocks),
        collectives=hlo.collectives(text, choosing),
        vmem_bytes=hlo.kernel_vmem(text),
        copies=copies + hlo.unaliased(choose, state_bytes),
    )


def _memory(compiled: jax.stages.Compiled) -> Any:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory


def _peak_bytes(compiled: jax.stages.Compiled) -> int:
    memory = _memory(compiled)
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
    )


def bytes_per_chip(tree: object) -> int:
    """Of placed shapes, on one device, without the padding of tiles."""
    return sum(
        math.prod(part.sharding.shard_shape(part.shape)) * part.dtype.itemsize
        for part in jax.tree.leaves(tree)
    )


def _architecture(config: Config) -> Architecture:
    return config.model.architecture or open_checkpoint(resolve_source(config)).architecture
