"""The HTTP side of a server: an application of the routes that it is given, and who serves it.

It runs on the event loop of the gRPC server. A caller meets `Guard` first, then `Doorkeeper`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.observe.calls import REQUEST_ID_HEADER, Call, call_of_headers, in_call
from engine.observe.logs import without_message
from engine.sampling import InvalidRequest
from engine.serve.access import CERTIFICATE_NAMES, Access
from engine.serve.credentials import names_in_certificate
from engine.serve.doorkeeper import Doorkeeper
from engine.serve.files import Watched
from engine.serve.http_connection import (
    HANDSHAKE_SECONDS,
    HEAD_SECONDS,
    Connection,
    Listener,
)
from engine.serve.openai.errors import HttpRefused, problem_of
from engine.serve.tls import Identity, http_context

_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; "
    b"img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}

_GOODBYE_SECONDS = 0.5  # at the server's end, for the rest of answers and for TLS; uvicorn has 1 s
_ANOTHER_HOST = (
    "the Host header names another server; reach this one by its address, or give its clients keys "
    "(server.access): then any name will do"
)


class Guard:
    """Refuses names that aren't this server's, and sets the headers that keep a page to itself;
    says which call it is, by its `x-request-id`, and sends that back.

    A site may point its own name at this machine (DNS rebinding), and its scripts could then read
    every answer. The `Host` that a browser sends still has that name in it.

    Args:
      app: answers what is not refused.
      names: this server's; None: any.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str] | None):
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there are no other kinds here

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS.items()]
                named = {key.lower() for key, _ in message["headers"]}
                if call.request_id is not None and REQUEST_ID_HEADER.encode() not in named:
                    name = REQUEST_ID_HEADER.encode(), call.request_id.encode()
                    message["headers"].append(name)
            await send(message)

        app, call = self._app, Call()
        try:
            call = call_of_headers((key.decode("latin-1"), text) for key, text in scope["headers"])
        except InvalidRequest as error:
            app = _refusal(error)
        hosts = [value for key, value in scope["headers"] if key == b"host"]
        if len(hosts) != 1 or not self._is_ours(hosts[0].decode("latin-1")):
            app = _refusal(HttpRefused(421, _ANOTHER_HOST))
        with in_call(call):
            await app(scope, receive, send_guarded)

    def _is_ours(self, host: str) -> bool:
        if self._names is None:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        with contextlib.suppress(ValueError):  # a number can't be pointed elsewhere
            return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
        return name.lower() in self._names


def _refusal(error: Exception) -> Response:
    """As OpenAI's clients read it."""
    problem = problem_of(error)
    return Response(problem.body, problem.status, problem.headers, "application/json")


def make_app(
    routes: list[BaseRoute], host: str, access: Access, *, is_public: bool = False
) -> Starlette:
    """The application of these routes, for a server that listens on `host`.

    Args:
      routes: what it answers.
      host: a name of the server.
      access: tells callers apart.
      is_public: see `Doorkeeper`.
    """
    # Who needs a key is safe from another's name: a browser sends a key to the name that it is for.
    names = frozenset(("localhost", host.lower(), socket.gethostname().lower()))
    middleware = [
        Middleware(Guard, names=None if access.is_required else names),
        Middleware(Doorkeeper, access=access, is_public=is_public),
    ]
    return Starlette(routes=routes, middleware=middleware)


class _WithoutMessages(logging.Filter):
    """uvicorn logs what escapes an application with its message, which may quote a prompt."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and (error := record.exc_info[1]) is not None:
            record.msg = f"{record.getMessage().strip()}\n{without_message(error)}"
            record.args, record.exc_info = (), None
        return True


_without_messages = _WithoutMessages()


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to who runs this."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. uvicorn's own would leave a handshake a minute."""
        loop, context = asyncio.get_running_loop(), self.config.ssl
        self.servers = [
            await loop.create_server(
                lambda: _Protocol(self.config, self.server_state, {}, loop),
                sock=each,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if context is not None else None,
            )
            for each in sockets or ()
        ]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own waits until TLS clients say goodbye, which idle ones don't, and then logs
        an error: end their connections before that."""
        ending = asyncio.ensure_future(super().shutdown(sockets))
        await asyncio.wait((ending,), timeout=_GOODBYE_SECONDS)
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.end_if_idle()
        await ending


class _Protocol(Connection):
    """Tells the application whom a client's certificate names."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if certificate := transport.get_extra_info("peercert"):
            names = names_in_certificate(certificate)
            self.app_state = {**self.app_state, CERTIFICATE_NAMES: names}


class HttpServer:
    """Serves an application over HTTP/1.1, on the event loop it is started on.

    Args:
      app: what it serves.
      host, port: where it listens; port 0 takes a free one.
      max_connections: of clients at once; one more is closed.
      identity: for TLS; None: without.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        max_connections: int = 1024,
        identity: Watched[Identity] | None = None,
    ):
        self._app = app
        self._max_connections = max_connections
        self._identity = identity
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
        scheme = "http" if self._identity is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._port}/"

    async def start(self) -> None:
        """Listen.

        Raises:
          OSError: the port is busy, or the host is not one of this machine.
        """
        family, kind, protocol, _, address = socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = Listener(self._max_connections, family, kind, protocol)
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
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(HEAD_SECONDS),
            timeout_graceful_shutdown=1,
        )
        if self._identity is not None:
            identity = self._identity
            config.ssl_context_factory = lambda *_: http_context(identity)
        logging.getLogger("uvicorn.error").addFilter(_without_messages)
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def stop(self) -> None:
        """Stop listening, and end what is on its way."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
