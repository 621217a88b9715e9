"""How many log-probabilities answers may keep in memory until their clients have taken them.

One takes some 250 bytes with its JSON, and a prompt's cost a client no more than one prefill.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import grpc

from engine.serve.errors import Refused

MAX_ENTRIES = 2**22  # of all answers together
MAX_TENANT_ENTRIES = 2**21
MAX_ANSWER_ENTRIES = 2**20


class Memory:
    """Counts what answers keep, of all tenants together."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()  # by tenant

    @contextlib.contextmanager
    def answer(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """What an answer says that it keeps so many more to, while it is made and sent. That raises
        Refused, RESOURCE_EXHAUSTED, where there is no room for them."""
        kept = 0

        def keep(count: int) -> None:
            nonlocal kept
            total = self._counts.total() + count
            if total > MAX_ENTRIES or self._counts[tenant] + count > MAX_TENANT_ENTRIES:
                raise Refused(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"with this answer's, {total} log-probabilities would wait to be read; at most "
                    f"{MAX_ENTRIES} may, {MAX_TENANT_ENTRIES} of them your tenant's: read answers "
                    "quicker, stream, or try again later",
                    retry_after=1.0,
                )
            self._counts[tenant] += count
            kept += count

        try:
            yield keep
        finally:
            self._counts[tenant] -= kept
            if not self._counts[tenant]:
                del self._counts[tenant]
