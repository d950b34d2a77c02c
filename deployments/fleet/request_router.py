"""The thin adapter between Serve's routing and the Fleet's placement, on Engine deployments only.

Serve asks which replicas to try; the call itself carries the answer (`Ticket`). A call without one (`join`, say)
goes anywhere. Everything else, from capacity to retries on rejection, stays Serve's.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private.common import RequestMetadata
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.fleet.client import Ticket
from deployments.fleet.replica_watch import changed


class FleetRequestRouter(FIFOMixin, RequestRouter):
    """Follows the ranking that each call brings along.

    First in, first out, where nothing else orders them: Serve's other way of matching goes by a request id, which all
    calls of one HTTP request share, and a completion with two prompts makes two.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        super().initialize_state(**kwargs)
        self._unreachable: set[ReplicaID] = set()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        changed(self._deployment_id.name, frozenset(replica.replica_id.unique_id for replica in replicas))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas with room, best first, each a rank of its own; all of them when none seems to have any."""
        ticket = _ticket(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        available = self.select_available_replicas(candidate_replicas) or candidate_replicas
        if ticket is None:
            return [available]
        by_id = {replica.replica_id.unique_id: replica for replica in available}
        return [[by_id[replica]] for replica in ticket.rank(list(by_id))]

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: RequestMetadata | None = None
    ) -> None:
        """Give the replica to the request whose turn it is: Serve takes the first, so that one becomes the first.

        It may have been ranked for another, so those that had better go elsewhere are passed over.
        """
        pending = self._pending_requests_to_fulfill
        if len(pending) > 1:
            free = [each.replica_id.unique_id for each in self.select_available_replicas()]
            id_ = replica.replica_id.unique_id
            _, first, request = min((_order(request, id_, free), i, request) for i, request in enumerate(pending))
            if first:
                del pending[first]
                pending.appendleft(request)
        super()._fulfill_next_pending_request(replica, request_metadata)

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        """Take the first candidate at its word, where Serve would ask it first how many requests it has.

        Serve asks when it has heard nothing for ten seconds, and hears nothing from a busy replica within its deadline:
        the first requests after a pause would wait. A replica without room refuses by itself, and says how many it has.
        Those that refused, and those that could not be reached, are asked.
        """
        first = candidates[0].replica_id
        if self.replica_queue_len_cache.get(first) is None and first not in self._unreachable:
            return self.curr_replicas.get(first)
        return await super()._select_from_candidate_replicas(candidates, backoff_index)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Called when a replica has accepted a request, as Serve has them do wherever it may be refused."""
        super().on_request_routed(pending_request, replica_id, result)
        ticket = _ticket(pending_request)
        if ticket is not None:
            ticket.taken(replica_id.unique_id)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._unreachable.add(replica_id)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._unreachable.discard(replica_id)


def _order(pending_request: PendingRequest, replica: str, free: list[str]) -> tuple[bool, bool, tuple[float, ...]]:
    """Return what requests are ordered by, for a replica.

    Those that are over come last, before them those that would rather go to another that is free; those that are no
    client's, first.
    """
    ticket, over = _ticket(pending_request), pending_request.future.done()
    if ticket is None:
        return over, False, (float("-inf"),)
    return over, not ticket.would_take(replica, free), ticket.order


def _ticket(pending_request: PendingRequest | None) -> Ticket | None:
    if pending_request is None:
        return None
    for value in (*pending_request.args, *pending_request.kwargs.values()):
        if isinstance(value, Ticket):
            return value
    return None
