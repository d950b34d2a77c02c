"""Our metrics on Ray's side, whose recorder is a stub."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.metrics import METRICS, RayMetrics

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
    deadline = time.monotonic() + LIMIT_S
    while len(heard) < 9:
        assert time.monotonic() < deadline, "it is not repeated"
        time.sleep(0.01)
    assert heard[-1][0] in (2, 7)
    last_two = [(value, tags["model"]) for value, tags in heard[-2:]]
    assert sorted(last_two) == [(2, "a"), (7, "b")]
