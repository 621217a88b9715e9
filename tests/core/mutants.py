"""Ways to break the core, each of which the simulation must notice.

A mutant is a function that patches one mistake into the running code; its name says which. Some
are this project's own, found by these tests and mended.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable

import pytest

from engine.core import (
    beams,
    inspection,
    merging,
    planning,
    restoring,
    scheduler,
    sequences,
    upkeep,
)
from engine.core.beams import BeamGroup
from engine.core.block_keys import child_key, root_key
from engine.core.block_pool import BlockPool
from engine.core.core import Core
from engine.core.host_tier import HostTier
from engine.core.limits import Limits
from engine.core.merging import MergingPool
from engine.core.scheduler import SchedulerState
from engine.core.sequences import Sequence, WaitingQueue
from engine.types import Domain

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]
MUTANTS: dict[str, Mutant] = {}
BEAM_MUTANTS: dict[str, Mutant] = {}  # of what only searches meet


def mutant(function: Mutant) -> Mutant:
    """Add to the list; the function's name says what goes wrong."""
    MUTANTS[function.__name__] = function
    return function


def beam_mutant(function: Mutant) -> Mutant:
    """Add to the list of those that only searches meet."""
    BEAM_MUTANTS[function.__name__] = function
    return function


def rewrite(patch: Patch, owner: object, name: str, old: str, new: str) -> None:
    """Replace one piece of a function's source text."""
    function = inspect.unwrap(getattr(owner, name))
    source = getattr(function, "mutated_source", None)
    if source is None:
        source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}"
    namespace: dict[str, object] = {}
    source = source.replace(old, new)
    exec(compile(source, f"<mutant of {name}>", "exec"), function.__globals__, namespace)
    changed = namespace[name]
    changed.mutated_source = source  # type: ignore[attr-defined]
    patch.setattr(owner, name, changed)


# Block pool.


@mutant
def release_starts_with_the_first_block(patch: Patch) -> None:
    rewrite(patch, BlockPool, "release", "reversed(blocks)", "blocks")


@mutant
def release_keeps_the_last_block(patch: Patch) -> None:
    rewrite(patch, BlockPool, "release", "reversed(blocks)", "reversed(blocks[:-1])")


@mutant
def release_frees_a_block_that_others_still_own(patch: Patch) -> None:
    rewrite(patch, BlockPool, "release", "if count == 0", "if count >= 0")


@mutant
def sharing_does_not_count(patch: Patch) -> None:
    rewrite(patch, BlockPool, "share", "self._ref_counts[block] += 1", "pass")


@mutant
def sharing_leaves_the_block_evictable(patch: Patch) -> None:
    rewrite(patch, BlockPool, "share", "del self._cached[block]", "pass")


@mutant
def eviction_takes_an_owned_block(patch: Patch) -> None:
    rewrite(
        patch,
        BlockPool,
        "_evict",
        "return block",
        "return next((b for b, count in enumerate(self._ref_counts) if count), block)",
    )


@mutant
def eviction_keeps_the_name(patch: Patch) -> None:
    rewrite(patch, BlockPool, "_forget_name", "del self._block_of[key]", "pass")


@mutant
def a_second_block_takes_over_a_name(patch: Patch) -> None:
    rewrite(patch, BlockPool, "name", "key not in self._block_of and ", "")


@mutant
def names_outlive_their_contents(patch: Patch) -> None:
    patch.setattr(BlockPool, "forget_names", lambda self: None)


@mutant
def a_copy_shares_the_free_list(patch: Patch) -> None:
    rewrite(patch, BlockPool, "copy", "self._free.copy()", "self._free")


@mutant
def a_copy_shares_the_order_of_eviction(patch: Patch) -> None:
    rewrite(patch, BlockPool, "copy", "self._cached.copy()", "self._cached")


# Keys.


@mutant
def keys_leave_out_the_domain(patch: Patch) -> None:
    patch.setattr(sequences, "root_key", lambda domain, *extras: root_key(Domain(), *extras))


@mutant
def keys_leave_out_the_salt(patch: Patch) -> None:
    patch.setattr(
        sequences, "root_key", lambda domain, *extras: root_key(Domain(domain.tenant), *extras)
    )


@mutant
def keys_run_tenant_and_salt_together(patch: Patch) -> None:
    patch.setattr(
        sequences,
        "root_key",
        lambda domain, *extras: root_key(Domain(domain.tenant + domain.salt), *extras),
    )


@mutant
def keys_leave_out_the_parent(patch: Patch) -> None:
    patch.setattr(sequences, "child_key", lambda parent, tokens: child_key(b"", tokens))


