"""Exceptions to HTTP answers in OpenAI's shape: `{"error": {message, type, param, code}}`.

What the exceptions of all front ends mean is said once, by `engine.serve.errors.status_of`; here
its codes become HTTP's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import grpc
import msgspec

from engine.observe.calls import REQUEST_ID_HEADER
from engine.observe.logs import without_message
from engine.sampling import InvalidRequest, PromptTooLong
from engine.serve.errors import Refused, shortened, status_of

log = logging.getLogger("octavo.serve")

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

# OpenAI's `type` and `code` where clients look at them; 4xx and 5xx have a type of their own.
_CODES = {
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    408: "request_timeout",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    503: "unavailable",
    504: "deadline_exceeded",
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

# What a request is refused for that is none of its fields.
_NO_FIELDS = ("body", REQUEST_ID_HEADER)


class HttpRefused(Exception):
    """A request that HTTP itself has a status for.

    Args:
      status: HTTP's.
      message: what was given, the limit and the way out.
      code: a word for machines, if the status has none.
      headers: that go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


class Problem(NamedTuple):
    """An error as a client is told of it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = MappingProxyType({})

    @property
    def body(self) -> bytes:
        """The answer's JSON."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, usual),
            "param": self.param,
            "code": self.code or _CODES.get(self.status),
        }
        return msgspec.json.encode({"error": error})


def problem_of(error: Exception, path_of: Callable[[str], str] = str) -> Problem:
    """What a client is told of an exception; logs the exception if it is unexpected.

    Args:
      error: what ended the request.
      path_of: what the client calls a field that the engine calls so.
    """
    match error:
        case InvalidRequest():
            field = path_of(error.field)
            param = None if field in _NO_FIELDS else field
            # Clients shorten a conversation by themselves where they read this.
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
            return Problem(400, shortened(f"{field}: {error.message}"), param, code)
        case HttpRefused():
            return Problem(error.status, str(error), code=error.code, headers=error.headers)
    code, status = status_of(error)
    if code is grpc.StatusCode.INTERNAL and not isinstance(error, Refused):
        log.error("an HTTP request failed\n%s", without_message(error))
        log.debug("what it said", exc_info=error)
    headers = {}
    if (retry_after := getattr(error, "retry_after", None)) is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    if code is grpc.StatusCode.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return Problem(_STATUS.get(code, 500), status.message, headers=headers)
