"""Events that are about the cache and no request: time passes, or a domain is to be forgotten.

Pure functions over a scheduler state, as those in `scheduler`.
"""

from __future__ import annotations

from engine.core.scheduler import SchedulerState
from engine.types import Domain


def tick(state: SchedulerState, now: int) -> SchedulerState:
    """Let time pass, in milliseconds from any start; it never goes back.

    What has outlived its request's `cache_ttl` can't be found any more, and the next plan erases
    it.
    """
    core = state._take()
    retention = core.pool.retention
    retention.now = max(retention.now, now)
    core.pool.expire()
    core.host.expire(retention.now)
    return SchedulerState(core)


def next_expiry(state: SchedulerState) -> int | None:
    """When `tick` may have something to do, in milliseconds, or None."""
    times = (state.core.pool.retention.next_expiry, state.core.host.next_expiry)
    return min((time for time in times if time is not None), default=None)


def flush(state: SchedulerState, domain: Domain | None = None) -> SchedulerState:
    """Forget what a domain left in the cache, or with None all but what is public.

    It can't be found any more. The next plan erases it, but for what running sequences hold, which
    is erased when they give it up: requests that are in the engine leave nothing. O(what the domain
    left, and sequences).
    """
    core = state._take()
    for seq in core.sequences.values():
        if not seq.request.is_public and domain in (None, seq.request.domain):
            seq.leaves_nothing = True
    core.pool.flush(domain)
    core.host.flush(domain)
    return SchedulerState(core)
