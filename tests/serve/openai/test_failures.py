"""What failed shows in `/metrics`, over gRPC and HTTP: who was refused, throttled, or failed."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.client import ServiceError
from engine.serve.server import Server
from engine.types import FinishReason
from tests.serve.access_file import ALICE, BOB, OPS, client, serving, tenants, write
from tests.serve.fake_engine import FakeEngine

CANARY = "canary-5f2c"
COMPLETIONS, GENERATE = "/v1/completions", "/octavo.v1.Generation/Generate"


async def counted(http: httpx2.AsyncClient, name: str, *labels: str) -> dict[tuple[str, ...], int]:
    """A metric of the server's, by some of its labels."""
    answer = await http.get("/metrics", headers={"x-api-key": OPS})
    assert CANARY not in answer.text
    return {
        tuple(sample.labels[label] for label in labels): int(sample.value)
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == f"octavo:{name}_total"
    }


async def failed(http: httpx2.AsyncClient) -> dict[tuple[str, ...], int]:
    return await counted(http, "failed_calls", "protocol", "method", "code")


async def test_http_s_failures_are_counted_by_route_and_status(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    asked = {"prompt": "hello", "max_tokens": 3}
    assert (await http.post(COMPLETIONS, json=asked)).status_code == 200
    for body in (asked | {"n": 0}, asked | {CANARY: 1}):
        assert (await http.post(COMPLETIONS, json=body)).status_code == 400
    fake.error = ZeroDivisionError()
    assert (await http.post(COMPLETIONS, json=asked)).status_code == 500
    fake.error, fake.ending = None, FinishReason.ERROR
    answer = await http.post(COMPLETIONS, json=asked | {"stream": True})
    assert answer.status_code == 200  # and then it failed
    for path in (f"/v1/{CANARY}", f"/v1/models/{CANARY}", f"/{CANARY}"):
        assert (await http.get(path)).status_code == 404
    assert await failed(http) == {
        ("http", COMPLETIONS, "400"): 2,
        ("http", COMPLETIONS, "500"): 2,
        ("http", "/v1/{path:path}", "404"): 1,
        ("http", "/v1/models/{name:path}", "404"): 1,
        ("http", "(unknown)", "404"): 1,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    limits = {"requests_per_minute": 1}
    return write(tmp_path / "access.yaml", tenants(alice=limits, bob=limits))


def page(server: Server) -> httpx2.AsyncClient:
    assert server.page is not None
    return httpx2.AsyncClient(base_url=server.page, timeout=60)


async def test_who_is_refused_or_throttled_is_counted(path: Path, fake: FakeEngine) -> None:
    asked = {"prompt": "hello", "max_tokens": 3}
    async with serving(path, fake, http=("127.0.0.1", 0)) as server, page(server) as http:
        server._access._clock = lambda: 0  # a slow test's minute is not over
        for key, codes in ((CANARY, (401, 401)), (BOB, (200, 429))):
            for code in codes:
                answer = await http.post(COMPLETIONS, json=asked, headers={"x-api-key": key})
                assert answer.status_code == code
        async with client(server, CANARY) as nobody, client(server, ALICE) as alice:
            with pytest.raises(ServiceError):
                await anext(nobody.generate("hello"))
            await alice.tokenize("hello")
            for _ in range(2):
                with pytest.raises(ServiceError):
                    await anext(alice.generate("hello"))
        assert await failed(http) == {
            ("http", COMPLETIONS, "401"): 2,
            ("http", COMPLETIONS, "429"): 1,
            ("grpc", GENERATE, "UNAUTHENTICATED"): 1,
            ("grpc", GENERATE, "RESOURCE_EXHAUSTED"): 2,
        }
        throttled = await counted(http, "tenant_throttled_calls", "tenant")
        assert throttled == {("alice",): 2, ("bob",): 1}
        # A tenant that the file no longer names has no series any more.
        write(path, {name: of for name, of in tenants().items() if name != "bob"})
        server._watcher._watched[0].look()
        assert await counted(http, "tenant_throttled_calls", "tenant") == {("alice",): 2}
