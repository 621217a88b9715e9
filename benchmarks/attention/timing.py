"""How things are timed: many repetitions in one program, in rounds that alternate, to the end.

A contestant repeats its work in one compiled loop, so that handing a program to the device costs
nothing beside it. Rounds go A B C A B C, and figures are medians with the range over the rounds.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MAX_REPETITIONS = 100_000

Run = Callable[[int], Any]
"""Does its work so many times and returns once the device is done."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one repetition, over the rounds; each round had `repetitions`."""

    median: float
    least: float
    most: float
    repetitions: int

    @classmethod
    def of(cls, seconds: list[float], repetitions: int) -> Timing:
        """Sum up the rounds."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), repetitions)


def measure(runs: Mapping[str, Run], *, rounds: int, seconds: float) -> dict[str, Timing | str]:
    """Time contestants against each other.

    Args:
      runs: by name. Each is warmed up here, which doesn't count.
      rounds: of all of them.
      seconds: that one contestant takes in one round, about.

    Returns:
      Timings by name, or what a contestant raised.
    """
    repetitions, samples = {}, {}
    found: dict[str, Timing | str] = {}
    for name, run in runs.items():
        try:
            repetitions[name] = calibrate(run, seconds)
            samples[name] = []
        except Exception as error:  # a rival's failure must not cost the others' figures
            found[name] = describe(error)
    for _ in range(rounds):
        for name, taken in samples.items():
            if name in found:
                continue
            try:
                taken.append(_seconds(runs[name], repetitions[name]) / repetitions[name])
            except Exception as error:
                found[name] = describe(error)
    for name, taken in samples.items():
        if name not in found:
            found[name] = Timing.of(taken, repetitions[name])
    return found


def calibrate(run: Run, seconds: float) -> int:
    """Warm up, and find how many repetitions take about `seconds`."""
    run(1)
    repetitions = 1
    while True:
        taken = _seconds(run, repetitions)
        wanted = repetitions * seconds / max(taken, 1e-9)
        if taken >= seconds / 4 or repetitions >= MAX_REPETITIONS:
            return max(1, min(round(wanted), MAX_REPETITIONS))
        repetitions = max(repetitions + 1, min(round(wanted), 16 * repetitions, MAX_REPETITIONS))


def describe(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _seconds(run: Run, repetitions: int) -> float:
    start = time.perf_counter()
    run(repetitions)
    return time.perf_counter() - start


class Looped:
    """A contestant of jax: `call` in one compiled loop, with a state that is donated.

    Attributes:
      state, out: as the last repetition left them.
    """

    def __init__(self, call: Callable[..., tuple[Any, Any]], state: Any, varying: Any, fixed: Any):
        """
        Args:
          call: (state, varying, prepared, index) -> (out, state), traced once.
          state: handed from one repetition to the next, in place; a pool, say.
          varying: inputs of every repetition. The compiler must believe that they change, as it
            would take work that they alone decide out of the loop.
          fixed: inputs that are ready when the loop starts.
        """
        self.state, self.out = state, None
        self._varying, self._fixed = varying, fixed

        def program(state, varying, fixed, repetitions):
            shape = jax.eval_shape(call, state, varying, fixed, jnp.int32(0))[0]

            def body(index, carry):
                state, varying, _ = carry
                out, state = call(state, varying, fixed, index)
                varying, out = lax.optimization_barrier((varying, out))
                return state, varying, out

            out = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shape)
            state, _, out = lax.fori_loop(jnp.int32(0), repetitions, body, (state, varying, out))
            return state, out

        self._program = jax.jit(program, donate_argnums=0)

    def __call__(self, repetitions: int) -> None:
        """Run, and wait for the device."""
        state, self.state, self.out = self.state, None, None
        self.state, self.out = self._program(
            state, self._varying, self._fixed, jnp.int32(repetitions)
        )
        jax.block_until_ready((self.state, self.out))


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured here and now."""

    copy_bytes_per_second: float  # read plus written
    flops_per_second: float
    copy: Timing
    matmul: Timing
    copy_bytes: int  # of the array; a copy moves twice as many
    matmul_size: int  # rows, columns and depth
    matmul_dtype: str


def measure_ceilings(*, copy_bytes: int, matmul_size: int, rounds: int, seconds: float) -> Ceilings:
    """Time a large copy on the device and a large product of bfloat16 matrices.

    The copy adds one to every word of an array in place, so that no compiler leaves it out: each
    byte is read once and written once.
    """
    words = jnp.zeros(copy_bytes // 4, jnp.uint32)
    keys = jax.random.split(jax.random.key(0))
    square = (matmul_size, matmul_size)
    factors = tuple(jax.random.normal(key, square, jnp.bfloat16) for key in keys)

    def copy(words, varying, fixed, index):
        return (), words + jnp.uint32(1)

    def product(state, factors, fixed, index):
        return factors[0] @ factors[1], state

    runs = {
        "copy": Looped(copy, words, (), ()),
        "matmul": Looped(product, (), factors, ()),
    }
    del words
    timings = measure(runs, rounds=rounds, seconds=seconds)
    copy_time, matmul_time = timings["copy"], timings["matmul"]
    if isinstance(copy_time, str) or isinstance(matmul_time, str):
        raise RuntimeError(f"the device's own rates can't be measured: {timings}")
    moved = 2 * (copy_bytes // 4) * 4
    return Ceilings(
        copy_bytes_per_second=moved / copy_time.median,
        flops_per_second=2 * matmul_size**3 / matmul_time.median,
        copy=copy_time,
        matmul=matmul_time,
        copy_bytes=copy_bytes,
        matmul_size=matmul_size,
        matmul_dtype="bfloat16",
    )


def available_bytes(device: jax.Device) -> int | None:
    """Memory that is free on a device, or of the host where that is the device; None: unknown."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
