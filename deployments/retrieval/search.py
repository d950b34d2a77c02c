"""Searching vector stores: by words, by meaning where there is an embedding model, and by both as one ranking."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from deployments.config import DocumentsConfig
from deployments.errors import BadRequest, DocumentsUnavailable, PublicError
from deployments.retrieval.batching import batches, text_bytes
from deployments.retrieval.filters import predicate
from deployments.retrieval.fusion import best, bm25_score, cosine_score, fuse
from deployments.retrieval.ports import Embed, Metrics, Score
from deployments.retrieval.reader import Found, Reader, StoreGone
from deployments.retrieval.records import Hit, Ranking, VectorStore
from deployments.retrieval.rules import check_dimension, check_usable, no_store, use_is_news
from deployments.retrieval.stages import staged

logger = logging.getLogger("ray.serve.groundswell.retriever")

MAX_RESULTS: Final = 50
MAX_STORES: Final = 100
MAX_QUERIES: Final = 32
MAX_QUERY_CHARS: Final = 16_384
RANKERS: Final = ("auto", "none", "default-2024-11-15")

_LOOKUPS_AT_ONCE: Final = 8

Key = tuple[str, str, int]
Touch = Callable[[Sequence[str]], Awaitable[Any]]


class Searcher:
    """Searches; see the module's docstring.

    Args:
        config: Fusion, candidates, timeout.
        reader: The store.
        embed: Makes vectors of queries; None searches by words alone.
        score: Reranks; None leaves it out.
        touch: Told which stores were used, for their expiry.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        config: DocumentsConfig,
        reader: Reader,
        metrics: Metrics,
        *,
        embed: Embed | None = None,
        score: Score | None = None,
        touch: Touch | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._reader, self._metrics = config, reader, metrics
        self._staged = partial(staged, metrics, "retriever_stage_seconds")
        self._embed, self._score, self._touch = embed, score, touch
        self._clock = clock
        self._lookups = asyncio.Semaphore(_LOOKUPS_AT_ONCE)
        self._touching: set[asyncio.Task[None]] = set()

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
        """Return the passages that answer any of the queries best, best first.

        Args:
            owner: Who asks: a store of somebody else is not there.
            store_ids: All are searched, as if they were one.
            queries: A passage counts with its best score for any of them.
            max_results: 1 to 50.
            filters: OpenAI's, on attributes.
            ranking: None for the defaults.

        Raises:
            NotFound: There is no such store, or not any more.
            BadRequest: An argument is wrong, a store has expired, or was made for another embedding model.
            DocumentsUnavailable: It took too long, or the embedding model does not answer.
        """
        outcome = "failed"
        try:
            async with asyncio.timeout(self._config.search_timeout_s):
                hits = await self._search(owner, store_ids, queries, max_results, filters, ranking or Ranking())
            outcome = "found" if hits else "empty"
            self._metrics.inc("retriever_hits", len(hits))
            return hits
        except TimeoutError:
            outcome = "late"
            limit = self._config.search_timeout_s
            raise DocumentsUnavailable(f"The search took longer than {limit:g} s.", retry_after_s=1) from None
        except PublicError as error:
            outcome = "refused" if error.status < 500 else "failed"
            raise
        finally:
            self._metrics.inc("retriever_searches", outcome=outcome)
            self._metrics.set("retriever_open_tables", self._reader.open_tables)

    async def _search(
        self,
        owner: str | None,
        store_ids: Sequence[str],
        queries: Sequence[str],
        max_results: int,
        filters: Any,
        ranking: Ranking,
    ) -> list[Hit]:
        _check(store_ids, queries, max_results, ranking)
        where = predicate(filters)
        stores = await self._stores(owner, store_ids)
        meaning = ranking.embedding_weight > 0 and self._embed is not None and any(s.dimension for s in stores)
        # By meaning alone, where there is no model for it or there are no vectors, is by words.
        legs = {"words": ranking.text_weight > 0 or not meaning, "meaning": meaning}
        limit = max(self._config.candidates, 2 * max_results)
        times: dict[str, float] = {}
        nothing: list[dict[Key, Found]] = [{} for _ in queries]
        try:
            async with self._staged("retrieve", times), asyncio.TaskGroup() as group:
                words = group.create_task(self._by_words(stores, queries, where, limit)) if legs["words"] else None
                meant = self._by_meaning(stores, queries, where, limit, times) if legs["meaning"] else None
                near = group.create_task(meant) if meant else None
        except BaseExceptionGroup as group:  # not `except*`: Python before 3.11.4 wraps what is raised in there again
            public, others = group.split(PublicError)
            if public is None or others is not None:
                raise
            raise _first(public) from None
        async with self._staged("rank", times):
            by_words = words.result() if words else nothing
            by_meaning = near.result() if near else nothing
            found = {key: f for leg in (*by_words, *by_meaning) for key, f in leg.items()}
            scores: dict[Key, float] = {}
            for one, other in zip(by_words, by_meaning, strict=True):
                for key, score in self._fused(one, other, legs, ranking).items():
                    scores[key] = max(score, scores.get(key, 0.0))
        if self._score is not None and ranking.ranker != "none" and scores:
            async with self._staged("rerank", times):
                scores = await self._reranked(queries, best(scores, limit), found)
        self._note_use(stores)
        hits = [_hit(found[key], score) for key, score in best(scores, max_results)]
        hits = [hit for hit in hits if hit.score >= ranking.score_threshold]
        spent = ", ".join(f"{stage} {1000 * seconds:.0f} ms" for stage, seconds in times.items())
        logger.info("%d passages found in %d vector stores: %s", len(hits), len(stores), spent)
        return hits

    async def _stores(self, owner: str | None, store_ids: Sequence[str]) -> list[VectorStore]:
        wanted = list(dict.fromkeys(store_ids))
        stores = await self._reader.stores(owner, wanted)
        for store_id in wanted:
            if store_id not in stores:
                raise no_store(store_id)
            check_usable(stores[store_id], self._config.embedding_model)
        return list(stores.values())

    async def _by_words(
        self, stores: Sequence[VectorStore], queries: Sequence[str], where: str | None, limit: int
    ) -> list[dict[Key, Found]]:
        return await self._each(
            stores, list(queries), lambda store, query: self._reader.by_words(store.id, query, where, limit)
        )

    async def _by_meaning(
        self,
        stores: Sequence[VectorStore],
        queries: Sequence[str],
        where: str | None,
        limit: int,
        times: dict[str, float],
    ) -> list[dict[Key, Found]]:
        with_vectors = [store for store in stores if store.dimension]
        assert self._embed is not None
        async with self._staged("embed", times):
            vectors = await self._embed(queries)
        for store in with_vectors:
            check_dimension(store, vectors.shape[1])
        return await self._each(
            with_vectors, list(vectors), lambda store, vector: self._reader.by_vector(store.id, vector, where, limit)
        )

    async def _each(
        self,
        stores: Sequence[VectorStore],
        queries: Sequence[Any],
        look_up: Callable[[VectorStore, Any], Awaitable[list[Found]]],
    ) -> list[dict[Key, Found]]:
        """Look each query up in each store; return what was found by query."""

        async def one(store: VectorStore, query: Any) -> list[Found]:
            async with self._lookups:
                try:
                    return await look_up(store, query)
                except StoreGone:
                    if await self._reader.store(store.owner, store.id) is None:
                        raise no_store(store.id) from None
                    return []  # none of its files has been indexed yet

        pairs = [(i, store) for i in range(len(queries)) for store in stores]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(store, queries[i])) for i, store in pairs]
        found: list[dict[Key, Found]] = [{} for _ in queries]
        for (i, _), task in zip(pairs, tasks, strict=True):
            found[i].update({(f.store_id, f.file_id, f.position): f for f in task.result()})
        return found

    def _fused(
        self,
        words: Mapping[Key, Found],
        meaning: Mapping[Key, Found],
        legs: Mapping[str, bool],
        ranking: Ranking,
    ) -> dict[Key, float]:
        if not legs["meaning"] or not meaning:
            return {key: bm25_score(f.score) for key, f in words.items()}
        if not legs["words"]:
            return {key: cosine_score(f.score) for key, f in meaning.items()}
        return fuse(
            self._config.fusion,
            [
                (ranking.text_weight, {key: f.score for key, f in words.items()}),
                (ranking.embedding_weight, {key: cosine_score(f.score) for key, f in meaning.items()}),
            ],
        )

    async def _reranked(
        self, queries: Sequence[str], candidates: Sequence[tuple[Key, float]], found: Mapping[Key, Found]
    ) -> dict[Key, float]:
        assert self._score is not None
        texts = [found[key].text for key, _ in candidates]
        by_query = await asyncio.gather(*(self._scored(self._score, query, texts) for query in queries))
        return {key: max(scores) for (key, _), *scores in zip(candidates, *by_query, strict=True)}

    async def _scored(self, score: Score, query: str, texts: Sequence[str]) -> list[float]:
        made = await asyncio.gather(*(score(query, batch) for batch in batches(texts, text_bytes)))
        return [one for batch in made for one in batch]

    def _note_use(self, stores: Sequence[VectorStore]) -> None:
        """Have the Indexer note, now and then and beside the search, that stores are in use."""
        now = self._clock()
        used = [store.id for store in stores if use_is_news(store, now)]
        if used and self._touch is not None and not self._touching:
            task = asyncio.get_running_loop().create_task(self._told(self._touch, used))
            self._touching.add(task)
            task.add_done_callback(self._touching.discard)

    async def _told(self, touch: Touch, store_ids: Sequence[str]) -> None:
        try:
            await touch(store_ids)
        except PublicError as error:
            logger.warning("The use of %s could not be noted: %s", ", ".join(store_ids), error.message)


