"""The GPU kernels in the interpreter that models warpgroups, transfers, barriers and races."""

from __future__ import annotations

import dataclasses

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
    reset_gpu_interpret_mode_state,  # has no public name
)

from tests.paged_attention.oracle import Case, Program, compiled, run

# A deadlocked kernel hangs in native code, where only a thread can end it. Garbage in rows that
# nobody reads may be multiplied, and NumPy warns of its NaN.
MARKS = [
    pytest.mark.timeout(600, method="thread"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
]


def program(*, decode_only: bool = False) -> Program:
    """The entry point, memory filled with NaN and every access checked for races and bounds."""
    params = plgpu.InterpretGPUParams(
        detect_races=True, on_race="raise", uninitialized_memory="nan"
    )
    return compiled("gpu", interpret=params, decode_only=decode_only)


def with_tiny_key_scales(case: Case) -> Case:
    """A case whose scores are all next to zero, so that a row is the mean of what it sees."""
    assert case.kv_scales is not None
    scales = case.kv_scales.copy()
    scales[0] = 1e-30
    return dataclasses.replace(case, kv_scales=scales)


def run_strictly(case: Case, kept: Program | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Output and pool of a case; raises where a thread reads what another writes."""
    try:
        return run(case, "gpu", kept or program(decode_only=case.is_decode_only))
    finally:
        reset_gpu_interpret_mode_state()
