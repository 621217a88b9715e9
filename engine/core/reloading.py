"""Events of an exchange of the weights: what has begun ends with the old ones, and then all that
they left is forgotten.

Pure functions over a scheduler state, as those in `scheduler`. Between `close_queue` and `reload`,
requests are admitted as ever, but only those that had begun run: so no answer is of two models.
"""

from __future__ import annotations

from engine.core.scheduler import SchedulerState
from engine.core.sequences import Sequence, WaitingQueue


class _ClosedQueue(WaitingQueue):
    """A queue that gives only those a turn that had one before, and were preempted."""

    __slots__ = ()

    def first(self) -> Sequence | None:
        """The lowest-ranked of those, or None. O(n), for a short while."""
        begun = (seq for seq in self._present.values() if seq.was_started)
        return min(begun, key=lambda seq: seq.rank, default=None)


def close_queue(state: SchedulerState) -> SchedulerState:
    """From now on, nobody starts who has not begun. Closing it twice changes nothing."""
    core = state._take()
    core.waiting = _ClosedQueue(core.waiting.in_order())
    return SchedulerState(core)


def has_drained(state: SchedulerState) -> bool:
    """Whether all that had begun has ended, since the queue was closed."""
    core = state.core
    return not core.running and not core.in_flight and core.waiting.first() is None


def reload(state: SchedulerState, fingerprint: str) -> SchedulerState:
    """Go on with other weights, named by `fingerprint`: nothing that is cached can be found any
    more, in no tier, and the queue opens.

    The device's memory must be made anew, as after `scheduler.fail`. What lies in the host tier is
    erased by the next plan. Public prefixes are computed again.

    Raises:
      ValueError: `has_drained` doesn't hold. The state is still good.
    """
    if not has_drained(state):
        raise ValueError("requests that began with the old weights have not ended yet")
    core = state._take()
    core.fingerprint = fingerprint
    core.public.keys.clear()
    for seq in core.sequences.values():  # their blocks' names are of the old weights
        seq.keys.clear()
        seq.num_public = 0
        if seq.request.is_public:
            seq.extend_keys(seq.num_prompt // core.block_size, core.block_size, fingerprint)
            core.public.keys.update(seq.keys)
    core.waiting = WaitingQueue(core.waiting.in_order())
    core.public.unpin(core)
    core.pool.forget_names()
    core.host.forget_all()
    return SchedulerState(core)