# Sequences.


@mutant
def a_slot_is_never_returned(patch: Patch) -> None:
    rewrite(patch, Core, "_stop", "heapq.heappush(self.free_slots, seq.slot)", "pass")


@mutant
def an_ended_sequence_keeps_its_blocks(patch: Patch) -> None:
    rewrite(patch, Core, "_stop", "self.pool.release(seq.owned_blocks()", "str((0)")


@mutant
def a_start_takes_a_block_too_few(patch: Patch) -> None:
    rewrite(patch, Core, "start", "- len(shared)", "- len(shared) - 1")


@mutant
def a_resumed_sequence_brings_no_history(patch: Patch) -> None:
    rewrite(
        patch,
        Sequence,
        "take_history",
        "return tuple(self.token_ids[self.num_prompt :])",
        "return None if self.num_total > self.num_prompt else ()",
    )


@mutant
def history_forgets_the_newest_token(patch: Patch) -> None:
    rewrite(patch, Sequence, "take_history", "self.num_prompt :", "self.num_prompt : -1")


@mutant
def prompt_logprobs_are_repeated_after_a_preemption(patch: Patch) -> None:
    rewrite(patch, Sequence, "add_prompt_logprobs", "entries[known - start :]", "entries")


@mutant
def prompt_logprobs_take_what_is_cached(patch: Patch) -> None:
    patch.setattr(Sequence, "needs_whole_prompt", False)


@mutant
def the_queue_takes_the_newest_first(patch: Patch) -> None:
    def first(self: WaitingQueue) -> Sequence | None:
        return self._present[max(self._present)] if self._present else None

    patch.setattr(WaitingQueue, "first", first)


@mutant
def a_copied_sequence_shares_its_tokens(patch: Patch) -> None:
    original = Sequence.copy

    def copy(self: Sequence) -> Sequence:
        other = original(self)
        other.token_ids = self.token_ids
        return other

    patch.setattr(Sequence, "copy", copy)


# Scheduler.


@mutant
def admission_ignores_the_models_context(patch: Patch) -> None:
    rewrite(
        patch,
        scheduler,
        "admit",
        "core.add(request, max_total)",
        "core.add(request, num_prompt + request.max_tokens)",
    )


@mutant
def a_hit_takes_the_whole_prompt(patch: Patch) -> None:
    rewrite(patch, planning, "_admit_waiting", "(num_known - 1) //", "num_known //")


@mutant
def admission_forgets_that_cached_hits_are_not_available(patch: Patch) -> None:
    rewrite(
        patch, planning, "_admit_waiting", "core.pool.num_cached(hits) - len(hits)", "-len(hits)"
    )
    rewrite(patch, planning, "_admit_waiting", "(needed, growth)", "(needed, 0)")


@mutant
def admission_skips_a_head_that_does_not_fit(patch: Patch) -> None:
    original = planning._admit_waiting

    def admit_waiting(core: Core, limits: Limits, rows: list, swap_ins: list, budget: int) -> None:
        head = core.waiting.first()
        before = len(rows)
        original(core, limits, rows, swap_ins, budget)
        if head is not None and len(rows) == before and len(core.waiting) > 1:
            core.waiting.remove(head)
            original(core, limits, rows, swap_ins, budget)
            core.waiting.add(head)

    patch.setattr(planning, "_admit_waiting", admit_waiting)


@mutant
def a_preempted_sequence_does_not_wait_for_its_token(patch: Patch) -> None:
    rewrite(patch, planning, "_admit_waiting", "if seq.num_pending:", "if False:")


@mutant
def a_preempted_sequence_comes_straight_back(patch: Patch) -> None:
    rewrite(patch, planning, "plan_step", "if preempted:", "if False:")


@mutant
def the_highest_rank_is_preempted(patch: Patch) -> None:
    rewrite(patch, planning, "_make_room", "in reversed(core.running)", "in core.running")


@mutant
def a_decode_that_needs_a_block_gets_none(patch: Patch) -> None:
    rewrite(
        patch,
        planning,
        "_needs_block",
        "seq.num_computed == seq.num_blocks",
        "seq.num_computed > seq.num_blocks",
    )


@mutant
def a_decode_runs_past_its_end(patch: Patch) -> None:
    rewrite(patch, planning, "_schedule_decodes", " or seq.num_total >= seq.max_total", "")


@mutant
def prompts_go_before_decodes(patch: Patch) -> None:
    rewrite(patch, planning, "plan_step", "rows=tuple(rows)", "rows=tuple(rows[::-1])")


