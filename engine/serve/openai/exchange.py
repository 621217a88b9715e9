"""One HTTP request and its answer, over ASGI: limits on the way in, backpressure on the way out.

Bodies are read piece by piece, up to a size and within a time. Events are sent one by one, each
when the client has room for it. Who leaves is noticed at once, and who takes nothing is let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from engine.serve.calls import Calls
from engine.serve.errors import Refused
from engine.serve.failures import FAILED
from engine.serve.http_connection import drop
from engine.serve.openai.errors import HttpRefused, problem_of

BODY_SECONDS = 30.0  # within which a request's body must have arrived
PART_BYTES = 2**20  # of an answer, each of which must be taken within `server.reader_timeout`


class ClientGone(Exception):
    """Nobody waits for the answer any more, or nobody takes it."""


class Exchange:
    """One request and its answer.

    Args:
      calls: says for how long a client may take nothing.
      scope, receive, send: as ASGI has them.

    Attributes:
      request: its head, and parameters of its path.
      path_of: what its body calls a field that the engine calls so, once that is read.
    """

    def __init__(self, calls: Calls, scope: Scope, receive: Receive, send: Send):
        self._calls = calls
        self.request = Request(scope)
        self._receive = receive
        self._send = send
        self._has_begun = self._has_ended = False
        self.path_of: Callable[[str], str] = str

    async def run(self, handle: Callable[[Exchange], Awaitable[None]]) -> None:
        """Answer by `handle`, or with the error that it raises."""
        try:
            try:
                await handle(self)
            except ClientGone:
                raise
            except Exception as error:
                await self._fail(error)
        except ClientGone:
            await drop(self.request.scope)

    async def read_json(self, limit: int) -> bytes:
        """The request's body.

        Args:
          limit: bytes that are taken.

        Raises:
          HttpRefused: it is larger, says that it is not JSON, or takes too long to arrive.
          ClientGone: the client left before all of it was there.
        """
        headers = self.request.headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Also what keeps foreign pages out: a browser asks us first before it sends JSON.
            raise HttpRefused(
                415, f"content-type is {kind!r:.80}; send JSON with content-type: application/json"
            )
        length = headers.get("content-length", "")
        is_number = length.isascii() and length.isdigit()
        if is_number and (len(length) > 15 or int(length) > limit):
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise HttpRefused(
                408, f"the body did not arrive within {BODY_SECONDS:g} seconds; send it at once"
            ) from None

    async def unless_gone[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Do work for as long as the client is there; its body must have been read.

        Raises:
          ClientGone: it left; the work was cancelled, and has ended.
        """
        working = asyncio.create_task(work)
        leaving = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not (working.done() or self._has_ended):
                raise ClientGone
            return await working
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def reply(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send a whole answer in JSON, and see that nearly all of it is taken: until then its call
        is in progress.

        Raises:
          ClientGone: the client takes it too slowly.
        """
        headers = {"content-length": str(len(body)), **(headers or {})}
        await self._begin(status, "application/json", headers)
        for start in range(0, len(body), PART_BYTES):
            await self._write(body[start : start + PART_BYTES], more=True)
        await self._write(b"", more=False)  # waits until the buffer is nearly empty

    async def begin_events(self) -> None:
        """Begin a stream of events: they can be sent from here on, and no other answer."""
        await self._begin(200, "text/event-stream; charset=utf-8", {"cache-control": "no-store"})

    async def event(self, data: bytes) -> None:
        """Send an event, which has no line breaks in it, when there is room for it.

        Raises:
          ClientGone: the client takes nothing.
        """
        await self._write(b"data: %s\n\n" % data, more=True)

    async def end_events(self) -> None:
        """End the stream."""
        await self._write(b"", more=False)

    async def _fail(self, error: Exception) -> None:
        """Tell the client of an error; in a stream, as its last event."""
        problem = problem_of(error, self.path_of)
        if self._has_begun:
            self.request.scope[FAILED] = problem.status
            await self.event(problem.body)
            await self.end_events()
            return
        # What is left of the body is read and forgotten, for as long as a head may take: a client
        # that still sends would not get the answer if the connection were closed.
        await self.reply(problem.body, problem.status, dict(problem.headers))

    async def _begin(self, status: int, media_type: str, headers: dict[str, str]) -> None:
        self._has_begun = True
        headers = {"content-type": media_type, **headers}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._put({"type": "http.response.start", "status": status, "headers": pairs})

    async def _write(self, body: bytes, *, more: bool) -> None:
        self._has_ended = not more
        await self._put({"type": "http.response.body", "body": body, "more_body": more})

    async def _put(self, message: Message) -> None:
        """Send when the client has taken enough of what was sent before."""
        try:
            await self._calls.taken(self._send(message))
        except (Refused, OSError):
            raise ClientGone from None

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _too_large(limit: int) -> HttpRefused:
    return HttpRefused(
        413,
        f"the body is larger than {limit} bytes (server.max_message), which is all that is taken; "
        "send less at once",
    )
