"""The `server` section of a config: where it listens, and what it takes from those who call.

`engine.config.Config` holds one and has it checked.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from engine.config_error import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """The files of TLS, in PEM. They are read again when they change, so that certificates can be
    renewed while the server runs. Relative paths start at the config file's folder.

    Attributes:
      certificate: the server's, and after it those that lead to its authority.
      key: its private key, without a password; nobody else on the machine may read it.
      client_ca: certificates of authorities. If given, a connection takes a client's certificate
        that one of them has issued, health checks included; `access` says whose it is.
    """

    certificate: str
    key: str
    client_ca: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The gRPC server.

    Attributes:
      host, port: where it listens; port 0 takes a free one.
      max_message: bytes of the largest message that is taken.
      max_concurrent: calls in progress at once; one more is refused.
      http: [host:]port of the OpenAI API and of the page that shows the cache; empty for none.
      http_public: whoever reaches the page and /metrics may see them, without authentication.
      max_metadata: bytes of the largest metadata (headers) of a call.
      max_connections: of clients at once; one more is closed.
      max_connection_streams: calls of one connection at once; gRPC's clients wait with one more.
      max_unread_tokens: of an answer that its client has not read; beyond, the call ends. Each
        likeliest token that comes with a log-probability counts as one.
      reader_timeout: seconds for which a client may take nothing of what it is sent.
      grace: seconds that calls have to end by themselves after SIGTERM or SIGINT.
      step_timeout: seconds after which a step counts as hung; its requests end.
      max_failed_steps: so many in a row, and no more requests are tried until the device works.
      recovery_timeout: seconds for which a device may hang or fail; then the process ends with 1.
      public_stats: whether all who reach the server may read GetStats, whose figures are of all
        requests together and so tell of other callers. Off, those of operators' keys may, and a
        caller has GetUsage, for its own.
      log_format: of lines on standard error, text for people or JSON for machines.
      tracing: whether each request makes an OpenTelemetry span; where it goes is said by the
        environment (docs/observability.md). It takes the extra `octavo[tracing]`.
      access: a file that says which tenants there are, by which keys and certificates they are
        known, and what each may do (docs/access.md). Empty: nobody is authenticated. A relative
        path starts at the config file's folder.
      tls: certificate and key; without them, what is sent can be read on its way.
      allow_anonymous: whoever reaches the server may use it, also from other machines.
      allow_plaintext: API keys may come from other machines without TLS, because something in
        front of the server ends it, or because the network is trusted.
      kv_events: what SubscribeKvEvents tells operators of the cache's blocks: "none", it is not
        served; "hashes", names without meaning outside of this process; "tokens", their token ids
        too, which are what everybody sent, and what a gateway needs to route by prefix.
      profile_dir: the folder that StartProfile writes traces to; a relative path starts where the
        server does. None: it is refused.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    max_message: int = 4 * 2**20
    max_concurrent: int = 1024
    http: str = ""
    http_public: bool = False
    max_metadata: int = 16 * 2**10
    max_connections: int = 1024
    max_connection_streams: int = 1024
    max_unread_tokens: int = 2**16
    reader_timeout: float = 30.0
    grace: float = 20.0
    step_timeout: float = 30.0
    max_failed_steps: int = 3
    recovery_timeout: float = 120.0
    public_stats: bool = False
    log_format: Literal["text", "json"] = "text"
    tracing: bool = False
    access: str = ""
    tls: TlsConfig | None = None
    allow_anonymous: bool = False
    allow_plaintext: bool = False
    kv_events: Literal["none", "hashes", "tokens"] = "none"
    profile_dir: str | None = None


def http_address(text: str) -> tuple[str, int]:
    """Host and port of `[host:]port`, where HTTP shall be; without a host, on this machine alone.
    An IPv6 address stands in brackets.

    Raises:
      ConfigError: it is not such an address.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"--http is {text!r:.80}; put an IPv6 address in brackets: [::1]:8080")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535 or (colon and not host):
        raise ConfigError(
            f"--http is {text!r:.80}; it must be a port, from 0 to 65535, or host:port"
        )
    return host or "127.0.0.1", int(port)


def check_server(server: ServerConfig) -> None:
    """Refuse values that no server can have. Raises ConfigError."""
    for name in (
        *("max_message", "max_concurrent", "max_metadata", "max_connections"),
        *("max_connection_streams", "max_unread_tokens", "max_failed_steps"),
    ):
        if (value := getattr(server, name)) < 1:
            raise ConfigError(f"server.{name} is {value}; it must be at least 1")
    for name in ("reader_timeout", "step_timeout", "recovery_timeout"):
        if not 0 < (value := getattr(server, name)) < math.inf:
            raise ConfigError(f"server.{name} is {value}; it must be a number of seconds above 0")
    if not 0 <= server.grace < math.inf:
        raise ConfigError(f"server.grace is {server.grace}; it must be seconds from 0 on")
    if server.max_message > 2**31 - 1:
        raise ConfigError(
            f"server.max_message is {server.max_message}; gRPC takes at most 2147483647"
        )
    if not 0 <= server.port <= 65535:
        raise ConfigError(f"server.port is {server.port}; it must be from 0 to 65535")
    http_address(server.http or "0")
    if server.http_public and not server.http:
        raise ConfigError(
            "server.http_public (--http-public) is for the page of server.http (--http), which is "
            "missing"
        )
    if server.access and server.allow_anonymous:
        raise ConfigError(
            "server.allow_anonymous lets anybody in, and server.access only those with a key or a "
            "certificate; leave one of the two out"
        )
    if server.tls is not None and server.allow_plaintext:
        raise ConfigError(
            "server.allow_plaintext is for a server without server.tls; leave one of the two out"
        )
    if server.tls is not None and server.tls.client_ca and not server.access:
        raise ConfigError(
            "server.tls.client_ca asks clients who they are, but there is no server.access to say "
            "which tenant that is; give both"
        )
