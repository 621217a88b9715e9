"""Spans, kept in memory by OpenTelemetry's own exporter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engine.client import AsyncClient, ServiceError
from engine.config_error import ConfigError
from engine.frontend import Engine
from engine.observe.tracing import Tracing, open_tracing
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.rpc.octavo.v1 import generation_pb2_grpc
from engine.serve.server import Server
from tests.conftest import ROOT
from tests.observe.served import Letters

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def spans(engine: Engine) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider, "letters")
    engine.requests.listeners.append(tracing)
    yield exporter
    tracing.close()


async def ask(client: AsyncClient, prompt: Any = "hello", **fields: Any) -> None:
    given: dict[str, Any] = {"max_tokens": 5} | fields
    async for _ in client.generate(prompt, **given):
        pass


def the_span(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    spans.clear()
    return span


async def test_a_request_is_a_span_with_counts_and_times_and_without_its_text(
    client: AsyncClient, spans: InMemorySpanExporter
) -> None:
    canary = "canary-5f2c"
    await ask(client, canary, request_id="mine", cache_salt=canary, stop=(canary,), n=2)
    span = the_span(spans)
    assert (span.name, span.kind, span.parent) == ("generate", SpanKind.SERVER, None)
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.request.model"] == "letters"
    assert attributes["gen_ai.response.id"] == "mine"
    assert attributes["gen_ai.usage.input_tokens"] == len(canary)
    assert attributes["gen_ai.usage.output_tokens"] == 10
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert attributes["octavo.tenant"] == "default"
    assert attributes["octavo.cached_tokens"] == 0
    names = [event.name for event in span.events]
    assert names[0] == "queued"
    assert sorted(names[1:]) == sorted(["prefill", "first token", "last token"] * 2)
    assert span.start_time is not None
    assert span.end_time is not None
    for event in span.events:
        assert span.start_time <= event.timestamp <= span.end_time
    assert span.status.status_code is StatusCode.UNSET
    assert canary not in span.to_json()


async def test_a_span_is_found_by_what_the_client_has(
    server: Server, client: AsyncClient, spans: InMemorySpanExporter
) -> None:
    def found() -> list[tuple[Any, ...]]:
        names = ("gen_ai.operation.name", "gen_ai.response.id", "octavo.request_id")
        seen = [dict(span.attributes or {}) for span in spans.get_finished_spans()]
        spans.clear()
        return [tuple(each[name] for name in names) for each in seen]

    assert server.page is not None
    async with httpx2.AsyncClient(base_url=server.page) as http:
        for path, operation, asked in (
            ("completions", "text_completion", {"prompt": ["one", "two"]}),
            ("chat/completions", "chat", {"messages": [{"role": "user", "content": "hi"}]}),
        ):
            answer = await http.post(f"v1/{path}", json={"max_tokens": 2} | asked)
            name = answer.json()["id"]
            ids = [seen[:2] for seen in found()]
            assert ids == [(operation, name)] * len(asked.get("prompt", "1"))
    await ask(client, request_id="mine")
    await ask(client, [{"role": "user", "content": "hi"}], request_id="ours")
    assert found() == [("text_completion", "mine", "mine"), ("chat", "ours", "ours")]


async def test_a_span_continues_its_caller_s_trace(
    server: Server, spans: InMemorySpanExporter
) -> None:
    import grpc

    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)
        request = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=2))
        for header, parent in (
            (f"00-{TRACE}-{PARENT}-01", PARENT),
            ("nonsense", None),
        ):
            async for _ in stub.Generate(request, metadata=(("traceparent", header),)):
                pass
            span = the_span(spans)
            assert (f"{span.parent.span_id:016x}" if span.parent else None) == parent
            if parent:
                assert span.context is not None
                assert f"{span.context.trace_id:032x}" == TRACE
        # A caller that doesn't want this request sampled is heard.
        header = f"00-{TRACE}-{PARENT}-00"
        async for _ in stub.Generate(request, metadata=(("traceparent", header),)):
            pass
        assert spans.get_finished_spans() == ()


async def test_what_went_wrong_is_an_error_without_its_message(
    client: AsyncClient, spans: InMemorySpanExporter, runner: Letters
) -> None:
    with pytest.raises(ServiceError):
        await ask(client, [10**6])
    span = the_span(spans)
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes or {})["error.type"] == "InvalidRequest"
    runner.fail_waits.add(len(runner.plans))
    with pytest.raises(ServiceError):
        await ask(client)
    assert dict(the_span(spans).attributes or {})["error.type"] == "error"


def test_an_exporter_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin_of_old")
    with pytest.raises(ConfigError, match=r"pip install opentelemetry-exporter-zipkin-of-old"):
        open_tracing()


def test_the_environment_names_exporter_and_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    tracing = open_tracing()
    assert tracing._provider.resource.attributes["service.name"] == "octavo"
    tracing.close()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "worker-7")
    tracing = open_tracing()
    assert tracing._provider.resource.attributes["service.name"] == "worker-7"
    tracing.close()


def test_nothing_of_it_is_imported_unless_it_is_turned_on() -> None:
    script = "import sys, engine.serve.run, engine.frontend; print('opentelemetry' in sys.modules)"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
