"""Nothing but loopback is attacked, unless its owner says so."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from engine.leakcheck.addresses import LeakcheckError, resolve


@pytest.mark.parametrize(
    ("address", "kind", "endpoint", "path"),
    [
        ("127.0.0.1:50051", "grpc", "127.0.0.1:50051", ""),
        ("127.9.9.9:1", "grpc", "127.9.9.9:1", ""),
        ("[::1]:50051", "grpc", "[::1]:50051", ""),
        ("[::ffff:127.0.0.1]:50051", "grpc", "[::ffff:127.0.0.1]:50051", ""),
        ("http://127.0.0.1:8000", "http", "127.0.0.1:8000", "/v1"),
        ("http://127.0.0.1:8000/openai/v1/", "http", "127.0.0.1:8000", "/openai/v1"),
        ("https://127.0.0.1", "https", "127.0.0.1:443", "/v1"),
    ],
)
def test_loopback_is_taken(address: str, kind: str, endpoint: str, path: str) -> None:
    found = resolve(address)
    assert (found.kind, found.endpoint, found.path, found.is_loopback) == (
        kind,
        endpoint,
        path,
        True,
    )


@pytest.mark.parametrize(
    "address",
    [
        "192.0.2.1:50051",
        "10.0.0.1:50051",
        "0.0.0.0:50051",
        "[2001:db8::1]:50051",
        "[::]:50051",
        "[::ffff:192.0.2.1]:50051",
        "http://192.0.2.1/v1",
        "https://192.0.2.1:8443/v1",
    ],
)
def test_other_machines_are_refused_until_the_user_owns_them(address: str) -> None:
    with pytest.raises(LeakcheckError, match="--i-own-this-server"):
        resolve(address)
    assert not resolve(address, is_own=True).is_loopback


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        "127.0.0.1",
        "127.0.0.1:port",
        "127.0.0.1:99999",
        "127.0.0.1:50051/v1",
        ":50051",
        "ftp://127.0.0.1:21",
        "unix:/run/octavo.sock",
        "http://",
        "http://user:secret@127.0.0.1/v1",
        "http://127.0.0.1/v1?key=1",
        "http://127.0.0.1/v1 HTTP/1.1\r\nHost: elsewhere",
        "127.0.0.1:50051\n",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(LeakcheckError, match="is not an address"):
        resolve(address)


def test_a_name_is_judged_by_what_it_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"inside.test": "127.0.0.1", "localhost": "192.0.2.7"}

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[host], port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = resolve("inside.test:50051")
    assert (found.netloc, found.endpoint) == ("inside.test:50051", "127.0.0.1:50051")
    with pytest.raises(LeakcheckError, match=r"localhost \(192\.0\.2\.7\) is not on loopback"):
        resolve("localhost:50051")


def test_a_name_with_one_address_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(LeakcheckError, match="not on loopback"):
        resolve("both.test:50051")


def test_a_name_that_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(LeakcheckError, match="can't be resolved"):
        resolve("nowhere.test:50051")
