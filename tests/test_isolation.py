"""Who sees that a prompt is cached: hits within a domain, misses across, on every surface.

And `octavo leakcheck` against real servers with isolation on and off, and with no hit observable.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.client import AsyncClient, Credentials
from engine.config_file import from_tree
from engine.domain_usage import DomainUsage, UsageByDomain
from engine.frontend import Engine
from engine.leakcheck.command import check
from engine.leakcheck.options import Options
from engine.leakcheck.report import Report
from engine.leakcheck.verdicts import Verdict
from engine.loading import LoadedEngine, load_engine, make_limits
from engine.runtime.replay import moments
from engine.sampling import SamplingParams
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.types import Domain
from tests.core.driver import Driver, make_request
from tests.runtime import tiny
from tests.runtime.tiny import random_ids
from tests.serve import access_file
from tests.serve.access_file import tenants, write
from tests.steps import by_hand

ALICE, BOB = Domain("default", "alice"), Domain("default", "bob")
PROMPT = random_ids(70)
GREEDY = SamplingParams(temperature=0.0, max_tokens=2)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    return load_engine(from_tree(tiny.config_tree(folder)))


def with_cache(loaded: LoadedEngine, **cache: Any) -> LoadedEngine:
    """The same model with another `cache` section."""
    config = dataclasses.replace(
        loaded.config, cache=dataclasses.replace(loaded.config.cache, **cache)
    )
    limits = make_limits(config, loaded.architecture, loaded.weights_fingerprint, backend="xla")
    return dataclasses.replace(loaded, config=config, limits=limits)


async def ask(
    engine: Engine, domain: Domain, prompt: tuple[int, ...] = PROMPT, **given: Any
) -> int:
    """The cached tokens that the reply tells of."""
    deltas = [delta async for delta in engine.generate(prompt, GREEDY, domain=domain, **given)]
    return deltas[-1].usage.cached_tokens


# What each surface says of how much of bob's prompt was cached, after alice sent hers.

Surface = Callable[[Engine, int, Path], int]
SURFACES: dict[str, Surface] = {
    "reply": lambda engine, reply, log: reply,
    "usage": lambda engine, reply, log: engine.usage(BOB).cached_prompt_tokens,
    "stats": lambda engine, reply, log: engine.stats().cached_prompt_tokens,
    "event log": lambda engine, reply, log: first_starts(log)[-1],
}


def first_starts(log: Path) -> list[int]:
    """Where each request of an event log started to compute."""
    seen: dict[str, int] = {}
    _, after = moments(log)
    for moment in after:
        for row in moment.plan.rows if moment.plan else ():
            seen.setdefault(row.request.request_id, row.start)
    return list(seen.values())


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(("first", "hit"), [(BOB, 64), (ALICE, 0)], ids=["within", "across"])
async def test_a_hit_shows_within_a_domain_and_nowhere_else(
    loaded: LoadedEngine, tmp_path: Path, surface: str, first: Domain, hit: int
) -> None:
    log = tmp_path / "events"
    engine = Engine(loaded, record=str(log))
    try:
        await ask(engine, first)
        reply = await ask(engine, BOB)
    finally:
        engine.close()
    assert SURFACES[surface](engine, reply, log) == hit


@pytest.mark.parametrize(("domain", "hit"), [(ALICE, 2), (BOB, 0)], ids=["within", "across"])
def test_the_host_tier_gives_a_block_back_within_its_domain_only(domain: Domain, hit: int) -> None:
    driver = Driver(num_blocks=4, host_blocks=8)
    driver.admit(make_request("a", range(9), domain=ALICE, max_tokens=1))
    driver.run()
    driver.admit(make_request("filler", 15, domain=Domain("filler"), max_tokens=1))
    assert any(plan.swap_outs for plan in driver.run())
    driver.admit(make_request("b", range(9), domain=domain, max_tokens=1))
    plan = driver.step()
    assert len(plan.swap_ins) == hit
    assert plan.rows[0].start == 4 * hit


async def test_what_others_do_leaves_no_mark_on_a_domain_s_figures(loaded: LoadedEngine) -> None:
    engine = Engine(loaded)
    try:
        await ask(engine, BOB)
        before = engine.usage(BOB)
        for _ in range(2):
            await ask(engine, ALICE)
        assert engine.usage(BOB) == before
        await ask(engine, BOB)
        after = engine.usage(BOB)
    finally:
        engine.close()
    assert before == DomainUsage(0, 70, 0, 2, {"length": 1})
    assert after == DomainUsage(0, 140, 64, 4, {"length": 2})


async def test_a_request_that_shares_no_prefix_counts_for_who_sent_it(loaded: LoadedEngine) -> None:
    engine = Engine(loaded)
    try:
        await ask(engine, BOB)
        assert await ask(engine, BOB, share_prefix=False) == 0
        assert engine.usage(BOB) == DomainUsage(0, 140, 0, 4, {"length": 2})
    finally:
        engine.close()


async def test_a_request_counts_while_it_runs_and_when_its_reader_leaves(
    loaded: LoadedEngine,
) -> None:
    engine = Engine(loaded)
    long = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    try:
        with by_hand(engine) as allow:
            allow(8)
            stream = engine.generate(PROMPT, long, domain=BOB)
            await anext(stream)
            assert engine.usage(BOB).in_progress == 1
            await stream.aclose()
            usage = engine.usage(BOB)
    finally:
        engine.close()
    assert (usage.in_progress, usage.prompt_tokens, usage.finished) == (0, 70, {"abort": 1})


async def test_a_tenants_tokens_are_told_as_they_become_known(loaded: LoadedEngine) -> None:
    engine = Engine(loaded)
    told: list[tuple[str, int]] = []
    engine.requests.on_tokens = lambda tenant, tokens: told.append((tenant, tokens))
    try:
        async with contextlib.aclosing(
            engine.generate(
                PROMPT, dataclasses.replace(GREEDY, n=2), domain=Domain("alice", "salt")
            )
        ) as stream:
            await anext(stream)
            assert told[0] == ("alice", 70)  # cached or not, once for both samples
            _ = [delta async for delta in stream]
    finally:
        engine.close()
    assert {tenant for tenant, _ in told} == {"alice"}
    assert sum(tokens for _, tokens in told) == 70 + 2 * 2


def test_a_client_that_invents_salts_costs_no_more_than_the_limit() -> None:
    usage = UsageByDomain(max_domains=3)
    usage.asked(Domain("victim", "old")).generated_tokens += 2
    for number in range(10):
        usage.asked(Domain("default", str(number))).end("stop", 9, 4)
        usage.asked(Domain("default", "busy")).generated_tokens += 1
    kept = [usage.of(Domain("default", str(number))).finished for number in range(10)]
    assert kept == [{}] * 8 + [{"stop": 1}] * 2
    assert usage.of(Domain("default", "busy")).generated_tokens == 10
    assert usage.of(Domain("victim", "old")).generated_tokens == 2  # another tenant's salts


# Show point 5 of the isolation: what `octavo leakcheck` finds, on counts that are not noisy.

COUNTS = ("cached_tokens", "occupancy", "watch")


@contextlib.asynccontextmanager
async def served(loaded: LoadedEngine, **server: Any) -> AsyncIterator[str]:
    engine = Engine(loaded)
    front = Server(ServerConfig(port=0, **server, grace=0.05))
    await front.start()
    await front.set_engine(engine)
    try:
        yield front.address
    finally:
        await front.stop()
        engine.close()


# A probe is cancelled after its first token: how many were generated by then is chance.
NOISE = 0.1


async def leakcheck(loaded: LoadedEngine, **server: Any) -> Report:
    async with served(loaded, **server) as address:
        options = Options(address=address, channel=COUNTS, trials=16, prompt_tokens=64, alpha=0.05)
        return await check(options, lambda *_: None)


def _aucs(report: Report) -> dict[str, tuple[float, float]]:
    """Across domains and within one."""
    found = {}
    for finding in report.findings:
        assert finding.cross is not None
        assert finding.same is not None
        found[finding.channel.value] = (finding.cross.auc, finding.same.auc)
    return found


async def test_a_default_server_leaks_nothing_across_domains(loaded: LoadedEngine) -> None:
    report = await leakcheck(loaded)
    for cross, same in _aucs(report).values():
        assert cross == pytest.approx(0.5, abs=NOISE)
        assert same == pytest.approx(1.0, abs=NOISE)
    assert {finding.verdict for finding in report.findings} == {Verdict.NO_LEAK}
    assert report.exit_code == 0


async def test_tenants_with_keys_leak_nothing_to_each_other_and_find_their_own(
    loaded: LoadedEngine, tmp_path: Path
) -> None:
    access = write(tmp_path / "access.yaml", tenants())
    async with served(loaded, access=str(access)) as address:
        options = Options(
            address=address,
            channel=COUNTS,
            trials=16,
            prompt_tokens=64,
            alpha=0.05,
            victim_key=access_file.ALICE,
            attacker_key=access_file.BOB,
        )
        report = await check(options, lambda *_: None)
        async with AsyncClient(address, Credentials(api_key=access_file.ALICE)) as alice:
            first = [delta async for delta in alice.generate(PROMPT, GREEDY)]
            again = [delta async for delta in alice.generate(PROMPT, GREEDY)]
            usage = await alice.usage()
        async with AsyncClient(address, Credentials(api_key=access_file.BOB)) as bob:
            his = [delta async for delta in bob.generate(PROMPT, GREEDY)]
            assert (await bob.usage()).cached_prompt_tokens < usage.cached_prompt_tokens
            assert await bob.flush() > 0
        async with AsyncClient(address, Credentials(api_key=access_file.ALICE)) as alice:
            kept = [delta async for delta in alice.generate(PROMPT, GREEDY)]
    assert [deltas[-1].cached_tokens for deltas in (first, again, his, kept)] == [0, 64, 0, 64]
    assert {finding.verdict for finding in report.findings} == {Verdict.NO_LEAK}


async def test_a_server_with_public_stats_leaks_and_is_found(loaded: LoadedEngine) -> None:
    report = await leakcheck(loaded, public_stats=True)
    leaks = {finding.channel for finding in report.findings if finding.verdict is Verdict.LEAK}
    assert "watch" in leaks
    assert report.exit_code == 1


async def test_a_server_without_isolation_leaks_and_is_found(loaded: LoadedEngine) -> None:
    report = await leakcheck(with_cache(loaded, isolation="none"))
    leaks = {finding.channel for finding in report.findings if finding.verdict is Verdict.LEAK}
    assert leaks == {"cached_tokens", "occupancy"}  # a caller sees only its own figures even so
    assert report.exit_code == 1


async def test_what_a_server_without_isolation_keeps_is_not_for_one_that_has_it(
    loaded: LoadedEngine,
) -> None:
    without = with_cache(loaded, isolation="none")
    assert without.limits.fingerprint != loaded.limits.fingerprint
    assert with_cache(loaded).limits.fingerprint == loaded.limits.fingerprint


async def test_with_constant_observability_nothing_shows_even_within_a_domain(
    loaded: LoadedEngine,
) -> None:
    report = await leakcheck(with_cache(loaded, observability="constant"))
    for aucs in _aucs(report).values():
        assert aucs == pytest.approx((0.5, 0.5), abs=NOISE)
    assert {finding.verdict for finding in report.findings} == {Verdict.BLIND}  # by its nature


async def test_answers_on_merged_blocks_are_those_of_each_alone(loaded: LoadedEngine) -> None:
    prefix = random_ids(192, seed=3)
    prompts = [(*prefix, *random_ids(8, seed=number)) for number in range(4)]
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    owned: list[int] = []

    async def answer(engine: Engine, prompt: tuple[int, ...]) -> tuple[int, ...]:
        stream = engine.generate(prompt, sampling, domain=ALICE)
        return tuple([token async for delta in stream for token in delta.token_ids])

    engine = Engine(with_cache(loaded, prefix_reuse=False))
    alone = [await answer(engine, prompt) for prompt in prompts]
    engine.close()
    engine = Engine(with_cache(loaded, observability="constant"))
    engine.watch_steps(lambda record: owned.append(record.owned_blocks))
    with by_hand(engine):  # all of them come before the first step
        tasks = [asyncio.create_task(answer(engine, prompt)) for prompt in prompts]
        while engine.stats().waiting < len(prompts):
            await asyncio.sleep(0.001)
    together = await asyncio.gather(*tasks)
    engine.close()
    assert list(together) == alone
    assert max(owned) > 12 + 4 * 3  # while prompts were computed
    assert max(owned[-10:]) <= 12 + 4 * 3  # the prefix once, and 48 tokens of each
