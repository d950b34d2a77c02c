"""What stands for a Retriever in tests: a stub, or a house's reading side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deployments.grounding.layout import Passage
from deployments.retrieval.records import Hit, Ranking

if TYPE_CHECKING:
    from tests.unit.house import House


def hit(passage: Passage, **attributes: Any) -> Hit:
    place = (passage.text, passage.position, 0, len(passage.text))
    return Hit("vs_1", passage.file_id, passage.filename, passage.score, *place, attributes)


class StubRetriever:
    """A stub Retriever: finds the same for every question, or fails or hangs as it was told."""

    def __init__(self, *found: Hit) -> None:
        self.asked: list[dict[str, Any]] = []
        self.owners: list[str | None] = []
        self.found: Sequence[Hit] = found
        self.error: Exception | None = None
        self.hangs = False
        self.began = asyncio.Event()
        self.cancelled = False

    async def search(
        self,
        owner: str | None,
        store_ids: Sequence[str],
        queries: Sequence[str],
        *,
        max_results: int,
        filters: Any,
        ranking: Ranking,
    ) -> Sequence[Hit]:
        self.owners.append(owner)
        self.asked.append({"stores": list(store_ids), "query": queries[0], "max": max_results, "filters": filters})
        self.began.set()
        if self.error is not None:
            raise self.error
        if self.hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return self.found


class HouseRetriever:
    """A house's catalog and searcher under one name, as the Retriever has them."""

    def __init__(self, made: House) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made.searcher if name == "search" else self._made.catalog, name)
