"""Mistakes that only beam searches meet."""

from __future__ import annotations

from engine.core import (
    beams,
    inspection,
    planning,
    scheduler,
)
from engine.core.beams import BeamGroup
from engine.core.core import Core
from tests.core.mutants.registry import NOTHING, Patch, beam_mutant, rewrite


@beam_mutant
def beams_advance_before_their_tokens_are_known(patch: Patch) -> None:
    rewrite(
        patch, planning, "_schedule_decodes", "if seq.beams is not None and seq", "if False and seq"
    )


@beam_mutant
def a_beam_looks_only_for_its_own_block(patch: Patch) -> None:
    rewrite(patch, beams, "num_needed", "return len(group.beams)\n", "return 1\n")


@beam_mutant
def copies_of_shared_ends_need_no_room(patch: Patch) -> None:
    rewrite(
        patch,
        beams,
        "num_needed",
        "return len(group.beams) - len({beam.tail(block_size) for beam in group.beams})",
        "return 0",
    )


@beam_mutant
def a_loser_keeps_its_blocks(patch: Patch) -> None:
    rewrite(patch, Core, "branch", "self.pool.release(", NOTHING)


@beam_mutant
def only_one_beam_is_preempted(patch: Patch) -> None:
    rewrite(patch, Core, "preempt", "[seq] if seq.beams is None else seq.beams.members", "[seq]")


@beam_mutant
def a_search_that_starts_over_takes_in_its_old_steps(patch: Patch) -> None:
    rewrite(patch, BeamGroup, "restart", "seq.first_step = step", "pass")


@beam_mutant
def a_search_that_starts_over_keeps_what_it_found(patch: Patch) -> None:
    rewrite(
        patch,
        BeamGroup,
        "restart",
        "self.found: list[Hypothesis] = []",
        "self.found = getattr(self, 'found', [])",
    )


@beam_mutant
def a_protected_search_gets_no_reserve(patch: Patch) -> None:
    rewrite(patch, Core, "blocks_to_start", "if seq.beams is None:", "if True:")


@beam_mutant
def what_a_protected_search_lets_go_of_is_lost_to_it(patch: Patch) -> None:
    rewrite(patch, beams, "_reassign", "if core.is_protected(first):", "if False:")


@beam_mutant
def the_reserve_is_never_used(patch: Patch) -> None:
    rewrite(patch, planning, "_give_block", "reserve.pop() if reserve else ", "")


@beam_mutant
def the_reserve_does_not_count(patch: Patch) -> None:
    rewrite(patch, planning, "_make_room", "len(group.reserve)", "0")


@beam_mutant
def searches_are_admitted_whatever_they_can_come_to_need(patch: Patch) -> None:
    rewrite(patch, scheduler, "check_request", "if most > num_blocks", "if False")


@beam_mutant
def an_ended_search_keeps_its_reserve(patch: Patch) -> None:
    rewrite(patch, Core, "remove", "self.pool.release(seq.beams.reserve, erase=seq.erases)", "pass")


@beam_mutant
def an_output_that_is_not_among_the_best_beams_counts(patch: Patch) -> None:
    rewrite(patch, BeamGroup, "choose", "elif place < width:", "else:")


@beam_mutant
def a_search_stops_with_the_first_outputs(patch: Patch) -> None:
    rewrite(patch, BeamGroup, "choose", "sampling.early_stopping or", "True or")


@beam_mutant
def a_search_never_stops_early(patch: Patch) -> None:
    rewrite(patch, BeamGroup, "choose", "sampling.early_stopping or", "False or")


@beam_mutant
def a_search_goes_on_without_hope(patch: Patch) -> None:
    rewrite(patch, BeamGroup, "choose", "/ normaliser <= self", "/ normaliser <= 9 * self")


@beam_mutant
def outputs_are_not_ranked_by_their_length(patch: Patch) -> None:
    rewrite(patch, BeamGroup, "choose", "length**sampling.length_penalty", "1.0")


@beam_mutant
def a_beam_forgets_what_it_was_likely_before(patch: Patch) -> None:
    rewrite(patch, BeamGroup, "choose", "self.logprobs[beam] + logprob", "logprob")


@beam_mutant
def a_copied_search_shares_its_course(patch: Patch) -> None:
    rewrite(patch, inspection, "copy", "group.copy(other.sequences)", "pass")


@beam_mutant
def one_beam_is_ended_and_the_others_go_on(patch: Patch) -> None:
    rewrite(patch, Core, "remove", "for one in reversed(seq.beams.members):", "for one in (seq,):")
