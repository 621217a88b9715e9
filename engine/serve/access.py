"""Who calls, and what they may: the tenant of every request comes from here, and from no field of
a message.

Without an access file nobody is authenticated: all callers are one tenant, and where only this
machine reaches the server, they are its operators too.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Set
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from engine.config_error import ConfigError
from engine.serve.credentials import Shown, key_in, names_in_context
from engine.serve.errors import Refused
from engine.serve.files import Watched
from engine.serve.rates import Meter
from engine.serve.tenants import Rules, TenantRules, read_rules
from engine.types import Domain

if TYPE_CHECKING:
    from starlette.requests import Request

    from engine.frontend import Engine

log = logging.getLogger("octavo.serve")

ANYBODY = Domain().tenant  # the tenant of all callers, where there is no authentication
_REPORT_SECONDS = 60.0  # between lines in the log that count refused calls
READING = frozenset(("GET", "HEAD"))
"""Methods of HTTP that change nothing."""
CERTIFICATE_NAMES = "certificate_names"
"""Where `scope["state"]` of an HTTP request has the names of its client's certificate."""


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Who a call comes from.

    Attributes:
      tenant: whose cache, names and figures are the caller's own.
      is_operator: whether the caller may do what concerns all tenants: see figures of all, flush
        the whole cache, profile, pause, reload.
      rules: of its tenant; None if nobody is authenticated here.
      meter: what its tenant has used up.
    """

    tenant: str = ANYBODY
    is_operator: bool = False
    rules: TenantRules | None = None
    meter: Meter | None = None

    @property
    def is_authenticated(self) -> bool:
        """Whether the caller has shown who it is."""
        return self.rules is not None

    def domain(self, cache_salt: str = "") -> Domain:
        """Who may share cached blocks with a request; a client's salt can only narrow it."""
        return Domain(self.tenant, cache_salt)

    def engine_name(self, request_id: str) -> str:
        """A request's name among those of all tenants. A tenant's name holds no slash."""
        return f"{self.tenant}/{request_id}" if self.is_authenticated else request_id

    @property
    def who_sees_all(self) -> str:
        """To whom figures of all callers together are shown, and the way out: not to whoever has
        shown no key, for on loopback all users of the machine are operators."""
        who = "operators with a key, of which it has none"
        if self.is_authenticated:
            who = "tenants with operator: true"
        return (
            f"only to {who}; to show it to all who reach the server, start that with --set "
            "server.public_stats=true"
        )

    def check_operator(self, what: str) -> None:
        """Refuse `what`, such as "a profile", to all but operators.

        Raises:
          Refused: PERMISSION_DENIED.
        """
        if not self.is_operator:
            is_known = self.is_authenticated
            who = "tenants with operator: true" if is_known else "those on its machine"
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED, f"{what} is for operators of this server: {who}"
            )

    def sees_all(self, engine: Engine) -> bool:
        """Whether the caller is shown figures of all callers together: an operator is who showed a
        key. Without keys all users of this machine are operators, and are shown them only where
        SubscribeKvEvents tells them more anyway."""
        return self.is_operator and (self.is_authenticated or engine.kv_events is not None)

    def check_sees_all(self, engine: Engine, what: str) -> None:
        """Refuse `what`, such as "GetStats", to who is not shown such figures.

        Raises:
          Refused: PERMISSION_DENIED.
        """
        if not self.sees_all(engine):
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{what} counts the requests of all callers together, so this server shows it "
                f"{self.who_sees_all}. Your own figures are in octavo.v1's GetUsage",
            )

    def check_priority(self, priority: int | None) -> int:
        """The priority that a request gets; one that says none (None) gets 0, or as good as its
        tenant's requests may have.

        Raises:
          Refused: PERMISSION_DENIED; it asks for a better one.
        """
        best = None if self.rules is None else self.rules.best_priority
        if best is None:
            return priority or 0
        if priority is not None and priority < best:
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                f"priority is {priority}, and your tenant's requests may have {best} at best "
                "(lower runs first); ask for that or leave it out",
            )
        return max(0, best) if priority is None else priority


