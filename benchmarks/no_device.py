"""An engine whose steps take a given time and compute nothing: the host's part of serving alone.

What the host can carry shows where a device is faster than the one at hand.
"""

from __future__ import annotations

import time
from typing import Any

from engine.config import Config, ConfigError, resolve_source
from engine.core.batching import Batch
from engine.loading import LoadedEngine, make_limits, runner_shape
from engine.start_up import StartUp
from engine.text import Tokenizer
from engine.text.grammars import Grammars
from engine.types import StepPlan, StepTokens
from engine.weights import open_checkpoint

_FIRST_TOKEN, _NUM_TOKENS = 1000, 1000  # words, in any vocabulary


class NoDevice:
    """Stands in for `Runner`; steps take `seconds` each, one after the other."""

    host = None

    def __init__(self, shape: Any, seconds: float):
        self.shape = shape
        self.sink_slot = shape.max_num_seqs
        self._seconds = seconds
        self._end = 0.0  # of the last step that was launched

    def launch(self, plan: StepPlan, batch: Batch) -> _Launched:
        """Begin a step."""
        del batch
        self._end = max(self._end, time.perf_counter()) + self._seconds
        return _Launched(plan, self._end)

    def move_blocks(self, plan: StepPlan) -> None:
        """There are no blocks."""

    def reset(self) -> None:
        """There is nothing to lose."""


class _Launched:
    outgoing = None
    masks = None  # no grammar

    def __init__(self, plan: StepPlan, end: float):
        self.plan = plan
        self._end = end

    def wait(self) -> StepTokens:
        """Wait for the end of the step."""
        if (left := self._end - time.perf_counter()) > 0:
            time.sleep(left)
        rows = self.plan.rows
        return StepTokens(
            tuple([_FIRST_TOKEN + (row.slot + row.output_position) % _NUM_TOKENS for row in rows])
        )


def load(config: Config, seconds: float) -> LoadedEngine:
    """The engine of a config whose model is a GGUF file, without its weights.

    Args:
      seconds: that a step takes.

    Raises:
      ConfigError: the model is in another format.
    """
    checkpoint = open_checkpoint(resolve_source(config))
    if checkpoint.metadata is None:
        raise ConfigError("model.source must be a .gguf file, whose tokenizer is in it")
    architecture = checkpoint.architecture
    limits = make_limits(config, architecture, checkpoint.fingerprint, backend="xla")
    runner: Any = NoDevice(runner_shape(config, limits), seconds)
    tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
    ends = checkpoint.eos_token_ids
    return LoadedEngine(
        config=config,
        name=config.model.name,
        architecture=architecture,
        products="none",
        attention="none",
        tokenizer=tokenizer,
        eos_token_ids=ends,
        grammars=Grammars(tokenizer, architecture.vocab_size, ends),
        start_up=StartUp(),
        weights_fingerprint=checkpoint.fingerprint,
        limits=limits,
        runner=runner,
        compiles_after_warmup=lambda: 0,
    )
