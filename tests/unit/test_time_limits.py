"""Deadlines, and clients that do not read: who ends the request, in which words, and that what ran is over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deployments import request_scope
from deployments.dispatch import App, Dispatcher, Message, Receive, Scope, Send
from deployments.errors import BadRequest, RequestTimeout
from deployments.time_limits import HEADER, deadline
from tests.unit.asgi_client import AsgiClient
from tests.unit.recording import LIMIT_S, Leaps
from tests.unit.stub_server import served_by_uvicorn

pytestmark = pytest.mark.asyncio
PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
DEADLINE_S = 600
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


class StubApp:
    """A stub model app that sends what it is told, and then never ends, unless it `ends`."""

    def __init__(self, *messages: Message, ends: bool = False) -> None:
        self.messages, self.ends = messages, ends
        self.sent_all = asyncio.Event()
        self.ended: str | None = None
        self.deadline: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        current = request_scope.current()
        assert current is not None
        self.deadline = current.deadline
        try:
            for message in self.messages:
                await send(message)
            self.sent_all.set()
            if not self.ends:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise


async def ask(
    app: App,
    path: str = PATHS[0],
    headers: list[tuple[bytes, bytes]] | None = None,
    send: Callable[[Message], Awaitable[None]] | None = None,
    counted: list[tuple[str, int]] | None = None,
    limit_s: float = LIMIT_S,
    **limits: Any,
) -> tuple[int, bytes, dict[str, str]]:
    async def resolve(name: str) -> App | None:
        return app

    noted = counted if counted is not None else []
    dispatcher = Dispatcher(
        resolve, ["m"], PATHS, {}, max_body_bytes=1000, count=lambda *what: noted.append(what), **limits
    )
    client = AsgiClient(b"{}", path=path, headers=headers or [])
    async with asyncio.timeout(limit_s):
        await dispatcher(client.scope, client.receive, send or client.send)
    return client.answer


async def ask_and_leap(app: StubApp, leaps: Leaps, *args: Any, **limits: Any) -> tuple[int, bytes, dict[str, str]]:
    """Ask, and leap over the deadline once the app has sent what it has to send."""
    asking = asyncio.create_task(ask(app, *args, limit_s=10_000, **limits))
    async with asyncio.timeout(LIMIT_S):
        await app.sent_all.wait()
    await leaps.over(DEADLINE_S)
    async with asyncio.timeout(LIMIT_S):
        return await asking


@pytest.mark.parametrize("parts", [[], [b"{"], [b"{", b"}"]])
async def test_a_body_that_does_not_come_to_its_end_is_given_up(leaps: Leaps, parts: list[bytes]) -> None:
    dispatcher = Dispatcher(lambda name: StubApp(), ["m"], PATHS, {}, max_body_bytes=1000)
    client = AsgiClient(*parts, ends=False)
    asking = asyncio.create_task(client.ask(dispatcher))
    await asyncio.wait_for(client.waiting.wait(), LIMIT_S)
    await leaps.over(61)
    status, body, _ = await asyncio.wait_for(asking, LIMIT_S)
    error = json.loads(body)["error"]
    assert (status, error["type"], error["code"]) == (408, "timeout_error", "body_stalled")


@pytest.fixture
def leaps(monkeypatch: pytest.MonkeyPatch) -> Leaps:
    return Leaps(monkeypatch)


@pytest.mark.parametrize(
    "limits", [{"headers": [(HEADER, b"%d" % DEADLINE_S)]}, {"request_timeout_s": DEADLINE_S}], ids=["header", "config"]
)
async def test_before_the_first_byte_a_deadline_is_an_error_in_openais_shape(
    leaps: Leaps, limits: dict[str, Any]
) -> None:
    app = StubApp()
    status, body, headers = await ask_and_leap(app, leaps, **limits)
    assert (status, app.ended) == (408, "cancelled")
    assert headers["x-should-retry"] == "false"
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    assert "600 s" in error["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_in_a_stream_a_deadline_is_its_last_event(leaps: Leaps, path: str) -> None:
    app = StubApp(
        {"type": "http.response.start", "status": 200, "headers": SSE},
        {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True},
    )
    status, body, _ = await ask_and_leap(app, leaps, path, request_timeout_s=DEADLINE_S)
    assert (status, app.ended) == (200, "cancelled")
    events = body.decode().split("\n\n")
    assert events[0] == "data: {}"
    assert "was not finished within 600 s" in events[1]
    assert events[2] == ("data: [DONE]" if path == PATHS[0] else "")


async def test_an_answer_that_is_complete_gets_no_error_after_it(leaps: Leaps) -> None:
    app = StubApp(
        {"type": "http.response.start", "status": 200, "headers": SSE},
        {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False},
    )
    _, body, _ = await ask_and_leap(app, leaps, request_timeout_s=DEADLINE_S)
    assert (body, app.ended) == (b"data: [DONE]\n\n", "cancelled")


async def test_who_can_end_a_request_in_its_own_words_is_told_when_before_it_is_cancelled(leaps: Leaps) -> None:
    app = StubApp()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await ask_and_leap(app, leaps, request_timeout_s=DEADLINE_S)
    moment, error = app.deadline
    assert begun < moment < loop.time()
    assert isinstance(error, RequestTimeout)


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    app = StubApp(
        {"type": "http.response.start", "status": 200, "headers": SSE},
        {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True},
    )
    taken: list[Message] = []

    async def send(message: Message) -> None:
        taken.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    counted: list[tuple[str, int]] = []
    await ask(app, send=send, counted=counted, max_unread_s=0.05)
    assert len(taken) == 2, "nothing more is sent to it"
    assert (app.ended, counted) == ("cancelled", [(PATHS[0], 499)])


@pytest.mark.parametrize("breaks", [False, True], ids=["a deadline", "an error"])
async def test_a_client_that_does_not_read_is_cut_off_also_when_its_last_words_wait(
    monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    leaps = Leaps(monkeypatch)
    body = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    app = StubApp({"type": "http.response.start", "status": 200, "headers": SSE}, body)
    waits = asyncio.Event()

    async def send(message: Message) -> None:
        if b"error" in message.get("body", b""):
            waits.set()
            await asyncio.Event().wait()
        if breaks and message is body:
            raise RuntimeError

    counted: list[tuple[str, int]] = []
    limits = {"max_unread_s": 300} | ({} if breaks else {"request_timeout_s": 0.05})
    asked = asyncio.create_task(ask(app, send=send, counted=counted, limit_s=10_000, **limits))
    async with asyncio.timeout(LIMIT_S):
        await waits.wait()
    assert counted == []
    await leaps.over(400)
    async with asyncio.timeout(LIMIT_S):
        await asked
    assert counted == [(PATHS[0], 499)]


async def test_a_client_that_does_not_read_its_socket_is_cut_off() -> None:
    """By uvicorn, which Serve's replicas use: its `send` waits while the client's buffers are full."""
    endless = {"type": "http.response.body", "body": b"x" * 2**16, "more_body": True}
    app = StubApp({"type": "http.response.start", "status": 200, "headers": SSE}, *[endless] * 1000)
    counted: list[tuple[str, int]] = []
    over = asyncio.Event()

    async def resolve(name: str) -> App | None:
        return app

    def count(*what: Any) -> None:
        counted.append(what)
        over.set()

    dispatcher = Dispatcher(resolve, ["m"], PATHS, {}, max_body_bytes=1000, max_unread_s=0.2, count=count)
    async with served_by_uvicorn(dispatcher) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
        try:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{}")
            async with asyncio.timeout(LIMIT_S):
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
                await over.wait()
        finally:
            writer.transport.abort()
    assert (app.ended, counted) == ("cancelled", [(PATHS[0], 499)])


async def test_a_slow_client_that_reads_is_not_cut_off(leaps: Leaps) -> None:
    body = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    app = StubApp({"type": "http.response.start", "status": 200, "headers": SSE}, *[body] * 12, ends=True)

    async def send(message: Message) -> None:
        await leaps.over(200)  # all of it takes longer than the bound, and each less

    counted: list[tuple[str, int]] = []
    await ask(app, send=send, counted=counted, limit_s=10_000, max_unread_s=300)
    assert counted == [(PATHS[0], 200)]


@pytest.mark.parametrize(
    ("header", "longest", "seconds"),
    [
        (None, None, None),
        (None, 30.0, 30.0),
        (b"5", None, 5.0),
        (b"5", 30.0, 5.0),
        (b"60", 30.0, 30.0),
        (b"0", 30.0, 30.0),
        (b"-1", None, None),
        (b"inf", None, None),
        (b"0.01", None, 0.01),
    ],
)
async def test_the_shorter_deadline_counts(header: bytes | None, longest: float | None, seconds: float | None) -> None:
    limit = deadline([] if header is None else [(HEADER, header)], longest, 100.0)
    assert (limit and limit.seconds) == seconds
    if limit is not None:
        assert 100 < limit.graceful < limit.final < 100 + limit.seconds, "Serve's own clock began before ours"


@pytest.mark.parametrize("header", [b"soon", b"", b"nan", b"\xff"])
async def test_a_deadline_that_is_no_number_is_refused(header: bytes) -> None:
    with pytest.raises(BadRequest, match="x-request-timeout-seconds"):
        deadline([(HEADER, header)], None, 0.0)
