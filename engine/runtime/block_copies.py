"""Copies and erases whole blocks of the pool, in every layer: copy-on-write's device side.

Each is one program that runs between two steps, so that a step finds everything done and no kernel
orders anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from engine.types import BlockCopy

AT_A_TIME = 8  # blocks that are held beside the pool while they move


class BlockCopier:
    """The compiled program for one pool; at most `max_copies` copies a call."""

    def __init__(self, kv_pool: jax.ShapeDtypeStruct, num_layers: int, max_copies: int):
        """
        Args:
          kv_pool: the pool's shape, dtype and sharding.
          num_layers: whose copies of a block lie one after the other in it.
          max_copies: of one step; a sequence copies one block at most.
        """
        self._num_blocks = kv_pool.shape[0] // num_layers
        self._size = -(-max_copies // AT_A_TIME) * AT_A_TIME
        program = jax.jit(
            functools.partial(copy_blocks, num_layers=num_layers),
            donate_argnums=0,
            out_shardings=kv_pool.sharding,
        )
        self.program = program.lower(kv_pool, *self._arguments(())).compile()

    def __call__(self, kv_pool: jax.Array, copies: Sequence[BlockCopy]) -> jax.Array:
        """The pool after the copies; the one given is consumed."""
        return self.program(kv_pool, *self._arguments(copies))

    def _arguments(self, copies: Sequence[BlockCopy]) -> tuple[np.ndarray, np.ndarray, np.int32]:
        # A block that is given up and taken again within a plan is a destination twice, and what
        # it got first is nobody's. One call must not write a place twice in no order.
        last = {copy.destination: copy.source for copy in copies}
        assert len(last) <= self._size, f"{len(last)} copies, but the program takes {self._size}"
        sources = np.zeros(self._size, np.int32)
        destinations = np.full(self._size, self._num_blocks, np.int32)
        sources[: len(last)] = list(last.values())
        destinations[: len(last)] = list(last)
        return sources, destinations, np.int32(len(last))


class BlockEraser:
    """The compiled program that fills blocks of one pool with zeros."""

    AT_A_CALL = 256

    def __init__(self, kv_pool: jax.ShapeDtypeStruct, num_layers: int):
        """
        Args:
          kv_pool: the pool's shape, dtype and sharding.
          num_layers: whose copies of a block lie one after the other in it.
        """
        self._num_blocks = kv_pool.shape[0] // num_layers
        program = jax.jit(
            functools.partial(erase_blocks, num_layers=num_layers),
            donate_argnums=0,
            out_shardings=kv_pool.sharding,
        )
        self.program = program.lower(kv_pool, *self._arguments(())).compile()

    def __call__(self, kv_pool: jax.Array, blocks: Sequence[int]) -> jax.Array:
        """The pool with zeros in those blocks; the one given is consumed."""
        for start in range(0, len(blocks), self.AT_A_CALL):
            kv_pool = self.program(kv_pool, *self._arguments(blocks[start:][: self.AT_A_CALL]))
        return kv_pool

    def _arguments(self, blocks: Sequence[int]) -> tuple[np.ndarray, np.int32]:
        padded = np.full(self.AT_A_CALL, self._num_blocks, np.int32)
        padded[: len(blocks)] = blocks
        return padded, np.int32(len(blocks))


def erase_blocks(
    kv_pool: jax.Array, blocks: jax.Array, count: jax.Array, *, num_layers: int
) -> jax.Array:
    """Fill blocks of every layer with zeros.

    Args:
      kv_pool: [num_layers * num_blocks, ...]; donate it.
      blocks: int32[n], a multiple of AT_A_TIME, no two alike; num_blocks where there is none.
      count: int32[], how many there are; they come first.
      num_layers: in the pool.
    """
    zeros = jnp.zeros((AT_A_TIME, *kv_pool.shape[1:]), kv_pool.dtype)

    def some(step, kv_pool):
        here = jax.lax.dynamic_slice_in_dim(blocks, step * AT_A_TIME, AT_A_TIME)
        return write_blocks(kv_pool, here, lambda pool, layer: zeros, num_layers=num_layers)

    return jax.lax.fori_loop(0, -(-count // AT_A_TIME), some, kv_pool)


def copy_blocks(
    kv_pool: jax.Array,
    sources: jax.Array,
    destinations: jax.Array,
    count: jax.Array,
    *,
    num_layers: int,
) -> jax.Array:
    """Copy blocks of every layer onto others of the same layer.

    Args:
      kv_pool: [num_layers * num_blocks, ...]; donate it.
      sources: int32[n], a multiple of AT_A_TIME.
      destinations: int32[n], no two alike; num_blocks where there is no copy.
      count: int32[], how many there are; they come first.
      num_layers: in the pool.
    """
    num_blocks = kv_pool.shape[0] // num_layers

    def some(step, kv_pool):
        source, destination = (
            jax.lax.dynamic_slice_in_dim(blocks, step * AT_A_TIME, AT_A_TIME)
            for blocks in (sources, destinations)
        )

        def contents(kv_pool, index):
            return kv_pool[index * num_blocks + source]

        return write_blocks(kv_pool, destination, contents, num_layers=num_layers)

    return jax.lax.fori_loop(0, -(-count // AT_A_TIME), some, kv_pool)


def write_blocks(
    kv_pool: jax.Array,
    blocks: jax.Array,
    contents: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    num_layers: int,
) -> jax.Array:
    """Fill blocks of every layer, layer by layer: all layers at once would copy the pool.

    Args:
      kv_pool: [num_layers * num_blocks, ...]; donate it.
      blocks: int32[n], no two alike; num_blocks where there is nothing to fill.
      contents: (the pool so far, int32[] layer) -> [n, ...], what goes there.
      num_layers: in the pool.
    """
    num_entries = kv_pool.shape[0]
    num_blocks = num_entries // num_layers

    def layer(index, kv_pool):
        entries = jnp.where(blocks < num_blocks, index * num_blocks + blocks, num_entries)
        return kv_pool.at[entries].set(contents(kv_pool, index), mode="drop")

    return jax.lax.fori_loop(0, num_layers, layer, kv_pool)
