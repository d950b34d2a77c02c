"""One trace from a client through the Router to Retriever and Engine, without Ray: in memory, and sent to a collector.

vLLM's own span is in `tests/e2e/test_file_search.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.app import assemble
from deployments.config import AppConfig, TracingConfig
from deployments.dispatch import Receive, Scope, Send
from deployments.errors import ConfigError
from deployments.retriever import Retriever
from deployments.serve_calls import Calls
from deployments.tracing import TracedApp, Tracing
from tests.collector import Collector, over_grpc, over_http
from tests.serve.stub_engine import StubEngine
from tests.unit.asgi_client import AsgiClient
from tests.unit.recording import LIMIT_S

pytestmark = pytest.mark.asyncio
CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CLIENT[:-1] + "0"


class Bench:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(provider)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def ask(app: Any, path: str = "/v1/chat/completions", *, traceparent: str | None = None) -> None:
    headers = [(b"accept", b"*/*")] + ([(b"traceparent", traceparent.encode())] if traceparent else [])
    await AsgiClient(b"", path=path, headers=headers).ask(app)


def answering(seen: list[dict[bytes, bytes]], within: Any = None) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"]))
        if within is not None:
            await within()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return app


async def test_the_routers_span_is_a_child_of_the_clients_and_the_engines_of_the_routers(bench: Bench) -> None:
    seen: list[dict[bytes, bytes]] = []
    await ask(TracedApp(answering(seen), bench.tracing), traceparent=CLIENT)
    (span,) = bench.spans.values()
    assert span.parent is not None and span.context is not None and span.attributes is not None
    assert format(span.parent.span_id, "016x") == CLIENT.split("-")[2]
    _, trace, parent, _ = seen[0][b"traceparent"].decode().split("-")  # what vLLM hands to the engine
    assert (trace, parent) == (CLIENT.split("-")[1], format(span.context.span_id, "016x"))
    assert seen[0][b"accept"] == b"*/*"
    assert span.attributes["http.response.status_code"] == 200


async def test_a_client_without_a_trace_gets_one_of_its_own_each_time(bench: Bench) -> None:
    app = TracedApp(answering([]), bench.tracing)
    await ask(app)
    await ask(app)
    first, second = bench.exporter.get_finished_spans()
    assert first.parent is second.parent is None
    assert first.context.trace_id != second.context.trace_id


async def test_a_client_that_wants_no_trace_gets_none(bench: Bench) -> None:
    await ask(TracedApp(answering([]), bench.tracing), traceparent=UNSAMPLED)
    assert bench.spans == {}


async def test_probes_are_not_traced(bench: Bench) -> None:
    await ask(TracedApp(answering([]), bench.tracing), "/health")
    assert bench.spans == {}


async def test_a_key_in_a_path_does_not_reach_the_collector(bench: Bench) -> None:
    await ask(TracedApp(answering([]), bench.tracing), "/v1/files/gs-secretsecret")
    (span,) = bench.spans.values()
    assert "secret" not in span.to_json()


async def test_a_search_is_a_span_here_and_a_child_of_it_in_the_retriever(bench: Bench) -> None:
    there = Bench()  # another process
    retriever = Retriever.__new__(Retriever)
    retriever._tracing = there.tracing

    class Searcher:
        async def search(self, *args: Any, **options: Any) -> list[str]:
            return ["a passage"]

    retriever._searcher = Searcher()  # type: ignore[assignment]
    handle: Any = SimpleNamespace(call=SimpleNamespace(remote=retriever.call))
    calls = Calls(handle, "The Retriever", timeout_s=5, tracing=bench.tracing)

    async def search() -> None:
        assert await calls.search("ann", ["vs_1"], ["question"]) == ["a passage"]

    await ask(TracedApp(answering([], search), bench.tracing))
    here, far = bench.spans, there.spans["Retriever.search"]
    assert here["call search"].parent == here["Router POST"].context
    assert far.parent is not None and far.context is not None
    assert far.parent.span_id == here["call search"].context.span_id
    assert far.context.trace_id == here["Router POST"].context.trace_id


@pytest.mark.parametrize(("protocol", "collecting"), [(None, over_grpc), ("http/protobuf", over_http)])
async def test_a_collector_gets_the_spans_of_each_process_by_the_protocol_that_is_set(
    protocol: str | None,
    collecting: Callable[[], AbstractContextManager[Collector]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", raising=False)
    if protocol is not None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with collecting() as collector:
        config = TracingConfig(otlp_endpoint=collector.endpoint, sample_ratio=0)  # but the client has decided
        router, retriever = (Tracing.start(config, service) for service in ("router", "retriever"))

        async def search() -> None:
            with router.span("call search"), retriever.span("Retriever.search", router.headers()):
                pass

        await ask(TracedApp(answering([]), router))  # spans of one process come in order, and this one's would be first
        await ask(TracedApp(answering([], search), router), traceparent=CLIENT)
        async with asyncio.timeout(LIMIT_S):
            while len(got := collector.trace(CLIENT.split("-")[1])) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert len(collector.traces()) == 1
    assert {name: (span.service, span.parent) for name, span in got.items()} == {
        "Router POST": ("groundswell-router", CLIENT.split("-")[2]),
        "call search": ("groundswell-router", got["Router POST"].id),
        "Retriever.search": ("groundswell-retriever", got["call search"].id),
    }


async def test_without_tracing_the_retriever_is_called_as_ever() -> None:
    heard: list[dict[str, Any]] = []

    async def remote(method: str, *args: Any, **options: Any) -> Any:
        from deployments.outcomes import outcome_of

        heard.append(options)

        async def nothing() -> list[str]:
            return []

        return await outcome_of(nothing())

    handle: Any = SimpleNamespace(call=SimpleNamespace(remote=remote))
    assert await Calls(handle, "The Retriever", timeout_s=5).search("ann", [], [], max_results=3) == []
    assert heard == [{"max_results": 3}]


async def test_engines_send_their_spans_to_the_same_collector_unless_their_model_says_where() -> None:
    models = [
        {"name": "a", "engine_args": {"model": "./m"}},
        {"name": "b", "engine_args": {"model": "./m", "otlp-traces-endpoint": "http://elsewhere:4317"}},
    ]
    app = assemble(AppConfig.parse({"models": models, "tracing": {"otlp_endpoint": "http://here:4317"}}), StubEngine)
    config = app._bound_deployment.init_args[0]
    assert config.models[0].engine_args["otlp_traces_endpoint"] == "http://here:4317"
    assert "otlp_traces_endpoint" not in config.models[1].engine_args


async def test_a_share_above_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="sample_ratio"):
        AppConfig.parse({"models": [], "tracing": {"otlp_endpoint": "http://here:4317", "sample_ratio": 2}})
