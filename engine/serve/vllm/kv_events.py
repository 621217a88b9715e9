"""SubscribeKvEvents: the cache's changes on the wire, under names that mean nothing elsewhere.

A gateway mirrors which prefixes a worker has and sends a request to the one that has most of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import grpc
import grpc.aio
from smg_grpc_proto.generated import common_pb2 as pb

from engine.core.journal import BlockRemoved, BlockStored, Change, PoolCleared
from engine.runtime.kv_events import Batch, HistoryExpired, KvEvents, Snapshot
from engine.serve.errors import Refused
from engine.serve.vllm.loads import Load, load_record
from engine.types import Domain

SERVED = frozenset(("start_sequence_number", "load_records_before_first_batch"))
MAX_SUBSCRIBERS = 16
BLOCKS_PER_CHUNK = 1024  # of a snapshot
_HEARTBEAT_SECONDS = 5.0  # between load records while nothing changes
_LOOK_SECONDS = 1.0  # between looks at whether the load changed


class BlockNames:
    """Keyed 64-bit digests of block keys: equal names mean equal blocks, to this process alone.

    A block's key is a plain hash of its domain and its tokens, so whoever guesses those could find
    it among keys; among these names, nobody can without the secret.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def of(self, key: bytes) -> int:
        """The name of a block, as the wire's int64."""
        return int.from_bytes(self._digest(key, 8), "little", signed=True)

    def of_domain(self, domain: Domain) -> str:
        """The name of those who share blocks with each other."""
        parts = (
            domain.tenant.encode("utf-8", "surrogatepass"),
            domain.salt.encode("utf-8", "surrogatepass"),
        )
        return self._digest(b"".join(len(part).to_bytes(8) + part for part in parts), 16).hex()

    def _digest(self, data: bytes, size: int) -> bytes:
        return hashlib.blake2b(data, digest_size=size, key=self._secret).digest()


class Subscriptions:
    """The streams of one server. Each reads the history at its own pace.

    Args:
      read_load: where the engine stands now; it raises what ends all streams.
      taken: awaits that a client takes what it is sent, and raises what ends a stream if it does
        not.
    """

    def __init__(
        self, read_load: Callable[[], Load], taken: Callable[[Awaitable[None]], Awaitable[None]]
    ):
        self._read_load = read_load
        self._taken = taken
        self._names = BlockNames()
        self._count = 0

    async def serve(
        self,
        events: KvEvents,
        request: pb.SubscribeKvEventsRequest,
        context: grpc.aio.ServicerContext,
        block_size: int,
        home: Domain,
    ) -> None:
        """Send everything there is, or what followed the batch that the request names, and from
        then on what changes, until the subscriber goes away.

        Args:
          events: of the engine.
          request: where to begin.
          context: of the call.
          block_size: tokens in a block.
          home: the subscriber's own domain. Its requests find these blocks and public ones; those
            of other domains have the domain's name as their `cache_salt`.

        Raises:
          Refused: OUT_OF_RANGE, what it wants to resume from is gone; DATA_LOSS, it read so slowly
            that what it has not read is gone; RESOURCE_EXHAUSTED, too many subscribe.
        """
        if self._count >= MAX_SUBSCRIBERS:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_SUBSCRIBERS} subscribe already, and no more are served at once",
                retry_after=10.0,
            )

        start = request.start_sequence_number
        _check_cursor(events, start)  # while it can still be the answer to the call itself

        async def send(batch: pb.KvEventBatch) -> None:
            await self._taken(context.write(batch))

        self._count += 1
        try:
            # Before the first batch, which may be long in coming: a subscriber takes the stream
            # for open when it has the headers.
            await context.send_initial_metadata(())
            stream = _Stream(events, send, Wire(self._names, block_size, home), self._read_load)
            await stream.run(start, request.load_records_before_first_batch)
        finally:
            self._count -= 1


