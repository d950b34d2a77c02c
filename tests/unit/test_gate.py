"""What a request meets first: no path goes past it, no key is told or kept, and limits show in every answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from deployments import request_scope
from deployments.access.gate import Gate
from deployments.access.keys import KeyEntry, Keys, hash_of
from deployments.dispatch import App, Dispatcher, Receive, Scope, Send
from tests.unit.asgi_client import AsgiClient
from tests.unit.recording import LIMIT_S, Clock, Recorder, until

pytestmark = pytest.mark.asyncio
CHAT = "/v1/chat/completions"
ANN, BOB = "gs-ann-0123456789abcdef", "gs-bob-0123456789abcdef"
PATHS = (
    CHAT,
    "/",
    "/metrics",
    "/version",
    "/v1/models",
    "/tokenize",
    "/docs",
    "/openapi.json",
    "/v1/files",
    "/v1/vector_stores/vs_1",
    "/v1/responses/resp_1",
    "/invocations",
    "/nowhere",
    "/health/",
    "/healthz",
    "//health",
    "/ping/..",
)


class RecordingApp:
    """A stub for all behind the gate: streams two events, and uses tokens."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.owners: list[str | None] = []
        self.tokens = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.owners.append(request_scope.owner())
        if (caller := request_scope.caller()) is not None:
            caller.tokens += self.tokens
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await self.go_on.wait()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class House:
    def __init__(self, app: App | None = None, *, keys: bool = True, **limits: Any) -> None:
        self.app = RecordingApp()
        entries = [
            KeyEntry(name="ann", sha256=hash_of(ANN), **limits),
            KeyEntry(name="bob", sha256=hash_of(BOB), owns_unowned=True),
        ]
        self.metrics, self.clock = Recorder(), Clock()
        self.gate = Gate(
            app or self.app,
            Keys(entries) if keys else None,
            [CHAT],
            max_header_count=20,
            max_header_bytes=1000,
            metrics=self.metrics,
            clock=self.clock,
        )

    async def ask(
        self,
        key: str | None = None,
        path: str = CHAT,
        method: str = "POST",
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> tuple[int, bytes, dict[str, str]]:
        given = [(b"authorization", f"Bearer {key}".encode())] if key else []
        async with asyncio.timeout(LIMIT_S):
            return await AsgiClient(b"{}", method=method, path=path, headers=[*given, *headers]).ask(self.gate)


async def test_anthropics_clients_hear_in_their_shape_that_there_is_no_key() -> None:
    status, body, _ = await House().ask(None, "/v1/messages", "POST")
    answer = json.loads(body)
    assert (status, answer["type"], set(answer["error"])) == (401, "error", {"type", "message"})
    assert answer["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("key", [None, "wrong", "gs-ann-0123456789abcdeg"])
async def test_no_path_is_open_without_a_key(path: str, method: str, key: str | None) -> None:
    house = House()
    status, body, headers = await house.ask(key, path, method)
    error = json.loads(body)["error"]
    assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert headers["www-authenticate"] == "Bearer"
    assert key is None or key not in body.decode()
    assert house.app.scopes == []


async def test_probes_need_no_key() -> None:
    house = House()
    assert [(await house.ask(None, path, "GET"))[0] for path in ("/health", "/ping")] == [200, 200]
    assert house.app.owners == [None, None]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", f"Bearer {ANN}".encode())],
        [(b"Authorization", f"bearer  {ANN} ".encode())],
        [(b"x-api-key", ANN.encode())],
        [(b"authorization", b"Basic eDp5"), (b"x-api-key", ANN.encode())],
    ],
)
async def test_a_key_comes_as_openais_and_as_anthropics_clients_send_it(headers: list[tuple[bytes, bytes]]) -> None:
    house = House()
    assert (await house.ask(headers=headers))[0] == 200
    assert house.app.owners == ["ann"]


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"\xff\xfe", ANN.encode(), b"Basic " + ANN.encode()])
async def test_what_is_no_key_is_none(header: bytes) -> None:
    assert (await House().ask(headers=[(b"authorization", header)]))[0] == 401


