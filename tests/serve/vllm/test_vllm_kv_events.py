"""The stream of cache events: what a mirror of it sees, resumes from and is spared."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2 as pb

from engine.core.journal import BlockRemoved, BlockStored, PoolCleared
from engine.runtime import kv_events as history
from engine.runtime.kv_events import KvEvents, Snapshot
from engine.serve.errors import Refused
from engine.serve.vllm import kv_events
from engine.serve.vllm.kv_events import BLOCKS_PER_CHUNK, BlockNames, Subscriptions, Wire
from engine.types import Domain
from tests.serve.fake_engine import FakeEngine

HOME = Domain()


def key(number: int) -> bytes:
    return number.to_bytes(32)


def stored(number: int, parent: int | None = None, **fields: Any) -> BlockStored:
    values: dict[str, Any] = {"index": 0, "domain": HOME, "token_ids": (number,) * 2} | fields
    return BlockStored(key(number), None if parent is None else key(parent), **values)


def publish(events: KvEvents, *changes: Any) -> None:
    events.journal._changes.extend(changes)
    events.journal.publish()


@pytest.fixture
def events(fake: FakeEngine) -> KvEvents:
    fake.kv_events = KvEvents(with_tokens=True)
    return fake.kv_events


Subscribe = Callable[..., Any]


@pytest.fixture
def subscribe(worker: Any) -> Subscribe:
    def begin(start: int = 0, **fields: Any) -> Any:
        return worker.SubscribeKvEvents(
            pb.SubscribeKvEventsRequest(start_sequence_number=start, **fields)
        )

    return begin


async def read(stream: Any) -> pb.KvEventBatch:
    """The next batch that is no heartbeat."""
    while (batch := await stream.read()).load.load_only:
        pass
    return batch


async def drain(stream: Any) -> None:
    while await stream.read():
        pass


async def test_a_server_that_tells_nothing_says_so_in_a_way_that_gateways_understand(
    subscribe: Subscribe,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"--set server\.kv_events=") as raised:
        await subscribe().read()
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED  # they don't ask again


async def test_a_subscriber_gets_what_is_there_and_then_what_changes(
    events: KvEvents, subscribe: Subscribe
) -> None:
    publish(events, stored(1), stored(2, parent=1, index=1))
    stream = subscribe()
    snapshot = await read(stream)
    assert snapshot.snapshot == pb.KvSnapshotChunk(index=0, count=1, blocks=2)
    cleared, first, second = snapshot.events
    assert cleared.WhichOneof("data") == "cleared"
    assert first.stored.blocks[0].token_ids == [1, 1]
    assert not first.stored.HasField("parent_block_hash")
    name = first.stored.blocks[0].block_hash
    assert second.stored.parent_block_hash == name
    assert {event.event_id for event in snapshot.events} == {0}
    publish(events, BlockRemoved(key(2)), stored(3, parent=1, index=1))
    batch = await read(stream)
    assert batch.sequence_number == snapshot.sequence_number + 1
    assert not batch.HasField("snapshot")
    removed, added = batch.events
    assert removed.removed.block_hashes == [second.stored.blocks[0].block_hash]
    assert added.stored.parent_block_hash == name
    publish(events, PoolCleared())
    batch = await read(stream)
    assert [event.WhichOneof("data") for event in batch.events] == ["cleared"]
    stream.cancel()


async def test_a_subscriber_resumes_where_it_was(events: KvEvents, subscribe: Subscribe) -> None:
    stream = subscribe()
    start = (await read(stream)).sequence_number
    stream.cancel()
    for number in range(1, 4):
        publish(events, stored(number))
    stream = subscribe(start + 1)
    batches = [await read(stream) for _ in range(2)]
    assert [batch.sequence_number for batch in batches] == [start + 2, start + 3]
    assert batches[0].events[0].stored.blocks[0].token_ids == [2, 2]
    stream.cancel()


@pytest.mark.parametrize("offset", [-1, 2], ids=["gone", "another life's"])
async def test_a_cursor_that_is_not_in_the_history_is_out_of_range(
    offset: int, events: KvEvents, subscribe: Subscribe
) -> None:
    publish(events, stored(1))
    start = events.snapshot().number - 1  # before the first batch
    with pytest.raises(grpc.aio.AioRpcError, match="start_sequence_number 0") as raised:
        await subscribe(start + offset).read()
    assert raised.value.code() is grpc.StatusCode.OUT_OF_RANGE


async def test_a_cursor_that_is_gone_is_the_answer_to_the_call_and_not_a_broken_stream() -> None:
    """SMG takes the first for a reason to begin anew, and the second for one to try the same."""
    opened = []

    class Context:
        async def send_initial_metadata(self, metadata: Any) -> None:
            opened.append(metadata)

    nothing: Any = None
    subscriptions = Subscriptions(nothing, nothing)
    request = pb.SubscribeKvEventsRequest(start_sequence_number=7)
    context: Any = Context()
    with pytest.raises(Refused) as raised:
        await subscriptions.serve(KvEvents(), request, context, 16, HOME)
    assert raised.value.code is grpc.StatusCode.OUT_OF_RANGE
    assert not opened


async def test_after_a_restart_a_subscriber_is_not_given_another_life_s_changes() -> None:
    first = KvEvents()
    for number in range(50):
        publish(first, stored(number))
    second = KvEvents()
    publish(second, stored(1))
    with pytest.raises(history.HistoryExpired):
        second.after(first.snapshot().number)


async def test_who_reads_too_slowly_is_told_to_begin_anew(
    events: KvEvents, subscribe: Subscribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = subscribe()
    await read(stream)
    monkeypatch.setattr(history, "MAX_BATCHES", 2)
    for number in range(4):  # in one go: the stream can't follow
        publish(events, stored(number))
    with pytest.raises(grpc.aio.AioRpcError, match="are gone; subscribe") as raised:
        await drain(stream)
    assert raised.value.code() is grpc.StatusCode.DATA_LOSS


async def test_the_load_comes_with_batches_and_alone_when_it_changes(
    events: KvEvents, subscribe: Subscribe, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "_LOOK_SECONDS", 0.01)
    stream = subscribe()
    first = await stream.read()
    stats = fake.stats()
    assert not first.load.load_only
    assert first.load.running_requests == stats.running
    assert first.load.active_token_usage == stats.owned_blocks / stats.total_blocks
    assert first.load.HasField("num_used_tokens")  # the telemetry comes with the first
    busier = dataclasses.replace(stats, running=77)
    monkeypatch.setattr(fake, "stats", lambda: busier)
    alone = await stream.read()
    assert alone.load.load_only
    assert alone.load.running_requests == 77
    assert alone.sequence_number == first.sequence_number
    assert not alone.events
    assert alone.load.sample == first.load.sample + 1
    publish(events, stored(1))
    batch = await stream.read()
    assert not batch.load.load_only
    assert not batch.load.HasField("num_used_tokens")
    stream.cancel()


async def test_who_resumes_gets_loads_before_the_first_batch_only_if_it_takes_them(
    events: KvEvents, subscribe: Subscribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "_LOOK_SECONDS", 0.01)
    publish(events, stored(1))
    start = events.snapshot().number
    takes = subscribe(start, load_records_before_first_batch=True)
    early = await takes.read()
    assert early.load.load_only
    assert early.sequence_number == 0
    takes.cancel()
    stream = subscribe(start)
    waiting = asyncio.ensure_future(stream.read())
    await stream.initial_metadata()
    takes = subscribe(start, load_records_before_first_batch=True)
    await takes.read()  # the other one's turn came before
    takes.cancel()
    assert not waiting.done()
    publish(events, stored(2))
    assert (await waiting).sequence_number == start + 1
    stream.cancel()


async def test_only_so_many_subscribe_at_once(
    events: KvEvents, subscribe: Subscribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "MAX_SUBSCRIBERS", 1)
    first = subscribe()
    await read(first)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await subscribe().read()
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()


async def test_a_stream_ends_when_the_server_does(
    events: KvEvents, subscribe: Subscribe, server: Any
) -> None:
    stream = subscribe()
    await read(stream)
    await server.stop()
    with pytest.raises(grpc.aio.AioRpcError):
        await drain(stream)


def test_a_large_snapshot_comes_in_chunks_that_end_at_its_number() -> None:
    blocks = tuple(stored(number) for number in range(BLOCKS_PER_CHUNK + 1))
    first, last = Wire(BlockNames(), 16, HOME).snapshot(Snapshot(5000, blocks))
    assert (first.sequence_number, last.sequence_number) == (4999, 5000)
    assert (len(first.events), len(last.events)) == (BLOCKS_PER_CHUNK + 1, 1)
    assert [chunk.snapshot.index for chunk in (first, last)] == [0, 1]
    assert {chunk.snapshot.blocks for chunk in (first, last)} == {BLOCKS_PER_CHUNK + 1}


def test_blocks_that_follow_each_other_are_one_event() -> None:
    wire = Wire(BlockNames(), 16, HOME)
    changes = (
        stored(1),
        stored(2, parent=1, index=1),
        stored(9, domain=Domain("bob")),
        BlockRemoved(key(2)),
        BlockRemoved(key(1)),
    )
    batch = wire.batch(history.Batch(7, 1.0, changes))
    chain, other, removed = batch.events
    assert len(chain.stored.blocks) == 2
    assert chain.stored.tier == pb.KV_CACHE_TIER_DEVICE
    assert {block.block_size for block in chain.stored.blocks} == {16}
    assert len(other.stored.blocks) == 1
    assert removed.removed.block_hashes == [
        chain.stored.blocks[1].block_hash,
        chain.stored.blocks[0].block_hash,
    ]
    assert [event.event_id for event in batch.events] == [1, 2, 3]


def test_another_domain_s_blocks_have_its_name_and_one_s_own_and_public_ones_none() -> None:
    wire = Wire(BlockNames(), 16, HOME)
    domains = (HOME, None, Domain("bob"), Domain("bob", "salt"), Domain("bobs", "alt"))
    salts: list[str] = []
    for domain in domains:
        (event,) = wire.batch(history.Batch(7, 1.0, (stored(1, domain=domain),))).events
        salts.append(event.stored.cache_salt if event.stored.HasField("cache_salt") else "")
    assert salts[:2] == ["", ""]
    assert len(set(salts[2:])) == 3
    assert not any("bob" in salt or "salt" in salt for salt in salts[2:])


def test_names_mean_nothing_outside_of_their_process() -> None:
    one, other = BlockNames(), BlockNames()
    assert one.of(key(1)) == one.of(key(1))
    assert one.of(key(1)) != one.of(key(2))
    assert one.of(key(1)) != other.of(key(1))
    assert -(2**63) <= one.of(key(1)) < 2**63
    assert int.from_bytes(key(1)[:8], "little", signed=True) != one.of(key(1))
