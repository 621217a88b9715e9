"""The command line of `octavo leakcheck`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from engine.leakcheck import command
from engine.leakcheck.channels import Channel
from engine.leakcheck.trials import Mode
from engine.progress import ProgressBar


def leakcheck(
    *,
    address: str = "127.0.0.1:50051",
    cross: bool = True,
    same: bool = True,
    channel: Annotated[
        list[Literal["ttft", "cached_tokens", "queue_order", "occupancy", "watch"]] | None,
        Parameter(negative=()),
    ] = None,
    trials: int = 40,
    prompt_tokens: int = 512,
    burst: int = 8,
    alpha: float = 0.01,
    seed: int = 0,
    timeout: float = 60.0,
    model: str | None = None,
    victim_key: Annotated[str | None, Parameter(env_var="OCTAVO_VICTIM_KEY")] = None,
    attacker_key: Annotated[str | None, Parameter(env_var="OCTAVO_ATTACKER_KEY")] = None,
    victim_salt: str | None = None,
    attacker_salt: str | None = None,
    i_own_this_server: Annotated[bool, Parameter(negative=())] = False,
    json: bool = False,
) -> int:
    """Attack a server of yours: can one tenant learn what another one has sent?

    It runs the published attacks on shared prompt caches and their controls, and exits with 1
    if a channel leaks, or with 2 if the controls found nothing, so that silence means nothing.

    Args:
      address: host:port of an Octavo server, or http://host:port/v1 of an OpenAI-compatible one.
      cross: attack across tenants.
      same: run the control, in which victim and attacker are one tenant.
      channel: try only this one; may be given several times.
      trials: pairs of probes for each channel, of a prompt that was sent and one that was not.
      prompt_tokens: of each prompt; the longer, the more a cached one stands out.
      burst: requests that queue before a probe, for queue_order.
      alpha: the chance of a false alarm that is accepted, over all channels.
      seed: of the order of probes and of the statistics; prompts are new in every run.
      timeout: seconds for a request.
      model: of an OpenAI-compatible server; the first that it lists unless given.
      victim_key: bearer token of one tenant, better given by the environment.
      attacker_key: bearer token of another.
      victim_salt: cache_salt of one tenant; for an Octavo server without keys it is made up.
      attacker_salt: cache_salt of another.
      i_own_this_server: attack it even if it is not on this machine.
      json: print JSON instead of tables.
    """
    options = command.Options(
        address=address,
        modes=tuple(mode for mode, on in ((Mode.CROSS, cross), (Mode.SAME, same)) if on),
        channels=tuple(map(Channel, channel or Channel)),
        trials=trials,
        prompt_tokens=prompt_tokens,
        burst=burst,
        alpha=alpha,
        seed=seed,
        timeout=timeout,
        model=model,
        victim_key=victim_key,
        attacker_key=attacker_key,
        victim_salt=victim_salt,
        attacker_salt=attacker_salt,
        own_server=i_own_this_server,
    )
    with ProgressBar() as progress:
        return command.leakcheck(
            options, progress, lambda report: command.show_report(report, json=json)
        )
