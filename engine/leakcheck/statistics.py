"""Does a score tell hits from misses? Rank statistics of probes taken in ABBA blocks.

A block holds probes of prompts that a victim sent (positive) and of prompts that nobody sent
(negative), in an order that a coin chose. So the test needs no assumption about the scores: under
the hypothesis of no leak the coin might as well have fallen the other way, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Shape legend: B blocks, A arms (POSITIVE, NEGATIVE), R probes of an arm in a block, F figures.
POSITIVE, NEGATIVE = 0, 1
NUM_PERMUTATIONS = 19_999
NUM_RESAMPLES = 9_999

_AT_ONCE = 1_000  # permutations: bounds the memory that many figures take
_ROUNDING = 1e-9  # of sums of ranks, relative to the number of pairs


def auc(scores_BARF: NDArray[np.float64]) -> NDArray[np.float64]:
    """The area under the ROC curve of each figure, float64[F], from all pairs of probes.

    This is Mann and Whitney's U over the number of pairs (Hanley and McNeil, Radiology, 1982).
    """
    pulls_BF = _pulls(scores_BARF)
    return 0.5 + pulls_BF.sum(axis=0) / _normaliser(scores_BARF)


def permutation_p_value(
    scores_BARF: NDArray[np.float64],
    rng: np.random.Generator,
    num_permutations: int = NUM_PERMUTATIONS,
) -> float:
    """The two-sided p-value of the largest |AUC - 0.5| over all figures.

    Each permutation swaps the arms of a random half of the blocks, which is what the coin could
    have done, in all figures at once: so their dependence is kept, and the largest of them is
    compared with the largest (Westfall and Young, Resampling-Based Multiple Testing, 1993). The
    observed order counts as one of the permutations, so that p is never 0 (Phipson and Smyth,
    Statistical Applications in Genetics and Molecular Biology, 2010).
    """
    pulls_BF = _pulls(scores_BARF)
    rounding = _ROUNDING * _normaliser(scores_BARF)
    observed = np.abs(pulls_BF.sum(axis=0)).max() - rounding
    as_extreme = 0
    for start in range(0, num_permutations, _AT_ONCE):
        count = min(_AT_ONCE, num_permutations - start)
        signs = rng.integers(0, 2, size=(count, len(pulls_BF))) * 2.0 - 1.0
        as_extreme += int((np.abs(signs @ pulls_BF).max(axis=1) >= observed).sum())
    return (as_extreme + 1) / (num_permutations + 1)


def bootstrap_interval(
    scores_BAR: NDArray[np.float64],
    rng: np.random.Generator,
    confidence: float,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """The percentile interval of one figure's AUC, resampling whole blocks.

    Probes of a block share the state that the server was in, so they stay together. If every
    resample says the same, as with counts that never differ, the interval would be a point; but
    what was never seen in n probes may still happen in 1 - tail^(1/n) of them (Hanley and
    Lippman-Hand, JAMA, 1983), so it reaches at least as far as that many other probes would take
    the AUC.
    """
    num_blocks, _, repeats = scores_BAR.shape
    above_BRBR = scores_BAR[:, POSITIVE, :, None, None] - scores_BAR[None, None, :, NEGATIVE, :]
    wins_BRBR = (above_BRBR > 0) + 0.5 * (above_BRBR == 0)
    wins_BB = wins_BRBR.sum(axis=(1, 3))
    counts = rng.multinomial(num_blocks, [1 / num_blocks] * num_blocks, size=num_resamples)
    aucs = np.einsum("sb,bc,sc->s", counts, wins_BB, counts, optimize=True)
    aucs /= (num_blocks * repeats) ** 2
    tail = (1 - confidence) / 2
    low, high = np.quantile(aucs, [tail, 1 - tail])
    observed = wins_BB.sum() / (num_blocks * repeats) ** 2
    unseen = (1 - tail ** (1 / (num_blocks * repeats))) / 2
    return float(min(low, max(0, observed - unseen))), float(max(high, min(1, observed + unseen)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics, 1979).

    Each is at most 1; one below alpha is significant at a family-wise error rate of alpha.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected


def least_blocks(alpha: float, num_tests: int) -> int:
    """Blocks below which not even a perfect leak is significant at `alpha` after correction.

    Of 2^B orders two are as extreme as a perfect one: it, and the one with all arms swapped.
    """
    return int(np.floor(np.log2(2 * num_tests / alpha))) + 1


def _pulls(scores_BARF: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each block adds to U beyond its half, float64[B, F]; swapping its arms negates it.

    The ranks of all probes together sum to the same whatever the order, so U depends on the
    order through the difference of the arms' ranks alone.
    """
    shape = scores_BARF.shape
    ranks_BARF = _ranks(scores_BARF.reshape(-1, shape[-1])).reshape(shape)
    return (ranks_BARF[:, POSITIVE] - ranks_BARF[:, NEGATIVE]).sum(axis=1) / 2


def _ranks(scores_NF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1 within each figure; equal scores share their mean rank."""
    ranks = np.empty(scores_NF.shape)
    for figure, scores in enumerate(scores_NF.T):
        _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
        ranks[:, figure] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def _normaliser(scores_BARF: NDArray[np.float64]) -> float:
    """The number of pairs of a positive and a negative."""
    blocks, _, repeats, _ = scores_BARF.shape
    return float(blocks * repeats) ** 2
