"""The thin adapter between Serve's routing and the Fleet's placement, on Engine deployments only.

Serve asks which replicas to try; the call itself carries the answer (`Ticket`). A call without one (`join`, say)
goes anywhere. Everything else, from capacity to retries on rejection, stays Serve's.
"""

from __future__ import annotations

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from deployments.fleet.client import Ticket
from deployments.fleet.replica_watch import changed


class FleetRequestRouter(FIFOMixin, RequestRouter):
    """Follows the ranking that each call brings along.

    First in, first out: Serve's other way of matching goes by a request id, which all calls of one HTTP request share,
    and a completion with two prompts makes two.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        changed(self._deployment_id.name, frozenset(replica.replica_id.unique_id for replica in replicas))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas with room, best first, each a rank of its own."""
        ticket = _ticket(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        available = self.select_available_replicas(candidate_replicas)
        if ticket is None:
            return [available]
        by_id = {replica.replica_id.unique_id: replica for replica in available}
        return [[by_id[replica]] for replica in ticket.rank(list(by_id))]


def _ticket(pending_request: PendingRequest | None) -> Ticket | None:
    if pending_request is None:
        return None
    for value in (*pending_request.args, *pending_request.kwargs.values()):
        if isinstance(value, Ticket):
            return value
    return None
