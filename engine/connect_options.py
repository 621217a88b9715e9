"""The command line's options for reaching a server that asks who one is.

There is none for the key itself: everybody on a machine can read its command lines.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from engine.credentials import Credentials, find_api_key


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectOptions:
    """How to reach a server.

    Attributes:
      api_key_file: a file with an API key; without it, OCTAVO_API_KEY in the environment is taken.
      tls: encrypt the connection, and verify the server's certificate.
      ca: PEM file of the authority that issued it; without it, the public ones are trusted.
      client_cert: PEM file of your own certificate, for servers that ask for one.
      client_key: PEM file of its private key.
      allow_plaintext: send the key to another machine even without TLS.
    """

    api_key_file: Path | None = None
    tls: Annotated[bool, Parameter(negative=())] = False
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    allow_plaintext: Annotated[bool, Parameter(negative=())] = False

    def credentials(self) -> Credentials:
        """As a client takes them. Raises CredentialsError."""
        return Credentials(
            api_key=find_api_key(self.api_key_file),
            tls=self.tls,
            ca=self.ca,
            certificate=self.client_cert,
            private_key=self.client_key,
            allow_plaintext=self.allow_plaintext,
        )
