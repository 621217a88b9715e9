"""The server's certificate, and the authority that its clients' certificates must come from.

All of it is tried before it is used, in a handshake with ourselves, so that a server neither
starts with nor changes to a certificate that no client would take. A renewed one is used for the
next connection; those that are open keep theirs.
"""

from __future__ import annotations

import base64
import datetime
import logging
import re
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from engine.config_error import ConfigError
from engine.pem import CERTIFICATE, PRIVATE_KEY, openssl_reason, read_pem
from engine.serve.files import Watched, refuse_open_to_others
from engine.server_config import TlsConfig

log = logging.getLogger("octavo.serve")

DAY_SECONDS = 24 * 3600.0
SOON_SECONDS = 14 * DAY_SECONDS


class Identity(NamedTuple):
    """What a server shows its clients, and whom it asks for the same.

    Attributes:
      chain, key: PEM.
      client_ca: PEM of those whose certificates clients must have; None: clients have none.
      context: the same, for HTTP.
      ends: when the certificate expires, in seconds since 1970.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext
    ends: float


def watch_identity(config: TlsConfig, now: Callable[[], float] = time.time) -> Watched[Identity]:
    """The server's identity as its files have it at any time. Raises ConfigError.

    In its last days the log says, once a day, that it ends; `now` is in seconds since 1970.
    """
    paths = [Path(name) for name in (config.certificate, config.key, config.client_ca) if name]
    said = 0.0

    def remind(identity: Identity) -> None:
        nonlocal said
        left = identity.ends - now()
        if left < SOON_SECONDS and now() - said >= DAY_SECONDS:
            said = now()
            days, file = left / DAY_SECONDS, config.certificate
            log.warning("TLS certificate %s ends in %.1f days; renew it", file, days)

    return Watched("TLS certificate", paths, lambda: read_identity(config), remind)


def read_identity(config: TlsConfig) -> Identity:
    """Read certificate and key.

    Raises:
      ConfigError: one is missing, is no PEM, belongs to another key, can be used by others of this
        machine, or is not valid now.
    """
    key_path = Path(config.key)
    forbidden = stat.S_IRWXO | stat.S_IWGRP
    refuse_open_to_others(key_path, "the private key", forbidden, f"do: chmod 600 {key_path}")
    chain = read_pem(config.certificate, "server.tls.certificate", CERTIFICATE, ConfigError)
    key = read_pem(config.key, "server.tls.key", PRIVATE_KEY, ConfigError)
    if b"ENCRYPTED" in key:
        raise ConfigError(
            f"server.tls.key: {key_path} is encrypted, and a server has nobody to ask for its "
            "password; give it without one, and guard the file"
        )
    client_ca = None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.certificate, config.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"server.tls: {config.certificate} and {config.key} are not a certificate and its "
            f"private key ({openssl_reason(error)})"
        ) from None
    if _is_of_edwards_curve(key):
        raise ConfigError(
            f"server.tls.key: {key_path} is an Ed25519 or Ed448 key, which gRPC's TLS (BoringSSL) "
            "does not take; use one of ECDSA P-256 or RSA"
        )
    ends = _handshake(context, chain, config.certificate)
    if config.client_ca:
        client_ca = read_pem(config.client_ca, "server.tls.client_ca", CERTIFICATE, ConfigError)
        _require_clients(context, client_ca, config.client_ca)
    return Identity(chain, key, client_ca, context, ends)


def grpc_credentials(identity: Watched[Identity]) -> grpc.ServerCredentials:
    """For a gRPC server: each new connection gets the latest certificate."""
    used = identity.value

    def renewed() -> Any:
        nonlocal used
        latest = identity.value
        if latest is used:
            return None  # as it was
        used = latest
        return _for_grpc(latest)

    return grpc.dynamic_ssl_server_credentials(
        _for_grpc(used), renewed, require_client_authentication=used.client_ca is not None
    )


def http_context(identity: Watched[Identity]) -> ssl.SSLContext:
    """For an HTTP server: each new connection gets the latest certificate."""
    context = identity.value.context

    def renew(connection: Any, name: str | None, _: ssl.SSLContext) -> None:
        del name
        if identity.value.context is not context:
            connection.context = identity.value.context

    context.sni_callback = renew
    return context


def _for_grpc(identity: Identity) -> Any:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key, identity.chain)], root_certificates=identity.client_ca
    )


def _is_of_edwards_curve(key: bytes) -> bool:
    """Whether a PEM key names id-Ed25519 or id-Ed448 (RFC 8410) as what it is."""
    match = re.search(rb"-----BEGIN PRIVATE KEY-----(.+?)-----END", key, re.DOTALL)
    start = base64.b64decode(match[1])[:16] if match else b""
    return b"\x06\x03\x2b\x65\x70" in start or b"\x06\x03\x2b\x65\x71" in start


def _handshake(server: ssl.SSLContext, chain: bytes, path: str) -> float:
    """Try a certificate as a client would who trusts it. Returns when it expires, in seconds since
    1970."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it is trusted whoever issued it
    client.load_verify_locations(cadata=chain.decode("ascii", "replace"))
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in tuple(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                raise ConfigError(
                    f"server.tls.certificate: {path} would be refused by clients: "
                    f"{error.verify_message}"
                ) from None
            except ssl.SSLError as error:
                raise ConfigError(
                    f"server.tls.certificate: {path} can't be used ({openssl_reason(error)})"
                ) from None
    certificate = ends[0].getpeercert()
    assert certificate
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def _require_clients(context: ssl.SSLContext, client_ca: bytes, path: str) -> None:
    """Have clients show a certificate of this authority."""
    try:
        context.load_verify_locations(cadata=client_ca.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise ConfigError(
            f"server.tls.client_ca: {path} is unusable ({openssl_reason(error)})"
        ) from None
    ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in context.get_ca_certs()]
    if not ends:
        raise ConfigError(f"server.tls.client_ca: {path} holds no certificate of an authority")
    if max(ends) <= time.time():
        when = datetime.datetime.fromtimestamp(max(ends), datetime.UTC)
        raise ConfigError(f"server.tls.client_ca: {path} expired on {when:%Y-%m-%d}")
    context.verify_mode = ssl.CERT_REQUIRED
    # A resumed connection would not be verified again, by an authority that has changed.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
