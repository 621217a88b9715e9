"""How tests call the API, and read its streams byte by byte."""

from __future__ import annotations

import json
from typing import Any

import httpx2


async def post(http: httpx2.AsyncClient, path: str, **body: Any) -> httpx2.Response:
    return await http.post(path, json=body)


async def complete(http: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    """A completion that must succeed."""
    return _good(await post(http, "/v1/completions", **body))


async def chat(http: httpx2.AsyncClient, content: str = "hi", **body: Any) -> dict[str, Any]:
    """An answer to one message, which must succeed."""
    body = {"messages": [{"role": "user", "content": content}]} | body
    return _good(await post(http, "/v1/chat/completions", **body))


async def error_of(
    http: httpx2.AsyncClient, path: str = "/v1/completions", status: int = 400, **body: Any
) -> dict[str, Any]:
    """The error that a request ends with."""
    reply = await post(http, path, **body)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


async def events(http: httpx2.AsyncClient, path: str, **body: Any) -> list[bytes]:
    """The data of each event of a stream, whose framing must be exact."""
    reply = await post(http, path, stream=True, **body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = reply.content.split(b"\n\n")
    assert parts.pop() == b""  # the last event ends too
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [part.removeprefix(b"data: ") for part in parts]


async def chunks(http: httpx2.AsyncClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream that ends well."""
    *data, done = await events(http, path, **body)
    assert done == b"[DONE]"
    return [json.loads(each) for each in data]


def _good(reply: httpx2.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return reply.json()
