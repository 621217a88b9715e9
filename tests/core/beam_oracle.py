"""Beam search once more, from scratch and without a cache; and every output there is.

Nothing here is shared with the engine. The search is written as transformers writes it: scores over
beams and vocabulary as one array, what must not be chosen pushed down by a billion.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

Tokens = tuple[int, ...]
Model = Callable[
    [Tokens], Sequence[float] | np.ndarray
]  # log-probabilities of the token after these
FAR_DOWN = 1e9


@dataclasses.dataclass(frozen=True)
class Found:
    """An output: the token that ended it included, its log-probability, and that for its length."""

    token_ids: Tokens
    logprob: float
    score: float


@dataclasses.dataclass(frozen=True)
class Search:
    """What there was to choose by."""

    width: int
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    length_penalty: float = 1.0
    early_stopping: bool = False

    def run(self, model: Model) -> tuple[list[Found], list[list[Tokens]]]:
        """The best outputs, and the beams after each step but the last, both best first."""
        width = self.width
        beams: list[Tokens] = [()] * width
        scores = np.array([0.0] + [-FAR_DOWN] * (width - 1))
        found: list[Found] = []
        trace = []
        for length in range(1, self.max_tokens + 1):
            rows = np.array([model(beam) for beam in beams], np.float64)
            flat = (rows + scores[:, None]).ravel()
            vocabulary = rows.shape[1]
            kept = np.argsort(-flat, kind="stable")[: max(2, 1 + len(self.stop_ids)) * width]
            outputs = [(*beams[index // vocabulary], int(index % vocabulary)) for index in kept]
            totals = flat[kept]
            ended = np.array(
                [output[-1] in self.stop_ids or length == self.max_tokens for output in outputs]
            )
            for place in np.flatnonzero(ended[:width]):
                score = float(totals[place]) / length**self.length_penalty
                found.append(Found(outputs[place], float(totals[place]), score))
            found = sorted(found, key=lambda each: each.score, reverse=True)[:width]
            totals = totals - FAR_DOWN * ended
            order = np.argsort(-totals, kind="stable")[:width]
            beams, scores = [outputs[place] for place in order], totals[order]
            is_full = len(found) == width
            hopeless = is_full and scores[0] / length**self.length_penalty <= found[-1].score
            if hopeless or (is_full and self.early_stopping) or ended.all():
                return found, trace
            trace.append(beams)
        raise AssertionError("the last step ends everything")

    def exhaust(self, model: Model) -> list[Found]:
        """The best of all outputs of exactly max_tokens, without tokens that end one."""
        assert not self.stop_ids
        vocabulary = range(len(model(())))
        every = []
        for output in itertools.product(vocabulary, repeat=self.max_tokens):
            logprob = sum(model(output[:place])[token] for place, token in enumerate(output))
            every.append(Found(output, logprob, logprob / self.max_tokens**self.length_penalty))
        return sorted(every, key=lambda each: each.score, reverse=True)[: self.width]
