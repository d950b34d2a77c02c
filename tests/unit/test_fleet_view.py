"""What `/fleet` says of replicas, and where each number comes from. No Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import messages as m
from deployments.fleet.view import MOST_REPLICAS, Cached, View, deployments_of
from deployments.fleet.vitals import PACE_S, RECENT_S, Recent, Vitals
from deployments.messages import Totals
from tests.unit.recording import Clock


def test_tokens_per_second_are_those_of_the_last_seconds() -> None:
    vitals = Vitals()
    for second in range(20):
        vitals.note(Totals(generated_tokens=10 * second if second < 12 else 110 + 100 * (second - 11)), second)
    assert vitals.recent().tokens_per_s == 100
    assert PACE_S == 5


def test_nothing_can_be_said_after_one_heartbeat() -> None:
    vitals = Vitals()
    assert vitals.recent() == Recent()
    vitals.note(Totals(generated_tokens=500, first_tokens=3, first_token_s=1.5), 1)
    assert vitals.recent() == Recent()
    assert (vitals.recent().ttft_s, vitals.recent().prefix_hit_rate) == (None, None)


def test_first_tokens_and_prefix_hits_are_those_of_the_last_minute() -> None:
    vitals = Vitals()
    vitals.note(Totals(first_tokens=10, first_token_s=100, prefix_queries=1000, prefix_hits=0), 0)
    for second in range(1, 200):
        done = Totals(first_tokens=10 + second, first_token_s=100 + second / 2, prefix_queries=1000 + 8 * second)
        vitals.note(done + Totals(prefix_hits=2 * second), second)
    recent = vitals.recent()
    assert recent.work.first_tokens == RECENT_S
    assert recent.ttft_s == pytest.approx(0.5)
    assert recent.prefix_hit_rate == pytest.approx(0.25)


def test_what_is_remembered_is_bounded_however_often_an_engine_beats() -> None:
    vitals = Vitals()
    for i in range(100_000):
        vitals.note(Totals(generated_tokens=i), i / 1000)
    assert len(vitals._heard) <= 256


def test_several_replicas_add_up_and_their_means_weigh_by_what_they_did() -> None:
    one = Recent(10, 0, Totals(first_tokens=1, first_token_s=1, prefix_queries=100, prefix_hits=100))
    two = Recent(30, 0, Totals(first_tokens=3, first_token_s=9, prefix_queries=300, prefix_hits=0))
    both = one + two
    assert (both.tokens_per_s, both.ttft_s, both.prefix_hit_rate) == (40, 2.5, 0.25)


# The view


def beat(replica: str, *, running: int = 0, waiting: int = 0, kv: float = 0.0, stalled_s: float = 0.0) -> m.Heartbeat:
    return m.Heartbeat(m.VERSION, replica, "tiny", running, waiting, kv, stalled_s, running)


@dataclass
class StubFleet:
    """A stub of what the view reads of a fleet."""

    model: str = "tiny"
    running: frozenset[str] = frozenset()
    replicas: dict[str, m.EngineDescription] = field(default_factory=dict)
    heartbeats: dict[str, m.Heartbeat] = field(default_factory=dict)
    vitals: dict[str, Vitals] = field(default_factory=dict)
    waiting: int = 0
    admission: Any = field(default_factory=lambda: SimpleNamespace(in_flight=0))

    def is_hung(self, heartbeat: m.Heartbeat) -> bool:
        return heartbeat.seconds_since_step > 60

    def join(self, *beats: m.Heartbeat) -> StubFleet:
        for each in beats:
            self.running |= {each.replica}
            self.replicas[each.replica] = m.EngineDescription(each.replica, 2048, 8, ("generate",))
            self.heartbeats[each.replica] = each
            self.vitals[each.replica] = Vitals()
        return self


def details(*replicas: tuple[str, str], dead: tuple[str, ...] = (), target: int = 2) -> dict[str, Any]:
    """Return Serve's account of an app, as its controller gives it, with much that nobody reads."""

    def row(name: str, state: str) -> dict[str, Any]:
        return {"replica_id": name, "state": state, "node_id": "0123456789ab", "start_time_s": 900.0, "pid": 7}

    engine = {
        "status": "HEALTHY",
        "target_num_replicas": target,
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}, "name": "Engine-tiny"},
        "replicas": [row(name, state) for name, state in replicas],
        "recent_dead_replicas": [row(name, "STOPPED") for name in dead],
    }
    router = {"target_num_replicas": 2, "deployment_config": {}, "replicas": [row("r1", "RUNNING")] * 2}
    return {"applications": {"app": {"deployments": {"Engine-tiny": engine, "Router": router}}, "other": {}}}


