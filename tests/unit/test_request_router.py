"""How our adapter chooses among Serve's replicas. Serve's own code runs, on fake replicas and without Ray."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from deployments.fleet.client import Ticket
from deployments.fleet.placement import Ledger
from deployments.fleet.request_router import FleetRequestRouter

DEPLOYMENT = DeploymentID(name="Engine", app_name="app")
ROOM = 2


@dataclass
class FakeReplica:
    """As much of Serve's `RunningReplica` as routing looks at. `asked` counts probes."""

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


async def router_of(*replicas: FakeReplica) -> FleetRequestRouter:
    router = FleetRequestRouter(
        DEPLOYMENT,
        DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        initial_backoff_s=0.001,
        max_backoff_s=0.01,
    )
    router.initialize_state()
    router.update_replicas(list(replicas))  # type: ignore[arg-type]
    while any(router.replica_queue_len_cache.get(replica.replica_id) is None for replica in replicas):  # noqa: ASYNC110
        await asyncio.sleep(0)  # Serve asks each new one, once
    for replica in replicas:
        replica.asked = 0
        router.replica_queue_len_cache.invalidate_key(replica.replica_id)
    return router


async def choose(router: FleetRequestRouter) -> str:
    ledger = Ledger(rng=random.Random(0))
    ticket = Ticket(ledger, ledger.book(10, 1), frozenset())
    pending = PendingRequest([ticket], {}, RequestMetadata(request_id="r", internal_request_id="i"))
    replica = await asyncio.wait_for(router._choose_replica_for_request(pending), 10)
    return replica.replica_id.unique_id


@pytest.mark.asyncio
async def test_a_replica_that_nobody_has_heard_of_for_long_gets_the_request_without_being_asked() -> None:
    replica = FakeReplica("a")
    assert await choose(await router_of(replica)) == "a"
    assert replica.asked == 0


@pytest.mark.asyncio
async def test_a_replica_that_refused_is_asked_again_until_it_has_room() -> None:
    replica = FakeReplica("a", ongoing=ROOM)  # another Router's requests: nothing here tells when they end
    router = await router_of(replica)
    router.on_new_queue_len_info(replica.replica_id, ROOM)
    choice = asyncio.create_task(choose(router))
    while not replica.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert not choice.done()
    replica.ongoing = ROOM - 1
    assert await choice == "a"


@pytest.mark.asyncio
async def test_a_full_replica_is_passed_over_while_another_has_room() -> None:
    full, free = FakeReplica("a"), FakeReplica("b")
    router = await router_of(full, free)
    router.on_new_queue_len_info(full.replica_id, ROOM)
    assert [await choose(router) for _ in range(4)] == ["b"] * 4
    assert full.asked == 0


@pytest.mark.asyncio
async def test_a_replica_that_could_not_be_reached_is_asked_before_it_gets_another() -> None:
    replica = FakeReplica("a")
    router = await router_of(replica)
    router.on_replica_actor_unavailable(replica.replica_id)
    assert await choose(router) == "a"
    assert replica.asked == 1
    router.on_new_queue_len_info(replica.replica_id, 0)
    router.replica_queue_len_cache.invalidate_key(replica.replica_id)
    assert await choose(router) == "a"
    assert replica.asked == 1