@mutant
def a_shared_block_is_written(patch: Patch) -> None:
    rewrite(patch, planning, "_needs_block", "seq.shares_tail and core", "False and core")


@mutant
def a_shared_block_is_replaced_but_not_copied(patch: Patch) -> None:
    rewrite(patch, planning, "_give_block", "copies.append(", "str(")


@mutant
def a_copy_goes_the_wrong_way(patch: Patch) -> None:
    rewrite(patch, planning, "_give_block", "BlockCopy(shared, block)", "BlockCopy(block, shared)")


@mutant
def a_copied_block_keeps_its_old_owner(patch: Patch) -> None:
    rewrite(patch, planning, "_give_block", "core.pool.release([shared])", "pass")


@mutant
def a_fork_samples_from_another_row(patch: Patch) -> None:
    rewrite(patch, planning, "_part", "logits_of=source", "logits_of=max(0, source - 1)")


@mutant
def forks_part_before_the_prompt_ends(patch: Patch) -> None:
    rewrite(patch, planning, "_part", " and seq.num_total > seq.num_prompt", "")


@mutant
def a_fork_takes_no_ownership(patch: Patch) -> None:
    rewrite(patch, Core, "branch", "self.pool.share(blocks)", "pass")


@mutant
def a_parent_does_not_know_that_its_tail_is_shared(patch: Patch) -> None:
    rewrite(
        patch,
        Sequence,
        "part_from",
        "self.shares_tail = parent.shares_tail",
        "self.shares_tail",
    )


@mutant
def no_slot_is_kept_for_a_fork(patch: Patch) -> None:
    rewrite(patch, planning, "_admit_waiting", "unclaimed <= 0", "not core.free_slots")


@mutant
def forks_are_lost_with_their_parent(patch: Patch) -> None:
    rewrite(patch, Core, "remove", "if seq.forks:", "if False:")


@mutant
def a_plan_s_block_table_changes_after_it_was_made(patch: Patch) -> None:
    rewrite(
        patch,
        Sequence,
        "replace_tail",
        "self.block_ids = self.block_ids.copy()",
        "self.block_ids.setflags(write=True)",
    )


@mutant
def an_evicted_block_is_not_swapped_out(patch: Patch) -> None:
    rewrite(patch, planning, "_swap_out", "yield SwapOut(evicted.block", "SwapOut(evicted.block")


@mutant
def a_swapped_block_gets_the_slot_of_another(patch: Patch) -> None:
    rewrite(patch, HostTier, "put", "return slot", "return 0")


@mutant
def blocks_are_restored_one_place_off(patch: Patch) -> None:
    rewrite(patch, Core, "start", "fresh[:num_restored]", "fresh[-num_restored:]")


@mutant
def a_restored_block_is_not_copied_back(patch: Patch) -> None:
    rewrite(patch, planning, "_admit_waiting", "swap_ins += map(SwapIn, slots, restored)", "pass")


@mutant
def restored_blocks_take_no_room(patch: Patch) -> None:
    rewrite(
        patch,
        planning,
        "_admit_waiting",
        "num_cached(hits) - len(hits)",
        "num_cached(hits) - len(hits) - len(slots)",
    )


@mutant
def restored_blocks_are_named_as_those_before_them(patch: Patch) -> None:
    rewrite(patch, restoring, "restore", "seq.keys[first : first + count]", "seq.keys[:count]")


@mutant
def restored_blocks_push_out_each_other(patch: Patch) -> None:
    """A mistake that the simulation found here: two blocks were written to one slot."""
    rewrite(patch, restoring, "restore", "[: core.host.num_slots]", "")


@mutant
def restored_blocks_come_in_reverse(patch: Patch) -> None:
    rewrite(patch, restoring, "restore", "*reversed(slots)", "*slots")


@mutant
def what_is_missing_starts_behind_the_pool_s_part(patch: Patch) -> None:
    old = "itertools.takewhile(core.host.__contains__, seq.keys[first:])"
    rewrite(patch, restoring, "missing_blocks", old, f"[*seq.keys[:1], *{old}]")


@mutant
def a_request_s_public_blocks_count_as_its_own_on_disk(patch: Patch) -> None:
    rewrite(patch, restoring, "missing_blocks", "seq.num_public - first", "0")


@mutant
def what_goes_out_is_everybody_s(patch: Patch) -> None:
    rewrite(patch, planning, "_swap_out", "evicted.tag.domain", "None")


@mutant
def the_last_block_of_a_prompt_counts_as_missing(patch: Patch) -> None:
    rewrite(patch, restoring, "missing_blocks", "seq.num_prompt - 1", "seq.num_prompt")


