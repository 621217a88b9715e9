"""`octavo leakcheck`: test whether one tenant of a server can learn what another one has sent.

For operators, on their own server: it attacks nothing but loopback unless told that the server
is the user's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import secrets
from collections.abc import Callable, Sequence

import numpy as np

from engine import __version__
from engine.leakcheck.addresses import Address, LeakcheckError, resolve
from engine.leakcheck.channels import Channel, Scene
from engine.leakcheck.http_target import HttpTarget
from engine.leakcheck.report import SCHEMA, Report, render, summarise
from engine.leakcheck.statistics import least_blocks
from engine.leakcheck.targets import GrpcTarget, Target, Tenant
from engine.leakcheck.trials import PAIRS_A_BLOCK, Mode, Progress, run_trials
from engine.leakcheck.verdicts import exit_code, judge

MAX_TRIALS = 10_000
MAX_PROMPT_TOKENS = 1_000_000
MAX_BURST = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to check, and how. Every field is validated on construction.

    Attributes:
      address: `host:port` of a gRPC server, or `http://host:port/v1` of an OpenAI-compatible one.
      modes: the attack, its control, or both.
      channels: those to try.
      trials: pairs of a positive and a negative probe, for each channel and mode; even.
      prompt_tokens: of each prompt; the longer, the more time a cached one saves.
      burst: requests sent before the probe, to see the queue's order.
      gap: seconds between the requests of a burst.
      alpha: the chance of a false alarm on any channel that is accepted.
      seed: of the order of probes and of the statistics. Prompts are new in every run.
      timeout: seconds for a request.
      model: of an OpenAI-compatible server; None takes the first that it lists.
      victim_key, attacker_key: bearer tokens of two tenants.
      victim_salt, attacker_salt: values of `cache_salt`. For a gRPC server without keys, two are
        made up.
      own_server: the server is the user's, so it may be elsewhere than on loopback.
    """

    address: str
    modes: Sequence[Mode] = (Mode.CROSS, Mode.SAME)
    channels: Sequence[Channel] = tuple(Channel)
    trials: int = 40
    prompt_tokens: int = 512
    burst: int = 8
    gap: float = 0.002
    alpha: float = 0.01
    seed: int = 0
    timeout: float = 60.0
    model: str | None = None
    victim_key: str | None = dataclasses.field(default=None, repr=False)
    attacker_key: str | None = dataclasses.field(default=None, repr=False)
    victim_salt: str | None = None
    attacker_salt: str | None = None
    own_server: bool = False

    def __post_init__(self) -> None:
        if not self.modes or not self.channels:
            raise LeakcheckError("there is nothing to do: ask for a mode and a channel")
        _check_range("--alpha", self.alpha, 0.001, 0.2)
        _check_range("--prompt-tokens", self.prompt_tokens, 32, MAX_PROMPT_TOKENS)
        _check_range("--burst", self.burst, 2, MAX_BURST)
        _check_range("--seed", self.seed, 0, 2**63 - 1)
        _check_range("--timeout", self.timeout, 0.1, 3600)
        least = PAIRS_A_BLOCK * least_blocks(self.alpha, len(set(self.channels)))
        if not least <= self.trials <= MAX_TRIALS or self.trials % PAIRS_A_BLOCK:
            raise LeakcheckError(
                f"--trials is {self.trials}; give an even number from {least}, below which not "
                f"even a perfect leak is significant at --alpha {self.alpha:g}, to {MAX_TRIALS}"
            )
        self._check_pair("key", self.victim_key, self.attacker_key)
        self._check_pair("salt", self.victim_salt, self.attacker_salt)

    def _check_pair(self, what: str, victims: str | None, attackers: str | None) -> None:
        for value in (victims, attackers):
            if value is not None and (not value or not value.isascii() or not value.isprintable()):
                raise LeakcheckError(f"a {what} must be visible ASCII characters, at least one")
        if (victims is None) != (attackers is None):
            raise LeakcheckError(
                f"only one {what} was given; give both --victim-{what} and --attacker-{what}"
            )
        if victims is not None and victims == attackers and Mode.CROSS in self.modes:
            raise LeakcheckError(
                f"--victim-{what} and --attacker-{what} are equal, so victim and attacker would be "
                "one tenant; give two, or only run the control with --no-cross"
            )


