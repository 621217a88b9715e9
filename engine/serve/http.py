"""The HTTP side of a server: the page that shows the pool, and its live stream.

It runs on the event loop of the gRPC server. The page shows the requests of all tenants and has
no authentication, so it listens on this machine alone unless the operator says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.core.picture import Frame
from engine.dashboard import page
from engine.dashboard.frames import FORMAT
from engine.dashboard.viewers import TooManyViewers, Viewers

if TYPE_CHECKING:
    from engine.frontend import Engine

MAX_CONNECTIONS = 128
STALLED_S = 30.0
"""Seconds after which a viewer that takes no data is let go."""

_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; "
    b"img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class Watching:
    """The page and the stream of one engine, as routes of an application."""

    def __init__(self) -> None:
        self.engine: Engine | None = None  # once it is loaded
        self._viewers = Viewers(self._take)

    @property
    def routes(self) -> list[BaseRoute]:
        """What the page needs."""
        files = [Route(f"/{name}", _file, name=name) for name in page.NAMES]
        return [Route("/", _file, name="index.html"), *files, Route("/events", _Events(self))]

    def close(self) -> None:
        """Show nothing any more."""
        self.engine = None
        self._viewers.close()

    async def events(self, send: Send) -> None:
        """Send frames until the engine ends, or the viewer takes no more.

        Raises:
          TooManyViewers: as many watch as may.
          TimeoutError: the viewer takes no data.
        """
        engine = self.engine
        assert engine is not None
        name = engine.model_info().name
        about = {"format": FORMAT, "title": name, "unit": "s", "pools": [{"name": name}]}
        async with self._viewers.watch() as frames:
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await _send_event(send, "about", json.dumps(about).encode())
            async for frame in frames:
                await _send_event(send, "frame", frame)
            await _send_event(send, "end", b"{}")
            await send({"type": "http.response.body", "body": b""})

    async def _take(self) -> Frame:
        assert self.engine is not None
        return await self.engine.picture()


class _Events:
    """The stream as an application of its own, so that a viewer that leaves is noticed at once."""

    def __init__(self, watching: Watching):
        self._watching = watching

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._watching.engine is None:
            return await _not_now("the server is still loading its model")(scope, receive, send)
        sending = asyncio.create_task(self._watching.events(send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            outcome = (await asyncio.gather(sending, return_exceptions=True))[0]
        if isinstance(outcome, TooManyViewers):
            await _not_now(str(outcome))(scope, receive, send)
        elif isinstance(outcome, Exception) and not isinstance(outcome, (OSError, TimeoutError)):
            raise outcome


def _not_now(why: str) -> Response:
    return PlainTextResponse(f"{why}\n", 503, {"retry-after": "5"})


async def _send_event(send: Send, event: str, data: bytes) -> None:
    body = b"event: %s\ndata: %s\n\n" % (event.encode(), data)
    async with asyncio.timeout(STALLED_S):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _file(request: Request) -> Response:
    """One of the page's files."""
    name = request.url.path.removeprefix("/") or "index.html"
    media_type = page.MEDIA_TYPES[name[name.rindex(".") :]]
    return Response(page.read(name), media_type=media_type, headers={"cache-control": "no-cache"})


class Guard:
    """Refuses names that aren't this server's, and sets the headers that keep a page to itself.

    A site may point its own name at this machine (DNS rebinding), and its scripts could then read
    every answer. The `Host` that a browser sends still has that name in it.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]):
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there are no other kinds here

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS.items()]
            await send(message)

        hosts = [value for key, value in scope["headers"] if key == b"host"]
        app = self._app
        if len(hosts) != 1 or not self._is_ours(hosts[0].decode("latin-1")):
            app = PlainTextResponse("the Host header names another server\n", 421)
        await app(scope, receive, send_guarded)

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        with contextlib.suppress(ValueError):  # a number can't be pointed elsewhere
            return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
        return name.lower() in self._names


def make_app(routes: list[BaseRoute], host: str) -> Starlette:
    """The application of these routes, for a server that listens on `host`."""
    names = frozenset(("localhost", host.lower(), socket.gethostname().lower()))
    return Starlette(routes=routes, middleware=[Middleware(Guard, names=names)])


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to who runs this."""
        yield


class HttpServer:
    """Serves an application over HTTP/1.1, on the event loop it is started on."""

    def __init__(self, app: Starlette, host: str, port: int):
        self._app = app
        self._host, self._port = host, port
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host = self._host
        with contextlib.suppress(ValueError):
            if (ip := ipaddress.ip_address(host)).is_unspecified:
                host = "127.0.0.1" if ip.version == 4 else "::1"
        return f"http://[{host}]:{self._port}/" if ":" in host else f"http://{host}:{self._port}/"

    async def start(self) -> None:
        """Listen.

        Raises:
          OSError: the port is busy, or the host is not one of this machine.
        """
        family, kind, protocol, _, address = socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # so that nobody is refused until uvicorn accepts
        except OSError:
            listener.close()
            raise
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def stop(self) -> None:
        """Stop listening, and end what is on its way."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
