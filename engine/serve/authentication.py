"""No gRPC call without a caller: what stands in front of every method of every service.

It knows what is open and takes all else to be closed, so that what is added later is closed too.
`doorkeeper` does the same for HTTP.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from engine.serve import health
from engine.serve.access import Access
from engine.serve.errors import Refused, abort_with
from engine.serve.failures import Failures

MAX_OPEN_CALLS = 512  # of health, at once: anybody may make them, and nothing else counts them


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Ends every gRPC call whose caller is unknown, of whatever service; only health is open.

    It comes before `ErrorInterceptor`, which reads the call's message: of who is unknown, nothing
    is read.

    Args:
      access: tells callers apart.
      failures: calls that it ends are counted here.
    """

    def __init__(self, access: Access, failures: Failures):
        self._access = access
        self._failures = failures
        self._num_open = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        service = path.removeprefix("/").rpartition("/")[0]
        if handler is None:
            return handler
        kind = "_".join(
            "stream" if streams else "unary"
            for streams in (handler.request_streaming, handler.response_streaming)
        )
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        guarded = self._counted if service == health.SERVICE_NAME else self._guarded
        return make(
            guarded(getattr(handler, kind), path),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: Callable[..., Any], path: str) -> Callable[..., Any]:
        """The method, for known callers. gRPC tells methods that yield from those that write."""
        if inspect.isasyncgenfunction(method):

            async def yielding(request: Any, context: grpc.aio.ServicerContext) -> Any:
                await self._check(context, path)
                async for response in method(request, context):
                    yield response

            return yielding

        async def writing(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._check(context, path)
            return await method(request, context)

        return writing

    def _counted(self, method: Callable[..., Any], path: str) -> Callable[..., Any]:
        """An open method, for so many calls at once."""

        async def writing(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if self._num_open >= MAX_OPEN_CALLS:
                refused = Refused(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{MAX_OPEN_CALLS} calls of {health.SERVICE_NAME} are in progress, and this "
                    "server takes no more at once; try again",
                    retry_after=1.0,
                )
                await self._refuse(refused, context, path)
            self._num_open += 1
            try:
                return await method(request, context)
            finally:
                self._num_open -= 1

        return writing

    async def _check(self, context: grpc.aio.ServicerContext, path: str) -> None:
        try:
            self._access.caller(context)
            return
        except Refused as refused:
            error = refused
        await self._refuse(error, context, path)

    async def _refuse(self, error: Refused, context: grpc.aio.ServicerContext, path: str) -> None:
        self._failures.add("grpc", path, error.code.name)
        await abort_with(context, error)
