"""From what the probes saw to what it means: leak, no leak found, or nothing to go by.

Silence counts only where the control, in which victim and attacker may share, was loud.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.leakcheck import statistics
from engine.leakcheck.channels import Channel, Figures
from engine.leakcheck.statistics import NEGATIVE, POSITIVE
from engine.leakcheck.trials import PAIRS_A_BLOCK, Mode, Samples

CONTROL_AUC = 0.95  # what the control must exceed for its silence in the attack to count
ORDERLY = 0.95  # of pairs of fillers in order of arrival, for a queue to have been seen

# Which way a channel's figure goes for a cached prompt. For metrics the control tells.
_DIRECTIONS = {Channel.TTFT: -1.0, Channel.CACHED_TOKENS: 1.0, Channel.QUEUE_ORDER: 1.0}


class Verdict(enum.StrEnum):
    """What was found on a channel."""

    LEAK = "leak"
    NO_LEAK = "no leak found"
    ABSENT = "absent"
    BLIND = "blind"
    NOT_MEASURABLE = "not measurable"
    CONTROL_WORKS = "control works"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One channel in one mode.

    Attributes:
      figure: the number that tells most, or that told most in the control.
      auc: the probability that it tells a cached prompt from a fresh one; 0.5 is chance.
      low, high: its confidence interval; those of all channels hold together at 1 - alpha.
      p_value: of the permutation test over all figures of the channel.
      corrected_p_value: by Holm over the channels; of the attack only.
      cached_median, fresh_median: of the figure, in its own unit.
      num_figures: how many were looked at.
      num_pairs: of a positive and a negative probe.
    """

    figure: str
    auc: float
    low: float
    high: float
    p_value: float
    corrected_p_value: float | None
    cached_median: float
    fresh_median: float
    num_figures: int
    num_pairs: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found on a channel, and why that follows."""

    channel: Channel
    verdict: Verdict
    reason: str
    cross: Measured | None = None
    same: Measured | None = None


def judge(
    samples: Mapping[tuple[Channel, Mode], Samples],
    alpha: float,
    rng: np.random.Generator,
) -> list[Finding]:
    """One finding a channel, in the order of `Channel`.

    Args:
      samples: of one mode or both.
      alpha: the chance of a false alarm on any channel that is accepted.
      rng: for permutations and resamples.
    """
    asked = [channel for channel in Channel if any(key[0] is channel for key in samples)]
    # Intervals of many channels all hold if each is that much wider (Bonferroni).
    each_alpha = alpha / max(1, len(asked))
    measured = {channel: _measure(channel, samples, each_alpha, rng) for channel in asked}
    crossed = [channel for channel in asked if Mode.CROSS in measured[channel]]
    p_values = [measured[channel][Mode.CROSS].p_value for channel in crossed]
    for channel, corrected in zip(crossed, statistics.holm(p_values), strict=True):
        by_mode = measured[channel]
        by_mode[Mode.CROSS] = dataclasses.replace(by_mode[Mode.CROSS], corrected_p_value=corrected)
    findings = []
    for channel in asked:
        control = samples.get((channel, Mode.SAME))
        orderliness = float(np.mean(control.orderliness)) if control and control.orderliness else 0
        cross, same = measured[channel].get(Mode.CROSS), measured[channel].get(Mode.SAME)
        verdict, reason = _verdict(cross, same, orderliness, alpha, control is not None)
        findings.append(
            Finding(channel=channel, verdict=verdict, reason=reason, cross=cross, same=same)
        )
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything leaks; 2 if silence on a channel means nothing, or none could be measured."""
    verdicts = {finding.verdict for finding in findings}
    if Verdict.LEAK in verdicts:
        return 1
    return 2 if Verdict.BLIND in verdicts or verdicts <= {Verdict.NOT_MEASURABLE} else 0


