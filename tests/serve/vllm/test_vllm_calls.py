"""What a gateway's call counts as, against its tenant's limits and the server's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from engine.serve.access import Caller
from engine.serve.calls import Calls
from engine.serve.server import Server
from tests.serve.access_file import ALICE, serving, tenants, write
from tests.serve.fake_engine import FakeEngine, collect, until

KEY = (("authorization", f"Bearer {ALICE}"),)
TEXT = pb.GenerateRequest(text="hello")


@pytest.fixture
async def limited(tmp_path: Path, fake: FakeEngine) -> AsyncIterator[Server]:
    """A server on which Alice may make one call at once, and two a minute."""
    limits = {"max_concurrent": 1, "requests_per_minute": 2}
    async with serving(write(tmp_path / "access.yaml", tenants(alice=limits)), fake) as server:
        server._access._clock = lambda: 0
        yield server


@pytest.fixture
async def alice(limited: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(limited.address) as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)


async def test_a_text_and_a_flush_are_one_call_each(alice: Any, limited: Server) -> None:
    await collect(alice.Generate(TEXT, metadata=KEY))
    await until(lambda: not limited._calls.num_in_progress)
    request = common_pb2.FlushCacheRequest(timeout_s=60)
    assert (await alice.FlushCache(request, metadata=KEY)).success
    with pytest.raises(grpc.aio.AioRpcError, match="2 requests a minute"):
        await collect(alice.Generate(TEXT, metadata=KEY))


async def test_a_text_is_in_progress_until_it_is_tokenised_though_its_client_left(
    alice: Any, limited: Server, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def encode(text: str) -> list[int]:
        begun.set()
        assert may_end.wait(30)
        return [ord(char) for char in text]

    monkeypatch.setattr(fake.tokenizer, "encode", encode)
    call = alice.Generate(TEXT, metadata=KEY)
    await until(begun.is_set)
    call.cancel()
    await until(lambda: not limited._calls.num_streams(None))  # its call has ended
    assert limited._calls.num_in_progress == 1
    with pytest.raises(grpc.aio.AioRpcError, match="1 calls of your tenant"):
        await collect(alice.Generate(TEXT, metadata=KEY))
    may_end.set()
    await until(lambda: not limited._calls.num_in_progress)
    await collect(alice.Generate(TEXT, metadata=KEY))
    assert len(fake.calls) == 1


async def test_who_waits_for_a_tenant_s_requests_to_end_hears_of_it_once_they_have(
    fake: FakeEngine,
) -> None:
    calls, anna, ben = Calls(8), Caller("anna"), Caller("ben")
    calls.set_engine(fake)
    assert await calls.without_streams("anna", 0)
    with calls.stream(ben, "b"):
        with calls.stream(anna, "a"):
            assert [calls.num_streams(who) for who in ("anna", "ben", None)] == [1, 1, 2]
            assert not await calls.without_streams("anna", 0)
            hers = asyncio.create_task(calls.without_streams("anna", 60))
            all_of_them = asyncio.create_task(calls.without_streams(None, 60))
            await asyncio.sleep(0)
            with calls.stream(anna, "another"):
                pass
        assert await hers
        assert not all_of_them.done()
    assert await all_of_them
    assert calls.num_streams(None) == 0
