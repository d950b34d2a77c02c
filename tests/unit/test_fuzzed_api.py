"""Whatever a client sends is answered: no 500, no dropped connection, no hang. 501 and 503 are answers.

Requests are schemathesis's, from the OpenAPI document of vLLM's app and from one written here for the documents' app;
each is sent as it is, and with some of its fields laid over a request that works. What serves them is a Router's app,
put together as a Router does, over a fleet that follows a script and documents in a folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import threading
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import requests

pytest.importorskip("vllm")
pytest.importorskip("schemathesis")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.core.errors import UnsupportedSchema

from deployments.access.gate import Gate
from deployments.access.keys import KeyEntry, Keys, hash_of
from deployments.config import DocumentsConfig, GroundingConfig
from deployments.dispatch import App, Dispatcher
from deployments.errors import OPAQUE, Overloaded
from deployments.grounding.asgi import GroundedApp, Limits
from deployments.metrics import NoMetrics
from deployments.retrieval import api
from deployments.seam.frontend import MOUNTED, token_counter
from tests.unit.house import house
from tests.unit.retrievers import HouseRetriever
from tests.unit.scripted_fleet import ScriptedFleet, StubReservation, scripted_app

LIMIT_S = 120
EXAMPLES = 12
"""For each operation and way of asking; all of it takes about a minute."""
KEY = "gs-fuzz-0123456789"
CAPACITY = 64

MESSAGES = [{"role": "user", "content": "Hello"}]
WORKING: dict[str, Any] = {
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES},
    "/v1/completions": {"model": "tiny", "prompt": "Hello"},
    "/v1/responses": {"model": "tiny", "input": "Hello"},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES, "max_tokens": 8},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": MESSAGES},
    "/tokenize": {"model": "tiny", "prompt": "Hello"},
    "/detokenize": {"model": "tiny", "tokens": [1, 2, 3]},
    "/generative_scoring": {"model": "tiny", "query": "a", "items": ["b"], "label_token_ids": [1, 2]},
}
"""Requests that are answered with 200."""

ROUTER, VLLM = "ray.serve.groundswell.router", "vllm"
"""Who logs that requests failed. vLLM does for bad requests too."""
KNOWN_DEFECTS = {
    "_construct_message_from_response_item": "an output message without content has no first item (IndexError)",
}
"""What makes vLLM itself fail, by the function that does, with the reason. To be removed as vLLM mends it."""


class _Full(ScriptedFleet):
    def admit(self, n: int) -> StubReservation:
        if n > CAPACITY:
            raise Overloaded("It is full.", retry_after_s=7)
        return StubReservation()


class _Failures(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__()
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None and record.exc_info[2] is not None:
            self._into.append(traceback.extract_tb(record.exc_info[2])[-1].name)


class Server:
    """A Router's app on an event loop of its own, which the tests' threads ask."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self._failures: dict[str, list[str]] = {name: [] for name in (ROUTER, VLLM)}
        self._handlers = {name: _Failures(into) for name, into in self._failures.items()}
        for name, handler in self._handlers.items():
            logging.getLogger(name).addHandler(handler)
        self.run(self._start(folder))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)

    async def _start(self, folder: Path) -> None:
        app, fleet, client = await scripted_app(folder / "model")
        fleet.__class__ = _Full
        made = await self._stack.enter_async_context(house(folder / "documents"))
        self._stack.callback(client.shutdown)
        retriever = HouseRetriever(made)
        config = DocumentsConfig(uri="unused", max_file_bytes=10**6)
        documents: Any = api.documents_app(made.ingestion, retriever, config, max_body_bytes=10**6)  # type: ignore[arg-type]
        limits = Limits("tiny", client.let_in, token_counter(client), 2048)
        grounded = GroundedApp(app, limits, retriever, GroundingConfig(), metrics=NoMetrics())  # type: ignore[arg-type]

        async def resolve(name: str) -> App | None:
            return grounded if name == "tiny" else None

        mounted = dict.fromkeys(api.PREFIXES, documents)
        dispatcher = Dispatcher(resolve, ["tiny"], MOUNTED, {}, max_body_bytes=10**6, mounted=mounted)
        gate = Gate(
            dispatcher,
            Keys([KeyEntry(name="fuzz", sha256=hash_of(KEY), owns_unowned=True)]),
            MOUNTED,
            max_header_count=100,
            max_header_bytes=2**15,
            metrics=NoMetrics(),
        )
        self.model_document: dict[str, Any] = app.openapi()  # type: ignore[attr-defined]
        self.store_id, (self.file_id, *_) = await made.store_of("The tide turns twice a day.", "Rain falls.")
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(gate, raise_app_exceptions=False), base_url="http://test", timeout=None
        )

    def ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def asked() -> httpx.Response:
            async with asyncio.timeout(LIMIT_S - 5):
                return await self.http.request(method, path, **kwargs)

        answer: httpx.Response = self.run(asked())
        return answer

    def failures(self, logger: str) -> list[str]:
        """Return in which functions requests have failed since this was asked, as `logger` tells."""
        taken = list(self._failures[logger])
        self._failures[logger].clear()
        return taken

    def close(self) -> None:
        for name, handler in self._handlers.items():
            logging.getLogger(name).removeHandler(handler)
        self.run(self.http.aclose())
        self.run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()


