"""What `octavo leakcheck` is asked to do: its options on the command line, and their limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from engine.leakcheck.addresses import LeakcheckError
from engine.leakcheck.channels import Channel
from engine.leakcheck.statistics import least_blocks
from engine.leakcheck.trials import PAIRS_A_BLOCK, Mode

MAX_TRIALS = 10_000
MAX_PROMPT_TOKENS = 1_000_000
MAX_BURST = 256

ChannelName = Literal["ttft", "cached_tokens", "queue_order", "occupancy", "watch"]


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to check, and how.

    Attributes:
      address: host:port of an Octavo server, or http://host:port/v1 of an OpenAI-compatible one.
      cross: attack across tenants.
      same: run the control, in which victim and attacker are one tenant.
      channel: try only this one; may be given several times.
      trials: pairs of probes for each channel and mode, of a prompt that was sent and one that was
        not; even.
      prompt_tokens: of each prompt; the longer, the more a cached one stands out.
      burst: requests that queue before a probe, for queue_order.
      gap: seconds between the requests of a burst, so that they arrive in order.
      alpha: the chance of a false alarm that is accepted, over all channels.
      seed: of the order of probes and of the statistics; prompts are new in every run.
      timeout: seconds for a request.
      model: of an OpenAI-compatible server; the first that it lists unless given.
      victim_key: bearer token of one tenant, better given by the environment.
      attacker_key: bearer token of another.
      victim_salt: cache_salt of one tenant; for an Octavo server without keys it is made up.
      attacker_salt: cache_salt of another.
      tls: encrypt connections to an Octavo server; https:// does so to others.
      ca: PEM file of the authority that issued its certificate; without it, the public ones.
      i_own_this_server: attack it even if it is not on this machine.
    """

    address: str = "127.0.0.1:50051"
    cross: bool = True
    same: bool = True
    channel: Annotated[Sequence[ChannelName], Parameter(negative=())] = ()
    trials: int = 40
    prompt_tokens: int = 512
    burst: int = 8
    gap: float = 0.002
    alpha: float = 0.01
    seed: int = 0
    timeout: float = 60.0
    model: str | None = None
    victim_key: Annotated[str | None, Parameter(env_var="OCTAVO_VICTIM_KEY")] = dataclasses.field(
        default=None, repr=False
    )
    attacker_key: Annotated[str | None, Parameter(env_var="OCTAVO_ATTACKER_KEY")] = (
        dataclasses.field(default=None, repr=False)
    )
    victim_salt: str | None = None
    attacker_salt: str | None = None
    tls: Annotated[bool, Parameter(negative=())] = False
    ca: Path | None = None
    i_own_this_server: Annotated[bool, Parameter(negative=())] = False

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The attack, its control, or both."""
        return tuple(mode for mode, on in ((Mode.CROSS, self.cross), (Mode.SAME, self.same)) if on)

    @property
    def channels(self) -> frozenset[Channel]:
        """Those to try."""
        return frozenset(map(Channel, self.channel or Channel))

    def check(self) -> None:
        """Raise LeakcheckError if they make no sense, before anything is sent."""
        if not self.modes:
            raise LeakcheckError("there is nothing to do: leave out --no-cross or --no-same")
        _check_range("--alpha", self.alpha, 0.001, 0.2)
        _check_range("--prompt-tokens", self.prompt_tokens, 32, MAX_PROMPT_TOKENS)
        _check_range("--burst", self.burst, 2, MAX_BURST)
        _check_range("--gap", self.gap, 0, 1)
        _check_range("--seed", self.seed, 0, 2**63 - 1)
        _check_range("--timeout", self.timeout, 0.1, 3600)
        least = PAIRS_A_BLOCK * least_blocks(self.alpha, len(self.channels))
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
        if victims is not None and victims == attackers and self.cross:
            raise LeakcheckError(
                f"--victim-{what} and --attacker-{what} are equal, so victim and attacker would be "
                "one tenant; give two, or only run the control with --no-cross"
            )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise LeakcheckError(f"{name} is {value}; it must be from {low} to {high}")