def _verdict(
    cross: Measured | None,
    same: Measured | None,
    orderliness: float,
    alpha: float,
    has_control: bool,
) -> tuple[Verdict, str]:
    if cross is None and same is None:
        return Verdict.NOT_MEASURABLE, "the server does not show it"
    if cross is not None and _is_significant(cross, alpha):
        return Verdict.LEAK, f"{cross.figure}: a tenant can tell what another one has sent"
    if not has_control:
        assert cross is not None
        return Verdict.NO_LEAK, f"no control was run; {_bound(cross)}"
    assert same is not None
    if same.auc > CONTROL_AUC and same.p_value < alpha:
        if cross is None:
            return Verdict.CONTROL_WORKS, f"{same.figure} shows it within a domain"
        return Verdict.NO_LEAK, _bound(cross)
    if _is_significant(same, alpha):
        return Verdict.BLIND, (
            f"the control sees too little (AUC {same.auc:.2f}, must exceed {CONTROL_AUC}): raise "
            "--prompt-tokens, or test a server that does less else"
        )
    if orderliness > ORDERLY:
        return Verdict.ABSENT, "the queue was seen, and served in order of arrival in the control"
    return Verdict.BLIND, (
        "the control found nothing, so silence means nothing; is prefix caching on, and are "
        "--prompt-tokens and --burst large enough?"
    )


def _bound(cross: Measured) -> str:
    """What may still be there."""
    most = max(cross.high, 1 - cross.low)
    return f"the AUC is at most {most:.2f}, as far as {cross.num_pairs} pairs can tell"


def _is_significant(measured: Measured, alpha: float) -> bool:
    p_value = measured.corrected_p_value
    p_value = measured.p_value if p_value is None else p_value
    return p_value < alpha and not measured.low <= 0.5 <= measured.high


def _measure(
    channel: Channel,
    samples: Mapping[tuple[Channel, Mode], Samples],
    alpha: float,
    rng: np.random.Generator,
) -> dict[Mode, Measured]:
    """Both modes of a channel by the same figures, the control first: it tells the attack which
    figure to use and which way it goes, as an attacker's own account would tell him."""
    arrays, names = _arrays({mode: each for (of, mode), each in samples.items() if of is channel})
    if not names:
        return {}
    directions = np.full(len(names), _DIRECTIONS.get(channel, 1.0))
    expected: int | None = None
    measured: dict[Mode, Measured] = {}
    for mode in (Mode.SAME, Mode.CROSS):
        if mode not in arrays:
            continue
        values_BARF = arrays[mode]
        if mode is Mode.SAME and channel not in _DIRECTIONS:
            directions = np.where(statistics.auc(values_BARF) < 0.5, -1.0, 1.0)
        scores_BARF = values_BARF * directions
        p_value = statistics.permutation_p_value(scores_BARF, rng)
        aucs_F = statistics.auc(scores_BARF)
        figure = int(np.argmax(np.abs(aucs_F - 0.5)))
        if expected is not None and p_value >= alpha:
            figure = expected  # the largest of many figures is never at 0.5, even by chance
        low, high = statistics.bootstrap_interval(scores_BARF[..., figure], rng, 1 - alpha)
        measured[mode] = Measured(
            figure=names[figure],
            auc=float(aucs_F[figure]),
            low=low,
            high=high,
            p_value=p_value,
            corrected_p_value=None,
            cached_median=float(np.median(values_BARF[:, POSITIVE, :, figure])),
            fresh_median=float(np.median(values_BARF[:, NEGATIVE, :, figure])),
            num_figures=len(names),
            num_pairs=len(values_BARF) * PAIRS_A_BLOCK,
        )
        expected = figure
    return measured


def _arrays(
    samples: Mapping[Mode, Samples],
) -> tuple[dict[Mode, NDArray[np.float64]], list[str]]:
    """The figures of each mode as float64[B, A, R, F], and their names.

    A server that leaves a count out when it is zero (vLLM does so with `cached_tokens`) shows it
    all the same. So a figure counts as 0 where it is missing, if it was ever seen.
    """
    seen = [
        figures
        for each in samples.values()
        for block in each.blocks
        for arm in block
        for figures in arm
    ]
    names = sorted({name for figures in seen if figures for name in figures})
    arrays = {
        mode: np.array(
            [[[_row(figures, names) for figures in arm] for arm in block] for block in each.blocks]
        )
        for mode, each in samples.items()
    }
    return arrays, names


def _row(figures: Figures | None, names: Sequence[str]) -> list[float]:
    return [(figures or {}).get(name, 0.0) for name in names]
