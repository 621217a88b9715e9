"""Options, tenants, exit codes, and what is printed."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any, get_args

import numpy as np
import pytest
from rich.console import Console

from engine.leakcheck.addresses import LeakcheckError, resolve
from engine.leakcheck.channels import Channel
from engine.leakcheck.command import check, leakcheck, show_report, tenants
from engine.leakcheck.options import ChannelName, Options
from engine.leakcheck.report import Report, render
from engine.leakcheck.statistics import NEGATIVE, POSITIVE
from engine.leakcheck.trials import Mode, Samples
from engine.leakcheck.verdicts import Finding, Verdict, exit_code, judge
from tests.leakcheck.servers import grpc_server
from tests.leakcheck.simulation import Simulation

ADDRESS = "127.0.0.1:50051"


def _options(**given: Any) -> Options:
    return Options(address=ADDRESS, **given)


def _finding(verdict: Verdict, channel: Channel = Channel.TTFT) -> Finding:
    return Finding(channel=channel, verdict=verdict, reason="")


def _samples(blocks: Any, name: str = "count") -> Samples:
    """Samples of a figure from [block][arm][probe]."""
    named: Any = [[[{name: float(value)} for value in arm] for arm in block] for block in blocks]
    return Samples(named, [])


def _quick(address: str) -> Options:
    """One channel, as few trials as tell anything."""
    return Options(
        address=address,
        channel=["cached_tokens"],
        trials=16,
        prompt_tokens=32,
        alpha=0.05,
    )


async def test_a_check_of_our_server_makes_up_two_salts() -> None:
    simulation = Simulation()
    async with grpc_server(simulation) as address:
        options = _quick(address)
        steps: list[tuple[str, int, int]] = []

        def progress(what: str, done: int, total: int) -> None:
            steps.append((what, done, total))

        report = await check(options, progress)
    assert report.exit_code == 0
    names = {tenant for _, tenant in simulation.prompts}
    assert len(names) == 2
    assert all(name.startswith("/leakcheck-") for name in names)
    assert steps[0] == ("Probing", 0, 16)
    assert steps[-1] == ("Probing", 16, 16)


def test_another_machine_is_refused_before_anything_is_sent() -> None:
    options = Options(address="192.0.2.1:50051")
    with pytest.raises(LeakcheckError, match="--i-own-this-server"):
        leakcheck(options, lambda *_: None, lambda report: None)


def test_keys_are_not_sent_to_another_machine_in_the_clear() -> None:
    keys: Any = {"victim_key": "a", "attacker_key": "b", "i_own_this_server": True}
    options = Options(address="192.0.2.1:50051", **keys)
    with pytest.raises(LeakcheckError, match="in the clear"):
        leakcheck(options, lambda *_: None, lambda report: None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trials": 18}, r"--trials is 18; give an even number from 20"),
        ({"trials": 41}, "give an even number"),
        ({"trials": 10**9}, "to 10000"),
        ({"alpha": 0.0}, "--alpha"),
        ({"alpha": float("nan")}, "--alpha"),
        ({"prompt_tokens": 1}, "--prompt-tokens"),
        ({"burst": 1}, "--burst"),
        ({"seed": -1}, "--seed"),
        ({"timeout": float("inf")}, "--timeout"),
        ({"cross": False, "same": False}, "nothing to do"),
        ({"victim_key": "a"}, "both --victim-key and --attacker-key"),
        ({"attacker_salt": "a"}, "both --victim-salt and --attacker-salt"),
        ({"victim_key": "a", "attacker_key": "a"}, "would be one tenant"),
        ({"victim_key": "a\r\nHost: b", "attacker_key": "b"}, "visible ASCII"),
        ({"victim_salt": "", "attacker_salt": "b"}, "at least one"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LeakcheckError, match=message):
        _options(**given).check()


def test_fewer_channels_need_fewer_trials() -> None:
    _options(channel=[Channel.TTFT], trials=16).check()
    with pytest.raises(LeakcheckError, match="--trials"):
        _options(trials=16).check()


def test_every_channel_can_be_named() -> None:
    assert set(get_args(ChannelName)) == set(Channel) == _options().channels
    assert _options(channel=["watch"]).channels == {Channel.WATCH}


def test_a_key_is_not_shown_with_the_options() -> None:
    assert "secret" not in repr(_options(victim_key="secret1", attacker_key="secret2"))


def test_tenants_are_those_that_were_given() -> None:
    options = _options(victim_key="a", attacker_key="b")
    victim, attacker, notes = tenants(options, resolve(ADDRESS))
    assert (victim.key, victim.salt, attacker.key, attacker.salt) == ("a", None, "b", None)
    assert notes == []


def test_anonymous_tenants_of_another_server_are_noted() -> None:
    victim, attacker, notes = tenants(_options(), resolve("http://127.0.0.1:8000"))
    assert victim == attacker
    assert "anonymous" in notes[0]


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([Verdict.NO_LEAK, Verdict.ABSENT, Verdict.NOT_MEASURABLE], 0),
        ([Verdict.CONTROL_WORKS], 0),
        ([Verdict.NO_LEAK, Verdict.LEAK, Verdict.BLIND], 1),
        ([Verdict.NO_LEAK, Verdict.BLIND], 2),
        ([Verdict.NOT_MEASURABLE, Verdict.NOT_MEASURABLE], 2),
    ],
)
def test_the_exit_code_follows_from_the_verdicts(verdicts: list[Verdict], code: int) -> None:
    assert exit_code([_finding(verdict) for verdict in verdicts]) == code


def test_a_control_that_sees_only_part_of_it_is_blind() -> None:
    rng = np.random.default_rng(0)
    weak = rng.standard_normal((60, 2, 2))
    weak[:, POSITIVE] += 1.2  # an AUC of about 0.8
    samples = {
        (Channel.CACHED_TOKENS, Mode.SAME): _samples(weak),
        (Channel.CACHED_TOKENS, Mode.CROSS): _samples(rng.standard_normal((60, 2, 2))),
    }
    (finding,) = judge(samples, 0.01, rng)
    assert finding.verdict is Verdict.BLIND
    assert "sees too little" in finding.reason


def test_a_leak_counts_even_where_the_control_is_blind() -> None:
    samples = {
        (Channel.TTFT, Mode.SAME): _samples(np.ones((20, 2, 2))),
        (Channel.TTFT, Mode.CROSS): _samples(np.tile([[1.0, 1.0], [2.0, 2.0]], (20, 1, 1))),
    }
    (finding,) = judge(samples, 0.01, np.random.default_rng(0))
    assert finding.verdict is Verdict.LEAK
    assert finding.cross is not None
    assert finding.cross.auc == 1.0  # sooner, so lower, is what a cached prompt looks like


def test_the_control_tells_the_attack_which_figure_to_use_and_its_direction() -> None:
    rng = np.random.default_rng(6)

    def figures(falls: bool) -> Samples:
        def one(arm: int) -> dict[str, float]:
            many = {f"noise {n}": float(rng.standard_normal()) for n in range(30)}
            return {**many, "free": float(rng.standard_normal()) - 9 * (falls and arm == POSITIVE)}

        blocks: Any = [[[one(arm), one(arm)] for arm in (POSITIVE, NEGATIVE)] for _ in range(20)]
        return Samples(blocks, [])

    samples = {
        (Channel.OCCUPANCY, Mode.SAME): figures(True),
        (Channel.OCCUPANCY, Mode.CROSS): figures(False),
    }
    (finding,) = judge(samples, 0.01, rng)
    assert finding.verdict is Verdict.NO_LEAK
    assert finding.same is not None
    assert finding.cross is not None
    assert (finding.same.figure, finding.cross.figure) == ("free", "free")
    assert finding.same.auc == 1.0
    assert finding.cross.num_figures == 31


def test_p_values_are_corrected_for_the_number_of_channels() -> None:
    blocks = np.random.default_rng(0).standard_normal((20, 2, 2))
    blocks[:, POSITIVE] += 0.9
    keys = [(channel, Mode.CROSS) for channel in Channel]
    findings = judge({key: _samples(blocks) for key in keys}, 0.01, np.random.default_rng(0))
    least = min(finding.cross.p_value for finding in findings if finding.cross)
    for finding in findings:
        assert finding.cross is not None
        assert finding.cross.corrected_p_value == pytest.approx(5 * least, rel=0.3)


def test_a_leak_needs_an_interval_without_one_half() -> None:
    """Holm lets the second channel pass at alpha, while its interval is drawn for alpha / 2."""
    sure = _samples(np.tile([[2.0, 2.0], [1.0, 1.0]], (20, 1, 1)))
    for seed in range(100):
        blocks = np.random.default_rng(seed).standard_normal((20, 2, 2))
        blocks[:, POSITIVE] += 0.5
        samples = {
            (Channel.CACHED_TOKENS, Mode.CROSS): sure,
            (Channel.QUEUE_ORDER, Mode.CROSS): _samples(blocks),
        }
        findings = judge(samples, 0.05, np.random.default_rng(0))
        cross = findings[1].cross
        assert cross is not None
        assert cross.corrected_p_value is not None
        if cross.corrected_p_value < 0.05 and cross.low <= 0.5:
            assert [each.verdict for each in findings] == [Verdict.LEAK, Verdict.NO_LEAK]
            return
    pytest.fail("no sample was on the edge")


async def _report(simulation: Simulation) -> Report:
    async with grpc_server(simulation) as address:
        return await check(_quick(address), lambda *_: None)


def _printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(render(report))
    file: Any = console.file
    return file.getvalue()


async def test_the_last_line_sums_up() -> None:
    text = _printed(await _report(Simulation(Channel.CACHED_TOKENS)))
    assert text.rstrip().splitlines()[-1] == "leak: cached_tokens"
    assert "32 if sent before, 0 if not" in text


async def test_json_holds_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(await _report(Simulation()), json=True)
    found = json.loads(capsys.readouterr().out)
    (finding,) = found["findings"]
    assert (found["exit_code"], finding["verdict"]) == (0, "no leak found")
    assert finding["same"]["auc"] == 1.0
    assert finding["cross"]["corrected_p_value"] == 1.0
    assert found["modes"] == ["cross", "same"]


async def test_a_servers_words_do_not_steer_the_terminal() -> None:
    report = await _report(Simulation())
    text = _printed(dataclasses.replace(report, server="\x1b[2J[bold]name\x07"))
    assert "[2J[bold]name" in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text
