"""What swapping and computing cost on this machine, measured once when an engine starts.

Each figure is the quickest of a few runs of the very programs that steps use, on a pool that is
still empty: a machine that is busy for a moment must not decide for as long as the engine runs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from engine.core import batching
from engine.core.limits import MAX_INT32, Limits
from engine.runtime.block_copies import AT_A_TIME
from engine.runtime.runner import Runner
from engine.sampling import SamplingParams
from engine.types import PlanRow, Request, StepPlan, SwapIn

_ROUNDS = 3
_PIECES = 4  # calls of the larger transfer


class Costs(NamedTuple):
    """Fields of `Limits`, with the meaning that they have there; no less than 1 if measured."""

    transfer_ns: int
    swap_in_ns: int
    swap_out_ns: int
    compute_ns: int
    attend_ps: int

    def apply(self, limits: Limits) -> Limits:
        """Limits with these costs."""
        return dataclasses.replace(limits, **self._asdict())

    def describe(self, block_bytes: int, block_size: int) -> str:
        """For people: rates, and what follows for one block at the start of a sequence."""
        out, back = (block_bytes / ns for ns in (self.swap_out_ns, self.swap_in_ns))
        return (
            f"out {out:.2f} GB/s, back {back:.2f} GB/s and {self.transfer_ns / 1e6:.2f} ms a "
            f"transfer; computing {1e9 / self.compute_ns:,.0f} tokens/s. A block comes back in "
            f"{self.swap_in_ns / 1e6:.2f} ms or is computed in "
            f"{block_size * self.compute_ns / 1e6:.2f} ms"
        )


def measure(runner: Runner, limits: Limits) -> Costs:
    """Time transfers and the largest prefill step.

    Args:
      runner: warmed up, with a host tier, and not in use yet. What it holds is overwritten.
      limits: of the scheduler.
    """
    one_out, one_in = _transfer(runner, 1)
    many_out, many_in = _transfer(runner, _PIECES)
    swap_out, swap_in = (
        max(many - one, 0.0) / (AT_A_TIME * (_PIECES - 1))
        for many, one in ((many_out, one_out), (many_in, one_in))
    )
    transfer = max(one_in - AT_A_TIME * swap_in, 0.0)

    bucket = runner.shape.buckets[-1]
    reach = min(limits.num_blocks * limits.block_size, limits.max_model_len) - 1
    num_tokens = min(bucket.num_tokens, limits.max_step_tokens, reach)
    near = _prefill(runner, limits, 0, num_tokens)
    far_start = reach - num_tokens
    attend = 0.0
    if far_start >= num_tokens:  # else the difference would drown in noise
        far = _prefill(runner, limits, far_start, num_tokens)
        attend = max(far - near, 0.0) / num_tokens / far_start
    compute = max(near / num_tokens - attend * num_tokens / 2, 1e-9)
    return Costs(
        transfer_ns=_whole(transfer * 1e9),
        swap_in_ns=_whole(swap_in * 1e9),
        swap_out_ns=_whole(swap_out * 1e9),
        compute_ns=_whole(compute * 1e9),
        attend_ps=_whole(attend * 1e12),
    )


def _whole(value: float) -> int:
    return min(max(1, round(value)), MAX_INT32)


def _quickest(run: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def _transfer(runner: Runner, pieces: int) -> tuple[float, float]:
    """Seconds for so many calls' worth of blocks: out, and back."""
    host = runner.host
    assert host is not None
    count = AT_A_TIME * pieces
    blocks = [number % runner.shape.num_blocks for number in range(count)]

    def out() -> list[jax.Array]:
        contents = host.fetch(runner.kv_pool, blocks)
        return jax.block_until_ready(contents)

    contents = out()
    swaps = [SwapIn(0, block) for block in blocks]

    def back() -> None:
        runner.swap_in(swaps, contents)
        jax.block_until_ready(runner.kv_pool)

    return _quickest(out), _quickest(back)


def _prefill(runner: Runner, limits: Limits, start: int, num_tokens: int) -> float:
    """Seconds for a step of one chunk of a prompt."""
    stop = start + num_tokens
    request = Request("measure", (0,) * (stop + 1), SamplingParams(temperature=0.0), max_tokens=1)
    blocks = np.arange(-(-stop // limits.block_size), dtype=np.int32)
    row = PlanRow(request, 0, start, num_tokens, (0,) * num_tokens, blocks, False, 0, ())
    plan = StepPlan(step=-1, rows=(row,))
    batch = batching.build(plan, runner.shape.buckets, runner.sink_slot)
    return _quickest(lambda: runner.launch(plan, batch).wait())
