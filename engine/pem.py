"""PEM files of certificates and keys, as clients and servers read them: what is wrong with one is
said by its name, which the TLS libraries' own complaints leave out.
"""

from __future__ import annotations

from pathlib import Path

CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
PRIVATE_KEY = b"PRIVATE KEY-----"


def read_pem(path: str | Path, name: str, marker: bytes, error: type[ValueError]) -> bytes:
    """A file that has to hold a kind of PEM block.

    Args:
      path: of the file.
      name: of the option or the config's key that gave it.
      marker: in each such block, `CERTIFICATE` or `PRIVATE_KEY`.
      error: what to raise.

    Raises:
      ValueError: as `error`; it can't be read, or holds none.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as failure:
        raise error(f"{name}: can't read {path}: {failure.strerror}") from None
    if marker not in text:
        raise error(f"{name}: {path} is not PEM with {marker.decode().strip('-')} in it")
    return text


def openssl_reason(error: Exception) -> str:
    """What OpenSSL says, in words."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(reason).lower().replace("_", " ")
