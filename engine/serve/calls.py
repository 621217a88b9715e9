"""What every front end shares: the engine once it is loaded, the calls in progress, and the end.

gRPC services and HTTP routes are written on one `Calls`, so that a limit counts for all of them
together, a name means the same request to each, and a server drains all of them at once. Its
refusals are `Refused`; each front end says them in its own protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from engine.observe.calls import current_call, in_request
from engine.serve.access import Caller
from engine.serve.errors import Refused
from engine.serve.failures import Failures
from engine.serve.rates import check_count
from engine.types import FinishReason

if TYPE_CHECKING:
    from engine.frontend import Engine

log = logging.getLogger("octavo.serve")

_SHUTTING_DOWN = "the server is shutting down; try another one"
_LOADING = "the server is still loading its model; try again when its health is SERVING"


class Calls:
    """The calls of all front ends on one engine. Everything runs on one event loop.

    Args:
      max_concurrent: calls that may be in progress at once, those included whose client left while
        work for them goes on.
      reader_timeout: seconds for which a client may take nothing of what it is sent.

    Attributes:
      failures: calls that ended with an error, of all front ends.
    """

    def __init__(self, max_concurrent: int, reader_timeout: float = 30.0):
        self.failures = Failures()
        self._max_concurrent = max_concurrent
        self._reader_timeout = reader_timeout
        self._engine: Engine | None = None
        self._shutting_down = asyncio.Event()
        self._num_calls = 0
        self._streams: dict[tuple[str, str], str] = {}  # engine's names by tenant and client's name
        self._num_streams: Counter[str | None] = Counter()  # by tenant; None: of all
        self._without: dict[str | None, asyncio.Event] = {}  # for who waits until one has none
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_in_progress(self) -> int:
        """Calls that have not ended."""
        return self._num_calls

    def num_streams(self, tenant: str | None) -> int:
        """Requests in progress, of one tenant or, with None, of all."""
        return self._num_streams[tenant]

    async def without_streams(self, tenant: str | None, timeout: float) -> bool:
        """Whether a tenant, or with None everybody, had no request in progress at one moment within
        `timeout` seconds.

        Raises:
          Refused: UNAVAILABLE, as `engine`; a server that is to end is not held up.
        """
        if self._num_streams[tenant]:
            none = self._without.setdefault(tenant, asyncio.Event())
            try:
                await asyncio.wait_for(none.wait(), timeout)
            except TimeoutError:
                return False
            self.engine()
        return True

    @property
    def unready(self) -> str | None:
        """Why requests should rather go to another server, in words for clients; None if nothing
        speaks against this one."""
        if self._shutting_down.is_set():
            return _SHUTTING_DOWN
        return _LOADING if self._engine is None else self._engine.life.unready

    @property
    def is_paused(self) -> bool:
        """Whether an operator paused the engine."""
        return self._engine is not None and self._engine.life.is_paused

    def set_engine(self, engine: Engine) -> None:
        """Begin to serve."""
        self._engine = engine

    def shut_down(self) -> None:
        """Refuse new calls; those in progress go on."""
        self._shutting_down.set()
        for none in self._without.values():
            none.set()

    def abort_streams(self) -> None:
        """Abort every request in progress."""
        if self._engine is not None:
            for name in tuple(self._streams.values()):
                self._engine.abort(name)

    def abandon_streams(self) -> None:
        """End every request in progress without the step loop, which is stuck."""
        if self._engine is not None:
            self._engine.abandon()

    async def wait_idle(self, timeout: float) -> bool:
        """Whether all calls ended within `timeout` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def engine(self, *, even_late: bool = False) -> Engine:
        """The engine, if it may be called. `even_late`: also while the server shuts down, or its
        device is in trouble.

        Raises:
          Refused: UNAVAILABLE; the server shuts down, has not loaded its model yet, or its device
            hangs or fails.
        """
        if self._shutting_down.is_set() and not even_late:
            raise Refused(grpc.StatusCode.UNAVAILABLE, _SHUTTING_DOWN)
        if self._engine is None:
            raise Refused(grpc.StatusCode.UNAVAILABLE, _LOADING, retry_after=1.0)
        if not even_late and (trouble := self._engine.life.trouble):
            raise Refused(grpc.StatusCode.UNAVAILABLE, trouble, retry_after=1.0)
        return self._engine

    @contextlib.contextmanager
    def call(self, caller: Caller, count: int = 1) -> Iterator[None]:
        """Count a call, or so many at once, while it is in progress.

        Raises:
          Refused: RESOURCE_EXHAUSTED; as many are in progress as may, or its tenant has asked for
            all that it may for now. INVALID_ARGUMENT; so many never may.
        """
        self._begin(caller, count)
        try:
            yield
        finally:
            self._end(caller, count)

    @contextlib.contextmanager
    def stream(self, caller: Caller, request_id: str | None) -> Iterator[tuple[str, str]]:
        """Reserve the name of a caller's request, or choose one, while its stream is open.

        Callers of different tenants may use one name: each means its own request. One that has
        none gets that of its call (`x-request-id`). As proxies send a call again under the same
        name, that is made unique where it is in use.

        Returns:
          The request's name as its client knows it, and as the engine does.

        Raises:
          Refused: ALREADY_EXISTS; the tenant has a request of that name in progress.
        """
        if request_id is None:
            call = current_call.get()
            request_id = call.request_id if call is not None else None
            request_id = request_id or uuid.uuid4().hex
            if (caller.tenant, request_id) in self._streams:
                request_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
        key = (caller.tenant, request_id)
        if key in self._streams:
            raise Refused(
                grpc.StatusCode.ALREADY_EXISTS,
                f"a request named {request_id} is running; choose another request_id, or leave "
                "it out to let the server choose",
            )
        self._streams[key] = name = caller.engine_name(request_id)
        self._num_streams.update((caller.tenant, None))
        try:
            with in_request(request_id, caller.tenant):
                yield request_id, name
        finally:
            del self._streams[key]
            for whose in (caller.tenant, None):
                self._num_streams[whose] -= 1
                if not self._num_streams[whose]:
                    del self._num_streams[whose]
                    if none := self._without.pop(whose, None):
                        none.set()

    def abort(self, caller: Caller, request_id: str) -> bool:
        """End a request of a caller's tenant; others' names mean nothing. Returns whether it was
        running."""
        engine = self.engine(even_late=True)
        name = self._streams.get((caller.tenant, request_id))
        return name is not None and engine.abort(name)

    async def on_thread[T](
        self, caller: Caller, work: Callable[[], T], *, counted: bool = False
    ) -> T:
        """Do the text work of a call on a thread: megabytes take a second, and streams go on.

        It counts as a call, as with `to_its_end`.
        """
        loop = asyncio.get_running_loop()
        return await self.to_its_end(
            caller, lambda: loop.run_in_executor(None, work), counted=counted
        )

    async def to_its_end[T](
        self, caller: Caller, begin: Callable[[], Awaitable[T]], *, counted: bool = False
    ) -> T:
        """Do work that can't be stopped half-way. It counts as a call, as `call` does, unless it is
        part of one that is `counted`.

        The call is in progress until the work ends, not until its client leaves: clients that
        call and cancel could pile up work without end.
        """
        if not counted:
            with self.call(caller):
                return await self.to_its_end(caller, begin, counted=True)

        work = asyncio.ensure_future(begin())
        # Its client may not be there to hear of an error.
        work.add_done_callback(lambda work: work.cancelled() or work.exception())
        try:
            return await asyncio.shield(work)
        finally:
            if not work.done():  # it takes the place that its call gives back now
                self._hold(caller)
                work.add_done_callback(lambda _: self._end(caller, 1))

    async def ends_before_shutdown(self, work: asyncio.Future[Any]) -> bool:
        """Wait for work, which goes on if nobody does, as long as the server is not to end. Returns
        whether it has ended."""
        shutdown = asyncio.ensure_future(self._shutting_down.wait())
        try:
            await asyncio.wait((work, shutdown), return_when=asyncio.FIRST_COMPLETED)
        finally:
            shutdown.cancel()
        return work.done()

    async def taken[T](self, sending: Awaitable[T]) -> T:
        """Await that a client takes what it is sent.

        Raises:
          Refused: RESOURCE_EXHAUSTED; it has taken nothing for too long.
        """
        try:
            async with asyncio.timeout(self._reader_timeout):
                return await sending
        except TimeoutError:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the client has taken nothing of its answer for {self._reader_timeout:g} s "
                "(server.reader_timeout); read on while the answer is made",
            ) from None

    def check_end(self, request_id: str, reasons: set[FinishReason]) -> None:
        """Raise what a client is told of a request of which an answer did not end well.

        Raises:
          Refused: INTERNAL, DEADLINE_EXCEEDED, or UNAVAILABLE if the server shut down or its device
            is in trouble.
        """
        trouble = self._engine.life.trouble if self._engine is not None else None
        if FinishReason.ERROR in reasons and trouble:
            raise Refused(grpc.StatusCode.UNAVAILABLE, trouble, retry_after=1.0)
        if FinishReason.ERROR in reasons or not reasons:
            log.error("request %s ended with %s", request_id, ", ".join(reasons) or "nothing")
            raise Refused(
                grpc.StatusCode.INTERNAL,
                f"the step that carried request {request_id} failed; the server's log says "
                "why, and the server goes on: try again",
            )
        if FinishReason.DEADLINE in reasons:
            raise Refused(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the deadline of the call passed; allow more time or ask for fewer tokens",
            )
        if FinishReason.ABORT in reasons and self._shutting_down.is_set():
            raise Refused(
                grpc.StatusCode.UNAVAILABLE,
                "the server shut down before the answer was complete; try another one",
            )

    def _begin(self, caller: Caller, count: int) -> None:
        """Count calls, or refuse all of them above the server's or their tenant's limits; `_end`
        must follow."""
        check_count(
            count, self._max_concurrent, "this server takes {} at once (server.max_concurrent)"
        )
        if self._num_calls + count > self._max_concurrent:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._num_calls} calls are in progress, and this server takes no more at once "
                "(server.max_concurrent); try again later",
                retry_after=1.0,
            )
        if caller.meter is not None:
            try:
                caller.meter.begin(count)
            except Refused as refused:
                if self._engine is not None and refused.retry_after is not None:
                    self._engine.requests.throttled(caller.tenant)
                raise
        self._num_calls += count
        self._idle.clear()

    def _hold(self, caller: Caller) -> None:
        """Count one more without a limit, for what was let in already; `_end` must follow."""
        if caller.meter is not None:
            caller.meter.hold()
        self._num_calls += 1

    def _end(self, caller: Caller, count: int) -> None:
        if caller.meter is not None:
            caller.meter.end(count)
        self._num_calls -= count
        if not self._num_calls:
            self._idle.set()