class Access:
    """Tells callers apart.

    It runs on one event loop, and costs a call one SHA-256 and no I/O.

    Args:
      rules: who is who; None: nobody is authenticated.
      is_local: only this machine reaches the gRPC server. Without rules, who does is its operator.
      is_http_local: the same of the HTTP server.
      clock: nanoseconds, for rates.
      now: seconds since 1970, for the dates on which keys expire.

    Attributes:
      on_tenants: called with the names of all tenants when other rules are taken up.
    """

    def __init__(
        self,
        rules: Watched[Rules] | None = None,
        *,
        is_local: bool = True,
        is_http_local: bool = True,
        clock: Callable[[], int] = time.monotonic_ns,
        now: Callable[[], float] = time.time,
    ):
        self.on_tenants: Callable[[Set[str]], None] = lambda names: None
        self._rules = rules
        self._is_local = is_local
        self._is_http_local = is_http_local
        self._clock = clock
        self._now = now
        self._known: Rules | None = None  # the rules that `_callers` were made from
        self._callers: dict[str, Caller] = {}
        self._num_refused = 0
        self._num_reported = 0
        self._reported_at = clock()

    @property
    def is_required(self) -> bool:
        """Whether callers must show who they are."""
        return self._rules is not None

    def caller(self, context: grpc.aio.ServicerContext) -> Caller:
        """Who a gRPC call comes from.

        Raises:
          Refused: UNAUTHENTICATED.
        """
        if self._rules is None:
            return Caller(is_operator=self._is_local)

        def shown() -> Shown:
            return Shown(
                key_in(context.invocation_metadata() or ()),
                names_in_context(context.auth_context()),
            )

        return self._find(shown)

    def http_caller(self, request: Request) -> Caller:
        """Who an HTTP request comes from.

        The password of HTTP Basic is taken as a key where nothing is changed: browsers send it
        along with whatever any site has them send.

        Raises:
          Refused: UNAUTHENTICATED.
        """
        if self._rules is None:
            return Caller(is_operator=self._is_http_local)

        def shown() -> Shown:
            with_basic = request.method in READING
            names = request.scope.get("state", {}).get(CERTIFICATE_NAMES, ())
            return Shown(key_in(request.headers.items(), with_basic=with_basic), names)

        return self._find(shown)

    def spend(self, tenant: str, tokens: int) -> None:
        """A tenant's request has a prompt of so many tokens, or got so many."""
        caller = self._callers.get(tenant)
        if caller is not None and caller.meter is not None:
            caller.meter.spend(tokens)

    def _find(self, shown: Callable[[], Shown]) -> Caller:
        """The caller that shows something. A key decides alone, if there is one."""
        assert self._rules is not None
        rules = self._rules.value
        if rules is not self._known:
            self._take_up(rules)
        try:
            key, names = shown()
            if key is None and not names:
                raise Refused(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "this server takes calls with an API key only: send it as `authorization: "
                    "Bearer KEY` (octavo's own commands: set OCTAVO_API_KEY)",
                )
            if key is not None:
                tenant = rules.tenant_of_key(key, self._now())
            else:
                tenant = rules.tenant_of_certificate(names)
            if tenant is None:
                what = "client certificate is of no tenant" if key is None else "key is not valid"
                raise Refused(grpc.StatusCode.UNAUTHENTICATED, f"the {what} here")
        except Refused:
            self._count_refused()
            raise
        return self._callers[tenant]

    def _take_up(self, rules: Rules) -> None:
        """Go by these rules; tenants that stay keep what they have used up."""
        before = self._callers
        self._callers = {}
        for name, tenant in rules.tenants.items():
            meter = before[name].meter if name in before else None
            if meter is None:
                meter = Meter(tenant.rate, self._clock)
            else:
                meter.change(tenant.rate)
            self._callers[name] = Caller(name, tenant.operator, tenant, meter)
        self._known = rules
        self.on_tenants(self._callers.keys())

    def _count_refused(self) -> None:
        """Log how many were refused, once in a while: a flood of them must not fill the disk."""
        self._num_refused += 1
        now = self._clock()
        if self._num_refused == 1 or now - self._reported_at >= _REPORT_SECONDS * 1e9:
            count = self._num_refused - self._num_reported
            self._num_reported, self._reported_at = self._num_refused, now
            log.warning("refused %d calls without a valid key or certificate", count)


def watch_rules(path: Path, tenants: Set[str] = frozenset()) -> Watched[Rules]:
    """The rules of an access file, as it is at any time.

    Args:
      path: of the file.
      tenants: those with a time to live of their own, which the file must name at first. Later a
        tenant that goes must be gone, and is only told of.

    Raises:
      ConfigError: it can't be used.
    """
    said: set[str] = set()

    def read() -> Rules:
        rules = read_rules(path)
        expired = set(rules.expired_keys(time.time()))
        for key in sorted(expired - said):
            log.warning("key %s in %s has expired", key, path)
        said.intersection_update(expired)
        said.update(expired)
        for name in sorted(tenants - rules.tenants.keys()):
            log.warning("cache.tenant_time_to_live names %s, and %s doesn't", name, path)
        return rules

    watched = Watched(f"access file {path}", [path], read)
    check_tenants(tenants, watched.value.tenants, f"{path} names no such tenant; add it there")
    return watched


def check_tenants(named: Set[str], known: Collection[str], way_out: str) -> None:
    """Refuse what can't have an effect: a time to live for a tenant that nobody is.

    Raises:
      ConfigError: of `named`, some are not `known`.
    """
    if others := sorted(named - set(known)):
        raise ConfigError(
            f"cache.tenant_time_to_live names {others[0]!r:.80}, but {way_out}, or set "
            "cache.time_to_live"
        )
