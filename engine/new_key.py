"""`octavo key`: makes an API key, and what a server needs to know it again.

The key itself is shown once and kept nowhere; the access file gets its SHA-256.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import secrets
import sys

KEY_BYTES = 32  # of randomness, so its hash can't be reversed by trying, and needs no salt


def make_key() -> str:
    """A new API key. It begins with a word, so that whoever finds one knows what it is."""
    return f"octavo_{secrets.token_urlsafe(KEY_BYTES)}"


def hash_of(key: str) -> str:
    """As the access file has it."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def key(*, name: str | None = None, expires: datetime.date | None = None) -> int:
    """Make an API key: the key goes to standard output, the line for the access file to
    standard error.

    Args:
      name: what the access file calls it; today's date unless given.
      expires: the last day on which it is valid, in UTC; unless given, it stays valid.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ValueError(
            f"--name is {name!r:.80}; use 1 to 64 letters, digits, dots, dashes and underscores"
        )
    made = make_key()
    today = datetime.datetime.now(datetime.UTC).date()
    if expires is not None and expires < today:
        raise ValueError(f"--expires is {expires}, which is over; today is {today} (UTC)")
    fields = [f"name: {json.dumps(name or str(today))}", f'hash: "{hash_of(made)}"']
    if expires is not None:
        fields.append(f"expires: {expires}")
    print(made)
    print(
        "This key is shown once. Give it to its tenant, and put this line under the tenant's "
        f"`keys:` in the access file:\n      - {{{', '.join(fields)}}}",
        file=sys.stderr,
    )
    return 0
