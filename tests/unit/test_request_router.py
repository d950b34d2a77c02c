"""How our adapter chooses among Serve's replicas. Serve's own code runs, on fake replicas and without Ray."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from unittest import mock

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaQueueLengthInfo, RequestMetadata
from ray.serve._private.router import AsyncioRouter
from ray.serve.request_router import PendingRequest, ReplicaID

from deployments.fleet.client import Ticket
from deployments.fleet.placement import Ledger
from deployments.fleet.request_router import FleetRequestRouter
from tests.unit.recording import LIMIT_S, until

DEPLOYMENT = DeploymentID(name="Engine", app_name="app")
ROOM = 2


@dataclass
class StubReplica:
    """A stub: as much of Serve's `RunningReplica` as routing looks at. `asked` counts probes."""

    name: str
    ongoing: int = 0
    asked: int = 0
    max_ongoing_requests: int = ROOM

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(unique_id=self.name, deployment_id=DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        return self.ongoing

    @property
    def multiplexed_model_ids(self) -> set[str]:
        return set()


async def router_of(*replicas: StubReplica) -> FleetRequestRouter:
    router = FleetRequestRouter(
        DEPLOYMENT,
        DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        initial_backoff_s=0.001,
        max_backoff_s=0.01,
    )
    router.initialize_state()
    router.update_replicas(list(replicas))  # type: ignore[arg-type]
    # Serve asks each new one, once.
    await until(lambda: all(router.replica_queue_len_cache.get(r.replica_id) is not None for r in replicas))
    for replica in replicas:
        replica.asked = 0
        router.replica_queue_len_cache.invalidate_key(replica.replica_id)
    return router


def call_with(ticket: Ticket) -> PendingRequest:
    return PendingRequest([ticket], {}, RequestMetadata(request_id="r", internal_request_id="i"))


async def choose(router: FleetRequestRouter, order: tuple[int, float] = (0, 0.0), *avoid: str) -> str:
    ledger = Ledger(rng=random.Random(0))
    ticket = Ticket(ledger, ledger.book(10, 1), frozenset(avoid), order)
    replica = await asyncio.wait_for(router._choose_replica_for_request(call_with(ticket)), LIMIT_S)
    return replica.replica_id.unique_id


@pytest.mark.asyncio
async def test_a_replica_that_nobody_has_heard_of_for_long_gets_the_request_without_being_asked() -> None:
    replica = StubReplica("a")
    assert await choose(await router_of(replica)) == "a"
    assert replica.asked == 0


@pytest.mark.asyncio
async def test_a_replica_that_refused_is_asked_again_until_it_has_room() -> None:
    replica = StubReplica("a", ongoing=ROOM)  # another Router's requests: nothing here tells when they end
    router = await router_of(replica)
    router.on_new_queue_len_info(replica.replica_id, ROOM)
    choice = asyncio.create_task(choose(router))
    await until(lambda: replica.asked)
    assert not choice.done()
    replica.ongoing = ROOM - 1
    assert await choice == "a"


@pytest.mark.asyncio
async def test_a_full_replica_is_passed_over_while_another_has_room() -> None:
    full, free = StubReplica("a"), StubReplica("b")
    router = await router_of(full, free)
    router.on_new_queue_len_info(full.replica_id, ROOM)
    assert [await choose(router) for _ in range(4)] == ["b"] * 4
    assert full.asked == 0


@pytest.mark.asyncio
async def test_a_replica_that_could_not_be_reached_is_asked_before_it_gets_another() -> None:
    replica = StubReplica("a")
    router = await router_of(replica)
    router.on_replica_actor_unavailable(replica.replica_id)
    assert await choose(router) == "a"
    assert replica.asked == 1
    router.on_new_queue_len_info(replica.replica_id, 0)
    router.replica_queue_len_cache.invalidate_key(replica.replica_id)
    assert await choose(router) == "a"
    assert replica.asked == 1


@pytest.mark.asyncio
async def test_those_that_wait_for_an_engine_get_it_in_their_order_and_else_as_they_came() -> None:
    replica = StubReplica("a", ongoing=ROOM)
    router = await router_of(replica)
    router.on_new_queue_len_info(replica.replica_id, ROOM)
    served: list[str] = []
    orders = {"greedy 1": (0, 5.0), "greedy 2": (0, 9.0), "polite": (0, 5.5), "same": (0, 5.5), "urgent": (-1, 99.0)}

    async def wait(name: str, order: tuple[int, float]) -> None:
        await choose(router, order)
        served.append(name)

    waiting = [asyncio.create_task(wait(name, order)) for name, order in orders.items()]
    await until(lambda: router.num_pending_requests >= len(waiting))
    for count in range(1, len(waiting) + 1):
        router._fulfill_next_pending_request(replica)  # type: ignore[arg-type]
        await until(lambda count=count: len(served) >= count)
    assert served == ["urgent", "greedy 1", "polite", "same", "greedy 2"]
    await asyncio.gather(*waiting)


async def two_waiting(*full: StubReplica) -> tuple[FleetRequestRouter, list[asyncio.Task[str]]]:
    """Return a router of replicas without room, and two that wait for one: the first has been failed by `a`."""
    router = await router_of(*full)
    for replica in full:
        router.on_new_queue_len_info(replica.replica_id, ROOM)
    waiting = [asyncio.create_task(choose(router, (0, 1.0), "a")), asyncio.create_task(choose(router, (0, 2.0)))]
    await until(lambda: router.num_pending_requests >= len(waiting))
    return router, waiting


@pytest.mark.asyncio
async def test_a_request_is_not_given_the_replica_that_failed_it_because_another_was_to_go_there() -> None:
    failed, other = StubReplica("a", ongoing=ROOM), StubReplica("b", ongoing=ROOM)
    router, waiting = await two_waiting(failed, other)
    for replica in (failed, other):
        router.on_new_queue_len_info(replica.replica_id, 0)
    router._fulfill_next_pending_request(failed)  # type: ignore[arg-type]
    router._fulfill_next_pending_request(other)  # type: ignore[arg-type]
    assert await asyncio.gather(*waiting) == ["b", "a"]


@pytest.mark.asyncio
async def test_the_replica_that_failed_a_request_is_better_than_waiting_behind_all_others() -> None:
    failed, full = StubReplica("a", ongoing=ROOM), StubReplica("b", ongoing=ROOM)
    router, waiting = await two_waiting(failed, full)
    router.on_new_queue_len_info(failed.replica_id, 0)
    router._fulfill_next_pending_request(failed)  # type: ignore[arg-type]
    router._fulfill_next_pending_request(failed)  # type: ignore[arg-type]
    done, _ = await asyncio.wait(waiting[:1], timeout=LIMIT_S)
    assert done and await waiting[0] == "a"
    await asyncio.gather(*waiting)


class Accepts:
    """As much of Serve's `ReplicaResult` as routing looks at, of a call that its replica accepts."""

    async def get_rejection_response(self) -> ReplicaQueueLengthInfo:
        return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=1)


@pytest.mark.asyncio
async def test_serve_tells_the_ticket_which_replica_has_taken_the_call() -> None:
    replica = StubReplica("a")
    replica.is_cross_language, replica.try_send_request = False, lambda *_, **__: Accepts()  # type: ignore[attr-defined]
    ledger, heard = Ledger(rng=random.Random(0)), []
    ticket = Ticket(ledger, ledger.book(10, 1), frozenset(), on_taken=heard.append)
    serve = mock.create_autospec(AsyncioRouter, instance=True)
    serve._active_request_router = await router_of(replica)
    serve._metrics_manager = mock.MagicMock()
    serve._enable_strict_max_ongoing_requests = True
    await AsyncioRouter._route_and_send_request_once(serve, call_with(ticket), "response", False)
    assert heard == ["a"]
    assert [each for each, load in ledger.loads().items() if load.streams] == ["a"]
