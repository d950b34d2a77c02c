"""A collector of OpenTelemetry spans: takes them over gRPC or HTTP, as any does, and keeps them for tests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from tests.unit.stub_server import http_server


@dataclass(frozen=True)
class Span:
    """One span that came in, its ids in hexadecimal.

    Attributes:
        service: Of its process.
        parent: Empty for a trace's first.
    """

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: tuple[str, ...]


class Collector:
    """What came in so far.

    Attributes:
        endpoint: Where to send more.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[Span] = []

    def take(self, request: Any) -> None:
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self._spans += [
                Span(
                    service,
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    tuple(sorted(attribute.key for attribute in span.attributes)),
                )
                for scope in resource.scope_spans
                for span in scope.spans
            ]

    def traces(self) -> set[str]:
        return {span.trace for span in list(self._spans)}

    def trace(self, trace: str) -> dict[str, Span]:
        """Return the spans of one trace by name."""
        return {span.name: span for span in list(self._spans) if span.trace == trace}


@contextmanager
def over_grpc() -> Iterator[Collector]:
    """Have a collector until the block is left."""
    collector = Collector()

    class Service(TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            collector.take(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Service(), server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


@contextmanager
def over_http() -> Iterator[Collector]:
    """Have a collector until the block is left."""
    collector = Collector()

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http_server(Service) as url:
        collector.endpoint = f"{url}/v1/traces"
        yield collector
