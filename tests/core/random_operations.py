"""Random limits, requests and operations for the simulation, made from whole numbers.

Hypothesis and the seeded driver draw the same numbers from the same ranges, each in its way.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

from engine.core.limits import Limits
from engine.sampling import SamplingParams
from engine.types import Domain, FinishReason, Fork, Request
from tests.core.oracle import TIMES_TO_LIVE, VOCABULARY
from tests.core.simulation import Simulation

Numbers = dict[str, int]
Ranges = dict[str, tuple[int, int]]

DOMAINS = (Domain("alice"), Domain("alice", "salt"), Domain("bob"), Domain("alicesalt"))

LIMITS: Ranges = {
    "block_size": (1, 5),
    "spare_blocks": (-2, 10),  # of the pool, beyond the longest sequence; below 0 it can't run
    "max_num_seqs": (1, 6),
    "spare_tokens": (0, 20),  # of the step's budget, beyond one for each sequence
    "max_model_len": (6, 40),
    "max_waiting": (1, 16),
    "prefix_reuse": (0, 9),  # on above 5; below 5 blocks are merged instead
    "host_blocks": (-2, 12),  # none if it is not above 0
    "max_preemptions": (1, 2),
    "max_in_flight": (1, 3),
    "public": (-30, 12),  # tokens of a text that is public; none if it is not above 0
    "compute_ns": (-2, 3),  # not known if it is not above 0
    "attend_ps": (0, 400),
    "transfer_ns": (0, 8),
    "swap_in_ns": (0, 6),
    "swap_out_ns": (0, 3),
}
REQUEST: Ranges = {
    "identity": (0, 9),  # below 2: a request that was aborted; 2: an id that may be in use
    "family": (0, 2),  # which text the prompt starts with,
    "shared": (0, 20),  # and how much of it,
    "follow_up": (0, 9),  # unless it is below 3: then with a finished conversation
    "own": (0, 5),  # what comes after
    "max_tokens": (1, 24),
    "stop": (0, 9),  # a token that ends it, if it is in the vocabulary
    "domain": (0, 5),
    "priority": (0, 5),  # mostly 0
    "logprobs": (0, 9),
    "prompt_logprobs": (0, 9),
    "forks": (-6, 3),  # none if it is not above 0
    "restored": (-1, 6),  # blocks that come from below the host tier, none if it is not above 0
}
# Small pools, and requests of which most are searches.
SEARCH_LIMITS: Ranges = {
    **LIMITS,
    "block_size": (1, 3),
    "spare_blocks": (0, 8),
    "max_num_seqs": (4, 8),
    "max_model_len": (14, 24),
    "max_waiting": (8, 16),
}
SEARCH_REQUEST: Ranges = {
    **REQUEST,
    "beams": (0, 4),  # none if it is not above 1
    "shared": (0, 6),
    "own": (0, 3),
    "max_tokens": (4, 16),
    "follow_up": (0, 30),
}
# How often the driver does what; an operation that isn't possible is left out.
WEIGHTS = {
    "admit": 30,
    "schedule": 40,
    "commit": 40,
    "abort": 6,
    "copy": 4,
    "fail": 1,
    "fail unlaunched": 1,
    "tick": 6,
    "flush": 1,
}
# The same where weights are exchanged, in a few runs only: it takes all that is cached with it.
WEIGHTS_OF_EXCHANGES = {**WEIGHTS, "close queue": 4, "exchange": 20}


def make_limits(numbers: Numbers) -> Limits:
    """A pool that is small against the longest sequence."""
    longest = -(-(numbers["max_model_len"] - 1) // numbers["block_size"])
    merges = numbers["prefix_reuse"] < 5
    return Limits(
        num_blocks=max(1, longest + numbers["spare_blocks"]),
        block_size=numbers["block_size"],
        max_num_seqs=numbers["max_num_seqs"],
        max_step_tokens=numbers["max_num_seqs"] + numbers["spare_tokens"],
        max_model_len=numbers["max_model_len"],
        max_waiting=numbers["max_waiting"],
        prefix_reuse=numbers["prefix_reuse"] > 5,
        merge_blocks=merges,
        host_blocks=0 if merges else max(0, numbers["host_blocks"]),
        max_preemptions=numbers["max_preemptions"],
        fingerprint="weights",
        compute_ns=max(0, numbers["compute_ns"]),
        attend_ps=numbers["attend_ps"],
        transfer_ns=numbers["transfer_ns"],
        swap_in_ns=numbers["swap_in_ns"],
        swap_out_ns=numbers["swap_out_ns"],
    )


def make_simulation(numbers: Numbers) -> Simulation:
    """A simulation with these limits, whose cache may have a public prefix."""
    simulation = Simulation(make_limits(numbers), numbers["max_in_flight"])
    declare_public(simulation, numbers)
    return simulation


def declare_public(simulation: Simulation, numbers: Numbers) -> None:
    """Make the beginning of a text public, if there is room for it."""
    limits, length = simulation.limits, numbers["public"]
    fits = 2 * (length // limits.block_size) <= limits.num_blocks
    if length > 0 and limits.prefix_reuse and fits and length < limits.max_model_len:
        prompt = text_of(0, length)
        greedy = SamplingParams(temperature=0.0)
        simulation.admit(Request("public", prompt, greedy, max_tokens=1, is_public=True))


def text_of(family: int, length: int) -> tuple[int, ...]:
    """The beginning of one of a few texts."""
    return tuple((family * 7 + index * index) % VOCABULARY for index in range(length))


def make_request(numbers: Numbers, simulation: Simulation, serial: int) -> Request:
    """A request that is likely to share its beginning with others."""
    if numbers["identity"] < 2 and simulation.aborted:
        return simulation.aborted[-1]  # the very same object, as its steps may be in flight
    family, shared = numbers["family"], numbers["shared"]
    text = text_of(family, shared)
    if numbers["follow_up"] < 3 and simulation.transcripts:
        text = simulation.transcripts[shared % len(simulation.transcripts)]
    own = tuple((serial * 3 + index) % VOCABULARY for index in range(numbers["own"]))
    prompt = (text + own)[: simulation.limits.max_model_len - (numbers["own"] > 0)] or (0,)
    sampling = SamplingParams(
        temperature=0.0,
        logprobs=0 if numbers["logprobs"] == 0 else None,
        prompt_logprobs=0 if numbers["prompt_logprobs"] < 2 else None,
    )
    num_forks = numbers["forks"]
    width = numbers.get("beams", 0)
    if width > 1:
        num_forks = width - 1
        sampling = SamplingParams(
            beam_width=width,
            n=1 + numbers["logprobs"] % width,
            length_penalty=(1.0, 0.0, 2.0)[numbers["prompt_logprobs"] % 3],
            early_stopping=numbers["domain"] > 3,
        )
    name = f"r{serial - 1 if numbers['identity'] == 2 else serial}"
    domain = DOMAINS[max(0, numbers["domain"] - 2)]
    return Request(
        name,
        prompt,
        sampling,
        max_tokens=numbers["max_tokens"],
        stop_ids=frozenset({numbers["stop"]}),
        domain=domain,
        is_private=numbers["identity"] == 9,
        cache_ttl=TIMES_TO_LIVE.get(domain, 0),
        priority=max(0, numbers["priority"] - 3),
        forks=tuple(Fork(f"{name}/{number}", number) for number in range(1, num_forks + 1)),
    )


def possible(simulation: Simulation) -> set[str]:
    """The operations that make sense now."""
    names = {"admit", "abort", "fail", "tick", "flush"}
    public = simulation.records.get("public")
    if public is not None and public.num_preempted >= simulation.limits.max_preemptions:
        names.remove("fail")  # or it would be given up; see `test_retention`
    if len(simulation.in_flight) < simulation.max_in_flight:
        names |= {"schedule", "copy"}
        names |= {"fail unlaunched"} & {f"{name} unlaunched" for name in names}
    if simulation.in_flight:
        names |= {"commit"}
    if not simulation.is_closed:
        names |= {"close queue"}
    if simulation.has_drained:
        names |= {"exchange"}
    return names


def perform(simulation: Simulation, operation: str, numbers: Numbers, serial: int) -> None:
    """Do one operation. `numbers` are a request's for "admit"; others take what they need."""
    if operation == "admit":
        request = make_request(numbers, simulation, serial)
        simulation.admit(request)
        if numbers["restored"] > 0 and simulation.limits.host_blocks:
            simulation.restore(request.request_id, numbers["restored"])
    elif operation == "abort":
        live = [*simulation.records, "nobody"]
        reason = (FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.STOP)
        simulation.abort(live[numbers["shared"] % len(live)], reason[numbers["family"]])
    elif operation == "schedule":
        simulation.schedule()
    elif operation == "commit":
        simulation.commit()
    elif operation == "tick":
        simulation.tick(5 * numbers["shared"])
    elif operation == "flush":
        simulation.flush((None, *DOMAINS)[numbers["shared"] % (len(DOMAINS) + 1)])
    elif operation == "close queue":
        simulation.close_queue()
    elif operation == "exchange":
        simulation.exchange(f"weights {serial}")
    elif operation == "copy":
        simulation.copy_and_compare(adopt=numbers["family"] == 0)
    else:
        if operation == "fail unlaunched":
            simulation.schedule(launch=False)
        simulation.fail()


def draw(rng: random.Random, ranges: Ranges) -> Numbers:
    """One number from each range."""
    return {name: rng.randint(*bounds) for name, bounds in ranges.items()}


def perform_random(
    simulation: Simulation,
    rng: random.Random,
    num_operations: int,
    requests: Ranges = REQUEST,
    weights_of: Mapping[str, int] = WEIGHTS,
) -> None:
    """That many operations, less those that were not possible, and then until idle."""
    names, weights = list(weights_of), list(weights_of.values())
    for serial in range(num_operations):
        (operation,) = rng.choices(names, weights)
        if operation in possible(simulation):
            perform(simulation, operation, draw(rng, requests), serial)
    simulation.drain()


def run_random(
    seed: int, num_operations: int, limits: Ranges = LIMITS, requests: Ranges = REQUEST
) -> Counter[str]:
    """Random limits, then random operations. Returns what happened."""
    rng = random.Random(seed)
    simulation = make_simulation(draw(rng, limits))
    weights = WEIGHTS_OF_EXCHANGES if seed % 8 == 5 else WEIGHTS
    perform_random(simulation, rng, num_operations, requests, weights)
    return simulation.counts
