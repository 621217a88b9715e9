"""Counts compilations, so that a compile after warm-up is seen and not just felt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"  # those from the compile cache included
_FROM_CACHE = "/jax/compilation_cache/cache_hits"
_counts: Counter[str] = Counter()
_listening = False


def counter() -> Callable[[], int]:
    """A function that tells how many programs were compiled since now, in this process."""
    return _since_now(_COMPILED)


def cache_counter() -> Callable[[], int]:
    """A function that tells how many of those were read from the compile cache since now."""
    return _since_now(_FROM_CACHE)


def _since_now(event: str) -> Callable[[], int]:
    global _listening
    if not _listening:
        jax.monitoring.register_event_duration_secs_listener(_on_duration)
        jax.monitoring.register_event_listener(_on_event)
        _listening = True
    start = _counts[event]
    return lambda: _counts[event] - start


def _on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
    _on_event(event)


def _on_event(event: str, **kwargs: str | int) -> None:
    if event in (_COMPILED, _FROM_CACHE):
        _counts[event] += 1
