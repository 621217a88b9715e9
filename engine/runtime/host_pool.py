"""The host tier's memory, and the transfers between it and the pool.

Which block lies in which slot is the scheduler's to know (`core/host_tier.py`); plans say what to
move. A slot holds a reference to a block's own array, which nobody changes: in the host's memory on
a CPU, in memory pinned for transfers beside another device. So a slot has its new contents as soon
as the transfer is started, in the order of the plans, and neither the device nor the step loop
waits for it or copies anything.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from engine.runtime.block_copies import AT_A_TIME, write_blocks
from engine.runtime.block_file import Block
from engine.types import SwapIn, SwapOut

Contents = jax.Array | np.ndarray  # of one block in all layers, [L, K, B, 2W]


class Outgoing:
    """Blocks of one plan on their way to the host."""

    def __init__(self, swaps: Sequence[SwapOut], contents: Sequence[jax.Array]):
        self.swaps = swaps
        self._contents = contents

    def finish(self) -> Iterable[tuple[SwapOut, Contents]]:
        """Wait until they are there; which, and their contents, but for those that were erased
        since. Raises what the device raised."""
        pairs = zip(self.swaps, self._contents, strict=True)
        kept = [(swap, contents) for swap, contents in pairs if not contents.is_deleted()]
        jax.block_until_ready([contents for _, contents in kept])
        return kept


class HostPool:
    """Slots for blocks of all layers, and the two compiled transfers."""

    def __init__(
        self,
        kv_pool: jax.ShapeDtypeStruct,
        num_layers: int,
        num_slots: int,
        memory_kind: str | None = None,
    ):
        """
        Args:
          kv_pool: the pool's shape, dtype and sharding.
          num_layers: whose blocks lie one after the other in it.
          num_slots: blocks that the host holds, at least one.
          memory_kind: jax's name for where the slots lie; by default "pinned_host", and on a CPU
            "device", which is the host.
        """
        self._num_blocks = kv_pool.shape[0] // num_layers
        self._slots: list[Contents | None] = [None] * num_slots
        self._reading = threading.Lock()  # what is being read can't be erased where it lies
        programs = TransferPrograms(kv_pool, num_layers, memory_kind)
        self.block = programs.block
        self._gather = programs.lower_gather().compile()
        self.scatter = programs.lower_scatter().compile()
        self._zero = programs.lower_zero().compile()

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return math.prod(self.block.shape) * self.block.dtype.itemsize

    def swap_out(self, kv_pool: jax.Array, swaps: Sequence[SwapOut]) -> Outgoing:
        """Start to copy blocks to their slots; before anything is written to them."""
        contents = self.fetch(kv_pool, [swap.block for swap in swaps])
        for swap, array in zip(swaps, contents, strict=True):
            self._slots[swap.slot] = array
        return Outgoing(swaps, contents)

    def fetch(self, kv_pool: jax.Array, blocks: Sequence[int]) -> list[jax.Array]:
        """Start to copy blocks to the host."""
        contents: list[jax.Array] = []
        for start in range(0, len(blocks), AT_A_TIME):
            some = np.zeros(AT_A_TIME, np.int32)
            some[: len(blocks) - start] = blocks[start : start + AT_A_TIME]
            contents += self._gather(kv_pool, some)
        return contents[: len(blocks)]  # the rest is padding, and given back at once

    def read(self, slots: Iterable[int]) -> list[Contents]:
        """The contents of slots, as they are before later plans fill them with others."""
        found = []
        for slot in slots:
            contents = self._slots[slot]
            assert contents is not None, f"slot {slot} is read, but was never filled"
            found.append(contents)
        return found

    def stage(self, contents: np.ndarray) -> Contents:
        """A block's contents in the memory of slots. From any thread."""
        if self.block.sharding.memory_kind == "device":
            return contents
        return jax.device_put(contents, self.block.sharding)

    def write(self, slot: int, contents: Contents) -> None:
        """Fill a slot, with what `stage` returned; whatever is on its way there gives way."""
        self._slots[slot] = contents

    def erase(self, slots: Iterable[int]) -> None:
        """Give up the contents of slots: those that came from the device are overwritten with zeros
        where they lie, once whatever reads them is done; those from a file are released."""
        for slot in slots:
            contents, self._slots[slot] = self._slots[slot], None
            if isinstance(contents, jax.Array):
                with self._reading:
                    self._zero(contents)

    def as_read_later(self, contents: Contents) -> Block:
        """The same memory as something that another thread will read, if it isn't erased before."""
        return contents if isinstance(contents, np.ndarray) else _ReadLater(contents, self._reading)

    def swap_in(
        self, kv_pool: jax.Array, swaps: Sequence[SwapIn], contents: Sequence[Contents]
    ) -> jax.Array:
        """The pool with contents from `read` in their blocks; the one given is consumed."""
        for start in range(0, len(swaps), AT_A_TIME):
            some = swaps[start : start + AT_A_TIME]
            blocks = np.full(AT_A_TIME, self._num_blocks, np.int32)
            blocks[: len(some)] = [swap.block for swap in some]
            piece = list(contents[start : start + AT_A_TIME])
            piece += [piece[0]] * (AT_A_TIME - len(piece))  # goes nowhere
            kv_pool = self.scatter(kv_pool, tuple(piece), blocks)
        return kv_pool


