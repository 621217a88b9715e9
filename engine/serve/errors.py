"""Exceptions to gRPC statuses, in one place: codes, messages and machine-readable details.

Clients learn what was given, the limit and the way out; they never see a traceback. The
details follow google.rpc's error model (https://google.aip.dev/193).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.sampling import InvalidRequest
from engine.types import QueueFull

log = logging.getLogger("octavo.serve")

# Metadata is limited to 8 KiB by default, and the message travels twice.
MAX_MESSAGE_CHARS = 1000
DETAILS_KEY = "grpc-status-details-bin"

_SAMPLING_FIELDS = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)


class Refused(Exception):
    """A call that ends with a status of its own.

    Args:
      code: the status.
      message: what was given, the limit and the way out.
      retry_after: seconds after which it may be tried again, if waiting helps.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


def status_of(error: Exception) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The status that tells a client about an exception.

    What is not one of ours is INTERNAL, without its message: that may quote a prompt.
    """
    retry_after = None
    details: Any = None
    match error:
        case InvalidRequest():
            path = _path(error.field)
            code, message = grpc.StatusCode.INVALID_ARGUMENT, f"{path}: {error.message}"
            details = error_details_pb2.BadRequest()
            details.field_violations.add(field=path, description=error.message)
        case QueueFull():
            code, message = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
            retry_after = error.retry_after
        case Refused():
            code, message, retry_after = error.code, str(error), error.retry_after
        case _ if _is_engine_stopped(error):
            code = grpc.StatusCode.UNAVAILABLE
            message = "the engine of this server has stopped; its log says why. Try another server"
        case _:
            code, message = grpc.StatusCode.INTERNAL, "the server failed; its log says why"
    if retry_after is not None:
        details = error_details_pb2.RetryInfo()
        details.retry_delay.FromNanoseconds(round(retry_after * 1e9))
    status = status_pb2.Status(code=code.value[0], message=message[:MAX_MESSAGE_CHARS])
    if details is not None:
        status.details.add().Pack(details)
    return code, status


def _is_engine_stopped(error: Exception) -> bool:
    # Imported here: a server listens before it loads the engine's modules. Whoever raised the
    # error has paid for them.
    from engine.frontend import EngineStopped

    return isinstance(error, EngineStopped)


def _path(field: str) -> str:
    """A field of the vocabulary as a path in the request message."""
    if field == "prompt_ids":  # the name in Python and in batch files
        return "token_ids"
    name = field.partition("[")[0]
    return f"sampling.{field}" if name in _SAMPLING_FIELDS else field


async def abort_with(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End a call with the status of an exception; log the exception if it is unexpected."""
    code, status = status_of(error)
    if code is grpc.StatusCode.INTERNAL and not isinstance(error, Refused):
        log.error("a call failed", exc_info=error)
    metadata = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(code, status.message, trailing_metadata=metadata)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends every failing call of our own services with the status of its exception.

    It also decodes requests inside the call. gRPC would answer bytes that don't decode (bad
    UTF-8, for one) with UNKNOWN and the decoder's message.
    """

    def __init__(self, services: frozenset[str]):
        self._services = services

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.removeprefix("/").rpartition("/")[0]
        if handler is None or service not in self._services:
            return handler
        if handler.response_streaming:
            make, method = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, method = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        decode = handler.request_deserializer

        async def call(request: bytes, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await method(_decode(decode, request), context)
            except asyncio.CancelledError:
                raise
            except Exception as failure:
                error = failure
            # Outside of the handler, so that the abort's own exception is not caught.
            await abort_with(context, error)

        return make(call, response_serializer=handler.response_serializer)


def _decode(decode: Callable[[bytes], Any], request: bytes) -> Any:
    try:
        return decode(request)
    except DecodeError:
        raise InvalidRequest(
            "request", "is not a valid message; check that its texts are UTF-8"
        ) from None
