"""Our metrics on Ray's side, whose recorder is a stub; and the endpoint of a node, passed on."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import ray
from aiohttp import web
from aiohttp.test_utils import TestServer

from deployments.errors import EngineUnavailable
from deployments.metrics import METRICS, NodeMetrics, RayMetrics, endpoint_of_this_node
from tests.e2e.serving import wait_for

LIMIT_S = 30


class Gauge:
    """Keeps what it is set to."""

    made: dict[str, Gauge]

    def __init__(self, name: str, description: str, tags: tuple[str, ...]) -> None:
        self.heard: list[tuple[float, dict[str, str]]] = []
        self.made[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.heard.append((value, tags))


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gauge]:
    import ray.util

    Gauge.made = {}
    stub: Any = SimpleNamespace(Gauge=Gauge, Counter=None)
    monkeypatch.setattr(ray.util, "metrics", stub, raising=False)
    return Gauge.made


def test_a_gauge_that_is_set_once_is_repeated_or_ray_would_forget_it(gauges: dict[str, Gauge]) -> None:
    assert METRICS["fleet_known_replicas"].kind == "gauge"
    metrics = RayMetrics(repeat_s=0.01)
    metrics.set("fleet_known_replicas", 1, model="a")
    metrics.set("fleet_known_replicas", 7, model="b")
    metrics.set("fleet_known_replicas", 2, model="a")
    heard = gauges["groundswell_fleet_known_replicas"].heard
    wait_for(lambda: len(heard) >= 9, "it is repeated", LIMIT_S)
    last_two = [(value, tags["model"]) for value, tags in heard[-2:]]
    assert sorted(last_two) == [(2, "a"), (7, "b")]


def test_what_repeats_gauges_ends_with_its_metrics_and_not_by_one_that_was_refused(gauges: dict[str, Gauge]) -> None:
    before = set(threading.enumerate())
    metrics = RayMetrics(repeat_s=0.01)
    (thread,) = set(threading.enumerate()) - before
    with pytest.raises(KeyError):
        metrics.set("no_such_gauge", 1)
    metrics.set("fleet_known_replicas", 1, model="a")
    heard = gauges["groundswell_fleet_known_replicas"].heard
    wait_for(lambda: len(heard) >= 2, "it is repeated in spite of the refused one", LIMIT_S)
    del metrics
    thread.join(LIMIT_S)
    assert not thread.is_alive()


class Head:
    """Says where a node's endpoint is, as often as it is asked, or falls silent."""

    def __init__(self, *urls: str | None) -> None:
        self.urls, self.asked = list(urls), 0
        self.silence = threading.Event()

    def find(self) -> str | None:
        self.asked += 1
        if not self.urls:
            self.silence.wait(LIMIT_S)
            return None
        return self.urls.pop(0)


@pytest_asyncio.fixture
async def endpoint() -> AsyncIterator[str]:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text="ray_one 1")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with TestServer(app) as server:
        yield str(server.make_url("/metrics"))


@pytest.mark.asyncio
async def test_the_head_is_asked_once_where_a_nodes_endpoint_is_and_may_then_be_gone(endpoint: str) -> None:
    head = Head(endpoint)
    node = NodeMetrics(head.find)
    for _ in range(3):
        status, _, body = await node.answer()
        assert (status, body) == (200, b"ray_one 1")
    assert head.asked == 1


@pytest.mark.asyncio
async def test_an_endpoint_that_is_not_there_yet_is_asked_for_again(endpoint: str) -> None:
    node = NodeMetrics(Head(None, endpoint).find)
    with pytest.raises(EngineUnavailable):
        await node.answer()
    assert (await node.answer())[0] == 200


@pytest.mark.asyncio
async def test_an_endpoint_that_does_not_answer_is_no_failure_of_the_router() -> None:
    node = NodeMetrics(Head("http://127.0.0.1:1/metrics").find)
    with pytest.raises(EngineUnavailable):
        await node.answer()


@pytest.mark.asyncio
async def test_a_head_that_is_gone_holds_nobody_up() -> None:
    head = Head()
    node = NodeMetrics(head.find, timeout_s=0.01)
    for _ in range(3):
        with pytest.raises(EngineUnavailable):
            await node.answer()
    assert head.asked == 1, "one thread waits, not one for each who asks"
    head.silence.set()


def test_outside_ray_there_is_no_endpoint_and_asking_starts_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "nodes", lambda: pytest.fail("it asked Ray, which starts one"))
    assert endpoint_of_this_node() is None
