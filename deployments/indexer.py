"""The Indexer: the single writer of the document store, in one Serve replica. See `retrieval.ingestion`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from deployments import grpc_wakeups
from deployments.config import DocumentsConfig, ModelConfig
from deployments.errors import DocumentsUnavailable
from deployments.metrics import RayMetrics
from deployments.outcomes import Refusal, outcome_of
from deployments.retrieval.blobs import Blobs
from deployments.retrieval.ingestion import Ingestion
from deployments.retrieval.reader import Reader
from deployments.retrieval.sandbox import Sandbox
from deployments.retrieval.tokens import tokenizer_file
from deployments.retrieval.writer import Fenced, Writer
from deployments.serve_calls import PoolingCalls

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve.groundswell.indexer")

grpc_wakeups.install()

_SPECIAL_TOKENS = 2
"""What an embedding model puts around a text."""


class IndexerUnhealthy(Exception):
    """Another Indexer has taken over; Serve replaces this replica, if it should run at all."""


class Indexer:
    """Made a deployment in `app.py`.

    Args:
        config: The document store.
        reader_model: The model whose tokens chunks are measured in: the embedding model, else the first that reads.
        embedder: The embedding model's engines, if there is one.
    """

    async def __init__(  # type: ignore[misc]
        self, config: DocumentsConfig, reader_model: ModelConfig, embedder: DeploymentHandle | None
    ) -> None:
        metrics = RayMetrics()
        place = (config.uri, config.storage_options)
        writer = await Writer.claim(*place, cache_bytes=config.cache_bytes, language=config.language, metrics=metrics)
        tokenizer = tokenizer_file(reader_model.engine_args.get("tokenizer") or reader_model.engine_args["model"])
        counted = (
            f"by the tokenizer of {reader_model.name}" if tokenizer else "by estimate: the model has no tokenizer.json"
        )
        logger.info("Tokens of chunks are counted %s", counted)
        sandbox = Sandbox(
            workers=config.parse_workers,
            memory_bytes=config.parse_memory_bytes,
            timeout_s=config.parse_timeout_s,
            max_chars=config.max_text_chars,
            tokenizer=tokenizer,
            metrics=metrics,
        )
        calls = PoolingCalls(embedder, "The embedding model", timeout_s=config.embed_timeout_s) if embedder else None
        self._ingestion = Ingestion(
            config,
            writer,
            await Reader.open(*place, cache_bytes=config.cache_bytes),
            Blobs(*place),
            sandbox,
            metrics,
            embed=calls.embed if calls else None,
            max_chunk_tokens=_reads_at_once(reader_model) if calls else None,
        )
        await self._ingestion.start()

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any | Refusal:
        """Call a method of `retrieval.ingestion.Ingestion`; return its outcome."""
        return await outcome_of(self._call(method, args, kwargs))

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return await getattr(self._ingestion, method)(*args, **kwargs)
        except Fenced:
            self._ingestion.fenced = True
            raise DocumentsUnavailable("The Indexer is being replaced.", retry_after_s=2) from None

    def check_health(self) -> None:
        """Called by Serve.

        Raises:
            IndexerUnhealthy: It has been fenced.
        """
        if self._ingestion.fenced:
            raise IndexerUnhealthy("another Indexer writes now")

    async def __del__(self) -> None:
        """Called by Serve when the replica stops."""
        if hasattr(self, "_ingestion"):
            await self._ingestion.close()


def _reads_at_once(model: ModelConfig) -> int | None:
    """Return how many tokens of a chunk the embedding model reads, or None if its config does not say."""
    args = {key.replace("-", "_"): value for key, value in model.engine_args.items()}
    limit = args.get("max_model_len")
    return limit - _SPECIAL_TOKENS if isinstance(limit, int) and limit > _SPECIAL_TOKENS else None
