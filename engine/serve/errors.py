"""Exceptions to gRPC statuses, in one place: codes, messages and machine-readable details.

Clients learn what was given, the limit and the way out; they never see a traceback. The
details follow google.rpc's error model (https://google.aip.dev/193).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from engine.observe.calls import REQUEST_ID_HEADER, Call, call_of_headers, in_call
from engine.observe.logs import without_message
from engine.sampling import InvalidRequest
from engine.serve.failures import Failures
from engine.types import QueueFull

log = logging.getLogger("octavo.serve")

# Clients take 8 KiB of metadata by default, and reset calls that end with more. There, a message
# stands percent-encoded (a byte may take three), and twice more in the details, in base64.
MAX_MESSAGE_BYTES = 1000
_GOODBYE_SECONDS = 2.0  # in which a client may take the status that ends its call
MESSAGE_SECONDS = 30.0  # within which the message of a call must have arrived
DETAILS_KEY = "grpc-status-details-bin"

# Where a request of a contract has what the engine calls so: a path of the message's own fields.
FieldPath = Callable[[Any, str], str]


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


def status_of(
    error: Exception, path_of: Callable[[str], str] | None = None
) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The status that tells a client about an exception.

    What is not one of ours is INTERNAL, without its message: that may quote a prompt.

    Args:
      error: what ended the call.
      path_of: where the request has a field that the engine calls so; None: there is no request
        that has it, and the details name none.
    """
    retry_after = None
    details: Any = None
    match error:
        case InvalidRequest():
            path = path_of(error.field) if path_of else error.field
            code, message = grpc.StatusCode.INVALID_ARGUMENT, f"{path}: {error.message}"
            if path_of:
                details = error_details_pb2.BadRequest()
                details.field_violations.add(field=path, description=shortened(error.message))
        case QueueFull():
            code, message = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
            retry_after = error.retry_after
        case Refused():
            code, message, retry_after = error.code, str(error), error.retry_after
        case _ if _is_reader_too_slow(error):
            code, message = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        case _ if _is_engine_stopped(error):
            code = grpc.StatusCode.UNAVAILABLE
            message = "the engine of this server has stopped; its log says why. Try another server"
        case _:
            code, message = grpc.StatusCode.INTERNAL, "the server failed; its log says why"
    if retry_after is not None:
        details = error_details_pb2.RetryInfo()
        details.retry_delay.FromNanoseconds(round(retry_after * 1e9))
    status = status_pb2.Status(code=code.value[0], message=shortened(message))
    if details is not None:
        status.details.add().Pack(details)
    return code, status


def shortened(message: str) -> str:
    """The beginning of a message, as long as clients take it."""
    encoded = message.encode("utf-8", "replace")
    return encoded[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore")


def _is_engine_stopped(error: Exception) -> bool:
    # Imported here: a server listens before it loads the engine's modules. Whoever raised the
    # error has paid for them.
    from engine.frontend import EngineStopped

    return isinstance(error, EngineStopped)


def _is_reader_too_slow(error: Exception) -> bool:
    from engine.frontend import ReaderTooSlow

    return isinstance(error, ReaderTooSlow)


async def abort_with(
    context: grpc.aio.ServicerContext,
    error: Exception,
    path_of: Callable[[str], str] | None = None,
) -> NoReturn:
    """End a call with the status of an exception; log where it came from if it is unexpected.

    Its message may quote a prompt, so that is logged at DEBUG only.
    """
    code, status = status_of(error, path_of)
    if code is grpc.StatusCode.INTERNAL and not isinstance(error, Refused):
        log.error("a call failed\n%s", without_message(error))
        log.debug("what it said", exc_info=error)
    metadata = (*(context.trailing_metadata() or ()), (DETAILS_KEY, status.SerializeToString()))
    try:
        async with asyncio.timeout(_GOODBYE_SECONDS):
            await context.abort(code, status.message, trailing_metadata=metadata)
    except TimeoutError:
        # It reads nothing, so it is not told before it does; gRPC keeps the status for it.
        # Its message may quote what the client sent.
        log.warning("a client that takes nothing was not told that its call is %s", code.name)
        raise grpc.aio.AbortError from None


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends every failing call of some services with the status of its exception.

    It also reads and decodes requests inside the call. gRPC reads a unary call's before it calls
    anybody, so half a message would be kept for ever, of whomever; and it would answer bytes that
    don't decode (bad UTF-8, for one) with UNKNOWN and the decoder's message. And it says which call
    it is: by its `x-request-id`, which goes back in the trailing metadata; there stands the name of
    its request where that has another one.

    Args:
      services: whose calls.
      paths: for each message that is more than its own fields to the engine, how it names them.
      failures: calls that ended with an error are counted here.
    """

    def __init__(
        self,
        services: frozenset[str],
        paths: Mapping[type[Message], FieldPath],
        failures: Failures,
    ):
        self._services = services
        self._paths = paths
        self._failures = failures

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        service = path.removeprefix("/").rpartition("/")[0]
        if handler is None or service not in self._services:
            return handler
        if handler.response_streaming:
            make, method = grpc.stream_stream_rpc_method_handler, handler.unary_stream
        else:
            make, method = grpc.stream_unary_rpc_method_handler, handler.unary_unary
        decode = handler.request_deserializer

        async def call(_: Any, context: grpc.aio.ServicerContext) -> Any:
            described = Call()
            path_of: Callable[[str], str] | None = None
            try:
                described = call_of_headers(context.invocation_metadata() or ())
                with in_call(described):
                    request = _decode(decode, await _message(context))
                    path_of = functools.partial(self._paths.get(type(request), _as_it_is), request)
                    reply = await method(request, context)
                _name(context, described)
                return reply
            except (asyncio.CancelledError, grpc.aio.AbortError):  # or it said so itself
                raise
            except Exception as failure:
                error = failure
            self._failures.add("grpc", path, status_of(error)[0].name)
            _name(context, described)
            # Outside of the handler, so that the abort's own exception is not caught.
            with in_call(described):
                await abort_with(context, error, path_of)

        return make(call, response_serializer=handler.response_serializer)


def _as_it_is(_: Message, field: str) -> str:
    return field


def _name(context: grpc.aio.ServicerContext, call: Call) -> None:
    if call.request_id is not None:
        context.set_trailing_metadata(((REQUEST_ID_HEADER, call.request_id),))


async def _message(context: grpc.aio.ServicerContext) -> bytes:
    """The one message of a call."""
    try:
        async with asyncio.timeout(MESSAGE_SECONDS):
            message = await context.read()
    except TimeoutError:
        raise Refused(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"the request did not arrive within {MESSAGE_SECONDS:g} s; send it at once",
        ) from None
    if not isinstance(message, bytes):  # gRPC's mark of the stream's end
        raise InvalidRequest("request", "is missing; send one message")
    return message


def _decode(decode: Callable[[bytes], Any], request: bytes) -> Any:
    try:
        return decode(request)
    except DecodeError:
        raise InvalidRequest(
            "request", "is not a valid message; check that its texts are UTF-8"
        ) from None
