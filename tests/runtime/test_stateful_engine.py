"""A real engine under anything that may happen to it, each request preempted: as if undisturbed.

Hypothesis submits plain, sampled, constrained, forked and searching requests of several tenants to
a step loop over the tiny model, with a pool of little more than one sequence, a host tier and a
disk below. Each is preempted in the middle, and blocks expire, are flushed, fail with their step,
and outlive the engine. In float32 every answer must be, token for token, that of the request alone
in a large pool.
`OCTAVO_FUZZ_EXAMPLES` (`make fuzz`) makes it long.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.config import BucketConfig, SchedulerConfig
from engine.core.scheduler import SchedulerState
from engine.runtime.disk_tier import DiskTier
from engine.runtime.loop import EngineLoop, EngineStopped
from engine.sampling import Constraint
from engine.text import Grammars, Tokenizer
from engine.types import Domain, FinishReason, Fork, Request
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.runtime.fake_runner import Listener
from tests.runtime.test_tiers import MAX_BYTES, layout_of
from tests.runtime.tiny import EOS, VOCAB_SIZE, random_ids

FUZZ_EXAMPLES = int(os.environ.get("OCTAVO_FUZZ_EXAMPLES", "0"))
EXAMPLES = FUZZ_EXAMPLES // 20 or 50
ALICE, BOB = Domain("alice"), Domain("bob")
TIME_TO_LIVE = 50  # milliseconds, for what bob leaves
REGEX = "([a-f]{3}[0-9]{4} )+"  # it may end after eight tokens
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "forked": {"temperature": 1.0, "n": 3},
    "searching": {"beam_width": 3, "n": 2},
    "constrained": {"temperature": 1.5, "n": 2, "constraint": Constraint("regex", REGEX)},
}
PUBLIC = random_ids(32, seed=77)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> SmallEngine:
    """The tiny model, and room for a hundred blocks in host memory."""
    return small_engine(
        tiny_model,
        num_blocks=64,
        block_size=16,
        max_model_len=160,
        config=SchedulerConfig(max_num_seqs=4, max_step_tokens=64),
        buckets=BucketConfig(decode_seqs=(4,), prefill_tokens=(64,), prefill_seqs=(4,)),
        host_blocks=100,
    )


class Injected(RuntimeError):
    """A step was made to fail."""


class News(Listener):
    """Takes the end of a public prefix once: it is computed again after a step that failed."""

    def __call__(self, news: Sequence[Any]) -> None:
        known = self.results["public"].finish_reason is not None
        super().__call__([one for one in news if not (known and one.request_id == "public")])


class Life:
    """A step loop on a folder, until it is closed; it preempts each request once.

    `preempt_at` says, by request, after how many of its samples.
    """

    def __init__(self, engine: SmallEngine, folder: Path, **limits: Any):
        self.engine = engine
        self.preempt_at: dict[str, int] = {}
        self.preempted: set[str] = set()  # so, or by the scheduler itself
        self.counts: Counter[str] = Counter()
        self.injected: list[Future[None]] = []
        self.fails = threading.Event()  # the next launch does
        self._samples: Counter[str] = Counter()
        self._launch = engine.runner.launch
        engine.runner.reset()
        engine.runner.launch = self._watched  # type: ignore[method-assign]
        self.disk = DiskTier(folder, MAX_BYTES, layout_of(engine))
        self.listener = News()
        own = dataclasses.replace(engine.limits, **limits)
        self.loop = EngineLoop(engine.runner, own, self.listener, disk=self.disk)

    def _watched(self, plan: Any, batch: Any) -> Any:
        if self.fails.is_set():
            self.fails.clear()
            self.counts["failed steps"] += 1
            raise Injected
        launched = self._launch(plan, batch)
        self.preempted.update(name.split("/")[0] for name in plan.preempted)
        for row in plan.rows:
            name = row.request.request_id
            self._samples[name] += row.samples
            if row.samples and self._samples[name] == self.preempt_at.get(name):
                look = self.loop.look(lambda state, name=name: self._preempt(state, name))
                self.injected.append(look)
        return launched

    def _preempt(self, state: SchedulerState, name: str) -> None:
        """As the scheduler does when blocks run out, but for no reason."""
        seq = state.core.sequences.get(name)
        if seq is not None and seq in state.core.running:
            state.core.preempt(seq, counts=False)
            self.preempted.add(name)
            self.counts["preempted"] += 1

    def check(self) -> None:
        """Have the scheduler's invariants checked between two steps; what is wrong is raised."""
        self.loop.look(lambda state: state.check()).result(30)

    def close(self) -> None:
        """Stop, with what is in memory written to the disk."""
        self.loop.close()
        self.engine.runner.launch = self._launch  # type: ignore[method-assign]
        assert self.disk.close(30)
        totals = self.loop.totals
        self.counts["swapped in"] += totals.swapped_in_blocks
        self.counts["swapped out"] += totals.swapped_out_blocks
        self.counts["copied"] += totals.copied_blocks
        self.counts["from disk"] += self.loop.tiers.num_restored
        for injected in self.injected:
            error = injected.exception(0)
            if error is not None and not isinstance(error, EngineStopped):
                raise error


