"""Which probe when: blocks of ABBA, by coin, with the attack and its control interleaved.

Interleaving keeps what drifts on a server, such as clocks, load and fragmentation, out of the
comparison: it meets both arms and both modes alike.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from engine.leakcheck.channels import EXPERIMENTS, Channel, Figures, Observation, Scene
from engine.leakcheck.statistics import NEGATIVE, POSITIVE

PAIRS_A_BLOCK = 2

type Progress = Callable[[str, int, int], None]


class Mode(enum.StrEnum):
    """Whether victim and attacker may share a cache."""

    CROSS = "cross"  # they must not: the attack
    SAME = "same"  # they do: the control, which must see what the attack looks for


class Samples(NamedTuple):
    """What one channel showed in one mode.

    Attributes:
      blocks: [block][arm][probe of that arm], as `statistics` takes it.
      orderliness: of each burst, if the experiment has bursts.
    """

    blocks: list[tuple[list[Figures | None], list[Figures | None]]]
    orderliness: list[float]


async def run_trials(
    scenes: Mapping[Mode, Scene],
    trials: int,
    rng: np.random.Generator,
    progress: Progress,
) -> dict[tuple[Channel, Mode], Samples]:
    """Run all experiments that the scenes' channels need.

    Args:
      scenes: by mode; all observe the same channels.
      trials: pairs of a positive and a negative probe for each channel and mode; even.
      rng: tosses the coins.

    Raises:
      LeakcheckError: a request failed. What was seen so far is dropped: a half-measured
        channel would look more certain than it is.
    """
    channels = next(iter(scenes.values())).channels
    experiments = {run: seen & channels for run, seen in EXPERIMENTS.items() if seen & channels}
    found = {(channel, mode): Samples([], []) for channel in channels for mode in scenes}
    for run in experiments:  # the first requests of a connection and a server are not like others
        for scene in scenes.values():
            await run(scene, True)
    num_blocks = trials // PAIRS_A_BLOCK
    done, total = 0, num_blocks * len(experiments) * len(scenes)
    progress("Probing", done, total)
    for _ in range(num_blocks):
        turns = [(run, mode) for run in experiments for mode in scenes]
        for turn in rng.permutation(len(turns)):
            run, mode = turns[turn]
            arms: dict[int, list[Observation]] = {POSITIVE: [], NEGATIVE: []}
            first, second = (POSITIVE, NEGATIVE) if rng.integers(2) else (NEGATIVE, POSITIVE)
            for arm in (first, second, second, first):
                arms[arm].append(await run(scenes[mode], arm == POSITIVE))
            for channel in experiments[run]:
                samples = found[channel, mode]
                samples.blocks.append(
                    (_figures(arms[POSITIVE], channel), _figures(arms[NEGATIVE], channel))
                )
                samples.orderliness.extend(
                    each.orderliness
                    for arm in arms.values()
                    for each in arm
                    if each.orderliness is not None
                )
            done += 1
            progress("Probing", done, total)
    return found


def _figures(observations: list[Observation], channel: Channel) -> list[Figures | None]:
    return [observation.figures[channel] for observation in observations]
