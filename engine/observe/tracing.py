"""One OpenTelemetry span a request, joined to its caller's trace: the extra `octavo[tracing]`.

A span is made when its request has ended, from times that were taken anyway, so streams cost
nothing more. Where spans go is said by the standard variables of the environment
(`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_EXPORTER`, `OTEL_TRACES_SAMPLER`, …):
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from engine import __version__
from engine.config_error import ConfigError
from engine.observe.requests import RequestRecord
from engine.types import FinishReason

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_FAILED = {FinishReason.ERROR, FinishReason.DEADLINE}


class Tracing:
    """Makes the spans; a listener of `RequestFigures`. Closing it sends what is left.

    Args:
      provider: where spans go.
      model: what clients call it.
    """

    def __init__(self, provider: TracerProvider, model: str = ""):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.model = model
        self._provider = provider
        self._tracer = provider.get_tracer("octavo", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: RequestRecord) -> None:
        """Write the span of a request that has ended."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        def at(seconds: float) -> int:
            return round(1e9 * (record.received + seconds))

        span = self._tracer.start_span(
            "generate",
            context=self._propagator.extract(record.trace),
            kind=SpanKind.SERVER,
            start_time=at(0.0),
        )
        if span.is_recording():
            for name, value in self._attributes(record).items():
                span.set_attribute(name, value)
            if record.submitted is not None:
                span.add_event("queued", timestamp=at(record.submitted))
            for answer in record.answers:
                which = {"octavo.answer": answer.index}
                if answer.first_token is not None and record.submitted is not None:
                    start = record.submitted + (answer.queued_first or 0.0)
                    span.add_event("prefill", which, at(min(start, answer.first_token)))
                    span.add_event("first token", which, at(answer.first_token))
                if answer.last_token is not None:
                    span.add_event(
                        "last token",
                        which | {"gen_ai.usage.output_tokens": answer.completion_tokens},
                        at(answer.last_token),
                    )
            failure = record.refusal or next(
                (str(one.finish_reason) for one in record.answers if one.finish_reason in _FAILED),
                None,
            )
            if failure is not None:
                span.set_attribute("error.type", failure)
                span.set_status(Status(StatusCode.ERROR))
        span.end(at(record.seconds))

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()

    def _attributes(self, record: RequestRecord) -> dict[str, Any]:
        """Names follow https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/."""
        answers = record.answers
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": record.operation,
            "gen_ai.provider.name": "octavo",
            "gen_ai.request.model": self.model,
            "gen_ai.response.id": record.response_id,
            "gen_ai.response.finish_reasons": [str(answer.finish_reason) for answer in answers],
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": sum(answer.completion_tokens for answer in answers),
            "octavo.request_id": record.request_id,
            "octavo.cached_tokens": record.cached_tokens,
            "octavo.tenant": record.tenant,
        }
        queued = [answer.queued for answer in answers if answer.queued is not None]
        firsts = [answer.first_token for answer in answers if answer.first_token is not None]
        if queued:
            attributes["octavo.queue_seconds"] = max(queued)
        if firsts:
            attributes["octavo.first_token_seconds"] = min(firsts)
        return attributes


def open_tracing() -> Tracing:
    """Tracing as the environment says: by default to the OTLP endpoint on this machine.

    Raises:
      ConfigError: the extra is not installed, or an exporter that the environment names.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"server.tracing takes OpenTelemetry ({error.name} is missing); install octavo's extra "
            "`tracing`, from its folder with pip install '.[tracing]', or leave server.tracing out"
        ) from None
    named = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = named or bool(os.environ.get("OTEL_SERVICE_NAME"))
    resource = Resource.create({} if named else {"service.name": "octavo"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in _exporters():
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def _exporters() -> list[Any]:
    """Those that `OTEL_TRACES_EXPORTER` names, as installed packages register them."""
    found = []
    for name in os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        name = name.strip()
        if name in ("", "none"):
            continue
        if name == "otlp":
            protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
            protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
            name = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
        registered = entry_points(group="opentelemetry_traces_exporter", name=name)
        if not registered:
            package = f"opentelemetry-exporter-{name.replace('_', '-')}"
            raise ConfigError(
                f"the environment asks for traces by {name} (OTEL_TRACES_EXPORTER, "
                f"OTEL_EXPORTER_OTLP_PROTOCOL), which is not installed; try pip install {package}"
            )
        found.append(next(iter(registered)).load()())
    return found
