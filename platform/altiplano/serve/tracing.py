"""OpenTelemetry traces of requests: one server span each, joined to the client's by `traceparent`. Optional (`altiplano[tracing]`).

Names follow OpenTelemetry's conventions for HTTP and generative AI. Neither prompts nor answers are recorded.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from altiplano.serve.call import Call


class Traces(Protocol):
    """Where calls are traced."""

    def begin(self, call: "Call", headers: Mapping[str, str]) -> None:
        """A request arrived. May set `call.trace_id`."""

    def end(self, call: "Call") -> None:
        """Its answer is complete, or given up."""


class NoTraces:
    """Traces that nobody asked for."""

    def begin(self, call: "Call", headers: Mapping[str, str]) -> None:
        return

    def end(self, call: "Call") -> None:
        return


class OtelTraces:
    """Spans through a provider of OpenTelemetry's SDK."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("altiplano.serve")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, call: "Call", headers: Mapping[str, str]) -> None:
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(dict(headers))
        # The method and the route's template, never the path: paths may hold names.
        call.span = self._tracer.start_span(f"{call.method} {call.route}", context=parent, kind=SpanKind.SERVER)
        call.trace_id = format(call.span.get_span_context().trace_id, "032x")

    def end(self, call: "Call") -> None:
        from opentelemetry.trace import Status, StatusCode

        span = call.span
        span.set_attributes(
            {
                "http.request.method": call.method,
                "http.route": call.route,
                "http.response.status_code": call.status,
                "altiplano.request.id": call.request_id,
                "altiplano.key.id": call.key_id,
            }
        )
        if call.model:
            span.set_attributes(
                {
                    "gen_ai.provider.name": "altiplano",
                    "gen_ai.request.model": call.model,
                    "gen_ai.response.model": call.arm,
                    "gen_ai.usage.input_tokens": call.prompt_tokens,
                    "gen_ai.usage.output_tokens": call.generation_tokens,
                    "gen_ai.usage.cached_tokens": call.cached_tokens,
                    "gen_ai.response.finish_reasons": tuple(call.finish_reasons),
                }
            )
        if call.first_token is not None:
            since = call.ended - call.first_token
            span.add_event("gen_ai.first_token", timestamp=time.time_ns() - int(since * 1e9))
            span.set_attribute("gen_ai.server.time_to_first_token", call.first_token - call.started)
        if call.status >= 500 or call.gone is not None:
            span.set_status(Status(StatusCode.ERROR, call.gone or "server error"))
        span.end()


def make_traces(endpoint: str | None) -> Traces:
    """Traces to an OTLP collector (HTTP); none without an endpoint.

    Raises:
        ValueError: OpenTelemetry's SDK or exporter is not installed.
    """
    if endpoint is None:
        return NoTraces()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(f"serve.otlp_endpoint is set, but {error.name} is missing: pip install 'altiplano[tracing]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "altiplano"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")))
    return OtelTraces(provider)
