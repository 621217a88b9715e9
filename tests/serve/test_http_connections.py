"""HTTP connections, whatever is served on them: how many there are, and for what they wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from http.client import HTTPSConnection
from pathlib import Path

import pytest
import trustme
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.protocols.http import h11_impl

from engine.dashboard import viewers
from engine.serve import http, http_connection, watching
from engine.serve.http import HttpServer
from engine.serve.http_connection import Connection
from engine.serve.openai import exchange, memory, parameters
from engine.serve.tls import watch_identity
from engine.server_config import TlsConfig
from tests.conftest import ROOT
from tests.serve.fake_engine import until

Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Site:
    """A server of a short text, a long one, and one that comes when it may.

    Attributes:
      server: it.
      may_end: whether the last may come.
      num_waiting: who waits for that.
    """

    def __init__(self, max_connections: int = 1024, tls: TlsConfig | None = None):
        routes = [
            Route("/", self._short),
            Route("/long", self._long),
            Route("/late", self._late),
            Route("/broken", self._broken),
        ]
        identity = None if tls is None else watch_identity(tls)
        self.server = HttpServer(
            Starlette(routes=routes),
            "127.0.0.1",
            0,
            max_connections=max_connections,
            identity=identity,
        )
        self.peers: list[Peer] = []
        self.may_end = asyncio.Event()
        self.num_waiting = 0

    @property
    def connections(self) -> list[Connection]:
        """Those that uvicorn knows."""
        assert self.server._server is not None
        return [
            c for c in self.server._server.server_state.connections if isinstance(c, Connection)
        ]

    async def connect(self, tls: ssl.SSLContext | None = None) -> Peer:
        """A connection."""
        self.peers.append(await asyncio.open_connection("127.0.0.1", self.server._port, ssl=tls))
        return self.peers[-1]

    async def _short(self, _: Request) -> PlainTextResponse:
        return PlainTextResponse("short")

    async def _long(self, _: Request) -> PlainTextResponse:
        return PlainTextResponse("x" * 30_000_000)

    async def _broken(self, _: Request) -> PlainTextResponse:
        raise RuntimeError(" ".join(("my", "secret", "prompt")))

    async def _late(self, request: Request) -> PlainTextResponse:
        self.num_waiting += 1
        waiting = asyncio.ensure_future(self.may_end.wait())
        leaving = asyncio.ensure_future(watching._until_gone(request.receive))
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        leaving.cancel()
        self.num_waiting -= 1
        return PlainTextResponse("late")


@contextlib.asynccontextmanager
async def running(site: Site) -> AsyncIterator[Site]:
    await site.server.start()
    yield site
    leave(*site.peers)
    await site.server.stop()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running(Site()) as site:
        yield site


def asking(path: str = "/") -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


async def said(peer: Peer, path: str = "/") -> bytes:
    """What is answered on a connection that stays open; the body has five letters at most."""
    reader, writer = peer
    writer.write(asking(path))
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)


async def is_closed(peer: Peer) -> bool:
    """Wait for the end of a connection on which nothing comes."""
    with contextlib.suppress(ConnectionError):
        return await peer[0].read() == b""
    return True


def leave(*peers: Peer) -> None:
    for _, writer in peers:
        writer.transport.abort()


async def test_connections_beyond_the_limit_are_closed_and_the_others_served() -> None:
    async with running(Site(max_connections=3)) as site:
        peers = [await site.connect() for _ in range(3)]  # which say nothing yet
        for _ in range(5):
            assert await is_closed(await site.connect())
        for peer in peers:
            assert await said(peer) == b"short"
        leave(peers[0])
        await until(lambda: len(site.connections) == 2)
        assert await said(await site.connect()) == b"short"


@pytest.fixture
def tls(tmp_path: Path) -> TlsConfig:
    leaf = trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert("127.0.0.1")
    chain, key = tmp_path / "server.pem", tmp_path / "server.key"
    key.touch(mode=0o600)
    leaf.private_key_pem.write_to_path(str(key))
    leaf.cert_chain_pems[0].write_to_path(str(chain))
    return TlsConfig(certificate=str(chain), key=str(key))


async def test_handshakes_count_as_connections_and_end(
    tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HANDSHAKE_SECONDS", 0.5)
    async with running(Site(max_connections=2, tls=tls)) as site:
        peers = [await site.connect() for _ in range(2)]
        assert await is_closed(await site.connect())
        assert not site.connections  # as no handshake has ended
        for peer in peers:
            assert await is_closed(peer)
        anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
        while True:  # on a busy machine, until it is in time
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                assert await said(await site.connect(anybody)) == b"short"
                break


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nx-a: b\r\n"])
async def test_a_head_that_doesn_t_come_is_not_waited_for(
    sent: bytes, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "HEAD_SECONDS", 0.2)
    reader, writer = await site.connect()
    writer.write(sent)
    with contextlib.suppress(ConnectionError):
        for number in range(1000):  # a line now and then keeps nobody
            if number % 2 and sent:
                writer.write(b"x-%d: y\r\n" % number)
            with contextlib.suppress(TimeoutError):
                assert await asyncio.wait_for(reader.read(), 0.02) == b""
                break
        else:
            pytest.fail("the connection is still open")


async def test_a_second_request_may_take_as_long_as_the_first(site: Site) -> None:
    peer = await site.connect()
    ends = []
    for _ in range(3):
        assert await said(peer) == b"short"
        [here] = site.connections
        await until(lambda here=here: here._timer is not None)
        assert here._timer is not None
        ends.append(here._timer.when())
    assert ends[0] < ends[1] < ends[2]


async def test_an_answer_may_take_longer_than_a_head(site: Site) -> None:
    peer = await site.connect()
    answer = asyncio.create_task(said(peer, "/late"))
    await until(lambda: site.num_waiting)
    assert [here._timer for here in site.connections] == [None]
    site.may_end.set()
    assert await answer == b"late"


@pytest.mark.parametrize("bytes_at_once", [0, 20_000])
async def test_the_rest_of_an_answer_must_be_taken_in_time(
    bytes_at_once: int, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "HEAD_SECONDS", 0.2)
    reader, writer = await site.connect()
    writer.write(asking("/long"))
    await reader.readuntil(b"\r\n\r\n")
    while site.connections:
        await reader.read(bytes_at_once)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_client_that_sends_ahead_is_noticed_when_it_leaves(
    at_once: bool, site: Site
) -> None:
    _, writer = peer = await site.connect()
    writer.write(asking("/late") + (asking() if at_once else b""))
    await until(lambda: site.num_waiting == 1)
    writer.write(asking() * 5000)  # more than is read at once
    await writer.drain()
    leave(peer)
    await until(lambda: site.num_waiting == 0)


async def test_what_is_sent_ahead_is_not_answered(site: Site) -> None:
    reader, writer = await site.connect()
    writer.write(asking("/late") + asking())
    await until(lambda: site.num_waiting == 1)
    site.may_end.set()
    answer = await reader.read()  # to the end of the connection
    assert answer.endswith(b"late")
    assert b"short" not in answer


async def test_a_server_ends_without_an_error_though_an_idle_client_says_no_goodbye(
    tls: TlsConfig, caplog: pytest.LogCaptureFixture
) -> None:
    anybody = ssl._create_unverified_context()
    async with running(Site(tls=tls)) as site:
        # It reads when it asks, as clients do that keep their connections for the next request.
        idle = HTTPSConnection("127.0.0.1", site.server._port, context=anybody)
        await asyncio.to_thread(idle.request, "GET", "/")
        assert await asyncio.to_thread(lambda: idle.getresponse().read()) == b"short"
        await site.server.stop()
        assert not site.connections
        idle.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_what_escapes_is_logged_without_its_message(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await site.connect()
    writer.write(asking("/broken"))
    assert b" 500 " in await reader.readline()
    assert "Exception in ASGI application" in caplog.text
    assert "builtins.RuntimeError" in caplog.text
    assert "in _broken" in caplog.text
    assert "my secret prompt" not in caplog.text


def test_the_page_of_limits_has_what_is_fixed() -> None:
    page = (ROOT / "docs" / "limits.md").read_text().partition("## Over HTTP")[2]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")][1:]
    assert [limit.strip() for _, limit in rows] == [
        "`server.max_connections`, beside gRPC's",
        f"{http_connection.HANDSHAKE_SECONDS:g} s",
        f"{h11_impl.DEFAULT_MAX_INCOMPLETE_EVENT_SIZE // 1024} KiB",
        f"{http_connection.HEAD_SECONDS:g} s",
        "`server.max_message`",
        f"{exchange.BODY_SECONDS:g} s",
        "0",
        "`server.reader_timeout`",
        f"{parameters.MAX_CHOICES}",
        f"{memory.MAX_ANSWER_ENTRIES:,}",
        f"{memory.MAX_TENANT_ENTRIES:,}",
        f"{memory.MAX_ENTRIES:,}",
        f"{viewers.MAX_VIEWERS}",
    ]
    assert "each MiB" in page
    assert exchange.PART_BYTES == 2**20
