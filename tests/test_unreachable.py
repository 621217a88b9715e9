"""Why a server can't be reached, by what gRPC says of it."""

from __future__ import annotations

import pytest

from engine.credentials import Credentials
from engine.unreachable import check_address, why_unavailable

PLAIN, TLS = Credentials(), Credentials(tls=True)


@pytest.mark.parametrize(
    ("details", "credentials", "said"),
    [
        ("failed to connect to all addresses; … Connection refused", TLS, "no Octavo server"),
        ("errors resolving x:1: … Domain name not found", PLAIN, "no Octavo server answers"),
        ("Socket closed", PLAIN, "broke (Socket closed)"),
        ("Cancelling all calls", PLAIN, "may be ending"),
        ("failed to connect …: CERTIFICATE_VERIFY_FAILED: certificate has expired", TLS, "renewed"),
    ],
)
def test_each_way_to_fail_has_its_words(details: str, credentials: Credentials, said: str) -> None:
    message = why_unavailable(details, "gpu:50051", credentials)
    assert said in message
    assert "gpu:50051" in message
    assert details in message
    assert ("make serve" in message) is said.startswith("no Octavo")


@pytest.mark.parametrize(
    "address",
    ["localhost:1", "[::1]:65535", "unix:/run/a.sock", "dns:///a.example:443", "ipv4:127.0.0.1:1"],
)
def test_what_grpc_resolves_is_an_address(address: str) -> None:
    check_address(address)
