"""Random operations on pool and scheduler, checked after each one; and proof that it can fail.

`OCTAVO_FUZZ_EXAMPLES` (`make fuzz`) makes it long: so many examples of Hypothesis, and a
hundred times as many operations of the seeded driver, from a seed of its own each time.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.core import mutants
from tests.core.random_operations import (
    LIMITS,
    REQUEST,
    SEARCH_REQUEST,
    Ranges,
    make_simulation,
    perform,
    possible,
    run_random,
)
from tests.core.simulation import Simulation

FUZZ_EXAMPLES = int(os.environ.get("OCTAVO_FUZZ_EXAMPLES", "0"))
HYPOTHESIS_EXAMPLES = FUZZ_EXAMPLES or 400
STEPS_AN_EXAMPLE = 60
DRIVER_OPERATIONS = max(100 * FUZZ_EXAMPLES, 60_000)
OPERATIONS_A_RUN = 250

# What must have come up, lest the checks be true of nothing.
EVENTS = (
    "aborted",
    "chunks",
    "copies",
    "empty plans",
    "evicted",
    "erased blocks",
    "erased slots",
    "failed requests",
    "finished: length",
    "finished: stop",
    "hits",
    "inherited",
    "journaled",
    "merged",
    "operation: copy",
    "operation: exchange",
    "parted",
    "preempted",
    "public positions read",
    "refused",
    "restored",
    "resumed",
    "rows dropped",
    "swapped in",
    "swapped out",
    "unknown tokens",
)

# Come up too seldom for Hypothesis's short runs; the driver's must meet them.
RARE = {"public positions read", "restored"}

hypothesis_counts: Counter[str] = Counter()


def numbers(ranges: Ranges) -> st.SearchStrategy[dict[str, int]]:
    """One whole number from each range."""
    return st.fixed_dictionaries({name: st.integers(*ends) for name, ends in ranges.items()})


class SchedulerMachine(RuleBasedStateMachine):
    """`Simulation`, driven by Hypothesis: it searches for failures, and shrinks what it finds."""

    simulation: Simulation
    serial = 0

    @initialize(sizes=numbers(LIMITS))
    def start(self, sizes: dict[str, int]) -> None:
        self.simulation = make_simulation(sizes)

    def can(self, operation: str) -> bool:
        return operation in possible(self.simulation)

    def perform(self, operation: str, choice: dict[str, int]) -> None:
        self.serial += 1
        perform(self.simulation, operation, choice, self.serial)

    @rule(choice=numbers(REQUEST))
    def admit(self, choice: dict[str, int]) -> None:
        self.perform("admit", choice)

    @rule(choice=numbers(SEARCH_REQUEST))
    def search(self, choice: dict[str, int]) -> None:
        self.perform("admit", choice)

    @rule(which=st.integers(0, 8), reason=st.integers(0, 2))
    def abort(self, which: int, reason: int) -> None:
        self.perform("abort", {"shared": which, "family": reason})

    @precondition(lambda self: self.can("schedule"))
    @rule()
    def schedule(self) -> None:
        self.perform("schedule", {})

    @precondition(lambda self: self.can("commit"))
    @rule()
    def commit(self) -> None:
        self.perform("commit", {})

    @precondition(lambda self: self.can("copy"))
    @rule(adopt=st.booleans())
    def copy(self, adopt: bool) -> None:
        self.perform("copy", {"family": 1 - adopt})

    @rule(shared=st.integers(0, 20))
    def tick(self, shared: int) -> None:
        self.perform("tick", {"shared": shared})

    @rule(shared=st.integers(0, 20))
    def flush(self, shared: int) -> None:
        """Mostly another step: little is left to see after one."""
        if shared == 0:
            self.perform("flush", {"shared": shared})
        elif self.can("schedule"):
            self.perform("schedule", {})

    @rule(luck=st.integers(0, 5))
    def close_queue(self, luck: int) -> None:
        """Seldom, as above."""
        if luck == 0 and self.can("close queue"):
            self.perform("close queue", {})

    @precondition(lambda self: self.can("exchange"))
    @rule()
    def exchange(self) -> None:
        self.perform("exchange", {})

    @rule(luck=st.integers(0, 5))
    def fail(self, luck: int) -> None:
        """Mostly another step: failures are rare, and little is left to see after one."""
        operation = {0: "fail", 1: "fail unlaunched"}.get(luck, "schedule")
        if self.can(operation):
            self.perform(operation, {})

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()
            hypothesis_counts.update(self.simulation.counts)


def test_hypothesis_finds_no_operations_that_break_anything():
    """Without OCTAVO_FUZZ_EXAMPLES, the examples are the same in every run (derandomize).

    So a failure in CI comes from the change and not from luck; `make fuzz` is for luck.
    """
    hypothesis_counts.clear()
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=HYPOTHESIS_EXAMPLES,
            stateful_step_count=STEPS_AN_EXAMPLE,
            derandomize=not FUZZ_EXAMPLES,
            database=None,
            deadline=None,  # a slow machine is not a bug
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    report(hypothesis_counts, at_least=50 * HYPOTHESIS_EXAMPLES, each_event=1)
    assert hypothesis_counts["beam steps"] >= HYPOTHESIS_EXAMPLES // 4


def report(counts: Counter[str], at_least: int, each_event: int) -> None:
    """Print what happened, and insist that it was enough and of every kind."""
    for event, count in sorted(counts.items()):
        print(f"{count:>12,} {event}")
    assert counts["operations"] >= at_least
    for event in EVENTS:
        if each_event == 1 and event in RARE:
            continue
        assert counts[event] >= each_event, f"came up {counts[event]} times only: {event}"


def drive(first_seed: int, num_operations: int) -> Counter[str]:
    """Random runs until that many operations were done."""
    counts: Counter[str] = Counter()
    seed = first_seed
    while counts["operations"] < num_operations:
        try:
            counts += run_random(seed, OPERATIONS_A_RUN)
        except Exception as error:
            raise AssertionError(f"run_random({seed}, {OPERATIONS_A_RUN}) failed") from error
        seed += 1
    return counts


def test_tens_of_thousands_of_random_operations_break_nothing():
    counts = drive(random.SystemRandom().getrandbits(48) if FUZZ_EXAMPLES else 0, DRIVER_OPERATIONS)
    report(counts, at_least=DRIVER_OPERATIONS, each_event=100)


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_every_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch):
    """The checks above would notice these mistakes, so that their silence means something."""
    mutants.MUTANTS[name](monkeypatch)
    with mutants.caught():
        drive(0, DRIVER_OPERATIONS)
