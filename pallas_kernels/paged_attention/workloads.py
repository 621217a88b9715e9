"""Named batches and head shapes, and what each must move and compute: tests and benchmarks share
them, so that a figure always says which.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Heads:
    """The attention heads of a model, as far as they are on one chip."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step's batch.

    Attributes:
      name: what it is called wherever it is measured.
      rows: of each sequence, (tokens of this step, tokens of context before them).
    """

    name: str
    rows: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of this step."""
        return sum(new for new, _ in self.rows)

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Tokens of each row's context, those of this step included."""
        return tuple(new + before for new, before in self.rows)

    @property
    def is_decode(self) -> bool:
        """Every row has one token."""
        return all(new == 1 for new, _ in self.rows)

    def scaled(self, factor: float) -> Workload:
        """The same rows, with lengths times `factor`: decodes stay decodes, others have 2 tokens
        or more."""
        if factor == 1:
            return self
        if not 0 < factor <= 1:
            raise ValueError(f"a scale of {factor} is not in (0, 1]; it shortens the workloads")

        def scale(new: int, before: int) -> tuple[int, int]:
            short = 1 if new == 1 else max(2, round(new * factor))
            return short, max(0, round((new + before) * factor) - short)

        return Workload(self.name, tuple(scale(*row) for row in self.rows))

    def bytes_moved(self, heads: Heads, *, itemsize: int, cache_itemsize: int) -> int:
        """The least that has to be moved: no padding, and nothing twice.

        The context before this step is read once a row; the step's keys and values are read and
        written to the pool; queries are read and the output is written.

        Args:
          heads: whose.
          itemsize: bytes of an element of queries, new keys and values, and the output.
          cache_itemsize: bytes of an element of the pool.
        """
        kv = 2 * heads.num_kv_heads * heads.head_dim
        context = sum(before for _, before in self.rows) * kv * cache_itemsize
        new = self.num_tokens * kv * (itemsize + cache_itemsize)
        return context + new + 2 * self.num_tokens * heads.num_heads * heads.head_dim * itemsize

    def flops(self, heads: Heads) -> int:
        """Multiplications and additions of both products, over what causality lets a token see."""
        # The i-th of n new tokens sees before + i + 1 positions.
        seen = sum(new * before + new * (new + 1) // 2 for new, before in self.rows)
        return 4 * seen * heads.num_heads * heads.head_dim


HEADS = {
    heads.name: heads
    for heads in (
        Heads("llama3-8b", 32, 8, 128),
        Heads("llama3-70b-tp8", 8, 1, 128),  # of one chip of eight
        Heads("smollm2", 9, 3, 64),
    )
}

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("decode-64x4k", ((1, 4095),) * 64),
        Workload("decode-256x1k", ((1, 1023),) * 256),
        Workload("prefill-1x8k", ((8192, 0),)),
        # Decodes of 1k to 4k, and the second half of a prompt of 4k: what a busy server's step is.
        Workload(
            "mixed",
            (*((1, 1023 + 3072 * index // 63) for index in range(64)), (2048, 2048)),
        ),
    )
}
