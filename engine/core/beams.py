"""Beam search: which continuations of a prompt live on, and on whose blocks.

A request of width W runs as W sequences, a *gang*: they advance in the same steps, and start over
together if they lose their blocks. After each step the likeliest W continuations of all its beams
go on. The first child of a beam keeps its sequence; for the others, a sequence whose beam has none
lets go of its blocks and goes on with the parent's (a fork, with copy-on-write where it writes).

What beams generate has no names: it is not found by others, and a search that starts over finds its
prompt only.

What is chosen follows from the step's log-probabilities alone, so that it replays. The search is
that of transformers' `_beam_search` (5.19), for a batch of one; of equally likely candidates the
one of the better beam goes first, then the one that its top list has first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from engine.core.sequences import NO_SLOT, Sequence
from engine.types import BeamScore, FinishReason, StepOutput, StepTokens

if TYPE_CHECKING:
    from engine.core.core import Core


class Hypothesis(NamedTuple):
    """An output that was found."""

    token_ids: tuple[int, ...]
    reason: FinishReason
    beam: BeamScore


class Choice(NamedTuple):
    """A beam that goes on: whose child it is (an index of the beams before), and with what."""

    parent: int
    token: int
    logprob: float  # of all its tokens


class BeamGroup:
    """The sequences of one search, and how far it is. Mutable, and owned by one `Core`.

    Attributes:
      members: all W sequences by rank, between which nobody else's lies.
      beams: those that run, the likeliest first: one while the prompt is computed, then all.
      logprobs: of each beam's output so far.
      found: the best outputs so far, at most W, best first.
      reserve: blocks that a protected gang holds, for what it can come to need.
    """

    __slots__ = ("beams", "found", "logprobs", "members", "reserve")

    def __init__(self, members: list[Sequence]):
        self.members = members
        self.restart(members[0].first_step)
        for seq in members:
            seq.beams = self

    def restart(self, step: int) -> Sequence:
        """Begin anew from the prompt. Results of plans before `step` are not for this attempt.

        Returns the sequence that computes the prompt; the others wait with it.
        """
        first, *first.forks = self.members
        for seq in self.members:
            del seq.token_ids[seq.num_prompt :]
            seq.keys.clear()
            seq.num_public = 0
            seq.num_total = seq.num_prompt
            seq.first_step = step
            seq.parent = None if seq is first else first
        self.beams, self.logprobs = [first], [0.0]
        self.found: list[Hypothesis] = []
        self.reserve: list[int] = []
        return first

    def choose(self, tops: Iterable[Iterable[tuple[int, float]]]) -> list[Choice]:
        """Take in the likeliest tokens after each beam: keep what ends, and say what goes on.

        Args:
          tops: by beam, (token, log-probability) of the likeliest; W of them don't end it.

        Returns:
          The next W beams, likeliest first; or none, if the search has ended.
        """
        first, width = self.members[0], len(self.members)
        sampling, stop_ids = first.request.sampling, first.request.stop_ids
        length = len(first.token_ids) - first.num_prompt + 1
        is_last = first.num_prompt + length == first.max_total
        normaliser = length**sampling.length_penalty
        candidates = [
            Choice(beam, token, self.logprobs[beam] + logprob)
            for beam, top in enumerate(tops)
            for token, logprob in top
            if math.isfinite(logprob)
        ]
        candidates.sort(key=lambda choice: -choice.logprob)  # stable
        going_on: list[Choice] = []
        for place, choice in enumerate(candidates):
            if len(going_on) == width:
                break
            if choice.token not in stop_ids and not is_last:
                going_on.append(choice)
            elif place < width:
                reason = FinishReason.STOP if choice.token in stop_ids else FinishReason.LENGTH
                output = (*self.beams[choice.parent].token_ids[first.num_prompt :], choice.token)
                score = BeamScore(choice.logprob, choice.logprob / normaliser)
                self.found.append(Hypothesis(output, reason, score))
        self.found.sort(key=lambda found: -found.beam.score)
        del self.found[width:]
        if len(going_on) < width:
            return []  # the last step; or one without the log-probabilities that it should have
        if len(self.found) == width and (
            sampling.early_stopping or going_on[0].logprob / normaliser <= self.found[-1].beam.score
        ):
            return []
        return going_on

    def outputs(self) -> Iterator[StepOutput]:
        """News of the best outputs, as many as were asked for; an error for each that is not there,
        which can only be if the device gave no finite log-probabilities."""
        first = self.members[0]
        for index, name in enumerate(first.request.replies):
            news = StepOutput(
                name, (), FinishReason.ERROR, first.num_prompt, first.num_cached_tokens
            )
            if index < len(self.found):
                token_ids, reason, beam = self.found[index]
                news = news._replace(token_ids=token_ids, finish_reason=reason, beam=beam)
            yield news

    def copy(self, sequences: Mapping[str, Sequence]) -> None:
        """Put the members that `sequences` has by these names into a group like this one."""
        other = object.__new__(BeamGroup)
        other.members = [sequences[seq.request.request_id] for seq in self.members]
        other.beams = [sequences[seq.request.request_id] for seq in self.beams]
        other.logprobs, other.found = self.logprobs.copy(), self.found.copy()
        other.reserve = self.reserve.copy()
        for seq in other.members:
            seq.beams = other

    def check(self, core: Core) -> None:
        """Assert what the planning of gangs rests on; for tests."""
        assert all(seq.beams is self for seq in self.members)
        ranks = [seq.rank for seq in self.members]
        others = [seq.rank for seq in core.sequences.values() if seq.beams is not self]
        assert ranks == sorted(ranks), "the members are out of order"
        assert not any(ranks[0] < rank < ranks[-1] for rank in others), "a gang is torn apart"
        running = [seq for seq in self.members if seq.slot != NO_SLOT]
        alive = running or self.members[:1]
        assert sorted(seq.rank for seq in self.beams) == [seq.rank for seq in alive]
        assert len({(seq.num_computed, seq.num_total) for seq in self.beams}) == 1
        assert len(self.logprobs) == len(self.beams)
        assert self.logprobs == sorted(self.logprobs, reverse=True)
        if self.reserve or (running and core.is_protected(self.members[0])):
            held = {block for seq in running for block in seq.owned_blocks()}
            first = self.members[0]
            most = most_blocks(first.num_prompt, first.max_total, len(ranks), core.block_size)
            assert len(held) + len(self.reserve) == most, "a protected gang lacks a block"


def most_blocks(num_prompt: int, max_total: int, width: int, block_size: int) -> int:
    """Blocks that a gang can come to hold: full ones of the prompt once, the rest for each."""
    shared = num_prompt // block_size
    return shared + width * (-(-(max_total - 1) // block_size) - shared)


def num_needed(seq: Sequence, block_size: int) -> int:
    """Blocks that must be there before a beam may advance. The first member answers for all."""
    group = seq.beams
    assert group is not None
    if seq is not group.members[0]:
        return 0
    # All are equally long, so all begin a block now, or none; and nobody else has their ends.
    if seq.num_computed == seq.num_blocks * block_size:
        return len(group.beams)
    return len(group.beams) - len({beam.tail(block_size) for beam in group.beams})


def gangs(core: Core) -> list[BeamGroup]:
    """Every search. O(sequences)."""
    groups = (seq.beams for seq in core.sequences.values())
    return list({id(group): group for group in groups if group is not None}.values())


def advance(core: Core, group: BeamGroup, first_row: int, tokens: StepTokens) -> list[StepOutput]:
    """Take in a step of a gang, whose rows follow one another from `first_row` on."""
    first = group.members[0]
    running = [seq for seq in group.members if seq.slot != NO_SLOT]
    tops = []
    for beam in group.beams:
        entry = tokens.logprobs.get(first_row + running.index(beam))
        tops.append(() if entry is None else entry.top)
    choices = group.choose(tops)
    if not choices:
        for _ in group.members:
            core.forecast.add(len(first.token_ids) - first.num_prompt + 1)
        outputs = list(group.outputs())
        core.remove(first)
        return outputs
    _reassign(core, group, choices)
    return []


def _reassign(core: Core, group: BeamGroup, choices: list[Choice]) -> None:
    """Give each of the chosen a sequence."""
    parents = [group.beams[choice.parent] for choice in choices]
    spare = iter([seq for seq in group.members if seq not in parents])
    beams: list[Sequence] = []
    for parent in parents:
        beam = parent
        if beam in beams:
            beam = next(spare)
            core.branch(beam, parent)
            beam.token_ids, beam.num_total = parent.token_ids.copy(), parent.num_total
            beam.has_state = True
        beams.append(beam)
    for beam, choice in zip(beams, choices, strict=True):
        beam.token_ids.append(choice.token)
    group.beams, group.logprobs = beams, [choice.logprob for choice in choices]
    first = group.members[0]
    if core.is_protected(first):
        held = {block for beam in beams for block in beam.owned_blocks()}
        most = most_blocks(first.num_prompt, first.max_total, len(beams), core.block_size)
        group.reserve += core.pool.allocate(most - len(held) - len(group.reserve))
