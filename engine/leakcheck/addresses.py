"""Where the server to check is, and whether it may be checked: on loopback, or by its owner's word.

The name is resolved once and that address is used from then on, so that a name can't point to
loopback when it is checked and elsewhere when it is attacked.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse
from typing import Literal, NamedTuple

_PORTS = {"http": 80, "https": 443}


class LeakcheckError(ValueError):
    """The check can't be done: what was given, or what the server did, and the way out."""


class Address(NamedTuple):
    """A server that may be checked.

    Attributes:
      kind: `grpc` for `octavo.v1`, or the scheme of an OpenAI-compatible server.
      host: as it was given; names the server in messages and certificates.
      ip: what the host was resolved to.
      path: of the API's root, such as `/v1`; empty for gRPC.
      is_loopback: whether nothing leaves this machine.
    """

    kind: Literal["grpc", "http", "https"]
    host: str
    ip: str
    port: int
    path: str
    is_loopback: bool

    @property
    def netloc(self) -> str:
        """`host:port`, as it was given."""
        return _join(self.host, self.port)

    @property
    def endpoint(self) -> str:
        """`ip:port`, to connect to."""
        return _join(self.ip, self.port)

    def __str__(self) -> str:
        return self.netloc if self.kind == "grpc" else f"{self.kind}://{self.netloc}{self.path}"


def resolve(address: str, *, is_own: bool = False) -> Address:
    """Read an address and resolve its host.

    Args:
      address: `host:port` of a gRPC server, or `http://host[:port][/v1]` of an
        OpenAI-compatible one, whose path is `/v1` if left out.
      is_own: the user says that the server is theirs, so it may be anywhere.

    Raises:
      LeakcheckError: it is malformed, can't be resolved, or is not on loopback.
    """
    kind, host, port, path = _parse(address)
    ip = _lookup(host, port)
    number = ipaddress.ip_address(ip.partition("%")[0])
    mapped = getattr(number, "ipv4_mapped", None)
    is_loopback = (mapped or number).is_loopback
    if not is_loopback and not is_own:
        where = host if host == ip else f"{host} ({ip})"
        raise LeakcheckError(
            f"{where} is not on loopback, and leakcheck attacks servers; give an address on this "
            "machine such as 127.0.0.1, or --i-own-this-server if you may test that one"
        )
    return Address(kind, host, ip, port, path, is_loopback)


def _parse(address: str) -> tuple[Literal["grpc", "http", "https"], str, int, str]:
    has_scheme = "://" in address
    problem = (
        f"{address[:200]!r} is not an address; give host:port of a gRPC server, such as "
        "127.0.0.1:50051, or http://host:port/v1 of an OpenAI-compatible one"
    )
    try:
        parts = urllib.parse.urlsplit(address if has_scheme else f"grpc://{address}")
        port = parts.port
    except ValueError:
        raise LeakcheckError(problem) from None
    kind = parts.scheme
    if kind not in ("grpc", "http", "https") or not parts.hostname or parts.username is not None:
        raise LeakcheckError(problem)
    if parts.query or parts.fragment or any(not " " < character < "\x7f" for character in address):
        raise LeakcheckError(problem)
    if kind == "grpc":
        if port is None or parts.path:
            raise LeakcheckError(problem)
        return "grpc", parts.hostname, port, ""
    scheme: Literal["http", "https"] = "https" if kind == "https" else "http"
    path = parts.path.rstrip("/")
    return scheme, parts.hostname, port or _PORTS[scheme], path or "/v1"


def _lookup(host: str, port: int) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LeakcheckError(
            f"{host} can't be resolved ({error}); check the name, or give the address in numbers"
        ) from None
    ips = [str(entry[4][0]) for entry in found]
    # A name such as localhost may have an IPv6 and an IPv4 address while the server listens on
    # one of them; 127.0.0.1 is what servers listen on unless told otherwise.
    return next((ip for ip in ips if "." in ip), ips[0])


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