@mutant
def a_failed_step_leaves_its_blocks_in_the_host_tier(patch: Patch) -> None:
    rewrite(patch, scheduler, "fail", "core.host.undo(plans)", "pass")


@mutant
def a_slot_is_lost_with_a_failed_step(patch: Patch) -> None:
    rewrite(patch, HostTier, "_drop", "self._free.append(", "str(")


@mutant
def a_protected_sequence_is_preempted(patch: Patch) -> None:
    rewrite(patch, planning, "_make_room", " or not core.is_protected(low)", " or True")


@mutant
def a_protected_sequence_gets_no_reserve(patch: Patch) -> None:
    rewrite(patch, Core, "blocks_to_start", "if self.is_protected(seq):", "if False:")


@mutant
def whoever_follows_a_preempted_sequence_is_passed_over(patch: Patch) -> None:
    rewrite(patch, planning, "_schedule_decodes", "index -= 1", "pass")


@mutant
def the_budget_forgets_the_decodes(patch: Patch) -> None:
    rewrite(patch, planning, "plan_step", "max_step_tokens - num_decodes", "max_step_tokens")


@mutant
def a_prompt_uses_half_the_budget(patch: Patch) -> None:
    rewrite(
        patch,
        planning,
        "plan_step",
        "min(seq.num_uncomputed, budget)",
        "min(seq.num_uncomputed, -(-budget // 2))",
    )


@mutant
def blocks_are_named_before_they_are_computed(patch: Patch) -> None:
    rewrite(
        patch,
        planning,
        "name_full_blocks",
        "min(seq.num_computed, len(seq.token_ids))",
        "len(seq.token_ids)",
    )


@mutant
def blocks_are_named_before_their_tokens_are_known(patch: Patch) -> None:
    rewrite(
        patch,
        planning,
        "name_full_blocks",
        "min(seq.num_computed, len(seq.token_ids))",
        "seq.num_computed",
    )
    rewrite(patch, planning, "plan_step", "rows[num_decodes:]", "rows")


@mutant
def a_block_is_named_while_a_place_in_it_is_empty(patch: Patch) -> None:
    rewrite(
        patch,
        planning,
        "name_full_blocks",
        "// limits.block_size",
        "// limits.block_size + (seq.num_computed % limits.block_size > 1)",
    )


@mutant
def a_block_is_matched_within_its_own_step(patch: Patch) -> None:
    rewrite(
        patch,
        planning,
        "_admit_waiting",
        "rows.append(_advance(seq, num_tokens, block_size))",
        "rows.append(_advance(seq, num_tokens, block_size)); name_full_blocks(seq, core, limits)",
    )


@mutant
def a_stop_token_is_overlooked(patch: Patch) -> None:
    rewrite(patch, scheduler, "commit", "token in row.request.stop_ids", "False")


@mutant
def max_tokens_is_off_by_one(patch: Patch) -> None:
    rewrite(patch, scheduler, "commit", "== seq.max_total", "== seq.max_total - 1")


@mutant
def steps_of_an_ended_request_reach_its_successor(patch: Patch) -> None:
    rewrite(patch, scheduler, "commit", " or plan.step < seq.first_step", "")


@mutant
def steps_are_told_apart_by_the_request_object(patch: Patch) -> None:
    rewrite(
        patch,
        scheduler,
        "commit",
        "plan.step < seq.first_step",
        "seq.request is not row.request",
    )


@mutant
def a_failed_step_ends_nothing(patch: Patch) -> None:
    rewrite(patch, scheduler, "fail", "for plan in plans:", "for plan in ():")


@mutant
def a_failed_step_leaves_the_others_running(patch: Patch) -> None:
    rewrite(patch, scheduler, "fail", "while core.running:", "while False:")


@mutant
def an_abort_forgets_the_request(patch: Patch) -> None:
    rewrite(patch, Core, "remove", "self._stop(seq)", "self.running.remove(seq)")


@mutant
def a_state_can_be_used_twice(patch: Patch) -> None:
    patch.setattr(SchedulerState, "_take", SchedulerState.core.fget)


# What must not stay, and what everybody shares.


@mutant
def what_goes_free_is_not_erased(patch: Patch) -> None:
    rewrite(patch, Core, "_stop", "erase=seq.erases", "erase=False")


@mutant
def nothing_expires(patch: Patch) -> None:
    patch.setattr(BlockPool, "expire", lambda self: None)


@mutant
def nothing_expires_in_host_memory(patch: Patch) -> None:
    patch.setattr(HostTier, "expire", lambda self, now: None)


