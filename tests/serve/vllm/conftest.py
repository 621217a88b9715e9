"""A gateway's view of a server with a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from smg_grpc_proto import vllm_engine_pb2_grpc

from engine.serve.server import Server


@pytest.fixture
async def worker(server: Server) -> AsyncIterator[Any]:
    """A stub of the service."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)
