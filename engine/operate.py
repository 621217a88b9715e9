"""`octavo pause`, `resume` and `reload`: what an operator asks of a running server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

from engine.client import DEFAULT_ADDRESS, AsyncClient, ServiceError
from engine.connect_options import ConnectOptions

_CONNECT = ConnectOptions()


def pause(connect: ConnectOptions = _CONNECT, *, address: str = DEFAULT_ADDRESS) -> int:
    """Have a server begin no step any more. Requests wait where they are, and new ones queue.

    Args:
      address: host:port of the server.
    """

    async def work(client: AsyncClient) -> str:
        await client.pause()
        return "Paused: the device is at rest. `octavo resume` goes on"

    return _ask(address, connect, work)


def resume(connect: ConnectOptions = _CONNECT, *, address: str = DEFAULT_ADDRESS) -> int:
    """Have a server go on where a pause came in.

    Args:
      address: host:port of the server.
    """

    async def work(client: AsyncClient) -> str:
        await client.resume()
        return "Resumed"

    return _ask(address, connect, work)


def reload(connect: ConnectOptions = _CONNECT, *, address: str = DEFAULT_ADDRESS) -> int:
    """Have a server read its weights again, and go on with them; the queue is kept.

    Args:
      address: host:port of the server.
    """

    async def work(client: AsyncClient) -> str:
        answer = await client.reload()
        what = "Reloaded" if answer.changed else "Nothing to reload: the files hold what is served"
        return f"{what}. Weights: {answer.weights_fingerprint}"

    return _ask(address, connect, work)


def _ask(
    address: str,
    connect: ConnectOptions,
    work: Callable[[AsyncClient], Awaitable[str]],
) -> int:
    async def run() -> str:
        async with AsyncClient(address, connect.credentials()) as client:
            return await work(client)

    try:
        print(asyncio.run(run()))
    except ServiceError as error:
        print(f"octavo: {error.details}", file=sys.stderr)
        return 1
    return 0
