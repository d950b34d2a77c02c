"""The fleet as people want to see it: each model's replicas, what they do, and how fast. Pure.

Two sources. Serve's controller knows which replicas there are and in which state. What engines do is what their
heartbeats say, and those reach every Router: such numbers are the whole fleet's, whichever Router is asked. What waits
in a Router is that Router's alone, and is named so.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from deployments.fleet.client import Fleet
from deployments.fleet.vitals import Recent

T = TypeVar("T")

STARTING: Final = "starting"
READY: Final = "ready"
HUNG: Final = "hung"
LOST: Final = "lost"
DRAINING: Final = "draining"
DEAD: Final = "dead"

MOST_REPLICAS: Final = 256
"""Of one model, one by one; sums are over all."""
_DEAD_SHOWN_S: Final = 60.0
_WATCHED_S: Final = 15.0
"""Who looks less often cannot tell when a replica died."""

_STATES: Final[Mapping[str, str]] = {
    "STARTING": STARTING,
    "UPDATING": STARTING,
    "RECOVERING": STARTING,
    "RUNNING": READY,
    "PENDING_MIGRATION": DRAINING,
    "STOPPING": DRAINING,
    "STOPPED": DEAD,
}


@dataclass(frozen=True)
class Replica:
    """One replica, as Serve's controller sees it.

    Attributes:
        id: As in heartbeats.
        state: One of the states above.
        node: The beginning of its node's id.
        started_at: Seconds since the epoch.
    """

    id: str
    state: str
    node: str | None = None
    started_at: float | None = None


@dataclass(frozen=True)
class Deployment:
    """One deployment, likewise.

    Attributes:
        target: How many replicas it should have now.
        bounds: Between how many it scales, where it does.
        replicas: Those there are.
        dead: Some of those there were.
    """

    target: int
    bounds: tuple[int, int] | None
    replicas: Sequence[Replica]
    dead: Sequence[Replica]


def deployments_of(details: Mapping[str, Any], app: str) -> dict[str, Deployment]:
    """Read Serve's own account of one of its applications (`get_serve_instance_details`)."""
    application = (details.get("applications") or {}).get(app) or {}
    return {name: _deployment(given) for name, given in (application.get("deployments") or {}).items()}


def _deployment(given: Mapping[str, Any]) -> Deployment:
    scaling = (given.get("deployment_config") or {}).get("autoscaling_config") or {}
    low, high = scaling.get("min_replicas"), scaling.get("max_replicas")
    return Deployment(
        int(given.get("target_num_replicas") or 0),
        None if low is None or high is None else (int(low), int(high)),
        [_replica(each) for each in given.get("replicas") or ()],
        [_replica(each) for each in given.get("recent_dead_replicas") or ()],
    )


def _replica(given: Mapping[str, Any]) -> Replica:
    state = str(getattr(given["state"], "value", given["state"]))
    node, started_at = given.get("node_id"), given.get("start_time_s")
    return Replica(given["replica_id"], _STATES.get(state, STARTING), node and node[:8], started_at or None)


