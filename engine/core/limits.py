"""What the scheduler may use: the sizes that every plan keeps to."""

from __future__ import annotations

import dataclasses
from typing import Literal

Allocator = Literal["paged", "contiguous"]
MAX_INT32 = 2**31 - 1  # block ids, positions and token ids are int32 on the device


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler may use. Units: blocks, tokens, sequences.

    `fingerprint` names the weights; it goes into every block key. `host_blocks` is the size of the
    host tier, 0 for none. `allocator` is "contiguous" for what paging is compared with.
    `merge_blocks` takes the place of `prefix_reuse` where hits must not be observable (`merging`).
    `max_waiting_tokens` bounds the prompts in the queue together; one of any length may be in it.
    What was measured, 0 for unknown, see `costs`: nanoseconds of a plan that transfers anything
    (`transfer_ns`), of a block's way in and out (`swap_in_ns`, `swap_out_ns`) and of computing a
    token (`compute_ns`), and picoseconds for each position before it (`attend_ps`).
    After `max_preemptions`, a sequence starts with every block it can need, and is left alone.

    Raises:
      ValueError: a limit is out of range, or a step could not hold one token a sequence.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_step_tokens: int
    max_model_len: int
    max_waiting: int = 1024
    max_waiting_tokens: int | None = None
    prefix_reuse: bool = True
    merge_blocks: bool = False
    host_blocks: int = 0
    allocator: Allocator = "paged"
    max_preemptions: int = 4
    fingerprint: str = ""
    transfer_ns: int = 0
    swap_in_ns: int = 0
    swap_out_ns: int = 0
    compute_ns: int = 0
    attend_ps: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "host_blocks" or field.name.endswith(("_ns", "_ps")) else 1
            if type(value) is int and not least <= value <= MAX_INT32:
                raise ValueError(f"{field.name} is {value}; it must be from {least} to {MAX_INT32}")
        if self.allocator == "contiguous" and (
            self.prefix_reuse or self.merge_blocks or self.host_blocks
        ):
            raise ValueError(
                "the contiguous allocator shares no blocks and keeps none; it takes "
                "prefix_reuse=False, merge_blocks=False and host_blocks=0"
            )
        if self.merge_blocks and (self.prefix_reuse or self.host_blocks):
            raise ValueError(
                "merge_blocks looks no prompt up, neither in the pool nor in a tier; it takes "
                "prefix_reuse=False and host_blocks=0"
            )
        if self.max_step_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}), so a step could not take one token of each sequence"
            )
