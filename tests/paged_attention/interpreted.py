"""The TPU kernel in Pallas' interpreters, one of which models transfers, semaphores and races."""

from __future__ import annotations

import types
from typing import Literal

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import tpu_plan
from tests.paged_attention.oracle import Case, run

Interpreter = Literal["generic", "on_wait", "eager"]
INTERPRETERS: tuple[Interpreter, ...] = ("generic", "on_wait", "eager")


def run_interpreted(
    case: Case, interpreter: Interpreter, capfd: pytest.CaptureFixture[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Output and pool of a case.

    Args:
      interpreter: "generic" runs the kernel as XLA operations. The others fill memory with NaN
        and check every access, transfer and semaphore; a transfer happens when it is waited
        for, or at once: some races show in one only.
      capfd: pytest's; a leaked semaphore is only printed.

    Raises:
      AssertionError: a semaphore that is not zero at the end.
      Exception: JAX's, on a race or an access out of bounds.
    """
    if interpreter == "generic":
        return run(case, "tpu", interpret=True)
    params = pltpu.InterpretParams(
        detect_races=True, on_race="raise", dma_execution_mode=interpreter
    )
    capfd.readouterr()
    try:
        result = run(case, "tpu", interpret=params)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    printed = capfd.readouterr()
    assert "non-zero count" not in printed.err + printed.out, printed.err + printed.out
    return result


def shrink(patch: pytest.MonkeyPatch, plan: types.ModuleType = tpu_plan) -> None:
    """Tiles and fetches so small that short contexts cross their edges: products of 128 tokens,
    fetches of 256, tiles of 16."""
    patch.setattr(plan, "CHUNK", 128)
    patch.setattr(plan, "FETCH_TOKENS", 256)
    patch.setattr(plan, "query_tile", lambda num_tokens: 16)