class View:
    """Puts both sources together.

    Args:
        fleets: One for each model, by the name of its deployment.
        router: This Router replica's id.
        clock: Monotonic seconds.
        wall: Seconds since the epoch.
    """

    def __init__(
        self,
        fleets: Mapping[str, Fleet],
        router: str,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._fleets, self._router = fleets, router
        self._clock, self._wall = clock, wall
        self._died: dict[str, float] = {}
        self._looked = -math.inf

    def body(self, serve: Mapping[str, Deployment] | None) -> dict[str, Any]:
        """Return the answer of `GET /fleet`.

        Args:
            serve: All deployments of the app; None where Serve's controller did not say.
        """
        serve = serve or {}
        self._note_dead(each for deployment in serve.values() for each in deployment.dead)
        others = {name: deployment for name, deployment in serve.items() if name not in self._fleets}
        return {
            "object": "fleet",
            "at": self._wall(),
            "router": self._router,
            "serve": "ok" if serve else "unknown",
            "models": [self._model(name, fleet, serve.get(name)) for name, fleet in self._fleets.items()],
            "deployments": [
                {"name": name, "replicas": dict(Counter(replica.state for replica in deployment.replicas))}
                for name, deployment in others.items()
            ],
        }

    def _model(self, deployment_name: str, fleet: Fleet, deployment: Deployment | None) -> dict[str, Any]:
        known = self._replicas(fleet, deployment)
        rows = [self._row(fleet, replica) for replica in known]
        alive = [fleet.heartbeats[replica.id] for replica in known if replica.id in fleet.heartbeats]
        recent = sum((fleet.vitals[beat.replica].recent() for beat in alive), Recent())
        return {
            "model": fleet.model,
            "target": None if deployment is None else deployment.target,
            "bounds": None if deployment is None else deployment.bounds,
            "states": dict(Counter(replica.state for replica in known)),
            "running": sum(beat.running for beat in alive),
            "waiting": sum(beat.waiting for beat in alive),
            "kv_cache_usage": sum(beat.kv_cache_usage for beat in alive) / len(alive) if alive else None,
            **_pace(recent),
            "this_router": {"in_flight": fleet.admission.in_flight, "waiting": fleet.waiting},
            "replicas": rows[:MOST_REPLICAS],
            "replicas_left_out": max(0, len(rows) - MOST_REPLICAS),
        }

    def _replicas(self, fleet: Fleet, deployment: Deployment | None) -> list[Replica]:
        """Return a model's replicas: the oldest first, those that have died lately last."""
        if deployment is None:
            return [Replica(id_, self._state(fleet, id_)) for id_ in sorted(fleet.running)]
        there = sorted(deployment.replicas, key=lambda replica: (replica.started_at or math.inf, replica.id))
        now, ids = self._clock(), {replica.id for replica in there}
        dead = [r for r in deployment.dead if r.id not in ids and now - self._died[r.id] < _DEAD_SHOWN_S]
        return [replace(r, state=self._state(fleet, r.id)) if r.state == READY else r for r in there] + dead

    @staticmethod
    def _state(fleet: Fleet, replica: str) -> str:
        """Return the state of a replica that runs, as its Router knows it."""
        beat = fleet.heartbeats.get(replica)
        if replica in fleet.replicas:
            return HUNG if beat is not None and fleet.is_hung(beat) else READY
        return LOST if replica in fleet.vitals and beat is None else STARTING

    def _row(self, fleet: Fleet, replica: Replica) -> dict[str, Any]:
        row: dict[str, Any] = {
            "replica": replica.id,
            "state": replica.state,
            "node": replica.node,
            "age_s": None if replica.started_at is None else max(0.0, self._wall() - replica.started_at),
        }
        beat, description = fleet.heartbeats.get(replica.id), fleet.replicas.get(replica.id)
        if beat is not None and replica.state != DEAD:
            row |= {
                "running": beat.running,
                "waiting": beat.waiting,
                "kv_cache_usage": beat.kv_cache_usage,
                **_pace(fleet.vitals[replica.id].recent()),
            }
        if description is not None:
            row["max_running"] = description.max_num_seqs
        return row

    def _note_dead(self, dead: Iterable[Replica]) -> None:
        """Remember when each was first seen dead. Whoever was dead before anybody looked died long ago."""
        now = self._clock()
        at = now if now - self._looked < _WATCHED_S else -math.inf
        self._died = {replica.id: self._died.get(replica.id, at) for replica in dead}
        self._looked = now


def _pace(recent: Recent) -> dict[str, Any]:
    return {
        "tokens_per_s": recent.tokens_per_s,
        "prompt_tokens_per_s": recent.prompt_tokens_per_s,
        "ttft_s": recent.ttft_s,
        "prefix_hit_rate": recent.prefix_hit_rate,
    }


class Cached(Generic[T]):
    """An answer that is made at most once in `for_s`, whoever asks and however many.

    Args:
        make: Makes it; what it raises reaches all who wait for it.
        clock: Monotonic seconds.
    """

    def __init__(self, make: Callable[[], Awaitable[T]], for_s: float, *, clock: Callable[[], float]) -> None:
        self._make, self._for_s, self._clock = make, for_s, clock
        self._making: asyncio.Task[T] | None = None
        self._made_at = -math.inf

    async def get(self) -> T:
        """Return it, made by now or some time ago."""
        if self._making is None or (self._making.done() and self._clock() - self._made_at >= self._for_s):
            self._making = asyncio.ensure_future(self._timed())
        return await asyncio.shield(self._making)

    async def _timed(self) -> T:
        try:
            return await self._make()
        finally:
            self._made_at = self._clock()
