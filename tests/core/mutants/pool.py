"""Mistakes in the block pool, in keys and in a sequence's own book-keeping."""

from __future__ import annotations

from engine.core import (
    sequences,
)
from engine.core.block_keys import child_key, root_key
from engine.core.block_pool import BlockPool
from engine.core.core import Core
from engine.core.journal import Journal
from engine.core.sequences import Sequence, WaitingQueue
from engine.types import Domain
from tests.core.mutants.registry import NOTHING, Patch, mutant, rewrite


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


@mutant
def a_slot_is_never_returned(patch: Patch) -> None:
    rewrite(patch, Core, "_stop", "heapq.heappush(self.free_slots, seq.slot)", "pass")


@mutant
def an_ended_sequence_keeps_its_blocks(patch: Patch) -> None:
    rewrite(patch, Core, "_stop", "self.pool.release(", NOTHING)


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


@mutant
def the_journal_misses_what_is_removed(patch: Patch) -> None:
    patch.setattr(Journal, "remove", lambda self, key: None)


@mutant
def the_journal_misses_that_all_is_lost(patch: Patch) -> None:
    patch.setattr(Journal, "clear", lambda self: None)


@mutant
def the_journal_has_what_found_no_name(patch: Patch) -> None:
    rewrite(patch, Journal, "add_stored", "if key in self._named", "if True")


@mutant
def the_journal_takes_a_block_for_its_own_parent(patch: Patch) -> None:
    rewrite(patch, Journal, "add_stored", "seq.keys[index - 1] if index", "key if index")
