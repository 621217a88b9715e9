"""The real engine and server over a device that is not there: every answer spells the alphabet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from engine.config_file import from_tree
from engine.core.limits import Limits
from engine.frontend import Engine
from engine.loading import LoadedEngine
from engine.start_up import StartUp
from engine.text import Tokenizer
from engine.text.grammars import Grammars
from engine.types import StepPlan, StepTokens
from tests.runtime import tiny
from tests.runtime.fake_runner import FakeLaunched, FakeRunner

LIMITS = Limits(
    num_blocks=64,
    block_size=8,
    max_num_seqs=4,
    max_step_tokens=32,
    max_model_len=128,
    max_waiting=8,
)


class Letters(FakeRunner):
    """Its tokens are `a`, `b`, `c` …, by their place in the answer.

    Attributes:
      seconds: that a step takes.
    """

    def __init__(self, limits: Limits = LIMITS):
        super().__init__(limits)
        self.seconds = 0.0

    def launch(self, plan: StepPlan, batch: Any) -> FakeLaunched:
        """Start a step."""
        return _Launched(**vars(super().launch(plan, batch)))


class _Launched(FakeLaunched):
    outgoing = None

    def wait(self) -> StepTokens:
        super().wait()
        assert isinstance(self.runner, Letters)
        time.sleep(self.runner.seconds)
        return StepTokens(tuple(97 + row.output_position % 26 for row in self.plan.rows))


def make_engine(folder: Path, runner: Letters | None = None) -> Engine:
    """An engine whose tokens are bytes; `folder` gets the tokenizer."""
    stand_in: Any = runner or Letters()
    config = from_tree(
        {
            "model": {"source": str(folder)},
            "cache": {"num_blocks": LIMITS.num_blocks},
            "scheduler": {"max_num_seqs": LIMITS.max_num_seqs, "max_step_tokens": 32},
        }
    )
    tokenizer = Tokenizer.from_folder(tiny.write_tokenizer(folder))
    loaded = LoadedEngine(
        config=config,
        name="letters",
        architecture=tiny.ARCH,
        products="xla",
        attention="none",
        tokenizer=tokenizer,
        eos_token_ids=(tiny.EOS,),
        grammars=Grammars(tokenizer, tiny.VOCAB_SIZE, (tiny.EOS,)),
        start_up=StartUp(),
        weights_fingerprint="00ff",
        limits=LIMITS,
        runner=stand_in,
        compiles_after_warmup=lambda: 0,
    )
    return Engine(loaded)
