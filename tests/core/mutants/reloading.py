"""Mistakes in an exchange of the weights."""

from __future__ import annotations

from engine.core import reloading
from engine.core.host_tier import HostTier
from engine.core.sequences import WaitingQueue
from tests.core.mutants.registry import NOTHING, Patch, mutant, rewrite


@mutant
def a_closed_queue_is_open(patch: Patch) -> None:
    patch.setattr(reloading._ClosedQueue, "first", WaitingQueue.first)


@mutant
def a_closed_queue_forgets_those_that_were_preempted(patch: Patch) -> None:
    rewrite(patch, reloading._ClosedQueue, "first", "if seq.was_started", "if False")


@mutant
def steps_on_their_way_are_not_waited_for(patch: Patch) -> None:
    rewrite(patch, reloading, "has_drained", "not core.in_flight and ", "")


@mutant
def blocks_of_the_old_weights_are_found(patch: Patch) -> None:
    rewrite(patch, reloading, "reload", "core.pool.forget_names()", "pass")


@mutant
def slots_of_the_old_weights_are_found(patch: Patch) -> None:
    patch.setattr(HostTier, "forget_all", lambda self: None)


@mutant
def names_of_the_old_weights_stay_with_those_that_wait(patch: Patch) -> None:
    rewrite(patch, reloading, "reload", "seq.keys.clear()", "pass")


@mutant
def public_names_are_those_of_the_old_weights(patch: Patch) -> None:
    rewrite(patch, reloading, "reload", "core.public.keys.clear()", "pass")


@mutant
def the_queue_stays_closed(patch: Patch) -> None:
    rewrite(patch, reloading, "reload", "core.waiting = WaitingQueue(", "(lambda _: None)(")


@mutant
def public_prefixes_are_not_computed_again(patch: Patch) -> None:
    rewrite(patch, reloading, "reload", "core.public.unpin(", NOTHING)
