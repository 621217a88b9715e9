"""Every channel's leak is found, and its absence accepted, on servers whose time is simulated."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from engine.leakcheck.addresses import resolve
from engine.leakcheck.channels import Channel, orderliness
from engine.leakcheck.command import check_target
from engine.leakcheck.http_target import HttpTarget
from engine.leakcheck.options import Options
from engine.leakcheck.report import Report
from engine.leakcheck.targets import GrpcTarget, Target, Tenant
from engine.leakcheck.verdicts import Verdict
from tests.leakcheck.servers import grpc_server, http_server
from tests.leakcheck.simulation import Simulation

type Serve = Callable[[Simulation], AbstractAsyncContextManager[str]]

VICTIM, ATTACKER = Tenant(key="victim"), Tenant(key="attacker")
SERVERS = pytest.mark.parametrize("serve", [grpc_server, http_server])
BURST = 4
FOREVER = 600.0  # seconds
WITHOUT_THE_QUEUE = tuple(channel for channel in Channel if channel is not Channel.QUEUE_ORDER)


def _target(address: str, simulation: Simulation) -> Target:
    resolved = resolve(address)

    class Grpc(GrpcTarget):
        async def send(self, prompt: Any, tenant: Tenant) -> Any:
            return await simulation.in_order(super().send(prompt, tenant))

    class Http(HttpTarget):
        async def send(self, prompt: Any, tenant: Tenant) -> Any:
            return await simulation.in_order(super().send(prompt, tenant))

    if resolved.kind == "grpc":
        kind = Grpc if simulation.burst else GrpcTarget
        return kind(resolved, FOREVER, simulation.now)
    kind = Http if simulation.burst else HttpTarget
    return kind(resolved, FOREVER, clock=simulation.now, settle=0.0)


async def _check(serve: Serve, simulation: Simulation, **options: Any) -> Report:
    async with serve(simulation) as address:
        given: dict[str, Any] = {
            "trials": 16,
            "prompt_tokens": 32,
            "burst": BURST,
            "gap": 0.002,
            "alpha": 0.05,
            **options,
        }
        asked = Options(address=address, **given)
        async with _target(address, simulation) as target:
            return await check_target(asked, target, VICTIM, ATTACKER, address, (), lambda *_: None)


def _verdicts(report: Report) -> dict[Channel, Verdict]:
    return {finding.channel: finding.verdict for finding in report.findings}


@SERVERS
@pytest.mark.parametrize("leak", Channel)
async def test_a_leak_is_found_on_its_channel(serve: Serve, leak: Channel) -> None:
    burst = BURST if leak is Channel.QUEUE_ORDER else 0
    report = await _check(serve, Simulation(leak, burst=burst), channel=[leak])
    (finding,) = report.findings
    assert finding.verdict is Verdict.LEAK
    assert finding.cross is not None
    assert finding.cross.auc > 0.95
    assert report.exit_code == 1
    assert report.summary == f"leak: {leak}"


@SERVERS
@pytest.mark.parametrize(
    ("channels", "burst"), [(WITHOUT_THE_QUEUE, 0), ((Channel.QUEUE_ORDER,), BURST)]
)
async def test_a_server_that_keeps_tenants_apart_has_no_leak(
    serve: Serve, channels: tuple[Channel, ...], burst: int
) -> None:
    report = await _check(serve, Simulation(burst=burst), channel=channels)
    assert _verdicts(report) == dict.fromkeys(channels, Verdict.NO_LEAK)
    assert report.exit_code == 0
    for finding in report.findings:
        assert finding.cross is not None
        assert finding.cross.low <= 0.5 <= finding.cross.high
        assert finding.same is not None
        assert finding.same.auc > 0.95


@SERVERS
@pytest.mark.parametrize("leak", [Channel.TTFT, Channel.CACHED_TOKENS, Channel.OCCUPANCY])
async def test_a_leak_shows_on_no_other_channel(serve: Serve, leak: Channel) -> None:
    report = await _check(serve, Simulation(leak), channel=WITHOUT_THE_QUEUE)
    leaks = [channel for channel, verdict in _verdicts(report).items() if verdict is Verdict.LEAK]
    assert leaks == [leak]


@SERVERS
async def test_without_a_cache_the_tool_says_that_it_is_blind(serve: Serve) -> None:
    simulation = Simulation(caches=False)
    channels = [Channel.TTFT, Channel.OCCUPANCY]
    report = await _check(serve, simulation, channel=channels)
    assert _verdicts(report) == dict.fromkeys(channels, Verdict.BLIND)
    assert "silence means nothing" in report.findings[0].reason
    assert report.exit_code == 2


@SERVERS
async def test_a_queue_in_order_of_arrival_is_no_channel(serve: Serve) -> None:
    simulation = Simulation(prefers_hits=False, burst=BURST)
    report = await _check(serve, simulation, channel=[Channel.QUEUE_ORDER])
    assert _verdicts(report) == {Channel.QUEUE_ORDER: Verdict.ABSENT}
    assert report.exit_code == 0


@SERVERS
async def test_what_a_server_does_not_show_is_not_measurable(serve: Serve) -> None:
    channels = [Channel.OCCUPANCY, Channel.WATCH, Channel.TTFT]
    report = await _check(serve, Simulation(shows=False), channel=channels)
    verdicts = _verdicts(report)
    assert verdicts.pop(Channel.TTFT) is Verdict.NO_LEAK
    assert set(verdicts.values()) == {Verdict.NOT_MEASURABLE}
    assert report.exit_code == 0


async def test_a_usage_without_a_count_is_not_measurable() -> None:
    report = await _check(http_server, Simulation(shows=False), channel=[Channel.CACHED_TOKENS])
    assert _verdicts(report) == {Channel.CACHED_TOKENS: Verdict.NOT_MEASURABLE}
    assert report.exit_code == 2


@pytest.mark.parametrize(
    ("caches", "verdict", "code"), [(True, Verdict.CONTROL_WORKS, 0), (False, Verdict.BLIND, 2)]
)
async def test_the_control_can_be_run_alone(caches: bool, verdict: Verdict, code: int) -> None:
    simulation = Simulation(caches=caches)
    report = await _check(grpc_server, simulation, channel=[Channel.TTFT], cross=False)
    assert _verdicts(report) == {Channel.TTFT: verdict}
    assert report.findings[0].cross is None
    assert report.exit_code == code
    assert {tenant for _, tenant in simulation.prompts} == {"Bearer victim/"}


async def test_the_attack_alone_says_that_it_had_no_control() -> None:
    simulation = Simulation()
    report = await _check(grpc_server, simulation, channel=[Channel.TTFT], same=False)
    assert _verdicts(report) == {Channel.TTFT: Verdict.NO_LEAK}
    assert "no control was run" in report.findings[0].reason


@SERVERS
async def test_no_prompt_is_probed_twice(serve: Serve) -> None:
    simulation = Simulation()
    channels = [Channel.TTFT, Channel.QUEUE_ORDER]
    await _check(serve, simulation, channel=channels, same=False)
    assert simulation.prompts
    assert set(Counter(simulation.prompts).values()) == {1}  # of the same tenant
    beginnings = Counter(prompt[:32] for prompt, tenant in simulation.prompts if "vic" in tenant)
    assert set(beginnings.values()) == {1}


async def test_a_second_run_with_the_same_seed_finds_nothing_of_the_first() -> None:
    simulation = Simulation()
    for _ in range(2):
        report = await _check(grpc_server, simulation, channel=[Channel.CACHED_TOKENS])
        assert _verdicts(report) == {Channel.CACHED_TOKENS: Verdict.NO_LEAK}
    assert set(Counter(simulation.prompts).values()) <= {1, 2}  # by two tenants of equal name


async def test_both_arms_come_equally_often_and_in_the_order_of_abba() -> None:
    simulation = Simulation()
    await _check(grpc_server, simulation, channel=[Channel.CACHED_TOKENS], same=False)
    secrets = [prompt for prompt, tenant in simulation.prompts if "victim" in tenant]
    probes = [prompt for prompt, tenant in simulation.prompts if "attacker" in tenant]
    arms = [secret == probe for secret, probe in zip(secrets[1:], probes[1:], strict=True)]
    blocks = {tuple(arms[start : start + 4]) for start in range(0, len(arms), 4)}
    assert len(arms) == 32  # without the warm-up
    assert blocks == {(True, False, False, True), (False, True, True, False)}


async def test_one_failed_request_of_a_burst_ends_the_others() -> None:
    simulation = Simulation()
    calls = 0

    class Failing(GrpcTarget):
        async def send(self, prompt: Any, tenant: Tenant) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise RuntimeError("broken")
            return await super().send(prompt, tenant)

    async with (
        grpc_server(simulation) as address,
        Failing(resolve(address), FOREVER, simulation.now) as target,
    ):
        options = Options(address=address, channel=["queue_order"], prompt_tokens=32)
        with pytest.raises(RuntimeError, match="broken"):
            await check_target(options, target, VICTIM, ATTACKER, "", (), lambda *_: None)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in others if "burst" in repr(task)]


def test_order_is_counted_in_pairs() -> None:
    assert orderliness([0, 1, 2]) == 1.0
    assert orderliness([2, 1, 0]) == 0.0
    assert orderliness([1, 0, 2]) == pytest.approx(2 / 3)
    assert orderliness([0]) == 0.5
