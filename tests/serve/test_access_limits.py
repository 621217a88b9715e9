"""What a tenant may ask for, what changes while a server runs, and what a flood of keys does."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.client import AsyncClient, ServiceError
from engine.new_key import make_key
from engine.serve import files, run
from engine.serve.access import watch_rules
from engine.serve.server import Server
from tests.serve.access_file import ALICE, BOB, OPS, client, entry, serving, tenants, write
from tests.serve.fake_engine import FakeEngine, collect, until

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_SECONDS", 0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "access.yaml", tenants())


@pytest.fixture
async def server(path: Path, fake: FakeEngine) -> AsyncIterator[Server]:
    async with serving(path, fake) as server:
        yield server


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode | None:
    """How a call ends; None: well."""
    try:
        await call
    except ServiceError as error:
        return error.code
    return None


async def until_code(call: Callable[[], Awaitable[Any]], code: grpc.StatusCode | None) -> None:
    """Call until it ends so; pytest's own time limit ends a test that waits in vain."""
    while await code_of(call()) is not code:
        await asyncio.sleep(0.01)


async def say(client: AsyncClient, prompt: str = "hello", **given: Any) -> str:
    return "".join([delta.text for delta in await collect(client.generate(prompt, **given))])


async def test_a_tenant_beyond_its_rate_is_told_how_long_to_wait_and_others_are_not_held_up(
    path: Path, fake: FakeEngine
) -> None:
    write(path, tenants(alice={"requests_per_minute": 2}, bob={"tokens_per_minute": 10}))
    async with (
        serving(path, fake) as server,
        client(server, ALICE) as alice,
        client(server, BOB) as bob,
    ):
        server._access._clock = lambda: 0  # which the meters of the first call take over
        await say(alice)
        await alice.tokenize("hello")
        with pytest.raises(ServiceError, match="2 requests a minute") as raised:
            await say(alice)
        assert raised.value.code is EXHAUSTED
        assert raised.value.retry_after == 30.0
        await say(bob, "hello")  # 5 of the prompt and 5 of the answer
        await say(bob, "hello hello")  # what it will cost isn't known before
        with pytest.raises(ServiceError, match="10 tokens a minute") as raised:
            await say(bob)
        assert raised.value.code is EXHAUSTED
        assert raised.value.retry_after == 132.0  # 22 tokens at 10 a minute
        assert not await alice.abort("unknown")  # is not counted
    assert len(fake.calls) == 3


async def test_a_tenant_has_so_many_calls_in_progress(path: Path, fake: FakeEngine) -> None:
    write(path, tenants(alice={"max_concurrent": 1}))
    async with (
        serving(path, fake) as server,
        client(server, ALICE) as alice,
        client(server, BOB) as bob,
    ):
        stream = alice.generate("forever")
        await anext(stream)
        assert await code_of(say(alice)) is EXHAUSTED
        assert await code_of(alice.tokenize("x")) is EXHAUSTED
        assert await code_of(alice.flush()) is EXHAUSTED
        assert await say(bob) == "hello"
        await stream.aclose()
        await until(lambda: not fake.running)
        assert await say(alice) == "hello"


async def test_a_tenants_requests_have_no_better_priority_than_it_may(
    path: Path, fake: FakeEngine
) -> None:
    write(path, tenants(alice={"best_priority": 3}, bob={"best_priority": -2}))
    async with (
        serving(path, fake) as server,
        client(server, ALICE) as alice,
        client(server, BOB) as bob,
        client(server, OPS) as ops,
    ):
        for caller, priority in ((alice, None), (alice, 3), (alice, 9), (bob, None), (bob, -2)):
            await say(caller, priority=priority)
        await say(ops, priority=-(2**31))
        assert await code_of(say(alice, priority=2)) is DENIED
        assert await code_of(say(alice, priority=0)) is DENIED
        assert await code_of(say(bob, priority=-3)) is DENIED
    assert [call.priority for call in fake.calls] == [3, 3, 9, 0, -2, -(2**31)]