def leakcheck(options: Options, progress: Progress, show: Callable[[Report], None]) -> int:
    """Check a server and show the report. The implementation of `octavo leakcheck`.

    Returns:
      0 if nothing leaks, 1 if something does, 2 if the check can't tell.

    Raises:
      LeakcheckError: the server can't be checked; the command exits with 2.
    """
    report = asyncio.run(check(options, progress))
    show(report)
    return report.exit_code


def show_report(report: Report, *, json: bool) -> None:
    """Print a report to standard output."""
    if json:
        print(report.as_json())
        return
    from rich.console import Console

    Console().print(render(report))


async def check(options: Options, progress: Progress) -> Report:
    """Run the attacks and their controls, and judge what they saw."""
    address = resolve(options.address, is_own=options.own_server)
    if options.victim_key and address.kind != "https" and not address.is_loopback:
        raise LeakcheckError(
            f"keys would travel to {address} in the clear; use https, or forward a port of this "
            "machine to the server (ssh -L) and give that"
        )
    victim, attacker, notes = tenants(options, address)
    async with open_target(options, address) as target:
        return await check_target(options, target, victim, attacker, str(address), notes, progress)


async def check_target(
    options: Options,
    target: Target,
    victim: Tenant,
    attacker: Tenant,
    address: str,
    notes: Sequence[str],
    progress: Progress,
) -> Report:
    """The same for a target that is open."""
    rng = np.random.default_rng(options.seed)
    server = await target.describe(victim, options.prompt_tokens)
    others = {Mode.CROSS: attacker, Mode.SAME: victim}
    scenes = {
        mode: Scene(
            target,
            victim,
            others[mode],
            options.burst,
            options.gap,
            frozenset(options.channels),
        )
        for mode in Mode
        if mode in options.modes
    }
    samples = await run_trials(scenes, options.trials, rng, progress)
    findings = tuple(judge(samples, options.alpha, rng))
    now = datetime.datetime.now(datetime.UTC)
    return Report(
        schema=SCHEMA,
        date=now.isoformat(timespec="seconds"),
        version=__version__,
        address=address,
        server=server,
        modes=tuple(mode.value for mode in scenes),
        trials=options.trials,
        prompt_tokens=options.prompt_tokens,
        burst=options.burst,
        alpha=options.alpha,
        seed=options.seed,
        notes=tuple(notes),
        findings=findings,
        summary=summarise(findings),
        exit_code=exit_code(findings),
    )


def open_target(options: Options, address: Address) -> Target:
    """The target at an address; it is to be entered."""
    if address.kind == "grpc":
        return GrpcTarget(address, options.timeout)
    return HttpTarget(address, options.timeout, model=options.model, max_threads=options.burst + 1)


def tenants(options: Options, address: Address) -> tuple[Tenant, Tenant, list[str]]:
    """Victim and attacker, and what to say of them."""
    victim = Tenant(options.victim_salt, options.victim_key)
    attacker = Tenant(options.attacker_salt, options.attacker_key)
    notes = []
    if victim == attacker:
        if address.kind == "grpc":
            name = secrets.token_hex(8)
            victim = Tenant(f"leakcheck-{name}-victim")
            attacker = Tenant(f"leakcheck-{name}-attacker")
        elif Mode.CROSS in options.modes:
            notes.append(
                "victim and attacker are both anonymous, so nothing lets the server keep them "
                "apart; to test tenants, give --victim-key and --attacker-key, or two salts"
            )
    return victim, attacker, notes


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise LeakcheckError(f"{name} is {value}; it must be from {low} to {high}")