class TransferPrograms:
    """What `HostPool` compiles, from shapes alone; `engine.aot` compiles it for other chips."""

    def __init__(
        self, kv_pool: jax.ShapeDtypeStruct, num_layers: int, memory_kind: str | None = None
    ):
        """
        Args:
          kv_pool, num_layers, memory_kind: see `HostPool`.
        """
        sharding = kv_pool.sharding
        assert isinstance(sharding, NamedSharding)
        if memory_kind is None:
            is_cpu = next(iter(sharding.device_set)).platform == "cpu"
            memory_kind = "device" if is_cpu else "pinned_host"
        self._kv_pool = kv_pool
        self._num_layers = num_layers
        self._num_blocks = kv_pool.shape[0] // num_layers
        self.block = jax.ShapeDtypeStruct(
            (num_layers, *kv_pool.shape[1:]),
            kv_pool.dtype,
            sharding=sharding.with_memory_kind(memory_kind),
        )
        self._numbers = jax.ShapeDtypeStruct(
            (AT_A_TIME,), jnp.int32, sharding=NamedSharding(sharding.mesh, PartitionSpec())
        )

    def lower_gather(self, platform: str | None = None) -> jax.stages.Lowered:
        """(pool, blocks int32[n]) -> n arrays on the host; for a platform, by default this one."""
        places = (self.block.sharding,) * AT_A_TIME
        traced = jax.jit(self._gather_blocks, out_shardings=places).trace(
            self._kv_pool, self._numbers
        )
        return traced.lower(lowering_platforms=(platform,) if platform else None)

    def lower_scatter(self, platform: str | None = None) -> jax.stages.Lowered:
        """(pool, n arrays on the host, blocks int32[n]) -> the pool, in place."""
        program = jax.jit(
            self._scatter_blocks, donate_argnums=0, out_shardings=self._kv_pool.sharding
        )
        traced = program.trace(self._kv_pool, (self.block,) * AT_A_TIME, self._numbers)
        return traced.lower(lowering_platforms=(platform,) if platform else None)

    def lower_zero(self) -> jax.stages.Lowered:
        """(an array on the host) -> zeros in its place."""
        place = self.block.sharding
        program = jax.jit(jnp.zeros_like, donate_argnums=0, out_shardings=place, keep_unused=True)
        return program.lower(self.block)

    def _gather_blocks(self, kv_pool: jax.Array, blocks: jax.Array) -> tuple[jax.Array, ...]:
        """Blocks [n] of every layer."""
        layers = jnp.arange(self._num_layers) * self._num_blocks
        return tuple(kv_pool[layers + blocks[index]] for index in range(AT_A_TIME))

    def _scatter_blocks(
        self, kv_pool: jax.Array, contents: tuple[jax.Array, ...], blocks: jax.Array
    ) -> jax.Array:
        """Put contents into blocks [n]; nowhere where that is num_blocks."""
        on_device = [jax.device_put(array, self._kv_pool.sharding) for array in contents]

        def layers_contents(_, index):
            return jnp.stack(
                [jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for array in on_device]
            )

        return write_blocks(kv_pool, blocks, layers_contents, num_layers=self._num_layers)


class _ReadLater:
    """Contents that are copied when they are read: once they are erased, a RuntimeError of jax's.

    jax keeps the NumPy form of an array that was ever read as NumPy, which for pinned memory would
    be a second copy for as long as the slot lives, and on a CPU keeps the memory from being erased.
    So an array of the same memory is made to be read, and is gone when that is done.
    """

    def __init__(self, contents: jax.Array, reading: threading.Lock):
        self._contents = contents
        self._reading = reading
        self.shape, self.dtype, self.nbytes = contents.shape, contents.dtype, contents.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with self._reading:
            shards = [shard.data for shard in self._contents.addressable_shards]
            array = jax.make_array_from_single_device_arrays(
                self.shape, self._contents.sharding, shards
            )
            return np.array(array, dtype)
