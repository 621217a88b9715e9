"""Mistakes in what may stay, for whom, and in blocks that are merged."""

from __future__ import annotations

from engine.core import (
    merging,
    planning,
    scheduler,
    sequences,
    upkeep,
)
from engine.core.block_pool import BlockPool
from engine.core.core import Core
from engine.core.host_tier import HostTier
from engine.core.merging import MergingPool
from engine.core.sequences import Sequence
from tests.core.mutants.registry import NOTHING, Patch, mutant, rewrite


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


@mutant
def a_merged_block_gets_no_further_owner(patch: Patch) -> None:
    rewrite(patch, merging, "merge_full_blocks", "core.pool.share(", "list(")


@mutant
def a_block_that_was_merged_away_is_kept(patch: Patch) -> None:
    rewrite(patch, merging, "merge_full_blocks", "core.pool.release(", NOTHING)


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