async def test_nothing_behind_the_gate_sees_a_key() -> None:
    house = House()
    await house.ask(ANN, headers=[(b"x-api-key", BOB.encode()), (b"x-other", b"1")])
    assert house.app.scopes[0]["headers"] == [(b"x-other", b"1")]


async def test_no_key_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def resolve(name: str) -> App | None:
        raise RuntimeError

    caplog.set_level(logging.DEBUG)
    behind = Dispatcher(resolve, ["tiny"], [CHAT], {}, max_body_bytes=100)
    house = House(behind)
    secret = "gs-never-0123456789"
    for key in (ANN, secret, None):
        for path in (CHAT, "/nowhere", f"/v1/files/{ANN}", f"/{secret}"):
            await house.ask(key, path)
            await house.ask(key, path, "OPTIONS", [(b"x-api-key", secret.encode())])
    assert caplog.records
    for known in (ANN, secret, hash_of(ANN)):
        assert known not in caplog.text


async def test_an_owner_is_the_keys_name_or_nobody_where_it_keeps_what_was_nobodys() -> None:
    house = House()
    await house.ask(ANN)
    await house.ask(BOB)
    assert house.app.owners == ["ann", None]


async def test_without_keys_everybody_is_nobody_and_whatever_they_send_is_taken_out() -> None:
    house = House(keys=False)
    assert (await house.ask("anything"))[0] == 200
    assert house.app.owners == [None]
    assert house.app.scopes[0]["headers"] == []


async def test_a_limited_key_hears_of_its_limits_in_every_answer() -> None:
    house = House(requests_per_minute=2, tokens_per_minute=1000)
    house.app.tokens = 300
    _, _, first = await house.ask(ANN, headers=[(b"content-length", b"400")])
    assert {k: v for k, v in first.items() if k.startswith("x-ratelimit")} == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "6s",
    }
    _, _, second = await house.ask(ANN)
    assert second["x-ratelimit-remaining-tokens"] == "700"
    status, body, third = await house.ask(ANN)
    error = json.loads(body)["error"]
    assert (status, error["code"], error["type"], third["retry-after"]) == (
        429,
        "rate_limit_exceeded",
        "requests",
        "30",
    )
    assert third["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-requests" not in (await house.ask(BOB))[2]


async def test_open_streams_count_until_they_end() -> None:
    house = House(max_concurrent_requests=1)
    house.app.go_on.clear()
    streaming = asyncio.create_task(house.ask(ANN))
    await until(lambda: house.app.scopes)
    assert (await house.ask(ANN))[0] == 429
    house.app.go_on.set()
    await streaming
    assert (await house.ask(ANN))[0] == 200


async def test_a_request_that_fails_or_is_cancelled_is_over() -> None:
    house = House(max_concurrent_requests=1)
    house.app.go_on.clear()
    streaming = asyncio.create_task(house.ask(ANN))
    await until(lambda: house.app.scopes)
    streaming.cancel()
    await asyncio.wait({streaming})
    house.app.go_on.set()
    assert (await house.ask(ANN))[0] == 200


@pytest.mark.parametrize("headers", [[(b"a", b"1")] * 21, [(b"a", b"x" * 1000)]], ids=["too many", "too large"])
@pytest.mark.parametrize("keys", [True, False])
async def test_headers_are_bounded(headers: list[tuple[bytes, bytes]], keys: bool) -> None:
    status, body, _ = await House(keys=keys).ask(None, headers=headers)
    assert (status, json.loads(body)["error"]["code"]) == (431, "request_headers_too_large")


async def test_a_scope_within_a_scope_has_the_same_caller() -> None:
    with request_scope.request_scope(request_scope.Caller("ann", "ann")), request_scope.request_scope() as inner:
        assert inner.caller is not None
        assert inner.caller.name == "ann"
    assert request_scope.caller() is None
