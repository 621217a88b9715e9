"""Random limits, requests and operations for the simulation, made from whole numbers.

Hypothesis and the seeded driver draw the same numbers from the same ranges, each in its way.
"""

from __future__ import annotations

import random
from collections import Counter

from engine.core.limits import Limits
from engine.sampling import SamplingParams
from engine.types import Domain, FinishReason, Fork, Request
from tests.core.oracle import VOCABULARY
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
    "prefix_reuse": (0, 5),  # off at 0
    "host_blocks": (-4, 12),  # none if it is not above 0
    "max_preemptions": (1, 2),
    "max_in_flight": (1, 3),
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
    "restored": (-2, 6),  # blocks that come from below the host tier, none if it is not above 0
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
}


def make_limits(numbers: Numbers) -> Limits:
    """A pool that is small against the longest sequence."""
    longest = -(-(numbers["max_model_len"] - 1) // numbers["block_size"])
    return Limits(
        num_blocks=max(1, longest + numbers["spare_blocks"]),
        block_size=numbers["block_size"],
        max_num_seqs=numbers["max_num_seqs"],
        max_step_tokens=numbers["max_num_seqs"] + numbers["spare_tokens"],
        max_model_len=numbers["max_model_len"],
        max_waiting=numbers["max_waiting"],
        prefix_reuse=numbers["prefix_reuse"] > 0,
        host_blocks=max(0, numbers["host_blocks"]),
        max_preemptions=numbers["max_preemptions"],
        fingerprint="weights",
        compute_ns=max(0, numbers["compute_ns"]),
        attend_ps=numbers["attend_ps"],
        transfer_ns=numbers["transfer_ns"],
        swap_in_ns=numbers["swap_in_ns"],
        swap_out_ns=numbers["swap_out_ns"],
    )


def make_simulation(numbers: Numbers) -> Simulation:
    """A simulation with these limits."""
    return Simulation(make_limits(numbers), numbers["max_in_flight"])


def make_request(numbers: Numbers, simulation: Simulation, serial: int) -> Request:
    """A request that is likely to share its beginning with others."""
    if numbers["identity"] < 2 and simulation.aborted:
        return simulation.aborted[-1]  # the very same object, as its steps may be in flight
    family, shared = numbers["family"], numbers["shared"]
    text = tuple((family * 7 + index * index) % VOCABULARY for index in range(shared))
    if numbers["follow_up"] < 3 and simulation.transcripts:
        text = simulation.transcripts[shared % len(simulation.transcripts)]
    own = tuple((serial * 3 + index) % VOCABULARY for index in range(numbers["own"]))
    prompt = (text + own)[: simulation.limits.max_model_len - (numbers["own"] > 0)] or (0,)
    sampling = SamplingParams(
        temperature=0.0,
        logprobs=0 if numbers["logprobs"] == 0 else None,
        prompt_logprobs=0 if numbers["prompt_logprobs"] < 2 else None,
    )
    name = f"r{serial - 1 if numbers['identity'] == 2 else serial}"
    return Request(
        name,
        prompt,
        sampling,
        max_tokens=numbers["max_tokens"],
        stop_ids=frozenset({numbers["stop"]}),
        domain=DOMAINS[max(0, numbers["domain"] - 2)],
        priority=max(0, numbers["priority"] - 3),
        forks=tuple(Fork(f"{name}/{number}", number) for number in range(1, numbers["forks"] + 1)),
    )


def possible(simulation: Simulation) -> set[str]:
    """The operations that make sense now."""
    names = {"admit", "abort", "fail"}
    if len(simulation.in_flight) < simulation.max_in_flight:
        names |= {"schedule", "copy", "fail unlaunched"}
    if simulation.in_flight:
        names |= {"commit"}
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
    elif operation == "copy":
        simulation.copy_and_compare(adopt=numbers["family"] == 0)
    else:
        if operation == "fail unlaunched":
            simulation.schedule(launch=False)
        simulation.fail()


def draw(rng: random.Random, ranges: Ranges) -> Numbers:
    """One number from each range."""
    return {name: rng.randint(*bounds) for name, bounds in ranges.items()}


def perform_random(simulation: Simulation, rng: random.Random, num_operations: int) -> None:
    """That many operations, less those that were not possible, and then until idle."""
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    for serial in range(num_operations):
        (operation,) = rng.choices(names, weights)
        if operation in possible(simulation):
            perform(simulation, operation, draw(rng, REQUEST), serial)
    simulation.drain()


def run_random(seed: int, num_operations: int) -> Counter[str]:
    """Random limits, then random operations. Returns what happened."""
    rng = random.Random(seed)
    simulation = make_simulation(draw(rng, LIMITS))
    perform_random(simulation, rng, num_operations)
    return simulation.counts
