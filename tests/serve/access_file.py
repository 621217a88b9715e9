"""Access files for tests, and servers that go by one."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from engine.client import AsyncClient, Credentials
from engine.new_key import hash_of, make_key
from engine.serve.server import Server, join
from engine.server_config import ServerConfig
from tests.serve.fake_engine import FakeEngine

ALICE, BOB, OPS = make_key(), make_key(), make_key()


def entry(key: str, name: str = "first", expires: datetime.date | None = None) -> dict[str, str]:
    """A key as the file has it."""
    dated = {} if expires is None else {"expires": expires.isoformat()}
    return {"name": name, "hash": hash_of(key)} | dated


def tenants(**changed: Any) -> dict[str, Any]:
    """Alice, Bob and the operator, with other fields for some of them."""
    usual = {
        "alice": {"keys": [entry(ALICE)]},
        "bob": {"keys": [entry(BOB)]},
        "ops": {"keys": [entry(OPS)], "operator": True},
    }
    return {name: fields | changed.get(name, {}) for name, fields in usual.items()}


def write(path: Path, listed: dict[str, Any]) -> Path:
    """Write an access file as an operator does, in one piece. JSON is YAML, dates aside."""
    text = json.dumps({"tenants": listed})
    for tenant in listed.values():
        for key in tenant.get("keys", ()):
            if "expires" in key:
                text = text.replace(f'"{key["expires"]}"', key["expires"])
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)
    return path


@contextlib.asynccontextmanager
async def serving(
    path: Path, fake: FakeEngine, http: tuple[str, int] | None = None, **config: Any
) -> AsyncIterator[Server]:
    """A server that goes by an access file."""
    address = join(*http) if http else ""
    server = Server(ServerConfig(port=0, access=str(path), grace=0.05, http=address, **config))
    await server.start()
    await server.set_engine(fake)
    try:
        yield server
    finally:
        await server.stop()


def client(server: Server, key: str | None, **credentials: Any) -> AsyncClient:
    """A client with a key."""
    return AsyncClient(server.address, Credentials(api_key=key, **credentials))
