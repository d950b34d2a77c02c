"""The app in front: where a request goes, and what it hears when it can go nowhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from deployments import request_scope
from deployments.dispatch import App, Dispatcher, Receive, Scope, Send, below_prefix, replay
from tests.unit.asgi_client import AsgiClient
from tests.unit.recording import LIMIT_S

pytestmark = pytest.mark.asyncio
CHAT = "/v1/chat/completions"


class RecordingApp:
    """A stub model app: remembers the bodies it was given."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def ask(
    dispatcher: Dispatcher,
    path: str = CHAT,
    body: bytes = b"",
    method: str = "POST",
    chunks: list[bytes] | None = None,
    hangs_up: bool = False,
) -> tuple[int, Any, dict[str, str]]:
    client = AsgiClient(*([body] if chunks is None else chunks), method=method, path=path)
    if hangs_up:
        client.gone.set()
    status, raw, headers = await client.ask(dispatcher)
    return status, json.loads(raw) if raw else None, headers


def make(models: dict[str, RecordingApp], **options: Any) -> Dispatcher:
    async def resolve(name: str) -> App | None:
        return models.get(name)

    async def health() -> tuple[int, str, bytes]:
        return 200, "application/json", b'{"status": "ok"}'

    options.setdefault("max_body_bytes", 1000)
    return Dispatcher(resolve, models, [CHAT], {"/health": health}, **options)


async def test_model_selects_the_app_and_the_body_arrives_whole() -> None:
    a, b = RecordingApp(), RecordingApp()
    body = b'{"model": "b", "messages": []}'
    status, _, _ = await ask(make({"a": a, "b": b}), chunks=[body[:7], body[7:]])
    assert status == 200
    assert (a.bodies, b.bodies) == ([], [body])


async def test_a_single_model_needs_no_name() -> None:
    app = RecordingApp()
    assert (await ask(make({"a": app}), body=b"{}"))[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"", 400, "empty"),
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"model": "a", "user": "\xff\xfe"}', 400, "not valid JSON"),
        (b'{"model": 7}', 400, "must be one of: a, b"),
        (b"{}", 400, "must be one of: a, b"),
        (b'{"model": "zz"}', 404, "does not exist"),
        (b'{"model": "a", "use_beam_search": true}', 501, "Beam search"),
        (b'{"model": "a", "background": true}', 501, "Background"),
        (b'{"model": "a", "previous_response_id": "resp_1"}', 501, "stored response"),
        (b'{"model": "a", "x": "' + b"y" * 1000 + b'"}', 413, "larger than 1000 bytes"),
        (b"[" * 900, 400, ""),
        (b'{"model": "\xff"}', 400, "not valid JSON"),
    ],
)
async def test_a_bad_body_is_answered_in_openai_shape(body: bytes, status: int, word: str) -> None:
    dispatcher = make({"a": RecordingApp(), "b": RecordingApp()})
    got, answer, _ = await ask(dispatcher, body=body)
    assert got == status
    assert word in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("field", ["messages", "input", "prompt", "tools", "documents", "texts"])
@pytest.mark.parametrize("item", ["{}", '"x"', "[1]"])
async def test_lists_are_bounded(field: str, item: str) -> None:
    app = RecordingApp()
    dispatcher = make({"a": app}, max_items=50)
    items = [item] * 50
    for count, status in ((50, 200), (51, 400)):
        body = f'{{"{field}": [{", ".join([*items, item][:count])}]}}'.encode()
        got, answer, _ = await ask(dispatcher, body=body)
        assert got == status, answer
    assert answer["error"]["param"] == field
    assert "has 51 items, and may have 50" in answer["error"]["message"]
    assert len(app.bodies) == 1


async def test_a_prompt_of_token_ids_is_one_item() -> None:
    app = RecordingApp()
    body = json.dumps({"prompt": [1] * 200}).encode()
    assert (await ask(make({"a": app}, max_items=10), body=body))[0] == 200


async def test_an_unknown_model_is_openais_404() -> None:
    _, answer, _ = await ask(make({"a": RecordingApp()}), body=b'{"model": "zz"}')
    assert answer["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("POST", "/health", 405),
        ("GET", CHAT, 405),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/responses/resp_1", 501),
        ("POST", "/v1/responses/resp_1/cancel", 501),
    ],
)
async def test_paths_and_methods(method: str, path: str, status: int) -> None:
    assert (await ask(make({"a": RecordingApp()}), path=path, method=method))[0] == status


