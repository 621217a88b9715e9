"""What a call brings to show who it is from: an API key, or the names of a client's certificate.

gRPC's metadata and HTTP's headers say the same in two ways; here they become one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import grpc

from engine.serve.errors import Refused

type Names = tuple[str, ...]  # of a certificate, as the access file has them: `dns:`, `uri:`, `cn:`


class Shown(NamedTuple):
    """What a call shows.

    Attributes:
      key: an API key, not checked yet; None if it has none. Never log it.
      names: of the certificate with which its connection was made, verified; often none.
    """

    key: str | None
    names: Names = ()


def key_in(headers: Iterable[tuple[str, str | bytes]], *, with_basic: bool = False) -> str | None:
    """The API key among a call's metadata or headers, whose names are in lower case.

    It is the token of `authorization: Bearer KEY` (RFC 6750) or the value of `x-api-key`.

    Args:
      headers: names and values.
      with_basic: also take the password of `authorization: Basic …` (RFC 7617), which is what
        browsers ask for.

    Raises:
      Refused: UNAUTHENTICATED; there are two different keys, or something else in their place.
    """
    keys = set()
    for name, value in headers:
        if name not in ("authorization", "x-api-key"):
            continue
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        keys.add(text.strip() if name == "x-api-key" else _authorized(text, with_basic))
    if len(keys) > 1:
        raise _unreadable("the call has two different keys; send one")
    return keys.pop() if keys else None


def names_in_context(auth_context: Mapping[str, Iterable[bytes]]) -> Names:
    """The names of the certificate behind a gRPC call, from its `auth_context()`."""
    kinds = {"peer_dns": "dns", "peer_uri": "uri", "x509_common_name": "cn"}
    return tuple(
        f"{kinds[name]}:{value.decode('utf-8', 'replace')}"
        for name, values in auth_context.items()
        if name in kinds
        for value in values
    )


def names_in_certificate(certificate: Mapping[str, Any]) -> Names:
    """The names of a verified certificate, as `ssl` gives it (`SSLSocket.getpeercert`)."""
    kinds = {"DNS": "dns", "URI": "uri"}
    alternatives = certificate.get("subjectAltName", ())
    subject = [pair for pairs in certificate.get("subject", ()) for pair in pairs]
    return (
        *(f"{kinds[kind]}:{name}" for kind, name in alternatives if kind in kinds),
        *(f"cn:{value}" for key, value in subject if key == "commonName"),
    )


def _authorized(value: str, with_basic: bool) -> str:
    scheme, _, rest = value.strip().partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic" and with_basic:
        try:
            pair = base64.b64decode(rest.strip(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise _unreadable("the authorization is not what Basic takes") from None
        return pair.partition(":")[2]
    raise _unreadable("the authorization must be Bearer and an API key")


def _unreadable(message: str) -> Refused:
    return Refused(grpc.StatusCode.UNAUTHENTICATED, message)
