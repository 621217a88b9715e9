"""What the scheduler may use: the sizes that every plan keeps to."""

from __future__ import annotations

import dataclasses

MAX_INT32 = 2**31 - 1  # block ids, positions and token ids are int32 on the device


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler may use. Units: blocks, tokens, sequences.

    `fingerprint` names the weights; it goes into every block key. `host_blocks` is the size of the
    host tier, 0 for none.

    Raises:
      ValueError: a limit is out of range, or a step could not hold one token a sequence.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_step_tokens: int
    max_model_len: int
    max_waiting: int = 1024
    prefix_reuse: bool = True
    host_blocks: int = 0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size",
            "max_num_seqs",
            "max_step_tokens",
            "max_model_len",
            "max_waiting",
        ):
            value = getattr(self, name)
            if not 1 <= value <= MAX_INT32:
                raise ValueError(f"{name} is {value}; it must be from 1 to {MAX_INT32}")
        if not 0 <= self.host_blocks <= MAX_INT32:
            raise ValueError(f"host_blocks is {self.host_blocks}; it must be from 0 to {MAX_INT32}")
        if self.max_step_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}), so a step could not take one token of each sequence"
            )