class House:
    def __init__(self, fleet: StubFleet) -> None:
        self.clock = Clock()
        self.view = View({"Engine-tiny": fleet}, "router-1", clock=self.clock, wall=lambda: 1000.0)  # type: ignore[dict-item]

    def look(self, said: dict[str, Any] | None) -> dict[str, Any]:
        return self.view.body(None if said is None else deployments_of(said, "app"))

    def model(self, said: dict[str, Any] | None) -> dict[str, Any]:
        (model,) = self.look(said)["models"]
        return dict(model)

    def states(self, said: dict[str, Any] | None) -> dict[str, str]:
        return {row["replica"]: row["state"] for row in self.model(said)["replicas"]}


def test_states_are_serves_and_of_those_that_run_the_fleets_own() -> None:
    fleet = StubFleet().join(beat("ready"), beat("hung", running=1, stalled_s=99), beat("lost"), beat("gone"))
    fleet.replicas.pop("lost")
    fleet.heartbeats.pop("lost")
    fleet.running |= {"joining"}
    said = details(
        ("ready", "RUNNING"),
        ("hung", "RUNNING"),
        ("lost", "RUNNING"),
        ("joining", "RUNNING"),
        ("loading", "STARTING"),
        ("gone", "STOPPING"),
    )
    assert House(fleet).states(said) == {
        "ready": "ready",
        "hung": "hung",
        "lost": "lost",
        "joining": "starting",
        "loading": "starting",
        "gone": "draining",
    }


def test_numbers_of_a_model_are_the_sums_of_its_engines() -> None:
    fleet = StubFleet(waiting=5).join(beat("a", running=3, waiting=1, kv=0.2), beat("b", running=4, kv=0.4))
    fleet.admission.in_flight = 13
    for replica, tokens in (("a", 100), ("b", 300)):
        fleet.vitals[replica].note(Totals(), 0)
        fleet.vitals[replica].note(Totals(generated_tokens=tokens, first_tokens=1, first_token_s=0.5), 10)
    model = House(fleet).model(details(("a", "RUNNING"), ("b", "RUNNING")))
    assert (model["running"], model["waiting"], model["tokens_per_s"]) == (7, 1, 40)
    assert model["kv_cache_usage"] == pytest.approx(0.3)
    assert (model["ttft_s"], model["prefix_hit_rate"]) == (0.5, None)
    assert (model["target"], model["bounds"]) == (2, (1, 4))
    assert model["states"] == {"ready": 2}
    assert model["this_router"] == {"in_flight": 13, "waiting": 5}
    first = model["replicas"][0]
    assert (first["replica"], first["running"], first["max_running"], first["tokens_per_s"]) == ("a", 3, 8, 10)
    assert (first["age_s"], first["node"]) == (100, "01234567")


def test_a_draining_replica_still_counts_while_it_works() -> None:
    fleet = StubFleet().join(beat("a", running=2))
    fleet.replicas.clear()  # Serve no longer counts it among the running ones
    model = House(fleet).model(details(("a", "STOPPING")))
    assert (model["running"], model["states"]) == (2, {"draining": 1})


