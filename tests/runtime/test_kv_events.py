"""The history of cache changes: bounded, numbered without gaps, and true to a real engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.config_file import from_tree
from engine.core.journal import BlockRemoved, BlockStored
from engine.core.retention import Retention
from engine.frontend import Engine
from engine.runtime import kv_events
from engine.runtime.kv_events import HistoryExpired, KvEvents
from engine.sampling import SamplingParams
from engine.types import Domain
from tests.runtime import tiny
from tests.runtime.tiny import random_ids
from tests.serve.fake_engine import until


def stored(number: int, index: int = 0) -> BlockStored:
    return BlockStored(number.to_bytes(32), None, index, Domain(), ())


def publish(events: KvEvents, *changes: BlockStored | BlockRemoved) -> None:
    events.journal._changes.extend(changes)
    events.journal.publish()


def test_nothing_is_published_when_nothing_changed() -> None:
    events = KvEvents()
    number = events.snapshot().number
    events.journal.publish()
    assert events.snapshot().number == number


def test_a_history_holds_so_many_batches_and_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "MAX_BATCHES", 3)
    events = KvEvents()
    start = events.snapshot().number
    for number in range(5):
        publish(events, stored(number))
    with pytest.raises(HistoryExpired):
        events.after(start + 1)
    assert [batch.number for batch in events.after(start + 2)] == [start + 3, start + 4, start + 5]
    assert [batch.number for batch in events.after(start + 2, most=1)] == [start + 3]
    assert events.after(start + 5) == []
    monkeypatch.setattr(kv_events, "MAX_CHANGES", 10)
    publish(events, *map(stored, range(100, 111)))  # more than all that may be held
    with pytest.raises(HistoryExpired):
        events.after(start + 5)
    assert events.after(start + 6) == []
    assert len(events.snapshot().blocks) == 16


def test_a_snapshot_has_parents_before_their_children() -> None:
    events = KvEvents()
    publish(events, stored(3, index=2), stored(1, index=0), stored(2, index=1))
    publish(events, BlockRemoved(stored(3).key))
    assert [block.index for block in events.snapshot().blocks] == [0, 1]


def test_readers_are_woken_until_they_stop() -> None:
    events, woken = KvEvents(), []
    stop = events.on_batch(lambda: woken.append(1))
    publish(events, stored(1))
    stop()
    publish(events, stored(2))
    assert woken == [1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    tree = tiny.config_tree(folder, **{"server.kv_events": "tokens"})
    engine = Engine.from_config(from_tree(tree))
    yield engine
    engine.close()


async def generate(engine: Engine, ids: tuple[int, ...], tenant: str = "a") -> tuple[int, ...]:
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    deltas = [d async for d in engine.generate(ids, sampling, domain=Domain(tenant))]
    return tuple(token for delta in deltas for token in delta.token_ids)


async def test_an_engine_tells_what_its_cache_holds(engine: Engine) -> None:
    events = engine.kv_events
    assert events is not None
    prompt = random_ids(40)
    whole = prompt + await generate(engine, prompt)
    blocks = events.snapshot().blocks
    # The last token's keys and values are not computed, so its block is not full.
    assert [block.token_ids for block in blocks] == [whole[:16], whole[16:32], whole[32:48]]
    assert [block.index for block in blocks] == [0, 1, 2]
    assert [block.parent for block in blocks] == [None, blocks[0].key, blocks[1].key]
    assert {block.domain for block in blocks} == {Domain("a")}
    before = events.snapshot().number
    await generate(engine, prompt, "a")
    assert events.snapshot().number == before  # all of it was there
    await generate(engine, prompt, "b")
    assert len(events.snapshot().blocks) == 6
    assert await engine.flush(Domain("a")) == 3
    await until(lambda: len(events.snapshot().blocks) == 3)  # the loop tells it after the step
    removed = [c for batch in events.after(before) for c in batch.changes]
    assert {change.key for change in removed if isinstance(change, BlockRemoved)} == {
        block.key for block in blocks
    }
    assert {block.domain for block in events.snapshot().blocks} == {Domain("b")}


def test_an_engine_that_was_not_asked_to_notes_nothing() -> None:
    journal = Retention().journal
    journal.name(b"key")
    journal.remove(b"key")
    journal.clear()
    assert journal._changes == []
    assert not journal._named