class EngineMachine(RuleBasedStateMachine):
    """One folder, and one engine after the other on it."""

    engine: SmallEngine
    grammars: Grammars
    alone: dict[Request, dict[str, Result]]
    counts: Counter[str]

    @initialize(
        num_blocks=st.integers(11, 14),
        host_blocks=st.sampled_from((4, 12, 100)),
        costs=st.booleans(),
        public=st.booleans(),
    )
    def start(self, num_blocks: int, host_blocks: int, costs: bool, public: bool) -> None:
        """Open the first engine."""
        self.folder = tempfile.TemporaryDirectory()
        self.limits = {"num_blocks": num_blocks, "host_blocks": host_blocks}
        if costs:  # so that some are swapped, some computed again; and the disk is quick enough
            self.limits |= {"compute_ns": 1_000_000, "swap_in_ns": 9_000_000}
        self.public = public and num_blocks > 12
        self.said: list[tuple[int, ...]] = []
        self.asked: dict[str, Request] = {}
        self.unsure: set[str] = set()  # a step of theirs may have failed, or they were aborted
        self.number = 0
        self.open()

    def open(self) -> None:
        """Another engine; what an operator declares public comes first."""
        self.life = Life(self.engine, Path(self.folder.name), **self.limits)
        if self.public:
            self.life.loop.submit(make_request("public", PUBLIC, 1, is_public=True))
            self.life.listener.until_ended("public")

    @rule(
        kind=st.sampled_from(sorted(KINDS)),
        beginning=st.integers(0, 3),
        own=st.integers(1, 24),
        max_tokens=st.integers(8, 24),
        whose=st.sampled_from((ALICE, ALICE, BOB)),
        is_private=st.sampled_from((False, False, False, True)),
        preempt_at=st.integers(2, 6),
    )
    def submit(
        self,
        kind: str,
        beginning: int,
        own: int,
        max_tokens: int,
        whose: Domain,
        is_private: bool,
        preempt_at: int,
    ) -> None:
        """Ask for something; its beginning may be public, another's, or an earlier answer."""
        beginnings = (PUBLIC, random_ids(40, seed=beginning), *self.said[-2:])
        longest = 32 if kind == "searching" else 64  # or the pool could never hold all beams
        prompt = (*beginnings[beginning % len(beginnings)][:longest], *random_ids(own, seed=own))
        name = f"r{self.number}"
        self.number += 1
        fields = KINDS[kind]
        ends = {"stop_ids": frozenset({EOS})} if kind == "constrained" else {"ignore_eos": True}
        num_forks = max(fields.get("n", 1), fields.get("beam_width", 1)) - 1
        request = make_request(
            name,
            prompt,
            max_tokens,
            seed=own,
            domain=whose,
            cache_ttl=TIME_TO_LIVE if whose == BOB else 0,
            is_private=is_private,
            forks=tuple(Fork(f"{name}/{index}", own + index) for index in range(1, num_forks + 1)),
            **ends,
            **fields,
        )
        self.asked[name] = request
        request = self.with_matchers(request)
        if self.life.fails.is_set():
            self.unsure.add(name)
        self.life.preempt_at[name] = preempt_at
        self.life.loop.submit(request)
        self.counts[kind] += 1

    @rule(num_steps=st.integers(1, 12))
    def wait(self, num_steps: int) -> None:
        """Let the engine work."""
        totals = self.life.loop.totals
        until = totals.steps + num_steps
        while totals.steps < until and sum(self.life.loop.gauges[:2]):
            time.sleep(0.0005)

    @rule(milliseconds=st.sampled_from((20, 60)))
    def idle(self, milliseconds: int) -> None:
        """Time passes, so that something expires."""
        time.sleep(milliseconds / 1000)

    @rule(whose=st.sampled_from((ALICE, BOB, None)))
    def flush(self, whose: Domain | None) -> None:
        """Forget what a tenant left, or all."""
        self.life.loop.flush(whose).result(30)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        """End one of the latest requests, if it has not ended."""
        name = list(self.asked)[-1 - which % min(3, len(self.asked))]
        self.unsure.add(name)
        self.life.loop.abort(name)

    @precondition(lambda self: len(self.asked) % 4 == 3)
    @rule()
    def fail(self) -> None:
        """The next step fails, and takes all that the device holds with it."""
        self.unsure.update(self.asked)
        self.life.fails.set()

    @precondition(lambda self: len(self.asked) > 3)
    @rule(own=st.integers(1, 24))
    def restart(self, own: int) -> None:
        """Begin a chat, close when all is answered, start again on the folder, and go on."""
        self.submit("greedy", 1, own, 8, ALICE, is_private=False, preempt_at=2)
        self.finish()
        self.counts["restarts"] += 1
        self.open()
        latest = 1 + len(self.said[-2:])
        self.submit("greedy", latest, own, 8, ALICE, is_private=False, preempt_at=2)

    @invariant()
    def is_sound(self) -> None:
        """The scheduler's own invariants hold between steps."""
        self.life.check()

    def finish(self) -> None:
        """Wait for every answer, close, and compare with each request alone."""
        asked, listener = self.asked, self.life.listener
        listener.until_ended(*(name for one in asked.values() for name in one.replies))
        self.life.close()
        self.counts += self.life.counts
        results = listener.results
        for name, request in asked.items():
            expected = self.expected(request)
            for reply in request.replies:
                found, right = results[reply], expected["x" + reply.removeprefix(name)]
                ended = found.finish_reason not in (FinishReason.ABORT, FinishReason.ERROR)
                assert ended or name in self.unsure, f"{reply}: {found}"
                length = len(found.token_ids)
                assert length or not ended
                assert found.token_ids == right.token_ids[: None if ended else length], reply
                if ended:
                    assert found.finish_reason == right.finish_reason
                    if request.sampling.constraint is not None and found.token_ids[-1] == EOS:
                        assert re.fullmatch(REGEX, bytes(found.token_ids[:-1]).decode())
                        self.counts["ended by their grammar"] += 1
                    assert name in self.life.preempted or name in self.unsure, f"{name} ran through"
            if not request.is_private and request.domain == ALICE:
                self.said.append(request.prompt_ids + results[name].token_ids)
            self.counts["compared"] += 1
        num_public = len(PUBLIC) // 16 if self.public else 0  # pinned, or being computed again
        assert self.life.loop.gauges[2].owned <= num_public
        assert self.life.loop._constraints._matchers == {}
        self.asked, self.unsure = {}, set()

    def expected(self, request: Request) -> dict[str, Result]:
        """Its answers alone in a large pool, where nothing is found. Nobody's loop may run."""
        forks = tuple(
            Fork("x" + fork.request_id.removeprefix(request.request_id), fork.seed)
            for fork in request.forks
        )
        alone = dataclasses.replace(
            request, request_id="x", forks=forks, domain=Domain(), cache_ttl=0, is_private=False
        )
        if alone not in self.alone:
            self.engine.runner.reset()
            self.alone[alone] = self.engine.run([self.with_matchers(alone)])
        return self.alone[alone]

    def with_matchers(self, request: Request) -> Request:
        """With new ones, if it is constrained: a loop uses them up."""
        constraint = request.sampling.constraint
        if constraint is None:
            return request
        matchers = self.grammars.matchers(constraint, Domain("tenant"), len(request.names))
        return dataclasses.replace(request, matchers=matchers)

    def teardown(self) -> None:
        """Compare what is left."""
        if not hasattr(self, "life"):
            return
        try:
            self.finish()
        finally:
            self.life.loop.close()
            self.life.disk.close(30)
            self.folder.cleanup()


def test_whatever_happens_each_answer_is_that_of_the_request_alone(
    engine: SmallEngine, tiny_model: Path
) -> None:
    counts: Counter[str] = Counter()
    tokenizer = Tokenizer.from_folder(tiny_model)
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS,))
    kept = {"engine": engine, "grammars": grammars, "alone": {}, "counts": counts}
    machine = type("Machine", (EngineMachine,), kept)
    launch = engine.runner.launch
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=30,
                derandomize=not FUZZ_EXAMPLES,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        engine.runner.launch = launch  # type: ignore[method-assign]
        grammars.close()
    for event, count in sorted(counts.items()):
        print(f"{count:>8,} {event}")
    kinds = (*KINDS, "ended by their grammar")
    for event in (*kinds, "preempted", "swapped in", "swapped out", "copied", "from disk"):
        assert counts[event] >= 3, f"came up {counts[event]} times only: {event}"
    assert counts["failed steps"]
    assert counts["restarts"]
