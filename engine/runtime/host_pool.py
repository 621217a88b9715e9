"""The host tier's memory, and the transfers between it and the pool.

Which block lies in which slot is the scheduler's to know (`core/host_tier.py`); plans say what to
move. A transfer out is started before a step and finished when the step's tokens are fetched, so
the device doesn't wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from engine.runtime.block_copies import AT_A_TIME, write_blocks
from engine.types import SwapIn, SwapOut


class Outgoing:
    """Blocks of one plan on their way to the host. `finish` puts them into their slots."""

    def __init__(self, slots: np.ndarray, swaps: Sequence[SwapOut], pieces: list[jax.Array]):
        self._slots = slots
        self._swaps = swaps
        self._pieces = pieces

    def finish(self) -> None:
        """Wait for the contents; again, and it does nothing. Raises whatever the device raised,
        and then again each time."""
        for number, piece in enumerate(self._pieces):
            contents = np.asarray(piece)
            start = number * AT_A_TIME
            for index, swap in enumerate(self._swaps[start : start + AT_A_TIME]):
                self._slots[swap.slot] = contents[index]
        self._pieces = []

    @property
    def is_finished(self) -> bool:
        """Whether everything is in its slot."""
        return not self._pieces


class HostPool:
    """Slots for blocks of all layers, and the two compiled transfers."""

    def __init__(self, kv_pool: jax.ShapeDtypeStruct, num_layers: int, num_slots: int):
        """
        Args:
          kv_pool: the pool's shape, dtype and sharding.
          num_layers: whose blocks lie one after the other in it.
          num_slots: blocks that the host holds, at least one.
        """
        self._num_layers = num_layers
        self._num_blocks = kv_pool.shape[0] // num_layers
        block = (num_layers, *kv_pool.shape[1:])
        # Zeros that nobody wrote take no memory yet.
        self._slots = np.zeros((num_slots, *block), kv_pool.dtype)
        blocks = jax.ShapeDtypeStruct((AT_A_TIME,), jnp.int32)
        contents = jax.ShapeDtypeStruct((AT_A_TIME, *block), kv_pool.dtype)
        self._gather = jax.jit(self._gather_blocks).lower(kv_pool, blocks).compile()
        scatter = jax.jit(self._scatter_blocks, donate_argnums=0, out_shardings=kv_pool.sharding)
        self.scatter = scatter.lower(kv_pool, contents, blocks).compile()
        self._unfinished: list[Outgoing] = []  # in the order of their plans

    def swap_out(self, kv_pool: jax.Array, swaps: Sequence[SwapOut]) -> Outgoing:
        """Start to copy blocks to their slots; before anything is written to them."""
        pieces = []
        for start in range(0, len(swaps), AT_A_TIME):
            blocks = np.zeros(AT_A_TIME, np.int32)
            some = swaps[start : start + AT_A_TIME]
            blocks[: len(some)] = [swap.block for swap in some]
            piece = self._gather(kv_pool, blocks)
            piece.copy_to_host_async()
            pieces.append(piece)
        outgoing = Outgoing(self._slots, swaps, pieces)
        self._unfinished = [one for one in self._unfinished if not one.is_finished]
        self._unfinished.append(outgoing)
        return outgoing

    def reset(self) -> None:
        """Give up what is on its way."""
        self._unfinished.clear()

    def read(self, swaps: Sequence[SwapIn]) -> np.ndarray:
        """The contents of slots, [n, L, ...]; before the same plan's `swap_out` changes them."""
        for outgoing in self._unfinished:  # of plans before, whose steps may still run
            outgoing.finish()
        return self._slots[[swap.slot for swap in swaps]]

    def erase(self, slots: Sequence[int]) -> None:
        """Fill slots with zeros, also those that something is still on its way to."""
        for outgoing in self._unfinished:
            outgoing.finish()
        self._slots[list(slots)] = 0

    def swap_in(
        self, kv_pool: jax.Array, swaps: Sequence[SwapIn], contents: np.ndarray
    ) -> jax.Array:
        """The pool with contents from `read` in their blocks; the one given is consumed."""
        for start in range(0, len(swaps), AT_A_TIME):
            some = swaps[start : start + AT_A_TIME]
            blocks = np.full(AT_A_TIME, self._num_blocks, np.int32)
            blocks[: len(some)] = [swap.block for swap in some]
            piece = contents[start : start + AT_A_TIME]
            if len(some) < AT_A_TIME:
                padding = ((0, AT_A_TIME - len(some)), *[(0, 0)] * (contents.ndim - 1))
                piece = np.pad(piece, padding)
            kv_pool = self.scatter(kv_pool, piece, blocks)
        return kv_pool

    def _gather_blocks(self, kv_pool: jax.Array, blocks: jax.Array) -> jax.Array:
        """[n, L, ...]: blocks [n] of every layer."""
        entries = blocks[:, None] + jnp.arange(self._num_layers)[None] * self._num_blocks
        return kv_pool[entries]

    def _scatter_blocks(
        self, kv_pool: jax.Array, contents: jax.Array, blocks: jax.Array
    ) -> jax.Array:
        """Put contents [n, L, ...] into blocks [n]; nowhere where that is num_blocks."""

        def layers_contents(_, index):
            return jax.lax.dynamic_index_in_dim(contents, index, axis=1, keepdims=False)

        return write_blocks(kv_pool, blocks, layers_contents, num_layers=self._num_layers)
