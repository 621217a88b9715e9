"""Calls that failed, counted for `/metrics`: by front end, method and code, of which there are few.

Whoever is refused for want of a key is among them. A method is one that this server has: what
clients make up is all one.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

FAILED = "octavo.failed"
"""Where the scope of an HTTP request has its status if it failed after its answer began."""


class Failure(NamedTuple):
    """What is counted together.

    Attributes:
      protocol: "grpc" or "http".
      method: of gRPC, such as `/octavo.v1.Generation/Generate`; of HTTP, the path as routed.
      code: gRPC's name, or HTTP's number.
    """

    protocol: str
    method: str
    code: str


class Failures(Counter[Failure]):
    """How many there were of each."""

    def add(self, protocol: Literal["grpc", "http"], method: str, code: str) -> None:
        """Count one."""
        self[Failure(protocol, method, code)] += 1