def _check(store_ids: Sequence[str], queries: Sequence[str], max_results: int, ranking: Ranking) -> None:
    if not 0 < len(store_ids) <= MAX_STORES:
        raise BadRequest(f"1 to {MAX_STORES} vector stores can be searched at once.", param="vector_store_ids")
    if not 0 < len(queries) <= MAX_QUERIES:
        raise BadRequest(f"`query` must be a string, or a list of 1 to {MAX_QUERIES}.", param="query")
    for query in queries:
        if not query.strip() or len(query) > MAX_QUERY_CHARS:
            raise BadRequest(f"`query` must have 1 to {MAX_QUERY_CHARS} characters.", param="query")
    if not 1 <= max_results <= MAX_RESULTS:
        raise BadRequest(f"`max_num_results` must be 1 to {MAX_RESULTS}.", param="max_num_results")
    if ranking.ranker not in RANKERS:
        raise BadRequest(f"`ranker` must be one of {', '.join(RANKERS)}.", param="ranking_options")
    if not 0 <= ranking.score_threshold <= 1:
        raise BadRequest("`score_threshold` must be between 0 and 1.", param="ranking_options")
    weights = (ranking.embedding_weight, ranking.text_weight)
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise BadRequest("Weights of `hybrid_search` must be 0 or more, and not both 0.", param="ranking_options")


def _first(errors: BaseExceptionGroup[PublicError]) -> PublicError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PublicError)
    return error


def _hit(found: Found, score: float) -> Hit:
    return Hit(
        found.store_id,
        found.file_id,
        found.filename,
        round(score, 6),
        found.text,
        found.position,
        found.start,
        found.end,
        found.attributes,
    )
