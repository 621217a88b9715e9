"""`/metrics`: parsed by prometheus_client's own readers, and compared with what was asked for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from engine import __version__
from engine.client import AsyncClient, ServiceError
from engine.frontend import Engine
from engine.serve.access import Access, Caller
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.types import Domain
from tests.conftest import ROOT
from tests.observe.http import get
from tests.steps import by_hand

DASHBOARD = ROOT / "docs" / "grafana" / "octavo.json"
# What Prometheus 2 and 3 ask for.
PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,*/*;q=0.1"

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(server: Server, accept: str = "") -> Values:
    status, headers, body = await get(server, "/metrics", {"accept": accept} if accept else None)
    assert status == 200
    parse: Callable[[str], Iterable[Any]] = text_string_to_metric_families
    if accept:
        assert headers["content-type"].startswith("application/openmetrics-text")
        parse = openmetrics.text_string_to_metric_families
    else:
        assert headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(body.decode())
        for sample in family.samples
    }


def value(values: Values, name: str, **labels: str) -> float:
    """The only sample of that name with these labels; other labels don't matter."""
    found = [
        number
        for (sample, have), number in values.items()
        if sample == f"octavo:{name}" and set(labels.items()) <= have
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


async def ask(client: AsyncClient, prompt: Any = "hello, octavo", **fields: Any) -> None:
    given: dict[str, Any] = {"max_tokens": 6} | fields
    async for _ in client.generate(prompt, **given):
        pass


@pytest.mark.parametrize("accept", ["", PROMETHEUS_2, PROMETHEUS_3], ids=["text", "2", "3"])
async def test_a_scrape_tells_what_was_asked_and_answered(
    server: Server, client: AsyncClient, accept: str
) -> None:
    prompt = "the same beginning of some length"
    await ask(client, prompt)
    await ask(client, prompt, n=2)
    with pytest.raises(ServiceError):
        await ask(client, "")
    values = await scrape(server, accept)
    assert value(values, "build_info", version=__version__) == 1
    assert value(values, "prompt_tokens_total", model_name="letters") == 3 * len(prompt)
    assert value(values, "prefix_cache_queries_total") == 2 * len(prompt)
    assert value(values, "prefix_cache_hits_total") == 32
    assert value(values, "generation_tokens_total") == 18
    assert value(values, "request_success_total", finished_reason="length") == 3
    assert value(values, "e2e_request_latency_seconds_count") == 3
    assert value(values, "time_to_first_token_seconds_count") == 3
    assert value(values, "time_to_first_token_seconds_bucket", le="+Inf") == 3
    assert value(values, "request_queue_time_seconds_count") == 3
    assert value(values, "request_prompt_tokens_sum") == 3 * len(prompt)
    assert value(values, "failed_calls_total", code="INVALID_ARGUMENT") == 1
    assert value(values, "tenant_generation_tokens_total", tenant="default") == 18
    assert value(values, "tenant_cached_prompt_tokens_total", tenant="default") == 64
    assert value(values, "tenant_answers_total", tenant="default") == 3
    assert value(values, "tenant_requests_in_progress", tenant="default") == 0
    blocks = [value(values, "kv_blocks", state=state) for state in ("free", "cached", "owned")]
    assert sum(blocks) == 64
    assert value(values, "num_requests_running") == value(values, "num_requests_waiting") == 0
    assert ("process_resident_memory_bytes", frozenset()) in values


async def test_a_server_that_loads_its_model_can_be_scraped() -> None:
    server = Server(ServerConfig(port=0, grace=0.05, http="127.0.0.1:0"))
    await server.start()
    try:
        values = await scrape(server)
    finally:
        await server.stop()
    assert value(values, "build_info") == 1
    assert not any(name.startswith("octavo:num_requests") for name, _ in values)


async def test_running_requests_and_their_blocks_are_seen(
    server: Server, client: AsyncClient, engine: Engine
) -> None:
    with by_hand(engine) as allow:
        tasks = [asyncio.create_task(ask(client, max_tokens=100)) for _ in range(6)]
        while engine.stats().waiting < 6:
            await asyncio.sleep(0.001)
        allow(6)
        while engine.stats().running < 4:
            await asyncio.sleep(0.001)
        values = await scrape(server)
        assert value(values, "num_requests_running") == 4
        assert value(values, "calls_in_progress") == 6
        assert value(values, "num_requests_waiting") == 2
        assert 0 < value(values, "kv_cache_usage_perc") < 1
        assert value(values, "tenant_requests_in_progress", tenant="default") == 6
    await asyncio.gather(*tasks)


async def test_no_label_holds_what_a_client_chose(server: Server, client: AsyncClient) -> None:
    canary = "canary-5f2c"
    await ask(client, canary, request_id=canary, cache_salt=canary, stop=(canary,))
    for accept in ("", PROMETHEUS_2):
        _, _, body = await get(server, "/metrics", {"accept": accept})
        assert canary.encode() not in body


async def test_only_operators_may_scrape(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Access, "http_caller", lambda self, request: Caller("acme"))
    status, _, body = await get(server, "/metrics")
    assert status == 403
    assert b"octavo:" not in body


async def test_a_scrape_lets_the_event_loop_go_on(server: Server, engine: Engine) -> None:
    for number in range(200):  # more tenants than are kept apart
        engine.requests.start("r", Domain(f"tenant-{number}"), received=0.0)
    turns, scraping = 0, asyncio.create_task(get(server, "/metrics"))
    while not scraping.done():
        turns += 1
        await asyncio.sleep(0)
    values = await scrape(server)
    tenants = [labels for name, labels in values if name == "octavo:tenant_requests_in_progress"]
    assert len(tenants) == 65
    families = {name for name, _ in values}
    assert turns >= len({re.sub("_(total|bucket|sum|count|info)$", "", name) for name in families})


async def test_every_metric_that_the_dashboard_shows_is_there(
    server: Server, client: AsyncClient
) -> None:
    await ask(client)
    with pytest.raises(ServiceError):
        await ask(client, "")
    names = {name for name, _ in await scrape(server)}
    # What a quiet run has no sample of.
    names |= {"octavo:held_steps_total"}
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    used: set[str] = set()
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            used |= set(re.findall(r"\b(?:octavo:|process_)\w+", target["expr"]))
    assert used - names == set()
    assert len(panels) >= 12
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