async def test_a_body_without_a_length_is_cut_off_at_the_bound() -> None:
    status, answer, _ = await ask(make({"a": RecordingApp()}), chunks=[b"x" * 600, b"x" * 600, b"x" * 600])
    assert status == 413
    assert answer["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_what_goes_no_further_is_told_to_anthropics_clients_in_their_shape(path: str) -> None:
    dispatcher = Dispatcher(lambda name: None, ["a"], [path], {}, max_body_bytes=10)
    status, answer, _ = await ask(dispatcher, path, body=b"x" * 11)
    assert (status, answer["type"], set(answer["error"])) == (413, "error", {"type", "message"})


async def test_a_client_that_hangs_up_in_its_body_is_no_error_and_gets_no_answer() -> None:
    counted: list[int] = []
    dispatcher = make({"a": RecordingApp()}, count=lambda path, status: counted.append(status))
    assert (await ask(dispatcher, chunks=[], hangs_up=True))[0] == 0
    assert counted == [499]


async def test_an_answer_that_nobody_waited_for_is_counted_as_such() -> None:
    class Late(RecordingApp):
        """As vLLM's handlers: once it has heard that the client is gone, it answers with nothing."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            assert (await receive())["type"] == "http.disconnect"
            await super().__call__(scope, replay(b"null", receive), send)

    counted: list[int] = []
    answers = make({"a": Late()}, count=lambda path, status: counted.append(status))
    status, _, _ = await ask(answers, body=b"{}", hangs_up=True)
    assert status == 0, "an answer was sent"
    assert counted == [499]


async def test_a_client_that_hangs_up_while_its_models_app_waits_for_an_engine_is_heard() -> None:
    cancelled: list[str] = []

    async def resolve(name: str) -> App | None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(name)
        return None

    dispatcher = Dispatcher(resolve, ["a"], [CHAT], {}, max_body_bytes=100)
    async with asyncio.timeout(LIMIT_S):
        assert (await ask(dispatcher, body=b"{}", hangs_up=True))[0] == 0
    assert cancelled == ["a"]


async def test_what_is_left_to_the_end_of_a_request_that_has_ended_is_done_at_once() -> None:
    done: list[str] = []
    with request_scope.request_scope() as scope:
        scope.at_end(keep := lambda: done.append("kept"))
        scope.at_end(drop := lambda: done.append("dropped"))
        scope.not_at_end(drop)
        assert (scope.over, done) == (False, [])
    assert (scope.over, done) == (True, ["kept"])
    scope.at_end(keep)
    assert done == ["kept"] * 2


async def test_an_internal_error_is_opaque() -> None:
    async def resolve(name: str) -> App | None:
        raise RuntimeError("secret path /etc/x")

    dispatcher = Dispatcher(resolve, ["a"], [CHAT], {}, max_body_bytes=100)
    status, answer, _ = await ask(dispatcher, body=b'{"model": "a"}')
    assert status == 500
    assert "secret" not in json.dumps(answer)


async def test_what_a_request_holds_is_released_at_its_end_whatever_happens() -> None:
    released: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        opened = request_scope.current()
        assert opened is not None
        opened.at_end(lambda: released.append("released"))
        raise RuntimeError("broken")

    async def resolve(name: str) -> App | None:
        return app

    dispatcher = Dispatcher(resolve, ["a"], [CHAT], {}, max_body_bytes=100)
    assert (await ask(dispatcher, body=b"{}"))[0] == 500
    assert released == ["released"]
    assert request_scope.current() is None


async def test_what_is_named_by_the_rest_of_a_path_is_looked_up() -> None:
    async def lookup(name: str) -> tuple[int, str, bytes]:
        return 200, "application/json", json.dumps({"id": name}).encode()

    dispatcher = make({"a": RecordingApp()}, lookups={"/v1/models/": lookup})
    status, answer, _ = await ask(dispatcher, method="GET", path="/v1/models/org/name")
    assert (status, answer) == (200, {"id": "org/name"})
    assert (await ask(dispatcher, method="GET", path="/v1/models/"))[0] == 404
    assert (await ask(dispatcher, path="/v1/models/a"))[0] == 405


async def test_a_mounted_app_gets_its_paths_and_reads_its_bodies_itself() -> None:
    app, counted = RecordingApp(), list[tuple[str, int]]()
    dispatcher = make(
        {"a": RecordingApp()}, mounted={"/v1/files": app}, count=lambda path, status: counted.append((path, status))
    )
    big = b"x" * 5000
    for path in ("/v1/files", "/v1/files/file-1/content"):
        assert (await ask(dispatcher, path=path, body=big))[0] == 200
    assert app.bodies == [big, big]
    assert (await ask(dispatcher, path="/v1/filesystem"))[0] == 404
    assert counted == [("/v1/files", 200), ("/v1/files", 200), ("other", 404)]


async def seen_below(root: str, path: str) -> tuple[str, str]:
    """Return the `root_path` and the `path` that an app below a prefix is shown."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def nothing(*_: Any) -> Any: ...

    scope: Scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": []}
    await below_prefix(app)(scope, nothing, nothing)
    assert scope["path"] == path, "it is Serve's"
    return seen[0]["root_path"], seen[0]["path"]


@pytest.mark.parametrize(
    ("root", "path", "below"),
    [
        ("", CHAT, CHAT),
        ("/llm", f"/llm{CHAT}", CHAT),
        ("/llm", "/llm/", "/"),
        ("/llm", "/llm/llm/x", "/llm/x"),
        ("/proxy/llm", "/proxy/llm/health", "/health"),
    ],
)
async def test_below_a_prefix_an_app_sees_its_own_paths(root: str, path: str, below: str) -> None:
    assert await seen_below(root, path) == ("", below)


async def test_a_path_that_only_begins_like_the_prefix_is_not_below_it() -> None:
    assert await seen_below("/llm", "/llms/health") == ("/llm", "/llms/health")
