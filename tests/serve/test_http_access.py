"""Who may ask for what over HTTP: keys in headers, and as a browser's password."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from engine.serve.access import Access, watch_rules
from engine.serve.errors import Refused
from engine.serve.http import HttpServer, make_app
from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.serve.access_file import ALICE, BOB, OPS, serving, tenants, write
from tests.serve.fake_engine import FakeEngine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "access.yaml", tenants())


def basic(password: str, user: str = "any") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def ask(
    url: str,
    path: str = "/",
    *headers: tuple[str, str],
    method: str = "GET",
    host: str = "anything.example",
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and body of an answer."""
    port = int(url.rsplit(":", 1)[1].strip("/"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    first, *rest = head.decode("latin-1").split("\r\n")
    pairs = [
        (name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in rest)
    ]
    return int(first.split()[1]), pairs, body


async def status(url: str, path: str = "/", *headers: tuple[str, str], **given: str) -> int:
    return (await ask(url, path, *headers, **given))[0]


async def test_the_page_takes_an_operators_key(path: Path, fake: FakeEngine) -> None:
    async with serving(path, fake, http=("127.0.0.1", 0)) as server:
        url = server.page
        assert url is not None
        for value in (f"Bearer {OPS}", basic(OPS), basic(OPS, "")):
            for file in ("/", "/app.js"):
                assert await status(url, file, ("Authorization", value)) == 200
        assert await status(url, "/", ("X-API-Key", OPS)) == 200
        for value in (f"Bearer {ALICE}", basic(ALICE)):
            assert await status(url, "/", ("Authorization", value)) == 403
            assert await status(url, "/events", ("Authorization", value)) == 403
        wrong = [f"Bearer {OPS}x", basic(OPS + "x"), basic(""), "Basic", "Basic %%%", OPS, ""]
        for value in wrong:
            assert await status(url, "/events", ("Authorization", value)) == 401
        assert await status(url, "/no/such/path") == 401
        assert await status(url, f"/?key={OPS}") == 401
        assert await status(url, "/health") == 200


async def test_a_browser_is_asked_for_a_key_and_a_program_told_in_json(
    path: Path, fake: FakeEngine
) -> None:
    async with serving(path, fake, http=("127.0.0.1", 0)) as server:
        assert server.page is not None
        code, headers, body = await ask(server.page)
        challenges = [value for name, value in headers if name == "www-authenticate"]
        assert (code, challenges) == (401, ["Bearer", 'Basic realm="octavo", charset="UTF-8"'])
        assert ("x-content-type-options", "nosniff") in headers
        error = json.loads(body)["error"]
        assert error["type"] == "authentication_error"
        assert "Bearer KEY" in error["message"]
        _, headers, body = await ask(server.page, "/", ("x-api-key", ALICE))
        assert "www-authenticate" not in dict(headers)
        assert json.loads(body)["error"]["type"] == "permission_error"


@contextlib.asynccontextmanager
async def routed(access: Access, **given: Any) -> AsyncIterator[str]:
    """A server with routes of several kinds, which say who called."""

    async def who(request: Request) -> PlainTextResponse:
        with contextlib.suppress(Refused):
            return PlainTextResponse(access.http_caller(request).tenant)
        return PlainTextResponse("nobody")

    routes = [
        Route(path, who, methods=["GET", "POST"])
        for path in ("/health", "/v1/completions", "/v1", "/metrics", "/new")
    ]
    server = HttpServer(make_app(list(routes), "127.0.0.1", access, **given), "127.0.0.1", 0)
    await server.start()
    yield server.url
    await server.stop()


async def test_a_route_that_knows_nothing_of_keys_is_an_operators(path: Path) -> None:
    async with routed(Access(watch_rules(path))) as url:
        seen = {
            route: [
                await status(url, route, *headers)
                for headers in ((), [("x-api-key", ALICE)], [("x-api-key", OPS)])
            ]
            for route in ("/health", "/v1/completions", "/v1", "/metrics", "/new")
        }
        assert seen == {
            "/health": [200, 200, 200],
            "/v1/completions": [401, 200, 200],
            "/v1": [401, 403, 200],
            "/metrics": [401, 403, 200],
            "/new": [401, 403, 200],
        }
        _, _, body = await ask(url, "/v1/completions", ("authorization", f"Bearer {BOB}"))
        assert body == b"bob"


async def test_a_host_with_a_path_in_it_opens_no_other(path: Path) -> None:
    async with routed(Access(watch_rules(path))) as url:
        for host in ("x/v1/", "x/health?", "x/health#", "/health", "x:1/v1/completions"):
            for key, code in ((None, 401), (ALICE, 403)):
                headers = [] if key is None else [("x-api-key", key)]
                assert await status(url, "/metrics", *headers, host=host) == code
        for target in ("/v1/../metrics", "//v1/metrics", "/health/../metrics", "/%2e/v1/"):
            assert await status(url, target, ("x-api-key", ALICE)) in (403, 404)


async def test_a_browsers_password_changes_nothing(path: Path) -> None:
    """Other sites can have a browser send it along."""
    async with routed(Access(watch_rules(path))) as url:
        for header, code in (
            (("authorization", basic(ALICE)), 401),
            (("authorization", f"Bearer {ALICE}"), 200),
        ):
            seen, headers, _ = await ask(url, "/v1/completions", header, method="POST")
            assert seen == code
            assert not any(value.startswith("Basic") for _, value in headers)  # it isn't asked for


@pytest.mark.parametrize(
    ("is_local", "is_public", "codes"),
    [(True, False, [200, 200]), (False, False, [200, 403]), (False, True, [200, 200])],
)
async def test_without_keys_the_operators_routes_are_for_this_machine_or_by_permission(
    is_local: bool, is_public: bool, codes: list[int]
) -> None:
    async with routed(Access(is_http_local=is_local), is_public=is_public) as url:
        paths = ("/v1/completions", "/metrics")
        assert [await status(url, path, host="localhost") for path in paths] == codes
        assert await status(url, "/v1/completions") == 421  # another's name


async def test_without_keys_other_sites_have_a_browser_change_nothing() -> None:
    async with routed(Access()) as url:
        for site, code in (
            ("cross-site", 403),
            ("same-site", 403),
            ("same-origin", 200),
            ("none", 200),
        ):
            header = ("Sec-Fetch-Site", site)
            given = {"method": "POST", "host": "localhost"}
            assert await status(url, "/v1/completions", header, **given) == code
            assert await status(url, "/v1/completions", header, host="localhost") == 200


async def test_with_a_key_other_sites_may_ask(path: Path) -> None:
    """A browser sends it only if a page has it, and a page that has it may use it."""
    async with routed(Access(watch_rules(path))) as url:
        headers = (("Sec-Fetch-Site", "cross-site"), ("x-api-key", ALICE))
        assert await status(url, "/v1/completions", *headers, method="POST") == 200


def test_a_public_page_and_keys_exclude_each_other(path: Path) -> None:
    with pytest.raises(ValueError, match="--http-public shows the page without authentication"):
        Server(ServerConfig(port=0, access=str(path), http="127.0.0.1:0", http_public=True))
