"""Keys, tenants and their limits over HTTP, as OpenAI's own client shows and sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import openai
import pytest

from engine.serve.server import Server
from engine.types import Domain
from tests.serve.access_file import ALICE, BOB, OPS, serving, tenants, write
from tests.serve.fake_engine import FakeEngine, until


@pytest.fixture
async def keyed(tmp_path: Path, fake: FakeEngine) -> AsyncIterator[Server]:
    limits = {"best_priority": 5, "max_concurrent": 1}
    path = write(tmp_path / "access.yaml", tenants(bob=limits))
    async with serving(path, fake, http=("127.0.0.1", 0)) as server:
        yield server


def client(server: Server, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.page}v1", api_key=key, max_retries=0)


async def test_a_key_says_whose_request_it_is(keyed: Server, fake: FakeEngine) -> None:
    for key in (ALICE, BOB):
        async with client(keyed, key) as api:
            await api.completions.create(model="echo", prompt="hi", user="anna")
    assert [call.domain for call in fake.calls] == [Domain("alice", "anna"), Domain("bob", "anna")]
    assert [str(call.request_id).split("/")[0] for call in fake.calls] == ["alice", "bob"]
    async with client(keyed, "wrong") as api:
        with pytest.raises(openai.AuthenticationError) as refused:
            await api.completions.create(model="echo", prompt="hi")
    assert refused.value.code == "invalid_api_key"


async def test_a_tenant_s_limits_hold_over_http(keyed: Server, fake: FakeEngine) -> None:
    async with client(keyed, BOB) as api:
        with pytest.raises(openai.PermissionDeniedError, match="priority"):
            await api.completions.create(model="echo", prompt="hi", extra_body={"priority": 4})
        await api.completions.create(model="echo", prompt="hi")
        assert fake.calls[-1].priority == 5
        with pytest.raises(openai.BadRequestError, match="may have 1 at once"):
            await api.completions.create(model="echo", prompt=["forever", "forever"])
        stream = await api.completions.create(
            model="echo", prompt="forever", max_tokens=9999, stream=True
        )
        async with stream:
            with pytest.raises(openai.RateLimitError) as limited:
                await api.completions.create(model="echo", prompt="hi")
        assert int(limited.value.response.headers["retry-after"]) >= 1
        await until(lambda: not fake.running)
        await until(lambda: keyed._calls.num_in_progress == 0)
        await api.completions.create(model="echo", prompt="hi")


async def test_routes_are_for_tenants_and_the_page_for_operators(keyed: Server) -> None:
    tenants_own = ("/v1/models", "/v1/models/echo", "/version", "/tokenizer_info")
    assert keyed.page is not None
    async with httpx2.AsyncClient(base_url=keyed.page) as http:
        codes = {}
        for name, headers in (
            ("nobody", {}),
            ("alice", {"authorization": f"Bearer {ALICE}"}),
            ("ops", {"authorization": f"Bearer {OPS}"}),
        ):
            paths = ("/health", *tenants_own, "/", "/events")
            tasks = [http.stream("GET", path, headers=headers) for path in paths]
            codes[name] = []
            for task in tasks:
                async with task as reply:
                    codes[name].append(reply.status_code)
            body = {"prompt": "hi"}
            codes[name].append(
                (await http.post("/tokenize", json=body, headers=headers)).status_code
            )
    assert codes["nobody"] == [200, *[401] * 6, 401]
    assert codes["alice"] == [200, *[200] * 4, 403, 403, 200]
    assert codes["ops"][:-2] == [200] * 6
    assert codes["ops"][-1] == 200


async def test_one_tenant_can_t_end_another_s_request(keyed: Server, fake: FakeEngine) -> None:
    async with client(keyed, ALICE) as alice, client(keyed, BOB) as bob:
        stream = await alice.completions.create(
            model="echo", prompt="forever", max_tokens=9999, stream=True
        )
        async with stream:
            chunk = await anext(aiter(stream))
            callers = [keyed._access._callers[name] for name in ("bob", "alice")]
            name = chunk.id.removeprefix("cmpl-")
            assert [keyed._calls.abort(caller, name) for caller in callers] == [False, True]
        await asyncio.sleep(0)
        await bob.completions.create(model="echo", prompt="hi")
    assert fake.finished["abort"] == 1