# The file while the server runs.


async def test_keys_come_and_go_while_the_server_runs(
    server: Server, path: Path, fake: FakeEngine
) -> None:
    new = make_key()
    async with (
        client(server, ALICE) as old,
        client(server, new) as renewed,
        client(server, BOB) as bob,
    ):
        stream = bob.generate("forever")
        await anext(stream)
        assert await code_of(renewed.model_info()) is UNAUTHENTICATED
        write(path, tenants(alice={"keys": [entry(ALICE, "old"), entry(new, "new")]}))
        await until_code(renewed.model_info, None)
        await old.model_info()
        write(path, tenants(alice={"keys": [entry(new, "new")]}))
        await until_code(old.model_info, UNAUTHENTICATED)
        await renewed.model_info()
        await anext(stream)  # what runs goes on
        await stream.aclose()


async def test_a_file_that_became_wrong_changes_nothing(
    server: Server, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with client(server, ALICE) as alice:
        for text in ("tenants: {alice: {keyz: []}}", "tenants: ["):
            caplog.clear()
            path.write_text(text)
            await until(lambda: "was not taken up" in caplog.text)
            await alice.model_info()
        path.unlink()
        await until(lambda: "No such file" in caplog.text)
        await alice.model_info()
        write(path, tenants(alice={"keys": []}))
        await until_code(alice.model_info, UNAUTHENTICATED)


async def test_a_hangup_signal_has_the_file_read_at_once(
    path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lines(level: int) -> int:
        return sum("was read again" in r.message for r in caplog.records if r.levelno == level)

    monkeypatch.setattr(files, "LOOK_SECONDS", 3600.0)
    caplog.set_level(logging.INFO, "octavo.serve")
    before = signal.getsignal(signal.SIGHUP)  # ignored under nohup
    async with serving(path, fake) as server:
        with run._rereading_on_hangup(server):
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: lines(logging.INFO))
            assert not lines(logging.WARNING)  # nothing has changed
            write(path, tenants(alice={"max_concurrent": 1}))
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: lines(logging.WARNING))
    assert signal.getsignal(signal.SIGHUP) is before


def test_an_expired_key_is_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    past = datetime.date(2020, 1, 1)
    write(path, tenants(alice={"keys": [entry(ALICE, "old", past)]}))
    watched = watch_rules(path)
    for _ in range(2):
        watched.look(again=True)
    write(path, tenants(alice={"keys": [entry(ALICE, "old", past)]}, bob={"max_concurrent": 1}))
    watched.look()
    assert caplog.text.count("key alice/old in") == 1
    assert caplog.text.count("was read again") == 1


async def test_limits_change_while_calls_are_in_progress(
    server: Server, path: Path, fake: FakeEngine
) -> None:
    async with client(server, ALICE) as alice:
        streams = [alice.generate("forever") for _ in range(2)]
        for stream in streams:
            await anext(stream)
        write(path, tenants(alice={"max_concurrent": 1}))
        await until_code(lambda: alice.tokenize("x"), EXHAUSTED)
        for stream in streams:
            await stream.aclose()
        await until(lambda: not fake.running)
        assert await say(alice) == "hello"


async def test_a_flood_of_wrong_keys_neither_fills_the_log_nor_holds_up_a_tenant(
    server: Server, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "octavo")
    server._access._clock = lambda: 0  # a slow machine logs no second line
    async with client(server, ALICE) as alice, client(server, make_key()) as wrong:
        stream = alice.generate("forever")
        await anext(stream)
        codes = await asyncio.gather(*(code_of(wrong.model_info()) for _ in range(200)))
        assert set(codes) == {UNAUTHENTICATED}
        await anext(stream)
        await stream.aclose()
    assert len([record for record in caplog.records if record.name.startswith("octavo")]) <= 2
    assert "refused 1 calls" in caplog.text
    failed = server._calls.failures
    assert failed == {("grpc", "/octavo.v1.Generation/GetModelInfo", "UNAUTHENTICATED"): 200}
