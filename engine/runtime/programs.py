"""The programs of a step, compiled: ahead of their use where there is something else to do."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import jax

from engine.core.buckets import Bucket
from engine.runtime.step import Step

_NUM_THREADS = 2
"""Compiling, and reading what was compiled before, lets go of the interpreter's lock; tracing,
which comes first, does not."""


class Programs:
    """Compiles each program of a step once. As a context, it works ahead in threads."""

    def __init__(self, step: Step):
        self.step = step
        self._ahead: ThreadPoolExecutor | None = None
        self._programs: dict[Bucket | int, Future[jax.stages.Compiled]] = {}

    def __enter__(self) -> Self:
        self._ahead = ThreadPoolExecutor(_NUM_THREADS, "octavo-compile")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Begin nothing more; what a thread is at, it ends by itself."""
        assert self._ahead is not None
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._ahead = None

    def begin(self, buckets: Iterable[Bucket]) -> None:
        """Start to compile, in this order, what these buckets need."""
        for bucket in buckets:
            self._begin(bucket.num_seqs)
            self._begin(bucket)

    def forward(self, bucket: Bucket) -> jax.stages.Compiled:
        """The decoder's program of a bucket; waits for it."""
        return self._begin(bucket).result()

    def choose(self, num_seqs: int) -> jax.stages.Compiled:
        """The sampler's program for a number of rows; waits for it."""
        return self._begin(num_seqs).result()

    def _begin(self, what: Bucket | int) -> Future[jax.stages.Compiled]:
        if what not in self._programs:
            if self._ahead is not None:
                self._programs[what] = self._ahead.submit(self._compile, what)
            else:
                self._programs[what] = Future()
                self._programs[what].set_result(self._compile(what))
        return self._programs[what]

    def _compile(self, what: Bucket | int) -> jax.stages.Compiled:
        step = self.step
        lowered = step.lower_choose(what) if isinstance(what, int) else step.lower_forward(what)
        return lowered.compile()
