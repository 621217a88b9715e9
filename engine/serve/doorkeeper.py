"""No HTTP request without a caller: what stands in front of every route.

It knows what is open and takes all else to be closed, so that what is added later is closed too.
"""

from __future__ import annotations

import grpc
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.serve.access import READING, Access
from engine.serve.errors import Refused
from engine.serve.openai.errors import problem_of

OPEN_PATHS = frozenset(("/health",))
"""What any HTTP client may ask for."""
TENANT_FOLDER = "/v1/"
MISPLACED_PATHS = ("/completions", "/chat/completions", "/models")
"""What clients ask for whose base URL lacks the folder; they are told so."""
TENANT_PATHS = frozenset(
    ("/tokenize", "/detokenize", "/tokenizer_info", "/version", *MISPLACED_PATHS)
)
"""What every tenant may ask for, besides all in the folder; all else is the operators'."""


class Doorkeeper:
    """Answers every HTTP request whose caller is unknown, or may not ask for that path.

    Args:
      app: answers the others.
      access: tells callers apart.
      is_public: whoever reaches the server may see what is the operators', without authentication.
    """

    def __init__(self, app: ASGIApp, access: Access, is_public: bool = False):
        self._app = app
        self._access = access
        self._is_public = is_public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._check(Request(scope))
            except Refused as refused:
                app = _refusal(refused, scope["method"])
        await app(scope, receive, send)

    def _check(self, request: Request) -> None:
        """Raise Refused if the request may not be made."""
        # The path that routes go by. `request.url` is put together with the Host header, in which
        # another path may stand.
        caller, path = self._access.http_caller(request), request.scope["path"]
        is_tenants = path.startswith(TENANT_FOLDER) or path in TENANT_PATHS
        if not (self._is_public or is_tenants):
            caller.check_operator(f"{path:.80}")
        # Without keys, being on this machine is enough, and so is being a page of any site in a
        # browser here: it can't read answers, but it could have work done.
        is_foreign = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if is_foreign and not caller.is_authenticated and request.method not in READING:
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED, "pages of other sites may change nothing here"
            )


def _refusal(refused: Refused, method: str) -> Response:
    """As OpenAI's clients read it, and so that a browser asks for a key where that helps."""
    problem = problem_of(refused)
    response = Response(problem.body, problem.status, problem.headers, "application/json")
    if problem.status == 401 and method in READING:
        response.headers.append("www-authenticate", 'Basic realm="octavo", charset="UTF-8"')
    return response
