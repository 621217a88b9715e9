"""HTTP connections, of which there are only so many, and which don't wait for ever: for a request's
head, or for an answer's reader.

uvicorn has a limit for idle connections after an answer only: one that sends nothing, or a header
line a minute, would keep its place until it likes to go. Nor does it close one that is too many: it
answers it, and everybody else then, with 503.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any
from weakref import WeakSet

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""For the head of a request, from the opening of the connection or the answer before it; within it,
that answer's rest must be taken. More than clients keep idle connections."""
HANDSHAKE_SECONDS = 10.0  # of TLS, as on gRPC's side


async def drop(scope: Scope) -> None:
    """End the connection of a request, with what its client doesn't take: a mere close would wait
    until it does."""
    if abort := scope.get("state", {}).get("abort_connection"):
        abort()
        await asyncio.sleep(0)  # the server learns of it before the request ends


class Listener(socket.socket):
    """Has at most so many connections open, and closes each that comes while it has. They count
    from when they are accepted: a handshake that doesn't end holds a descriptor as well.

    Args:
      most: connections.
      family, kind, protocol: as sockets have them.
    """

    def __init__(self, most: int, family: int, kind: int, protocol: int):
        super().__init__(family, kind, protocol)
        self._most = most
        self._open: WeakSet[_Accepted] = WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. Raises ConnectionAbortedError if there is no place for it, after
        which asyncio sees to others before it asks again."""
        plain, address = super().accept()
        if len(self._open) >= self._most:
            plain.close()
            raise ConnectionAbortedError(f"{self._most} connections are open already")
        return _Accepted(self._open, plain.detach()), address


class _Accepted(socket.socket):
    """One of those that are open, until it is closed."""

    def __init__(self, all_open: WeakSet[_Accepted], descriptor: int):
        super().__init__(fileno=descriptor)
        self._all_open = all_open
        all_open.add(self)

    def close(self) -> None:
        self._all_open.discard(self)
        super().close()


class Connection(H11Protocol):
    """One connection, which `drop` can end.

    Who sends a request before the answer to the one before it (pipelining) gets no answer to that,
    and a closed connection after the first, as HTTP lets a server do; clients send it again.
    uvicorn would stop reading, and so not hear that a client leaves.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "abort_connection": self._abort}
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[bad-override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_answering():
            self.cycle.keep_alive = False
            return
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a head is complete
            self._stop_waiting()
        if self._is_answering() and self.conn.trailing_data[0]:
            self.cycle.keep_alive = False
            self.flow.resume_reading()

    def _is_answering(self) -> bool:
        """Whether a whole request is here, and its answer is not all sent."""
        cycle = self.cycle
        return cycle is not None and not (cycle.more_body or cycle.response_complete)

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before:  # the next request is not here yet
            self._wait_for_head()

    def end_if_idle(self) -> None:
        """End it, unless an answer is being made; what is not taken of one before is lost."""
        if self.cycle is None or self.cycle.response_complete:
            self._abort()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self) -> None:
        self.transport.abort()