@mutant
def an_expired_block_is_not_erased(patch: Patch) -> None:
    rewrite(patch, BlockPool, "_give_up", "erase=True", "erase=False")


@mutant
def an_evicted_block_is_not_erased(patch: Patch) -> None:
    rewrite(patch, BlockPool, "_evict", "erase=expires > 0", "erase=False")


@mutant
def a_dropped_slot_is_not_erased(patch: Patch) -> None:
    rewrite(patch, HostTier, "_drop", "self._erased.append(slot)", "pass")


@mutant
def a_copy_is_erased(patch: Patch) -> None:
    rewrite(patch, planning, "plan_step", "if block not in copied", "")


@mutant
def a_failed_plan_is_taken_to_have_erased(patch: Patch) -> None:
    rewrite(patch, HostTier, "undo", "for plan in plans:", "for plan in ():")


@mutant
def a_flush_forgets_no_block(patch: Patch) -> None:
    patch.setattr(BlockPool, "flush", lambda self, domain: None)


@mutant
def a_flush_forgets_no_host_block(patch: Patch) -> None:
    patch.setattr(HostTier, "flush", lambda self, domain: None)


@mutant
def a_private_request_s_blocks_get_names(patch: Patch) -> None:
    rewrite(patch, planning, "name_full_blocks", "seq.leaves_nothing", "False")


@mutant
def a_private_request_finds_what_others_left(patch: Patch) -> None:
    patch.setattr(Sequence, "looks_nothing_up", Sequence.needs_whole_prompt)


@mutant
def what_a_private_request_gives_up_is_not_erased(patch: Patch) -> None:
    patch.setattr(Sequence, "erases", property(lambda seq: seq.tag.time_to_live > 0))


@mutant
def a_flush_does_not_reach_what_runs(patch: Patch) -> None:
    rewrite(patch, upkeep, "flush", "seq.leaves_nothing = True", "pass")


@mutant
def a_fork_counts_public_keys_that_it_has_not(patch: Patch) -> None:
    rewrite(patch, Sequence, "part_from", "self.keys = parent.keys.copy()", "pass")


@mutant
def domains_share_what_follows_a_public_prefix(patch: Patch) -> None:
    patch.setattr(sequences, "joined_key", lambda root, public: public)


@mutant
def what_a_domain_sends_becomes_public(patch: Patch) -> None:
    rewrite(patch, Sequence, "extend_keys", "or key in public", "or public")


@mutant
def a_lost_public_prefix_stays_pinned(patch: Patch) -> None:
    rewrite(patch, scheduler, "fail", "core.public.unpin(core)", "pass")


@mutant
def a_request_counts_on_pinned_blocks(patch: Patch) -> None:
    rewrite(patch, scheduler, "check_request", "- len(core.public.keys)", "")


# Blocks that are merged.


@mutant
def a_merged_block_gets_no_further_owner(patch: Patch) -> None:
    rewrite(patch, merging, "merge_full_blocks", "core.pool.share(", "list(")


@mutant
def a_block_that_was_merged_away_is_kept(patch: Patch) -> None:
    rewrite(patch, merging, "merge_full_blocks", "core.pool.release(", "list(")


@mutant
def a_merge_changes_plans_on_their_way(patch: Patch) -> None:
    rewrite(
        patch,
        merging,
        "merge_full_blocks",
        "seq.block_ids = seq.block_ids.copy()",
        "seq.block_ids.setflags(write=True)",
    )


@mutant
def a_block_is_merged_before_it_is_computed_again(patch: Patch) -> None:
    rewrite(patch, merging, "merge_full_blocks", "min(num_tokens, seq.num_computed)", "num_tokens")


@mutant
def a_block_is_merged_while_a_place_in_it_is_empty(patch: Patch) -> None:
    rewrite(
        patch,
        merging,
        "merge_full_blocks",
        "// limits.block_size",
        "// limits.block_size + (num_tokens % limits.block_size > 1)",
    )


@mutant
def a_name_outlives_the_last_owner_of_a_merged_block(patch: Patch) -> None:
    rewrite(patch, MergingPool, "release", "self._forget_name(block)", "pass")


@mutant
def prompts_are_looked_up_where_blocks_are_merged(patch: Patch) -> None:
    rewrite(
        patch,
        planning,
        "_admit_waiting",
        "if limits.prefix_reuse and",
        "if (limits.prefix_reuse or limits.merge_blocks) and",
    )


# Beams.


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
    rewrite(patch, Core, "branch", "self.pool.release(seq.owned_blocks()", "str((0)")


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