class _Stream:
    """One subscriber."""

    def __init__(
        self,
        events: KvEvents,
        send: Callable[[pb.KvEventBatch], Awaitable[None]],
        wire: Wire,
        read_load: Callable[[], Load],
    ):
        self._events = events
        self._write = send
        self._wire = wire
        self._read_load = read_load
        self._cursor = 0
        self._last_sent = 0  # the number of the last batch; 0 before the first
        self._num_records = 0
        self._told: Load | None = None
        self._told_at = 0.0

    async def run(self, start: int, early_records: bool) -> None:
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(arrived.set)

        stop = self._events.on_batch(wake)
        try:
            await self._begin(start)
            while True:
                arrived.clear()
                if await self._send_new():
                    continue
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(arrived.wait(), _LOOK_SECONDS)
                if not arrived.is_set() and (self._last_sent or early_records):
                    await self._send_load()
        finally:
            stop()

    async def _begin(self, start: int) -> None:
        """Send what is there, unless the subscriber knows it."""
        self._cursor = start
        if start == 0:
            snapshot = self._events.snapshot()
            self._cursor = snapshot.number
            for batch in self._wire.snapshot(snapshot):
                await self._send(batch)

    async def _send_new(self) -> bool:
        """Send what was published. Returns whether there was something."""
        try:
            batches = self._events.after(self._cursor)
        except HistoryExpired:
            raise Refused(
                grpc.StatusCode.DATA_LOSS,
                "changes came faster than they were read, and are gone; subscribe with "
                "start_sequence_number 0 to get everything that is there",
            ) from None
        for batch in batches:
            await self._send(self._wire.batch(batch))
            self._cursor = batch.number
        return bool(batches)

    async def _send(self, batch: pb.KvEventBatch) -> None:
        self._last_sent = batch.sequence_number
        batch.load.CopyFrom(self._record(self._read_load(), is_full=self._told is None))
        await self._write(batch)

    async def _send_load(self) -> None:
        """Send the load alone, if it changed or nothing was said for some time."""
        load, told = self._read_load(), self._told
        is_news = told is None or load.core != told.core
        if not is_news and time.monotonic() - self._told_at < _HEARTBEAT_SECONDS:
            return
        batch = pb.KvEventBatch(
            sequence_number=self._last_sent,
            timestamp=time.time(),
            dp_rank=0,
            load=self._record(load, is_full=True),
        )
        batch.load.load_only = True
        await self._write(batch)

    def _record(self, load: Load, *, is_full: bool) -> pb.EngineLoad:
        self._num_records += 1
        self._told, self._told_at = load, time.monotonic()
        return load_record(load, self._num_records, is_full=is_full)


def _check_cursor(events: KvEvents, start: int) -> None:
    """Refuse to resume from what is not in the history."""
    try:
        if start:
            events.after(start, most=0)  # for its exception
    except HistoryExpired as error:
        raise Refused(
            grpc.StatusCode.OUT_OF_RANGE,
            f"{error}; subscribe with start_sequence_number 0 to get everything that is there",
        ) from None


class Wire:
    """Writes changes as messages.

    Args:
      names: of blocks and domains.
      block_size: tokens in a block.
      home: the domain whose blocks have no `cache_salt`, as public ones.
    """

    def __init__(self, names: BlockNames, block_size: int, home: Domain):
        self._names = names
        self._block_size = block_size
        self._home = home

    def batch(self, batch: Batch) -> pb.KvEventBatch:
        """What one step changed."""
        return pb.KvEventBatch(
            sequence_number=batch.number,
            timestamp=batch.time,
            dp_rank=0,
            events=[
                self._event(changes, event_id)
                for event_id, changes in enumerate(_runs(batch.changes), 1)
            ],
        )

    def snapshot(self, snapshot: Snapshot) -> Iterator[pb.KvEventBatch]:
        """Everything there is: some batches, of which the last has the snapshot's number."""
        chunks = list(itertools.batched(snapshot.blocks, BLOCKS_PER_CHUNK)) or [()]
        for index, blocks in enumerate(chunks):
            cleared = [pb.KvCacheEvent(cleared=pb.KvCacheCleared())] if index == 0 else []
            yield pb.KvEventBatch(
                sequence_number=snapshot.number - len(chunks) + 1 + index,
                timestamp=time.time(),
                dp_rank=0,
                events=[*cleared, *(self._event([block], 0) for block in blocks)],
                snapshot=pb.KvSnapshotChunk(
                    index=index, count=len(chunks), blocks=len(snapshot.blocks)
                ),
            )

    def _event(self, changes: Sequence[Change], event_id: int) -> pb.KvCacheEvent:
        """One event for changes of one kind, which follow each other."""
        event = pb.KvCacheEvent(event_id=event_id)
        match changes[0]:
            case BlockStored() as first:
                self._store(event.stored, first, changes)
            case BlockRemoved():
                event.removed.tier = pb.KV_CACHE_TIER_DEVICE
                event.removed.locality = pb.KV_CACHE_LOCALITY_LOCAL
                event.removed.block_hashes.extend(
                    self._names.of(change.key)
                    for change in changes
                    if isinstance(change, BlockRemoved)
                )
            case PoolCleared():
                event.cleared.SetInParent()
        return event

    def _store(
        self, stored: pb.KvBlocksStored, first: BlockStored, changes: Sequence[Change]
    ) -> None:
        stored.tier = pb.KV_CACHE_TIER_DEVICE
        stored.locality = pb.KV_CACHE_LOCALITY_LOCAL
        if first.parent is not None:
            stored.parent_block_hash = self._names.of(first.parent)
        if first.domain is not None and first.domain != self._home:
            stored.cache_salt = self._names.of_domain(first.domain)
        for change in changes:
            assert isinstance(change, BlockStored)
            stored.blocks.add(
                block_hash=self._names.of(change.key),
                token_ids=change.token_ids,
                block_size=self._block_size,
            )


def _runs(changes: Sequence[Change]) -> Iterator[list[Change]]:
    """Changes that make one event: removals side by side, and blocks that follow each other."""
    run: list[Change] = []
    for change in changes:
        if run and not _follows(run[-1], change):
            yield run
            run = []
        run.append(change)
    if run:
        yield run


def _follows(last: Change, change: Change) -> bool:
    match last, change:
        case BlockStored(), BlockStored():
            return change.parent == last.key and change.domain == last.domain
        case BlockRemoved(), BlockRemoved():
            return True
        case _:
            return False