def check(server: Server, answer: httpx.Response) -> None:
    """Hold an answer to what every answer must be."""
    failed_in, said_by_vllm = server.failures(ROUTER), server.failures(VLLM)
    if answer.status_code == 500:
        assert answer.json()["error"]["message"] == OPAQUE
        assert failed_in and set(failed_in) <= KNOWN_DEFECTS.keys(), failed_in
        return
    assert failed_in == [], answer.text
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        assert OPAQUE not in answer.text, said_by_vllm  # the 500 of what has begun
    assert answer.status_code < 500 or answer.status_code in (501, 503), answer.text
    assert "Traceback" not in answer.text and "site-packages/" not in answer.text
    if answer.status_code >= 400:
        assert "error" in answer.json(), answer.text


def send(server: Server, case: Any) -> None:
    kwargs = case.as_transport_kwargs(base_url="http://test")
    kwargs["headers"] = {**kwargs["headers"], "authorization": f"Bearer {KEY}"}
    try:
        request = requests.Request(**kwargs).prepare()
        path = request.path_url.encode("ascii").decode()
        headers = [(name, value) for name, value in request.headers.items() if isinstance(value, str)]
        httpx.Request(str(request.method), f"http://test{path}", headers=headers)
    except (UnicodeError, ValueError, TypeError, requests.RequestException, httpx.InvalidURL):
        return  # not even a client could say this
    check(server, server.ask(str(request.method), path, content=request.body or b"", headers=headers))


def operations(document: dict[str, Any]) -> list[Any]:
    return [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]


def fuzz(strategy: Any, examples: int = EXAMPLES) -> Any:
    """Run a test with examples that are the same each time."""

    def decorate(test: Any) -> Any:
        bounded = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        return bounded(given(*strategy)(test))

    return decorate


def _named(document: Any) -> Any:
    """Return an OpenAPI document in which `model` is the one there is, so that requests get further than their name."""
    if isinstance(document, dict):
        changed = {key: _named(value) for key, value in document.items()}
        if isinstance(properties := changed.get("properties"), dict) and "model" in properties:
            properties["model"] = {"enum": ["tiny"]}
        return changed
    return [_named(item) for item in document] if isinstance(document, list) else document


