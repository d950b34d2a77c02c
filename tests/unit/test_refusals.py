"""What a refused request hears, on all paths of vLLM's that generate: before any stream, and nothing of the inside."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

pytest.importorskip("vllm")

from deployments.dispatch import App, Dispatcher
from deployments.errors import EngineUnavailable
from deployments.seam.frontend import MOUNTED
from tests.unit.scripted_fleet import ScriptedFleet, StubFlight, scripted_app

pytestmark = pytest.mark.asyncio
MESSAGES = [{"role": "user", "content": "Hello"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": ["one", "two"]},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
}


class House:
    """vLLM's app behind the dispatcher."""

    def __init__(self, app: App, fleet: ScriptedFleet) -> None:
        async def resolve(name: str) -> App | None:
            return app

        self.fleet = fleet
        dispatcher = Dispatcher(resolve, ["tiny"], MOUNTED, {}, max_body_bytes=10**6)
        transport = httpx.ASGITransport(dispatcher, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def ask(self, path: str, **more: Any) -> httpx.Response:
        return await self.http.post(path, json={"model": "tiny", **ASKED.get(path, {}), **more})


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    app, fleet, _ = await scripted_app(tmp_path)
    made = House(app, fleet)
    yield made
    await made.http.aclose()


def said(answer: httpx.Response) -> str:
    """Return the error's message, in the shape that the path's clients know."""
    body = answer.json()
    assert (body.get("type") == "error") == answer.url.path.startswith("/v1/messages")
    return str(body["error"]["message"])


async def test_a_full_router_says_so_before_any_stream_and_when_to_come_back(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.fleet.full = True
    for path in ASKED:
        for stream in (False, True):
            answer = await house.ask(path, stream=stream)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "7"), path
            assert said(answer) == "It is full."
            kind = "rate_limit_error" if path == "/v1/messages" else "overloaded_error"
            assert answer.json()["error"]["type"] == kind
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "a refusal is no error of ours"


async def test_an_engine_that_fails_a_plain_request_says_when_to_come_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(n: int) -> None:
        raise EngineUnavailable("The engines failed.", retry_after_s=1)

    monkeypatch.setattr(house.fleet, "admit", none_left)
    for path in ASKED:
        answer = await house.ask(path)
        assert (answer.status_code, answer.headers["retry-after"], said(answer)) == (503, "1", "The engines failed.")


async def test_what_nobody_foresaw_is_an_opaque_500(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(n: int) -> None:
        raise RuntimeError("/srv/models/secret")

    monkeypatch.setattr(house.fleet, "admit", breaks)
    for path in (*ASKED, "/v1/messages/count_tokens"):
        answer = await house.ask(path, **({} if path in ASKED else {"messages": MESSAGES}))
        assert (answer.status_code, said(answer)) == (500, "The server had an internal error.")


async def last_event(house: House, path: str) -> dict[str, Any]:
    """Return the last thing a stream says, but for `[DONE]`."""
    more = {"prompt": "one"} if path == "/v1/completions" else {}
    answer = await house.ask(path, stream=True, **more)
    assert answer.status_code == 200
    *before, last = [
        line[6:] for line in answer.text.splitlines() if line.startswith("data: ") and "[DONE]" not in line
    ]
    assert before, "something had been said"
    return dict(json.loads(last))


@pytest.mark.parametrize("path", ASKED)
async def test_a_stream_that_fails_ends_in_an_event_that_says_why(house: House, path: str) -> None:
    house.fleet.fails_after = 2
    said = await last_event(house, path)
    assert said.get("error", said)["message"] == "The engines failed."
    if path == "/v1/responses":
        assert (said["type"], said["code"]) == ("error", "engine_unavailable")
    elif path == "/v1/messages":
        assert (said["type"], said["error"]["type"]) == ("error", "overloaded_error")
    else:
        plain = await house.ask(path, **({"prompt": "one"} if path == "/v1/completions" else {}))
        assert said == plain.json()


@pytest.mark.parametrize("path", ASKED)
async def test_a_stream_that_fails_by_what_nobody_foresaw_says_no_more_than_that(
    house: House, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(flight: StubFlight, said: list[int]) -> None:
        if flight._submission.progress >= 2:
            flight._submission._queue.put(RuntimeError("/srv/models/secret"))

    monkeypatch.setattr(StubFlight, "_logprobs", breaks)
    said = await last_event(house, path)
    assert said.get("error", said)["message"] == "The server had an internal error."
    if path == "/v1/messages":
        assert said["error"]["type"] == "api_error"


async def test_vllms_own_refusals_keep_their_words(house: House) -> None:
    long = "one two three " * 2000
    for path, field in (("/v1/chat/completions", "messages"), ("/v1/messages", "messages"), ("/v1/responses", "input")):
        asked = long if field == "input" else [{"role": "user", "content": long}]
        answer = await house.ask(path, **{field: asked})
        assert answer.status_code == 400
        assert "2048" in said(answer)


async def test_what_vllm_refuses_has_a_type_that_anthropics_clients_know(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "one two three " * 2000}]},
        {"messages": "Hello"},
        {"max_tokens": -1},
        {"model": 7},
    ]
    for body in wrong:
        answer = await house.ask("/v1/messages", **body)
        assert (answer.status_code, said(answer) != "") == (400, True)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = await house.ask("/v1/messages/count_tokens", messages="Hello")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    answer = await house.http.post("/v1/messages", content=b"{}", headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")

    def refuses(flight: StubFlight, said: list[int]) -> None:
        if flight._submission.progress >= 2:
            flight._submission._queue.put(ValueError("not so"))

    monkeypatch.setattr(StubFlight, "_logprobs", refuses)
    assert (await last_event(house, "/v1/messages"))["error"] == {"type": "invalid_request_error", "message": "not so"}


async def test_anthropics_messages_are_answered_streaming_or_not(house: House) -> None:
    house.fleet.answers = ["An answer."]
    plain = await house.ask("/v1/messages", max_tokens=50)
    assert plain.json()["content"][0]["text"] == "An answer."
    streamed = await house.ask("/v1/messages", max_tokens=50, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert "event: message_stop" in streamed.text
    counted = await house.ask("/v1/messages/count_tokens", messages=MESSAGES)
    assert counted.json()["input_tokens"] > 0
