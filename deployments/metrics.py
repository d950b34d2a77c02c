"""Our own metrics, on Ray's Prometheus endpoint beside vLLM's (`ray_vllm_*`) and Serve's (`ray_serve_*`).

One table declares them all; names on the endpoint are `ray_groundswell_<name>`.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from deployments.errors import EngineUnavailable

FOUND_WITHIN_S: Final = 10.0
REPEAT_S: Final = 5.0
"""Ray forgets a gauge that is not set within two of its reports, 20 s: one that seldom changes would seldom be seen."""
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class Metric:
    kind: str
    description: str
    tags: tuple[str, ...] = ()


METRICS: Final[Mapping[str, Metric]] = {
    "fleet_requests": Metric("counter", "Requests by how they ended.", ("model", "outcome")),
    "fleet_rejected_requests": Metric("counter", "Requests refused before any work, for overload.", ("model",)),
    "fleet_engine_failures": Metric("counter", "Attempts that failed by an engine's fault.", ("model",)),
    "fleet_recovered_requests": Metric(
        "counter",
        "Requests placed again after an engine's failure, from their start or from where they were.",
        ("model", "how"),
    ),
    "fleet_recovery_seconds": Metric("histogram", "From an engine's failure to the next delta.", ("model",)),
    "fleet_request_seconds": Metric("histogram", "From taking a request to its end.", ("model",)),
    "fleet_time_to_first_token_seconds": Metric("histogram", "From taking a request to its first delta.", ("model",)),
    "fleet_requests_in_flight": Metric("gauge", "Sequences this Router holds.", ("model",)),
    "fleet_held_back_sequences": Metric(
        "gauge", "Sequences of requests of many that wait for their turn, uncounted.", ("model",)
    ),
    "fleet_known_replicas": Metric("gauge", "Engine replicas that have joined this Router.", ("model",)),
    "channel_connected_engines": Metric("gauge", "Engine replicas connected to this Router's token channel."),
    "channel_connected_routers": Metric("gauge", "Routers this engine replica is connected to."),
    "channel_dropped_messages": Metric("counter", "Messages on the token channel that were ignored.", ("reason",)),
    "channel_unknown_stream_deltas": Metric("counter", "Deltas for streams this Router no longer has."),
    "channel_lost_routers": Metric("counter", "Routers an engine gave up: silent, or slow beyond the bound."),
    "channel_aborted_streams": Metric("counter", "Streams aborted because their Router was given up."),
    "engine_executions": Metric("counter", "Runs by how they ended.", ("model", "outcome")),
    "grounding_searches": Metric("counter", "Searches for answers, by how they ended.", ("model", "outcome")),
    "grounding_search_seconds": Metric("histogram", "Searching for one answer, the Retriever included.", ("model",)),
    "grounding_layout_seconds": Metric("histogram", "Laying what was found into the prompt.", ("model",)),
    "indexer_files": Metric("counter", "Files indexed, by how that ended.", ("outcome",)),
    "indexer_chunks": Metric("counter", "Chunks written to vector stores."),
    "indexer_stage_seconds": Metric("histogram", "Time of each stage, for a file or a batch of chunks.", ("stage",)),
    "indexer_file_seconds": Metric("histogram", "From taking a file up to its being indexed, or failed."),
    "indexer_retries": Metric("counter", "Writes of chunks that failed and were tried again."),
    "indexer_broken_changes": Metric(
        "counter", "Changes that failed, perhaps halfway; deletions, cancellations and expiry are finished later."
    ),
    "indexer_loop_failures": Metric("counter", "Failures of the Indexer's own work, which goes on.", ("loop",)),
    "indexer_read_retries": Metric("counter", "Readings of files that broke off and were tried again."),
    "indexer_waiting_files": Metric("gauge", "Files that wait to be indexed or are being indexed."),
    "indexer_buffered_chunks": Metric("gauge", "Chunks read and not yet written."),
    "indexer_killed_parsers": Metric("counter", "Parsing children that passed a limit, or died.", ("reason",)),
    "indexer_commit_seconds": Metric("histogram", "Time of one write to the document store.", ("table",)),
    "indexer_maintenance": Metric("counter", "Compactions of tables, by how they ended.", ("outcome",)),
    "indexer_maintenance_seconds": Metric("histogram", "Time of compacting one table."),
    "indexer_tables_behind": Metric("gauge", "Tables with writes that no compaction has folded in yet."),
    "indexer_open_uploads": Metric("gauge", "Uploads under way."),
    "retriever_searches": Metric("counter", "Searches by how they ended.", ("outcome",)),
    "retriever_stage_seconds": Metric("histogram", "Time of each stage of a search.", ("stage",)),
    "retriever_hits": Metric("counter", "Passages found and returned."),
    "retriever_open_tables": Metric("gauge", "Tables a Retriever keeps open."),
    "router_refused_requests": Metric("counter", "Requests refused before anything was looked at.", ("reason",)),
    "router_key_requests": Metric("counter", "Requests by key and status.", ("key", "status")),
    "router_key_tokens": Metric("counter", "Tokens of prompts and answers, by key.", ("key",)),
    "router_http_requests": Metric("counter", "HTTP requests by path and status.", ("path", "status")),
}


class RayMetrics:
    """Declares each metric with Ray at its first use. While it lives, a thread of its own repeats gauges.

    Args:
        repeat_s: How often.

    Raises:
        KeyError: The metric is not in the table.
    """

    def __init__(self, *, repeat_s: float = REPEAT_S) -> None:
        self._made: dict[str, Any] = {}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()  # or a value could be repeated after the one that follows it
        threading.Thread(target=_repeat, args=(weakref.ref(self), repeat_s), name="gauges", daemon=True).start()

    def inc(self, name: str, value: float = 1, **tags: str) -> None:
        if value > 0:
            self._metric(name).inc(value, tags=tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        with self._lock:
            self._metric(name).set(value, tags=tags)  # first: what Ray refuses is not repeated
            self._gauges[name, tuple(sorted(tags.items()))] = value

    def observe(self, name: str, value: float, **tags: str) -> None:
        self._metric(name).observe(max(value, 0.0), tags=tags)

    def repeat(self) -> None:
        """Set each gauge to what it was set to last."""
        with self._lock:
            for (name, tags), value in self._gauges.items():
                self._metric(name).set(value, tags=dict(tags))

    def _metric(self, name: str) -> Any:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._make(name, METRICS[name])
        return made

    @staticmethod
    def _make(name: str, metric: Metric) -> Any:
        from ray.util import metrics

        full = f"groundswell_{name}"
        if metric.kind == "histogram":
            return metrics.Histogram(full, metric.description, list(_SECONDS), metric.tags)
        made = {"counter": metrics.Counter, "gauge": metrics.Gauge}[metric.kind]
        return made(full, metric.description, metric.tags)


def _repeat(metrics: weakref.ref[RayMetrics], every_s: float) -> None:
    while True:
        time.sleep(every_s)
        living = metrics()
        if living is None:
            return
        living.repeat()
        del living  # or it would live as long as this thread sleeps, and so for ever


class NoMetrics:
    """Counts nothing: for parts used outside Ray."""

    def inc(self, name: str, value: float = 1, **tags: str) -> None:
        pass

    def set(self, name: str, value: float, **tags: str) -> None:
        pass

    def observe(self, name: str, value: float, **tags: str) -> None:
        pass


class NodeMetrics:
    """What answers `/metrics`: Ray's endpoint of this node, so that a scraper of vLLM's finds the same here.

    Args:
        find: Returns its URL; None while there is none. It asks the head, which may be gone, and may take its time:
            called in a thread, at once, and no more when it has said.
        timeout_s: How long an answer waits for it.
    """

    def __init__(self, find: Callable[[], str | None], *, timeout_s: float = FOUND_WITHIN_S) -> None:
        self._find, self._timeout_s = find, timeout_s
        self._found = asyncio.ensure_future(asyncio.to_thread(find))

    async def answer(self) -> tuple[int, str, bytes]:
        """Return status, content type and body.

        Raises:
            EngineUnavailable: Ray exports nothing on this node, nobody says where, or its endpoint does not answer.
        """
        import requests

        if self._found.done() and (self._found.exception() or self._found.result() is None):
            self._found = asyncio.ensure_future(asyncio.to_thread(self._find))
        try:
            async with asyncio.timeout(self._timeout_s):
                url = await asyncio.shield(self._found)
        except TimeoutError:
            url = None
        if url is None:
            raise EngineUnavailable("Ray exports no metrics on this node.")
        try:
            answer = await asyncio.to_thread(requests.get, url, timeout=10)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise EngineUnavailable("Ray's metrics of this node cannot be read.") from error
        return 200, "text/plain; version=0.0.4; charset=utf-8", answer.content


def endpoint_of_this_node() -> str | None:
    """Return the URL of Ray's Prometheus endpoint on this node, by what the head says; None outside Ray."""
    import ray

    if not ray.is_initialized():  # or asking would start one
        return None
    me = ray.get_runtime_context().get_node_id()
    port = next((node.get("MetricsExportPort") for node in ray.nodes() if node["NodeID"] == me), None)
    return f"http://{ray.util.get_node_ip_address()}:{port}/metrics" if port else None
