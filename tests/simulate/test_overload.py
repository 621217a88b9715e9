"""More requests than fit, for as long as the stream lasts: nobody starves, little is wasted."""

from __future__ import annotations

import numpy as np
import pytest

from engine.core.limits import Limits
from engine.simulate.cost import DEVICES
from engine.simulate.report import Figures, figures
from engine.simulate.run import Outcome, run
from engine.simulate.stream import Stream, sharegpt_like

LIMITS = Limits(
    num_blocks=256,
    block_size=16,
    max_num_seqs=64,
    max_step_tokens=512,
    max_model_len=1024,
    prefix_reuse=False,
)
REQUESTS = 300


def serve(rate: float | None) -> tuple[Stream, Outcome, Figures]:
    stream = sharegpt_like(REQUESTS, rate=rate, seed=11)
    outcome = run(stream, LIMITS, DEVICES["v6e"], "paged")
    return stream, outcome, figures(outcome, stream.prompt_tokens)


@pytest.fixture(scope="module")
def capacity() -> Figures:
    """All at once: what can be served if there is always something to do."""
    return serve(None)[2]


@pytest.mark.parametrize("load", [2.0, 4.0, 8.0])
def test_throughput_stays_under_overload(capacity: Figures, load: float) -> None:
    _, outcome, found = serve(load * capacity.finished / capacity.duration_s)
    assert found.finished == capacity.finished
    assert found.output_tokens_per_s > 0.9 * capacity.output_tokens_per_s
    assert found.preemptions > 0  # the pool is what limits it
    assert found.recomputed_tokens < 0.1 * outcome.num_computed


def test_nobody_starves_and_a_wait_is_bounded_by_the_place_in_the_queue(capacity: Figures) -> None:
    """Equal priorities at four times the capacity, until the last request has come."""
    _, outcome, _ = serve(4 * capacity.finished / capacity.duration_s)
    came = ~np.isnan(outcome.arrival_s)
    refused = int(came.sum()) - capacity.finished
    assert np.isnan(outcome.finish_s[came]).sum() == refused  # too long for the context
    order = np.argsort(outcome.arrival_s, kind="stable")
    order = order[~np.isnan(outcome.finish_s[order])]
    arrival, first, end = (
        values[order] for values in (outcome.arrival_s, outcome.first_token_s, outcome.finish_s)
    )
    assert (np.diff(first) >= 0).all()  # nothing overtakes
    # Those before it that were not done yet when it came: each is served alone at the worst.
    alone = _alone_s(LIMITS.max_model_len)
    ahead = np.array([(end[:index] > when).sum() for index, when in enumerate(arrival)])
    assert ahead.max() > REQUESTS / 2
    assert (first - arrival <= (ahead + 1) * alone).all()
    # And it is far better than that: what is served is served together.
    assert np.max((first - arrival) / (ahead + 1)) < alone / 4
    # Once started it ends, with all its preemptions, in the time of a few.
    assert np.max(end - first) < (LIMITS.max_preemptions + 1) * alone


def _alone_s(num_tokens: int) -> float:
    """Seconds in which the longest request would be served, had it the device for itself."""
    stream = sharegpt_like(1, seed=0)
    stream = Stream(
        stream.arrival_s,
        np.array([1]),
        np.array([num_tokens]),
        stream.conversation,
        stream.next_turn,
        stream.think_s,
    )
    return run(stream, LIMITS, DEVICES["v6e"], "paged").end_s
