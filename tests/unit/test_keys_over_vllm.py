"""Keys with vLLM's own app behind them: what is charged, and how its clients see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

pytest.importorskip("vllm")

from deployments.access.gate import Gate
from deployments.access.keys import KeyEntry, Keys, hash_of
from deployments.config import AppConfig
from deployments.dispatch import App, Dispatcher
from deployments.router import Router
from tests.unit.recording import LIMIT_S, Clock, Recorder
from tests.unit.scripted_fleet import ScriptedFleet, scripted_app

pytestmark = pytest.mark.asyncio
CHAT = "/v1/chat/completions"
KEY = "gs-ann-0123456789"
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


class House:
    """vLLM's app behind dispatcher and gate, as a Router puts them together."""

    def __init__(self, app: App, fleet: ScriptedFleet, **limits: Any) -> None:
        async def resolve(name: str) -> App | None:
            return app if name == "tiny" else None

        paths = [CHAT, "/v1/completions", "/tokenize", "/v1/messages"]
        dispatcher = Dispatcher(resolve, ["tiny"], paths, {}, max_body_bytes=10**6)
        keys = Keys([KeyEntry(name="ann", sha256=hash_of(KEY), **limits)])
        self.fleet = fleet
        self.gate = Gate(
            dispatcher,
            keys,
            paths,
            max_header_count=100,
            max_header_bytes=2**15,
            metrics=Recorder(),
            clock=Clock(),
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.gate),
            base_url="http://test",
            headers={"authorization": f"Bearer {KEY}"},
        )

    async def remaining(self) -> int:
        answer = await self.http.get("/nowhere")
        return int(answer.headers["x-ratelimit-remaining-tokens"])


@pytest_asyncio.fixture
async def house(tmp_path: Any) -> AsyncIterator[House]:
    app, fleet, client = await scripted_app(tmp_path)
    made = House(app, fleet, tokens_per_minute=100_000)
    yield made
    await made.http.aclose()
    client.shutdown()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_key_is_charged_what_usage_says(house: House, stream: bool, n: int) -> None:
    body = QUESTION | {"stream": stream, "n": n} | ({"stream_options": {"include_usage": True}} if stream else {})
    answer = await house.http.post(CHAT, json=body)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
    if stream:
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        usage = httpx.Response(200, text=events[-1]).json()["usage"]
    else:
        usage = answer.json()["usage"]
    assert await house.remaining() == 100_000 - usage["total_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("taken", [False, True])
async def test_who_hangs_up_before_the_first_token_pays_for_a_prompt_that_an_engine_has(
    house: House, stream: bool, taken: bool
) -> None:
    house.fleet.silent, house.fleet.takes = True, taken
    asking = asyncio.create_task(house.http.post(CHAT, json=QUESTION | {"stream": stream, "n": 2}))
    async with asyncio.timeout(LIMIT_S):
        await house.fleet.started.wait()
        asking.cancel()
        await asyncio.wait({asking})
    (flight,) = house.fleet.flights
    assert await house.remaining() == 100_000 - (flight._submission.prompt_tokens if taken else 0)


async def test_what_runs_no_engine_costs_no_tokens(house: House) -> None:
    assert (await house.http.post("/tokenize", json={"model": "tiny", "prompt": "one two three"})).status_code == 200
    assert (await house.http.post(CHAT, json={"model": "tiny", "messages": "none"})).status_code == 400
    assert await house.remaining() == 100_000


async def test_a_prompt_longer_than_the_model_takes_is_vllms_400_and_starts_nothing(house: House) -> None:
    for words in (3000, 150_000):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "word " * words}], "stream": True}
        answer = await house.http.post(CHAT, json=body)
        assert answer.status_code == 400, words
        assert "2048" in answer.json()["error"]["message"]
    assert house.fleet.flights == []


async def test_a_limited_key_hears_of_it_before_a_stream_starts(house: House) -> None:
    await house.http.post(CHAT, json=QUESTION)
    house.gate._keys = Keys([KeyEntry(name="ann", sha256=hash_of(KEY), requests_per_minute=1)])
    first = await house.http.post(CHAT, json=QUESTION | {"stream": True})
    second = await house.http.post(CHAT, json=QUESTION | {"stream": True})
    assert (first.status_code, second.status_code) == (200, 429)
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
    assert second.headers["retry-after"] == "60"


async def test_openais_and_anthropics_clients_find_their_errors(house: House) -> None:
    import anthropic
    import httpx2
    import openai

    http = httpx.AsyncClient(transport=httpx.ASGITransport(house.gate))
    theirs = openai.AsyncOpenAI(base_url="http://test/v1", api_key="wrong", http_client=http, max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        await theirs.chat.completions.create(**QUESTION)  # type: ignore[call-overload]
    mine = openai.AsyncOpenAI(base_url="http://test/v1", api_key=KEY, http_client=http)
    assert (await mine.chat.completions.create(**QUESTION)).choices  # type: ignore[call-overload]
    http2 = httpx2.AsyncClient(transport=httpx2.ASGITransport(house.gate))
    other = anthropic.AsyncAnthropic(base_url="http://test", api_key="wrong", http_client=http2, max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        await other.messages.create(**QUESTION, max_tokens=5)  # type: ignore[call-overload]
    good = anthropic.AsyncAnthropic(base_url="http://test", api_key=KEY, http_client=http2, max_retries=0)
    assert (await good.messages.create(**QUESTION, max_tokens=5)).content  # type: ignore[call-overload]
    await http.aclose()
    await http2.aclose()


@pytest.mark.parametrize("keys", [None, f"ann:{hash_of(KEY)}"])
async def test_a_router_says_so_where_keys_leave_allowed_origins_without_effect(
    keys: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    monkeypatch.delenv("GROUNDSWELL_API_KEYS", raising=False)
    if keys is not None:
        monkeypatch.setenv("GROUNDSWELL_API_KEYS", keys)
    model = {"name": "m", "engine_args": {"model": "./m"}, "frontend_args": {"allowed-origins": ["https://a.example"]}}
    Router(AppConfig.parse({"models": [model]}), {})
    assert ("allowed_origins" in caplog.text) == bool(keys)
