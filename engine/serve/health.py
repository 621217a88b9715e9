"""``grpc.health.v1.Health``: whether each service serves, for whoever asks or watches.

Anybody may call it, so it waits for no client: a state is set at once, and each watcher is told on
its own call. (grpcio-health-checking's servicer writes to watchers under the lock that setting a
state takes, so that one who doesn't read stops all others, and the server's end.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2 as pb

from engine.serve.errors import Refused

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Health"].full_name
MAX_WATCHERS = 256  # calls of Watch at once

_SERVING = pb.HealthCheckResponse.SERVING
_NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService:
    """Serves the calls; everything runs on one event loop.

    Args:
      services: whose health it tells, beside that of the whole server, whose name is empty.
      taken: awaits that a watcher takes what it is told, and lets go of one that doesn't
        (`Calls.taken`).
    """

    def __init__(
        self, services: Iterable[str], taken: Callable[[Awaitable[None]], Awaitable[None]]
    ):
        self._services = frozenset(("", *services))
        self._taken = taken
        self._is_serving = False
        self._has_ended = False
        self._changed = asyncio.Event()  # another one after each change
        self._num_watchers = 0

    def set(self, *, is_serving: bool) -> None:
        """Say whether all services serve; not after `end`."""
        if is_serving != self._is_serving and not self._has_ended:
            self._is_serving = is_serving
            self._changed.set()
            self._changed = asyncio.Event()

    def end(self) -> None:
        """Nothing serves any more."""
        self.set(is_serving=False)
        self._has_ended = True

    async def Check(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        if request.service not in self._services:
            raise Refused(
                grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r:.80} here"
            )
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> None:
        if self._num_watchers >= MAX_WATCHERS:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_WATCHERS} calls of Watch are in progress, and this server takes no more; "
                "call Check instead",
                retry_after=60.0,
            )
        self._num_watchers += 1
        try:
            await self._tell(request.service, context)
        finally:
            self._num_watchers -= 1

    async def _tell(self, service: str, context: Any) -> None:
        """Tell a watcher every change, until it leaves."""
        told = None
        while True:
            changed, status = self._changed, self._status(service)
            if status != told:
                told = status
                await self._taken(context.write(pb.HealthCheckResponse(status=status)))
            await changed.wait()

    def _status(self, service: str) -> pb.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self._is_serving else _NOT_SERVING
