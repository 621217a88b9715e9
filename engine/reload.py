"""Other weights for an engine that runs: read beside the old ones, and then put in their place.

What is read must fit what was compiled: the same architecture, in the same dtypes and shardings.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import jax

from engine.config import Architecture, ConfigError, resolve_source
from engine.core.limits import Limits
from engine.loading import (
    LoadedEngine,
    enough_memory,
    eos_token_ids_of,
    read_weights,
    tokenizer_of,
)
from engine.runtime.disk_tier import DiskTier
from engine.runtime.tiers import Tiers, open_disk_tier
from engine.weights import open_checkpoint

if TYPE_CHECKING:
    from engine.runtime.loop import EngineLoop
    from engine.runtime.runner import Runner


@dataclasses.dataclass(frozen=True)
class ReadyWeights:
    """Weights in the device's memory, as `EngineLoop.reload` takes them.

    Attributes:
      weights: by dotted name, placed as the runner's are.
      limits: the scheduler's, with these weights' fingerprint.
      fingerprint: of the weights alone.
      disk: the disk tier for blocks of these weights, if there is one.
    """

    weights: dict[str, jax.Array]
    limits: Limits
    fingerprint: str
    disk: DiskTier | None

    def install(self, runner: Runner, tiers: Tiers) -> None:
        """Take the place of the old weights. Their memory is free when nobody holds them."""
        old, runner.weights = runner.weights, self.weights
        try:
            with enough_memory(
                "the cache doesn't fit beside both weights", "restart the server instead"
            ):
                runner.reset()  # the pool's contents were computed with the old ones
        except BaseException:
            runner.weights = old
            raise
        tiers.exchange(self.limits, self.disk)


async def exchange(loaded: LoadedEngine, loop: EngineLoop) -> LoadedEngine:
    """Read the weights again, and have the step loop go on with them.

    Returns:
      What is served from now on: `loaded` itself if there were no others to read.

    Raises:
      ConfigError, WeightsError, QueueFull, EngineStopped: see `Engine.reload`; the old weights are
        served as before.
    """
    ready = await asyncio.to_thread(read_again, loaded)
    if ready is None:
        return loaded
    unused = ready.disk
    try:
        await asyncio.wrap_future(loop.reload(ready))
        unused = loaded.disk
    finally:
        if unused is not None:
            await asyncio.to_thread(unused.close)
    return dataclasses.replace(
        loaded, weights_fingerprint=ready.fingerprint, limits=ready.limits, disk=ready.disk
    )


def read_again(loaded: LoadedEngine) -> ReadyWeights | None:
    """Read the config's `model.source` again, beside the weights that are being served.

    It takes as much memory of the device again as the weights take, and of the host what loading
    takes. Takes as long as loading does; call it on a thread.

    Returns:
      What to go on with; or None if the source still holds the weights that are served.

    Raises:
      ConfigError: it is another model by now, or doesn't fit beside the old weights.
      WeightsError: the files can't be read.
    """
    config = loaded.config
    checkpoint = open_checkpoint(resolve_source(config))
    if checkpoint.fingerprint == loaded.weights_fingerprint:
        return None
    _check_architecture(loaded.architecture, checkpoint.architecture)
    tokenizer = tokenizer_of(checkpoint)
    if (
        tokenizer.fingerprint != loaded.tokenizer.fingerprint
        or eos_token_ids_of(checkpoint, tokenizer) != loaded.eos_token_ids
    ):
        raise ConfigError(
            "the new weights come with another tokenizer, chat template or end tokens, which a "
            "running server can't exchange; start a new server for them"
        )
    runner = loaded.runner
    with enough_memory(
        "the new weights don't fit beside the old ones",
        "restart the server instead, or leave as much memory free as the weights take",
    ):
        weights = read_weights(checkpoint, runner.model, runner.mesh)
        jax.block_until_ready(weights)
    old = loaded.limits.fingerprint
    limits = dataclasses.replace(
        loaded.limits,
        fingerprint=checkpoint.fingerprint + old.removeprefix(loaded.weights_fingerprint),
    )
    disk = open_disk_tier(config, limits, runner.arch, *runner.backends)
    return ReadyWeights(weights, limits, checkpoint.fingerprint, disk)


def _check_architecture(served: Architecture, found: Architecture) -> None:
    for field in dataclasses.fields(Architecture):
        ours, theirs = getattr(served, field.name), getattr(found, field.name)
        if ours != theirs:
            raise ConfigError(
                f"the new weights' {field.name} is {theirs}, but {ours} is what was compiled; "
                "start a new server for them"
            )
