"""The Retriever: reads and searches the document store, in as many Serve replicas as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deployments import grpc_wakeups
from deployments.config import DocumentsConfig, TracingConfig
from deployments.metrics import RayMetrics
from deployments.outcomes import Refusal, outcome_of
from deployments.retrieval.blobs import Blobs
from deployments.retrieval.catalog import Catalog
from deployments.retrieval.reader import Reader
from deployments.retrieval.records import Hit, Ranking
from deployments.retrieval.search import Searcher
from deployments.serve_calls import Calls, PoolingCalls
from deployments.tracing import Tracing

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

grpc_wakeups.install()


class Retriever:
    """Made a deployment in `app.py`.

    Args:
        config: The document store.
        indexer: Told which stores are in use, for their expiry.
        embedder: The embedding model's engines, if there is one.
        reranker: The rerank model's engines, if there is one.
        tracing: Where spans go, if there are any.
    """

    async def __init__(  # type: ignore[misc]
        self,
        config: DocumentsConfig,
        indexer: DeploymentHandle,
        embedder: DeploymentHandle | None,
        reranker: DeploymentHandle | None,
        tracing: TracingConfig | None = None,
    ) -> None:
        self._tracing = Tracing.start(tracing, "retriever") if tracing is not None else None
        place = (config.uri, config.storage_options)
        reader = await Reader.open(*place, cache_bytes=config.cache_bytes)
        limit_s = config.search_timeout_s
        self._catalog = Catalog(reader, Blobs(*place))
        self._searcher = Searcher(
            config,
            reader,
            RayMetrics(),
            embed=PoolingCalls(embedder, "The embedding model", timeout_s=limit_s).embed if embedder else None,
            score=PoolingCalls(reranker, "The rerank model", timeout_s=limit_s).score if reranker else None,
            touch=Calls(indexer, "The Indexer", timeout_s=config.write_timeout_s).touch,
        )

    async def search(
        self,
        owner: str | None,
        store_ids: Sequence[str],
        queries: Sequence[str],
        *,
        max_results: int = 10,
        filters: Any = None,
        ranking: Ranking | None = None,
    ) -> list[Hit]:
        """Search; see `retrieval.search.Searcher.search`. From another process: `Calls(handle, …).search(…)`."""
        return await self._searcher.search(
            owner, store_ids, queries, max_results=max_results, filters=filters, ranking=ranking
        )

    async def call(
        self, method: str, *args: Any, trace_headers: dict[str, str] | None = None, **kwargs: Any
    ) -> Any | Refusal:
        """Call `search`, or a method of `retrieval.catalog.Catalog`; return its outcome."""
        target = self.search if method == "search" else getattr(self._catalog, method)
        if self._tracing is None or trace_headers is None:
            return await outcome_of(target(*args, **kwargs))
        with self._tracing.span(f"Retriever.{method}", trace_headers):
            return await outcome_of(target(*args, **kwargs))
