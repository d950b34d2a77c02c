"""A client that hangs up, in both ways in which Routers hear of it.

Where Serve receives for the app, it cancels the request's task, and what comes after the body is heard too late or not
at all; so do deadlines. Where the app receives itself, it hears `http.disconnect`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("vllm")

from deployments.dispatch import App, Dispatcher
from deployments.seam.engine_client import FleetClient
from tests.unit.asgi_client import AsgiClient
from tests.unit.recording import LIMIT_S
from tests.unit.scripted_fleet import ScriptedFleet, scripted_app

pytestmark = pytest.mark.asyncio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]


class House:
    """vLLM's app behind the dispatcher, over engines that fall silent after their first delta."""

    def __init__(self, app: App, fleet: ScriptedFleet, client: FleetClient) -> None:
        async def resolve(name: str) -> App | None:
            return app

        self.fleet, self.client = fleet, client
        self.counted: list[int] = []
        self.app = Dispatcher(
            *(resolve, ["tiny"], [CHAT, COMPLETIONS], {}),
            max_body_bytes=10**6,
            count=lambda path, status: self.counted.append(status),
        )
        self.tasks_before = asyncio.all_tasks()

    def ask(self, path: str, body: dict[str, Any]) -> None:
        """Send a request as Serve does."""
        raw = json.dumps({"model": "tiny", "max_tokens": 100, **body}).encode()
        client = AsgiClient(raw, path=path, headers=[(b"content-type", b"application/json")])
        self._gone, self._asking = client.gone, asyncio.create_task(client.ask(self.app))

    async def hang_up(self, cancelled: bool) -> None:
        if cancelled:
            self._asking.cancel()
        else:
            self._gone.set()
        await asyncio.wait({self._asking})
        self._gone.set()

    async def nothing_runs(self) -> None:
        while left := asyncio.all_tasks() - self.tasks_before - {asyncio.current_task()}:
            await asyncio.wait(left)


@pytest_asyncio.fixture
async def house(tmp_path: Any) -> AsyncIterator[House]:
    app, fleet, client = await scripted_app(tmp_path)
    fleet.hangs = True
    made = House(app, fleet, client)
    yield made
    client.shutdown()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "flights"),
    [
        (CHAT, {"messages": MESSAGES}, 1),
        (CHAT, {"messages": MESSAGES, "n": 2}, 1),
        (COMPLETIONS, {"prompt": "one"}, 1),
        (COMPLETIONS, {"prompt": ["one", "two"]}, 2),
    ],
)
async def test_a_client_that_hangs_up_leaves_nothing_running(
    house: House,
    path: str,
    body: dict[str, Any],
    flights: int,
    stream: bool,
    cancelled: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    house.ask(path, {**body, "stream": stream})
    async with asyncio.timeout(LIMIT_S):
        while len(house.fleet.flights) < flights:
            await house.fleet.started.wait()
            house.fleet.started.clear()
        await house.hang_up(cancelled)
        await asyncio.gather(*(flight.closed.wait() for flight in house.fleet.flights))
        await house.nothing_runs()
    assert not house.client._outputs.has_unfinished_requests()
    assert house.client._outputs.parent_requests == {}
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    if not stream and not cancelled:
        assert house.counted == [499]


async def test_a_request_cancelled_while_its_prompt_is_rendered_never_starts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on, process = asyncio.Event(), asyncio.Event(), FleetClient._process

    async def slowly(self: FleetClient, *arguments: Any, **options: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await process(self, *arguments, **options)

    monkeypatch.setattr(FleetClient, "_process", slowly)
    house.ask(CHAT, {"messages": MESSAGES})
    async with asyncio.timeout(LIMIT_S):
        await reached.wait()
        await house.hang_up(cancelled=True)
        go_on.set()
        await house.nothing_runs()
    assert not house.fleet.flights
