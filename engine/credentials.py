"""What a client shows a server, and how it knows that server: an API key, TLS, a certificate.

Nothing heavy is imported here, as the command line reads these options.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING

from engine.pem import CERTIFICATE, PRIVATE_KEY, openssl_reason, read_pem

if TYPE_CHECKING:
    import grpc

API_KEY_VARIABLE = "OCTAVO_API_KEY"


class CredentialsError(ValueError):
    """Credentials that can't be used: what was given, and the way out. It quotes no key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
    """How a client connects.

    Attributes:
      api_key: sent with every call; None sends none.
      tls: whether the connection is encrypted and the server's certificate is verified.
      ca: path of a PEM file of the authorities that may have issued it; None: the public ones, as
        gRPC brings them along.
      certificate, private_key: paths of PEM files of the client's own certificate, for servers that
        ask.
      allow_plaintext: send the key to another machine even without TLS.

    Raises:
      CredentialsError: they don't go together.
    """

    api_key: str | None = dataclasses.field(default=None, repr=False)
    tls: bool = False
    ca: str | Path | None = None
    certificate: str | Path | None = None
    private_key: str | Path | None = None
    allow_plaintext: bool = False

    def __post_init__(self) -> None:
        if self.api_key is not None:
            _checked(self.api_key, "an API key")
        if not self.tls and (self.ca or self.certificate or self.private_key):
            raise CredentialsError(
                "certificates are for TLS; turn that on (--tls; in Python, tls=True) or leave "
                "them out"
            )
        if (self.certificate is None) != (self.private_key is None):
            raise CredentialsError("a client's certificate and its private key go together")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    def check_address(self, address: str) -> None:
        """Refuse to send a key to another machine in the clear. Raises CredentialsError."""
        if self.api_key is None or self.tls or self.allow_plaintext or _is_here(address):
            return
        raise CredentialsError(
            f"the API key would travel to {address} in the clear; use TLS (--tls), forward a port "
            "of this machine to the server (ssh -L), or allow it (--allow-plaintext)"
        )

    def for_grpc(self) -> grpc.ChannelCredentials | None:
        """For a channel; None without TLS.

        Raises:
          CredentialsError: a file can't be read, or is not what it should be.
        """
        if not self.tls:
            return None
        import grpc

        authorities = _read(self.ca, "--ca", CERTIFICATE)
        chain = _read(self.certificate, "--client-cert", CERTIFICATE)
        key = _read(self.private_key, "--client-key", PRIVATE_KEY)
        self._check_pem(authorities, key)
        return grpc.ssl_channel_credentials(authorities, key, chain)

    def _check_pem(self, authorities: bytes | None, key: bytes | None) -> None:
        """Try the files as gRPC will: its own complaints name none of them."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if authorities is not None:
            try:
                context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
            except (ssl.SSLError, ValueError) as error:
                why = openssl_reason(error)
                raise CredentialsError(
                    f"--ca: {self.ca} holds no certificate of an authority ({why})"
                ) from None
        if self.certificate is None or self.private_key is None or key is None:
            return
        if b"ENCRYPTED" in key:
            raise CredentialsError(
                f"--client-key: {self.private_key} is encrypted, which gRPC does not take; give it "
                "without a password, and guard the file"
            )
        try:
            context.load_cert_chain(self.certificate, self.private_key)
        except (ssl.SSLError, OSError) as error:
            raise CredentialsError(
                f"--client-cert {self.certificate} and --client-key {self.private_key} are not a "
                f"certificate and its private key ({openssl_reason(error)})"
            ) from None


def find_api_key(file: Path | None) -> str | None:
    """The API key in a file, or else in the environment (`OCTAVO_API_KEY`); None if there is none.

    Raises:
      CredentialsError: the file can't be read, or what is there can't be a key.
    """
    if file is None:
        key = os.environ.get(API_KEY_VARIABLE)
        return _checked(key, f"the API key in {API_KEY_VARIABLE}") if key else None
    try:
        key = file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise CredentialsError(f"can't read the API key in {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CredentialsError(f"{file} holds no API key: it is not ASCII") from None
    return _checked(key, f"the API key in {file}")


def _checked(key: str, what: str) -> str:
    """A key that can be sent, which `what` names in the error, as the key itself is not quoted."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise CredentialsError(f"{what} must be visible ASCII characters, at least one")
    return key


def _read(path: str | Path | None, option: str, marker: bytes) -> bytes | None:
    return None if path is None else read_pem(path, option, marker, CredentialsError)


def _is_here(address: str) -> bool:
    """Whether nothing leaves this machine on the way to `host:port`."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")
