"""Steps that begin only as a test allows them, so that a test may be as slow as it likes.

A tiny engine answers hundreds of tokens in the time for which a busy machine may stop a test: what
is to be seen, aborted or left in mid-answer has ended by then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from engine.frontend import Engine


@contextlib.contextmanager
def by_hand(engine: Engine) -> Iterator[Callable[[int], None]]:
    """Within the block the engine rests; what it gives lets so many more steps be launched.

    While it rests, requests come and wait, and those that run may be aborted, as in a pause. After
    the block it goes on by itself.
    """
    loop, pulse, lock = engine._loop, engine._loop.pulse, threading.Lock()
    launch, allowed, is_over = loop._launch, 0, False

    def counted() -> object:
        nonlocal allowed
        launched = launch()
        with lock:
            allowed -= launched is not None
            pulse.is_paused = allowed <= 0 and not is_over
        return launched

    def allow(steps: int) -> None:
        nonlocal allowed
        with lock:
            allowed += steps
            pulse.is_paused = allowed <= 0 and not is_over
        loop.look(lambda _: None)  # which wakes it

    loop._launch = counted  # type: ignore[method-assign]
    allow(0)
    try:
        yield allow
    finally:
        is_over = True
        allow(0)
        del loop._launch
