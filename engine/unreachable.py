"""Why a server can't be reached, in words that say what to change.

gRPC has one status for all of it, UNAVAILABLE, and tells the reasons apart in its details alone.
"""

from __future__ import annotations

import re

from engine.credentials import Credentials

_CONNECTING = ("failed to connect", "connections to all backends failing", "errors resolving")
_HOST_AND_PORT = re.compile(r"(\[[^\[\]]+\]|[^\[\]:/@\s]+):(?P<port>[0-9]{1,5})")
_RESOLVER = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock):.+")  # gRPC's


def check_address(address: str) -> None:
    """Refuse what gRPC would take for another address than was meant. Raises ValueError."""
    match = _HOST_AND_PORT.fullmatch(address)
    if (match and 0 < int(match["port"]) < 2**16) or (not match and _RESOLVER.fullmatch(address)):
        return
    scheme = re.match(r"https?://", address)
    way_out = f"leave out {scheme[0]}" if scheme else "it has a port from 1 to 65535"
    tls = "; TLS is turned on by --tls" if scheme and scheme[0] == "https://" else ""
    raise ValueError(
        f"the address {address!r:.200} is not host:port, such as 127.0.0.1:50051; {way_out}{tls}"
    )


def why_unavailable(details: str, address: str, credentials: Credentials) -> str:
    """What a user is told of an UNAVAILABLE that the server didn't explain itself.

    Args:
      details: gRPC's.
      address: of the server.
      credentials: those that the connection was tried with.
    """
    if not details.startswith(_CONNECTING):
        return (
            f"the connection to the server at {address} broke ({details}): what came of the answer "
            "so far is not all of it. The server may be ending; its log says why. Try again"
        )
    return f"{_why_unconnected(details, address, credentials)} ({details})"


def _why_unconnected(details: str, address: str, credentials: Credentials) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in details:
        if "expired" in details or "not yet valid" in details:
            return f"the certificate of the server at {address} is not valid now; have it renewed"
        if credentials.ca is None:
            return (
                f"no public authority has issued the certificate of the server at {address}: name "
                "the one that has with --ca"
            )
        return (
            f"no authority in {credentials.ca} (--ca) has issued the certificate of the server at "
            f"{address}"
        )
    if "Hostname Verification" in details:
        return (
            f"the certificate of the server at {address} is for other names than this; take one of "
            "those for the address"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return f"the server at {address} answers, but has no TLS; leave out --tls"
    if "http1.x server" in details or "missing selected ALPN" in details:
        return (
            f"what answers at {address} speaks HTTP/1.1, not gRPC; an Octavo server has another "
            "port for that (server.port)"
        )
    if "Socket closed" in details or "Connection reset" in details:
        return f"what answers at {address} closes connections; {_why_closed(credentials)}"
    return (
        f"no Octavo server answers at {address}: start one with `make serve` or `octavo serve`, or "
        "give another address"
    )


def _why_closed(credentials: Credentials) -> str:
    if not credentials.tls:
        return (
            "it may be a server that has TLS: turn that on with --tls (in Python "
            "Credentials(tls=True)), and name its authority with --ca if it is not a public one"
        )
    if credentials.certificate is None:
        return "it may ask for a client's certificate: --client-cert and --client-key"
    return (
        f"it may not take the certificate {credentials.certificate} (--client-cert), for its "
        "authority or because it has expired"
    )
