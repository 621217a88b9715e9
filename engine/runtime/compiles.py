"""Counts compilations, so that a compile after warm-up is seen and not just felt."""

from __future__ import annotations

from collections.abc import Callable

import jax.monitoring

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0
_listening = False


def counter() -> Callable[[], int]:
    """A function that tells how many programs were compiled since now, in this process."""
    global _listening
    if not _listening:
        jax.monitoring.register_event_duration_secs_listener(_on_duration)
        _listening = True
    start = _count
    return lambda: _count - start


def _on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _count
    if event == _COMPILE_EVENT:
        _count += 1
