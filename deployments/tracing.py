"""OpenTelemetry spans from the Router to Retriever and Engine, where `args.tracing` names a collector. Off without it.

Three kinds of span make one trace: the Router's, for each HTTP request, a child of the client's if it sends a
`traceparent`; the search for its documents, here and in the Retriever; and vLLM's own `llm_request`, in the Engine.
vLLM's serving classes hand a request's `traceparent` on to the engine, so the Router puts its own span's in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from deployments.config import TracingConfig
from deployments.dispatch import App, Message, Receive, Scope, Send
from deployments.redaction import redacted

_PROTOCOL: Final = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_CONTEXT_HEADERS: Final = (b"traceparent", b"tracestate")
_UNTRACED: Final = ("/health", "/ping", "/metrics")


class Tracing:
    """Makes spans, and carries them across processes as headers.

    Args:
        provider: OpenTelemetry's `TracerProvider`.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("groundswell")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def start(cls, config: TracingConfig, service: str) -> Tracing:
        """Send spans to the collector, from a thread of OpenTelemetry's own."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        provider = TracerProvider(
            resource=Resource.create({"service.name": f"groundswell-{service}"}),
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        )
        provider.add_span_processor(BatchSpanProcessor(_exporter(config.otlp_endpoint)))
        return cls(provider)

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str] | None = None, **attributes: Any) -> Iterator[Any]:
        """Open a span for the block: a child of the one in `headers`, else of the one that is open here."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract(headers) if headers else None
        kind = SpanKind.SERVER if headers is not None else SpanKind.INTERNAL
        with self._tracer.start_as_current_span(
            name, context, kind=kind, attributes=attributes, record_exception=False
        ) as span:
            yield span

    def headers(self) -> dict[str, str]:
        """Return what makes another process's span a child of the one that is open here."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier


def _exporter(endpoint: str) -> Any:
    """Return an exporter by the protocol that OpenTelemetry's variable names, gRPC by default, as vLLM does."""
    if os.environ.get(_PROTOCOL, "grpc") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=endpoint)


class TracedApp:
    """An ASGI app with a span around each request but those of probes."""

    def __init__(self, app: App, tracing: Tracing) -> None:
        self._app, self._tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        came = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": scope["method"], "url.path": redacted(scope["path"])}
        with self._tracing.span(f"Router {scope['method']}", came, **attributes) as span:
            others = [(name, value) for name, value in scope["headers"] if name not in _CONTEXT_HEADERS]
            ours = [(name.encode(), value.encode()) for name, value in self._tracing.headers().items()]

            async def noting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self._app({**scope, "headers": [*others, *ours]}, receive, noting)
