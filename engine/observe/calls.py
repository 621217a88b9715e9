"""Which call a piece of work belongs to: its request's name and tenant, for logs and traces.

A front end says so once, where a call comes in; what is called from there finds it in a context
variable, without an argument on every path. It holds nothing of what the call asks for.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar

from engine.sampling import InvalidRequest

REQUEST_ID_HEADER = "x-request-id"
TRACE_HEADERS = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/

# Visible ASCII only: a name is written to logs, where a line break would forge an entry.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MAX_TRACE_CHARS = 512  # as many as the specification asks of a tracestate


class Call:
    """What is known of a call in progress.

    Attributes:
      request_id: what its client calls it, or once it is named, its request; None before.
      tenant: whose it is, once that is known.
      trace: the caller's trace context, by header.
      given: its `x-request-id`, which a front end may not name the request by.
      operation: what it asks for, as OpenTelemetry calls it: text_completion or chat.
      response_id: what the answer is called where that is not the request's name.
    """

    __slots__ = ("given", "operation", "request_id", "response_id", "tenant", "trace")

    def __init__(
        self,
        request_id: str | None = None,
        tenant: str | None = None,
        trace: Mapping[str, str] | None = None,
        given: str | None = None,
    ):
        self.given = given
        self.operation = "text_completion"
        self.request_id = request_id
        self.response_id: str | None = None
        self.tenant = tenant
        self.trace: Mapping[str, str] = trace or {}


current_call: ContextVar[Call | None] = ContextVar("octavo_call", default=None)


def checked_request_id(text: str, field: str) -> str:
    """A client's name for its request. Raises InvalidRequest, which names the field."""
    if not _REQUEST_ID.fullmatch(text):
        raise InvalidRequest(
            field,
            f"{text!r:.80} must be 1 to 128 visible ASCII characters; "
            "leave it out to let the server choose one",
        )
    return text


def call_of_headers(headers: Iterable[tuple[str, str | bytes]]) -> Call:
    """A call by its metadata or HTTP headers, whose names are in lower case.

    Raises:
      InvalidRequest: its `x-request-id` can't name a request.
    """
    request_id, trace = None, {}
    for name, value in headers:
        if name == REQUEST_ID_HEADER:
            request_id = checked_request_id(_text(value), REQUEST_ID_HEADER)
        elif name in TRACE_HEADERS and len(value) <= _MAX_TRACE_CHARS:
            trace[name] = _text(value)
    return Call(request_id, trace=trace, given=request_id)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


@contextlib.contextmanager
def in_call(call: Call) -> Iterator[None]:
    """What runs inside belongs to a call."""
    token = current_call.set(call)
    try:
        yield
    finally:
        # A generator may be closed from another context than it was started in, which ends then.
        with contextlib.suppress(ValueError):
            current_call.reset(token)


@contextlib.contextmanager
def in_request(request_id: str, tenant: str) -> Iterator[None]:
    """What runs inside is one request of the current call, which is called by the first of them."""
    call = current_call.get()
    if call is not None and call.tenant is None:
        call.request_id, call.tenant = request_id, tenant
    request = Call() if call is None else copy.copy(call)
    request.request_id, request.tenant = request_id, tenant
    with in_call(request):
        yield


def answered_as(operation: str, response_id: str | None = None) -> None:
    """Say what the current call asks for, and what its client knows the answer by; requests that
    begin from here on go by it."""
    if (call := current_call.get()) is not None:
        call.operation, call.response_id = operation, response_id
