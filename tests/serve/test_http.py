"""The page over HTTP: its files and headers, its stream, and whom it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Message

from engine.core.picture import Frame, take_picture
from engine.dashboard import page, viewers
from engine.serve import watching
from engine.serve.server import AddressUnavailable, Server, join
from engine.server_config import ServerConfig, http_address
from tests.core.driver import Driver, make_request
from tests.dashboard.reader import Reader
from tests.serve.fake_engine import FakeEngine, until


class WatchedEngine(FakeEngine):
    """Shows a scheduler that goes on by a step with each picture.

    Where `due` is set, each picture waits until the test releases it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(max_waiting=100_000)
        self.pictures: list[Frame] = []
        self.due: asyncio.Semaphore | None = None

    async def picture(self) -> Frame:
        if self.due is not None:
            await self.due.acquire()
        number = len(self.pictures)
        self.driver.admit(make_request(f"r{number}", 5, max_tokens=3))
        self.driver.step()
        self.pictures.append(Frame(take_picture(self.driver.state), float(number), number, 0))
        return self.pictures[-1]


class Reply:
    """An answer that is read bit by bit, without a client library between."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    async def read_head(self) -> None:
        self.status = int((await self.reader.readline()).split()[1])
        while line := (await self.reader.readline()).decode().strip():
            name, _, value = line.partition(": ")
            self.headers[name.lower()] = value

    async def body(self) -> bytes:
        return await self.reader.readexactly(int(self.headers["content-length"]))

    async def event(self) -> tuple[str, Any]:
        """The next event of a stream: its name and its data."""
        lines: list[bytes] = []
        while not lines or lines[-1] != b"\n":
            size = int(await self.reader.readline(), 16)
            chunk = await self.reader.readexactly(size + 2)
            lines += chunk[:-2].splitlines(keepends=True)
            if not size:
                raise EOFError
        event, data = (line.decode().strip().partition(": ")[2] for line in lines[:2])
        return event, json.loads(data)

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """All events to the end of the stream."""
        with contextlib.suppress(EOFError):
            while True:
                yield await self.event()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


_replies: list[Reply] = []


async def request(
    server: Server, path: str = "/", *, method: str = "GET", hosts: tuple[str, ...] | None = None
) -> Reply:
    assert server.page is not None
    port = int(server.page.rsplit(":", 1)[1].strip("/"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    hosts = (f"127.0.0.1:{port}",) if hosts is None else hosts
    lines = [f"{method} {path} HTTP/1.1", *(f"Host: {host}" for host in hosts), "", ""]
    writer.write("\r\n".join(lines).encode())
    reply = Reply(reader, writer)
    _replies.append(reply)
    await reply.read_head()
    return reply


@pytest.fixture
def engine() -> WatchedEngine:
    return WatchedEngine()


@pytest.fixture(autouse=True)
async def _quick(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(viewers, "INTERVAL_S", 0.005)
    yield
    while _replies:
        await _replies.pop().close()


@pytest.fixture
async def server(engine: WatchedEngine) -> AsyncIterator[Server]:
    server = Server(ServerConfig(port=0, grace=0.05, http="127.0.0.1:0"))
    await server.start()
    await server.set_engine(engine)
    yield server
    await server.stop()


@pytest.mark.parametrize("name", ["", *page.NAMES])
async def test_every_file_is_served_as_what_it_is(server: Server, name: str) -> None:
    reply = await request(server, f"/{name}")
    assert reply.status == 200
    assert await reply.body() == page.read(name or "index.html")
    suffix = (name or "index.html").rpartition(".")[2]
    assert reply.headers["content-type"] == page.MEDIA_TYPES[f".{suffix}"]
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/static/", "/frames.py", "/%2e%2e/page.py"]
)
async def test_nothing_else_is_served(server: Server, path: str) -> None:
    reply = await request(server, path)
    assert reply.status == 404
    assert "content-security-policy" in reply.headers


async def test_files_are_only_read(server: Server) -> None:
    reply = await request(server, "/", method="POST")
    assert reply.status == 405


async def test_the_stream_begins_with_the_whole_and_goes_on_with_changes(
    server: Server, engine: WatchedEngine
) -> None:
    engine.due = asyncio.Semaphore(0)
    reply = await request(server, "/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert await reply.event() == (
        "about",
        {"format": 1, "title": "echo", "unit": "s", "pools": [{"name": "echo"}]},
    )
    reader = Reader()
    wholes = []
    for _ in range(8):
        engine.due.release()
        event, frame = await reply.event()
        assert event == "frame"
        wholes.append("pool" in frame)
        reader.apply(frame)
        reader.check(engine.pictures[int(frame["time"])])
    assert wholes == [True] + [False] * 7


async def test_a_viewer_that_leaves_is_forgotten_and_the_engine_left_alone(
    server: Server, engine: WatchedEngine
) -> None:
    reply = await request(server, "/events")
    await reply.event()
    await reply.close()
    watching = server._watching
    assert watching is not None
    await until(lambda: watching._viewers.num_viewers == 0)
    taken = len(engine.pictures)
    await asyncio.sleep(0.05)
    assert len(engine.pictures) == taken


async def test_a_viewer_that_takes_nothing_holds_up_nobody_and_is_let_go(
    server: Server, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = server._watching
    assert shown is not None
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        if b"event: frame" in message.get("body", b""):
            await asyncio.Event().wait()  # its buffers are full
        if b"event: about" in message.get("body", b""):
            monkeypatch.setattr(watching, "STALLED_S", 0.2)  # for what comes next

    other = await request(server, "/events")
    with pytest.raises(TimeoutError):
        await shown.events(send)
    assert len(sent) == 3  # the head, what the page is about, and one frame
    taken = len(engine.pictures)
    await until(lambda: len(engine.pictures) > taken)  # for the other, who is held up by nobody
    assert shown._viewers.num_viewers == 1
    await other.close()


async def test_a_viewer_that_takes_nothing_loses_its_connection(
    server: Server, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "STALLED_S", 0.1)
    assert server._watching is not None
    dropped = asyncio.Event()

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "state": {"abort_connection": dropped.set}}
    await watching._Events(server._watching)(scope, never, never)
    assert dropped.is_set()


async def test_one_viewer_too_many_is_told_to_come_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = server._watching
    assert watching is not None
    monkeypatch.setattr(watching._viewers, "_max_viewers", 1)
    first = await request(server, "/events")
    await first.event()
    second = await request(server, "/events")
    assert second.status == 503
    assert second.headers["retry-after"] == "5"
    assert b"1 watch already" in await second.body()


async def test_while_the_model_loads_there_is_a_page_but_no_stream() -> None:
    server = Server(ServerConfig(port=0, http="127.0.0.1:0"))
    await server.start()
    try:
        assert (await request(server, "/")).status == 200
        reply = await request(server, "/events")
        assert reply.status == 503
        assert b"still loading" in await reply.body()
    finally:
        await server.stop()


@pytest.mark.parametrize(
    "hosts",
    [("evil.example",), ("evil.example:80",), ("localhost.evil.example",), (), ("",), ("a",) * 2],
)
async def test_another_name_that_points_here_is_refused(
    server: Server, hosts: tuple[str, ...]
) -> None:
    reply = await request(server, "/events", hosts=hosts)
    assert reply.status in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80"])
async def test_this_machine_by_its_own_names_is_served(server: Server, host: str) -> None:
    reply = await request(server, "/", hosts=(host,))
    assert reply.status == 200


async def test_the_server_stops_although_somebody_watches(engine: WatchedEngine) -> None:
    server = Server(ServerConfig(port=0, grace=0.05, http="127.0.0.1:0"))
    await server.start()
    await server.set_engine(engine)
    reply = await request(server, "/events")
    await reply.event()
    await server.stop()
    events = [name async for name, _ in reply.events()]
    assert events[-1] == "end"


async def test_a_busy_port_of_the_page_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Server(ServerConfig(port=0, http=join(*taken.getsockname())))
        with pytest.raises(AddressUnavailable, match=r"can't serve HTTP on http://127.*--http"):
            await server.start()
        await server.stop()


async def test_a_server_without_a_page_opens_no_port_for_one() -> None:
    server = Server(ServerConfig(port=0))
    await server.start()
    assert server.page is None
    await server.stop()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8080", ("127.0.0.1", 8080)),
        ("localhost:0", ("localhost", 0)),
        ("127.0.0.2:65535", ("127.0.0.2", 65535)),
        ("[::1]:8080", ("::1", 8080)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
    ],
)
def test_addresses_are_read(text: str, address: tuple[str, int]) -> None:
    assert http_address(text) == address


@pytest.mark.parametrize("text", ["", ":80", "host:", "80a", "65536", "::1:80", "-1", "²"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--http is"):
        http_address(text)
