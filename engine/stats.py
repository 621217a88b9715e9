"""What an engine says of itself: which model it serves, and where it stands."""

from __future__ import annotations

import dataclasses

from engine.config import Architecture


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model an engine serves, and by which attention kernels."""

    name: str
    architecture: Architecture
    attention: str
    dtype: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weights_fingerprint: str


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """Where an engine stands. Counts since the start unless they are of the present.

    For the operator: they are of all requests together, so whoever sees them sees others' hits.
    """

    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    owned_blocks: int
    total_blocks: int
    block_size: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    cached_prompt_tokens: int
    pinned_blocks: int
    preemptions: int
    copied_blocks: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    held_steps: dict[str, int]
    padded_tokens: int
    computed_tokens: int
    compiles_after_warmup: int
    finished: dict[str, int]
    failed_steps: int
    uptime_seconds: float
    restored_blocks: int
    disk_read_bytes: int
    disk_written_blocks: int
    disk_written_bytes: int
    disk_dropped_blocks: int