def test_who_dies_while_somebody_looks_is_shown_for_a_minute() -> None:
    house = House(StubFleet().join(beat("a"), beat("b")))
    assert house.states(details(("a", "RUNNING"), ("b", "RUNNING"))) == {"a": "ready", "b": "ready"}
    house.clock.now += 2
    assert house.states(details(("a", "RUNNING"), dead=("b",))) == {"a": "ready", "b": "dead"}
    for _ in range(50):
        house.clock.now += 1
        assert "b" in house.states(details(("a", "RUNNING"), dead=("b",)))
    house.clock.now += 10
    assert house.states(details(("a", "RUNNING"), dead=("b",))) == {"a": "ready"}


def test_who_died_before_anybody_looked_is_not_shown() -> None:
    house = House(StubFleet().join(beat("a")))
    assert house.states(details(("a", "RUNNING"), dead=("old",))) == {"a": "ready"}
    house.clock.now += 3600
    assert house.states(details(("a", "RUNNING"), dead=("old", "older"))) == {"a": "ready"}


def test_without_serves_account_the_fleet_says_what_it_knows() -> None:
    fleet = StubFleet().join(beat("a", running=1))
    fleet.running |= {"b"}
    house = House(fleet)
    assert house.states(None) == {"a": "ready", "b": "starting"}
    body = house.look(None)
    assert (body["serve"], body["models"][0]["target"], body["deployments"]) == ("unknown", None, [])
    assert house.look(details())["serve"] == "ok"


def test_other_deployments_are_counted_by_state() -> None:
    body = House(StubFleet()).look(details(("a", "STARTING")))
    assert body["deployments"] == [{"name": "Router", "replicas": {"ready": 2}}]
    assert body["router"] == "router-1"


def test_what_serve_leaves_out_is_not_made_up() -> None:
    """It leaves out what nobody has set, and a replica that is about to start has started at no time."""
    bare = {"replicas": [{"replica_id": "a", "state": "STARTING", "start_time_s": 0}], "deployment_config": {}}
    said = {"applications": {"app": {"deployments": {"Engine-tiny": bare}}}}
    model = House(StubFleet()).model(said)
    assert (model["target"], model["bounds"]) == (0, None)
    assert model["replicas"] == [{"replica": "a", "state": "starting", "node": None, "age_s": None}]
    bare["deployment_config"] = {"autoscaling_config": {"max_replicas": 3}}
    assert House(StubFleet()).model(said)["bounds"] is None


def test_the_answer_is_bounded_and_says_what_it_leaves_out() -> None:
    fleet = StubFleet().join(*(beat(f"r{i:04}", running=1) for i in range(300)))
    model = House(fleet).model(details(*((f"r{i:04}", "RUNNING") for i in range(300))))
    assert (len(model["replicas"]), model["replicas_left_out"]) == (MOST_REPLICAS, 300 - MOST_REPLICAS)
    assert (model["running"], model["states"]) == (300, {"ready": 300})


def test_nothing_of_the_cluster_is_told_that_nobody_needs() -> None:
    text = str(House(StubFleet().join(beat("a"))).look(details(("a", "RUNNING"))))
    assert "0123456789ab" not in text
    assert "pid" not in text


# However many ask


@pytest.mark.asyncio
async def test_many_who_ask_at_once_are_answered_by_one_look() -> None:
    clock, looks, go = Clock(), 0, asyncio.Event()

    async def look() -> int:
        nonlocal looks
        looks += 1
        await go.wait()
        return looks

    cached = Cached(look, 1.0, clock=clock)
    asking = [asyncio.create_task(cached.get()) for _ in range(100)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    go.set()
    assert await asyncio.gather(*asking[1:]) == [1] * 99
    clock.now += 0.9
    assert await cached.get() == 1
    clock.now += 0.2
    assert await cached.get() == 2


@pytest.mark.asyncio
async def test_a_look_that_fails_is_tried_again() -> None:
    clock, answers = Clock(), [RuntimeError("no"), "yes"]

    async def look() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cached = Cached(look, 1.0, clock=clock)
    with pytest.raises(RuntimeError):
        await cached.get()
    clock.now += 1
    assert await cached.get() == "yes"
