"""The page that shows the pool, and its live stream, as routes of the HTTP side.

It shows the requests of all tenants, so it is for operators (`Doorkeeper`): those with an
operator's key or, where there are no keys, those on this machine.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from engine.core.picture import Frame
from engine.dashboard import page
from engine.dashboard.frames import FORMAT
from engine.dashboard.viewers import TooManyViewers, Viewers
from engine.serve.http_connection import drop

if TYPE_CHECKING:
    from engine.frontend import Engine

STALLED_S = 30.0
"""Seconds after which a viewer that takes no data is let go."""


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
            async with asyncio.timeout(STALLED_S):
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
        elif isinstance(outcome, TimeoutError):
            await drop(scope)
        elif isinstance(outcome, Exception) and not isinstance(outcome, OSError):
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
    name = request.scope["path"].removeprefix("/") or "index.html"
    media_type = page.MEDIA_TYPES[name[name.rindex(".") :]]
    return Response(page.read(name), media_type=media_type, headers={"cache-control": "no-cache"})
