"""Mistakes in what is planned, admitted, preempted, swapped and taken in."""

from __future__ import annotations

from engine.core import (
    planning,
    restoring,
    scheduler,
)
from engine.core.core import Core
from engine.core.host_tier import HostTier
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.core.sequences import Sequence
from tests.core.mutants.registry import Patch, mutant, rewrite


@mutant
def admission_ignores_the_models_context(patch: Patch) -> None:
    rewrite(
        patch,
        scheduler,
        "admit",
        "core.add(request, max_total)",
        "core.add(request, len(request.prompt_ids) + request.max_tokens)",
    )


@mutant
def a_hit_takes_the_whole_prompt(patch: Patch) -> None:
    rewrite(patch, planning, "_admit_waiting", "(num_known - 1) //", "num_known //")


@mutant
def admission_forgets_that_cached_hits_are_not_available(patch: Patch) -> None:
    rewrite(patch, planning, "_admit_waiting", "- core.pool.num_cached(hits)", "")
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
        "replace_blocks",
        "block_ids = self.block_ids.copy()",
        "(block_ids := self.block_ids).setflags(write=True)",
    )


@mutant
def an_evicted_block_is_not_swapped_out(patch: Patch) -> None:
    rewrite(patch, HostTier, "take_in", "yield SwapOut(", "if False: yield SwapOut(")


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
        "blocks_to_start(seq) - num_shared",
        "blocks_to_start(seq) - num_shared - len(slots)",
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
    rewrite(patch, HostTier, "take_in", "evicted.tag.domain", "None")


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
