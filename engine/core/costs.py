"""What a block costs by each way to have it: brought back from the host's memory, or computed.

Whole nanoseconds that were measured when the engine started and stand in `Limits`, so that a
decision is a function of the events alone. Where nothing was measured, bringing back wins.
"""

from __future__ import annotations

from engine.core.limits import Limits


def compute_ns(limits: Limits, first: int, count: int) -> int:
    """Nanoseconds to compute `count` blocks from number `first` of a sequence on.

    A token takes a fixed time and some for each position before it: 0 if it was not measured.
    """
    tokens = count * limits.block_size
    start = first * limits.block_size
    positions = tokens * start + tokens * tokens // 2  # the sum over the tokens
    return tokens * limits.compute_ns + positions * limits.attend_ps // 1000


def restoring_pays(limits: Limits, first: int, count: int, read_ns: int = 0) -> bool:
    """Whether to bring those blocks back rather than compute them.

    It is all or nothing: what is saved grows faster than the number of blocks, so a part of
    them never pays where all don't.

    Args:
      limits: with the costs.
      first, count: consecutive blocks of a sequence.
      read_ns: nanoseconds a block until it is in the host's memory, if it isn't there yet.
    """
    if not limits.compute_ns:
        return True
    transfer = limits.transfer_ns + count * (limits.swap_in_ns + read_ns)
    return transfer < compute_ns(limits, first, count)


def keeping_pays(limits: Limits) -> bool:
    """Whether a block that has to leave the pool may ever be worth its way out and back.

    At the end of the longest sequence it is worth most.
    """
    if not limits.compute_ns:
        return True
    last = max(0, limits.max_model_len // limits.block_size - 1)
    return limits.swap_out_ns + limits.swap_in_ns < compute_ns(limits, last, 1)
