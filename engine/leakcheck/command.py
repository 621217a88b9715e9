"""`octavo leakcheck`: test whether one tenant of a server can learn what another one has sent.

For operators, on their own server: it attacks nothing but loopback unless told that the server
is the user's own.
"""

from __future__ import annotations

import asyncio
import datetime
import secrets
from collections.abc import Callable, Sequence

import numpy as np

from engine import __version__
from engine.credentials import Credentials
from engine.leakcheck.addresses import Address, LeakcheckError, resolve
from engine.leakcheck.channels import Scene
from engine.leakcheck.http_target import HttpTarget
from engine.leakcheck.options import Options
from engine.leakcheck.report import SCHEMA, Report, render, summarise
from engine.leakcheck.targets import GrpcTarget, Target, Tenant
from engine.leakcheck.trials import Mode, Progress, run_trials
from engine.leakcheck.verdicts import exit_code, judge


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
    options.check()
    address = resolve(options.address, is_own=options.i_own_this_server)
    is_encrypted = address.kind == "https" or (address.kind == "grpc" and options.tls)
    if options.victim_key and not is_encrypted and not address.is_loopback:
        raise LeakcheckError(
            f"keys would travel to {address} in the clear; use https (--tls for host:port), or "
            "forward a port of this machine to the server (ssh -L) and give that"
        )
    if (options.tls and address.kind != "grpc") or (options.ca and not is_encrypted):
        raise LeakcheckError(
            f"--tls is for host:port and --ca for that or https, but the address is {address}"
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
            options.channels,
        )
        for mode in options.modes
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
        secure = Credentials(tls=True, ca=options.ca).for_grpc() if options.tls else None
        return GrpcTarget(address, options.timeout, secure=secure)
    return HttpTarget(
        address,
        options.timeout,
        model=options.model,
        max_threads=options.burst + 1,
        ca=options.ca,
    )


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
