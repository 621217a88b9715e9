"""`octavo top`: asks a server for its figures again and again, and shows what changed."""

from __future__ import annotations

import asyncio
import dataclasses
import json as json_module
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from engine.connect_options import ConnectOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine.client import AsyncClient
    from engine.top.figures import Figures


_CONNECT = ConnectOptions()


def top(
    connect: ConnectOptions = _CONNECT,
    *,
    address: str = "127.0.0.1:50051",
    interval: float = 1.0,
    once: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Watch a server at work: a table that renews itself until Ctrl-C.

    The server shows its figures to operators only: see docs/observability.md.

    Args:
      address: host:port of the server.
      interval: seconds between two looks, which rates and latencies are of.
      once: look twice, show what was between, and end.
      json: a JSON object a look instead of a table.
    """
    from engine.client import ServiceError

    if not (math.isfinite(interval) and interval > 0):
        raise ValueError(f"--interval is {interval}; it must be above zero")
    try:
        asyncio.run(_watch(address, connect, interval, once, json))
    except ServiceError as error:
        print(f"octavo: {error.details}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass  # the way to end it
    except BrokenPipeError:  # whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def _watch(
    address: str, connect: ConnectOptions, interval: float, once: bool, as_json: bool
) -> None:
    from rich.console import Console
    from rich.live import Live

    from engine.client import AsyncClient
    from engine.top.table import render

    async with AsyncClient(address, connect.credentials()) as client:
        name = (await client.model_info()).name
        looks = _looks(client, interval)
        if as_json or once:
            async for figures in looks:
                if as_json:
                    print(json_module.dumps(dataclasses.asdict(figures)), flush=True)
                else:
                    Console().print(render(figures, f"{name} on {address}"))
                if once:
                    return
        with Live(auto_refresh=False, screen=sys.stdout.isatty()) as live:
            async for figures in looks:
                live.update(render(figures, f"{name} on {address}"), refresh=True)


async def _looks(client: AsyncClient, interval: float) -> AsyncIterator[Figures]:
    """The figures of each interval."""
    from engine.top.figures import Reading, figures

    before = Reading(await client.stats(), time.monotonic())
    while True:
        await asyncio.sleep(interval)
        now = Reading(await client.stats(), time.monotonic())
        yield figures(now, before)
        before = now