@pytest.mark.parametrize("path", sorted(WORKING.keys() - {"/generative_scoring"}))  # it wants logprobs of our tokens
def test_a_request_that_works_does(server: Server, path: str) -> None:
    answer = server.ask("POST", path, json=WORKING[path], headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", sorted(WORKING))
def test_vllms_api_answers_whatever_it_is_sent(server: Server, path: str, mode: str) -> None:
    (operation,) = [o for o in operations(_named(server.model_document)) if o.path == path]
    cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @fuzz((cases, st.sets(st.integers(0, 30), max_size=3)))
    def asked(case: Any, chosen: set[int]) -> None:
        send(server, case)
        if isinstance(case.body, dict):
            keys = sorted(case.body, key=str)
            over = {keys[i % len(keys)]: case.body[keys[i % len(keys)]] for i in chosen if keys}
            headers = {"authorization": f"Bearer {KEY}"}
            try:
                raw = json.dumps({**WORKING[path], **over}).encode()
            except (TypeError, ValueError):
                return
            check(server, server.ask("POST", path, content=raw, headers=headers))

    with contextlib.suppress(UnsupportedSchema):  # some schemas schemathesis cannot break in all ways
        asked()


# The documents' app


def documents_document() -> dict[str, Any]:
    """Return an OpenAPI document of files and vector stores, from the structs that their bodies are read into."""
    bodies = {
        ("POST", "/v1/vector_stores"): api._CreateStore,
        ("POST", "/v1/vector_stores/{store_id}"): api._UpdateStore,
        ("POST", "/v1/vector_stores/{store_id}/search"): api._Search,
        ("POST", "/v1/vector_stores/{store_id}/files"): api._Attach,
        ("POST", "/v1/vector_stores/{store_id}/files/{file_id}"): api._SetAttributes,
        ("POST", "/v1/vector_stores/{store_id}/file_batches"): api._AttachBatch,
    }
    plain = [
        ("GET", "/v1/files"),
        ("GET", "/v1/files/{file_id}"),
        ("DELETE", "/v1/files/{file_id}"),
        ("GET", "/v1/files/{file_id}/content"),
        ("GET", "/v1/vector_stores"),
        ("GET", "/v1/vector_stores/{store_id}"),
        ("DELETE", "/v1/vector_stores/{store_id}"),
        ("GET", "/v1/vector_stores/{store_id}/files"),
        ("GET", "/v1/vector_stores/{store_id}/files/{file_id}"),
        ("DELETE", "/v1/vector_stores/{store_id}/files/{file_id}"),
        ("GET", "/v1/vector_stores/{store_id}/files/{file_id}/content"),
        ("GET", "/v1/vector_stores/{store_id}/file_batches/{batch_id}"),
        ("POST", "/v1/vector_stores/{store_id}/file_batches/{batch_id}/cancel"),
        ("GET", "/v1/vector_stores/{store_id}/file_batches/{batch_id}/files"),
    ]
    schemas, components = msgspec.json.schema_components(bodies.values(), ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), schema in zip(bodies, schemas, strict=True):
        content = {"application/json": {"schema": schema}}
        paths.setdefault(path, {})[method.lower()] = {"requestBody": {"required": True, "content": content}}
    for method, path in plain:
        paths.setdefault(path, {})[method.lower()] = {}
    form = {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": [*api.PURPOSES, "x"]}}
    form |= {"expires_after[anchor]": {"type": "string"}, "expires_after[seconds]": {"type": "string"}}
    schema = {"type": "object", "properties": form, "required": ["file", "purpose"]}
    paths["/v1/files"]["post"] = {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }
    for path, operations_of in paths.items():
        for method, operation in operations_of.items():
            named = re.findall(r"{(\w+)}", path)
            given = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in named]
            if method == "get":
                query = {"limit": {"type": "integer"}, "order": {"type": "string"}, "after": {"type": "string"}}
                query |= {"before": {"type": "string"}, "filter": {"type": "string"}, "purpose": {"type": "string"}}
                given += [{"name": n, "in": "query", "schema": s} for n, s in query.items()]
            operation |= {"parameters": given, "responses": {"200": {"description": "An answer."}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Documents", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }


DOCUMENTS = documents_document()
OPERATIONS = sorted((method, path) for path, on in DOCUMENTS["paths"].items() for method in on)


def test_the_document_names_every_path_of_the_documents_app() -> None:
    app: Any = api.documents_app(None, None, DocumentsConfig(uri="unused"), max_body_bytes=1)  # type: ignore[arg-type]
    assert {route.path for route in app.routes} == set(DOCUMENTS["paths"])


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_documents_api_answers_whatever_it_is_sent(server: Server, method: str, path: str, mode: str) -> None:
    (operation,) = [o for o in operations(DOCUMENTS) if o.path == path and o.method.lower() == method]
    cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

    @fuzz((cases, st.booleans()), 2 * EXAMPLES // 3)
    def asked(case: Any, known: bool) -> None:
        ids = {"store_id": server.store_id, "file_id": server.file_id, "batch_id": "vsfb_1"}
        if known and method != "delete":
            case.path_parameters = {name: ids[name] for name in case.path_parameters or {}}
        send(server, case)

    try:
        asked()
    except Unsatisfiable:
        pytest.skip("nothing can be wrong with such a request")


def test_bytes_that_are_no_json_are_refused(server: Server) -> None:
    paths = st.sampled_from([*sorted(WORKING), "/v1/vector_stores", "/v1/files"])
    kinds = st.sampled_from(["application/json", "multipart/form-data; boundary=x", "text/plain", ""])

    @fuzz((st.one_of(st.binary(max_size=300), st.text(max_size=100).map(str.encode)), paths, kinds), 10 * EXAMPLES)
    def asked(content: bytes, path: str, kind: str) -> None:
        headers = {"authorization": f"Bearer {KEY}", "content-type": kind}
        check(server, server.ask("POST", path, content=content, headers=headers))

    asked()


ODD: dict[str, list[Any]] = {
    "n": [0, -1, 10**6, 2**63],
    "max_tokens": [0, -1, 2**31, 2**70, 1.5],
    "seed": [-(2**63), 2**63, 2**70],
    "logit_bias": [{"x": 1}, {"-1": 1}, {"999999999": 1}, {"1": 1e400}, {"1": "x"}],
    "stop": ["", [""], ["\x00"], ["x"] * 100],
    "stop_token_ids": [[-1], [2**40]],
    "allowed_token_ids": [[], [-1], [2**40]],
    "bad_words": [[""], ["\u0000"]],
    "temperature": [-1, 1e400, "NaN"],
    "top_p": [0, 2],
    "top_k": [-5, 2**40],
    "repetition_penalty": [0, -1],
    "truncate_prompt_tokens": [-5, 0, 2**40],
    "priority": [2**63, -(2**64)],
    "cache_salt": ["", "x" * 10**5, 7],
    "chat_template": ["{{ 1/0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ x.y.z }}"],
    "response_format": [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense", "$ref": "#/none"}}},
        {"type": "structural_tag", "format": {}},
    ],
    "structured_outputs": [{"regex": "("}, {"grammar": "root ::="}, {"choice": []}, {"json": "{"}],
    "tools": [[{"type": "function", "function": {"name": "", "parameters": {"type": 3}}}], [{}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "none"}}],
    "stream_options": [{"include_usage": True}, {"include_usage": "x"}],
    "logprobs": [True, 10**6, -2],
    "top_logprobs": [10**6, -2],
    "prompt_logprobs": [10**6, -2],
    "messages": [
        [],
        [{}],
        [{"role": "nobody", "content": "x"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}],
        [{"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": {"arguments": "{"}}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "<|im_start|>" * 100}],
    ],
    "prompt": ["", [], [[]], [-1], [2**40], ["", ""], [[1], [-1]], "\ud800"],
    "input": ["", [], [{"type": "function_call_output", "call_id": "x", "output": []}], [{"type": "reasoning"}]],
    "tokens": [[], [-1], [2**40]],
    "kv_transfer_params": [{"x": 1}],
    "vllm_xargs": [{"x": [1]}],
}
"""What breaks servers, by field; each is laid over every request that works."""


@pytest.mark.parametrize("field", sorted(ODD))
def test_odd_values_are_answered(server: Server, field: str) -> None:
    for path, working in WORKING.items():
        for value in ODD[field]:
            for stream in (False, True):
                raw = json.dumps({**working, "stream": stream, field: value}).encode()
                answer = server.ask("POST", path, content=raw, headers={"authorization": f"Bearer {KEY}"})
                check(server, answer)


def test_the_defects_that_are_known_are_there_still(server: Server) -> None:
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": []}
    body = {"model": "tiny", "input": [item, {"role": "user", "content": "Hello"}]}
    answer = server.ask("POST", "/v1/responses", json=body, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 500
    check(server, answer)


def test_a_crash_in_mid_stream_would_be_seen(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("vllm.entrypoints.openai.completion.serving.CompletionStreamResponse", fails)
    body = WORKING["/v1/completions"] | {"stream": True}
    answer = server.ask("POST", "/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    with pytest.raises(AssertionError, match="fails"):
        check(server, answer)
