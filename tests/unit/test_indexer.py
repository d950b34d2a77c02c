"""The Indexer as Serve sees it: what it makes of being fenced. What it does is `test_ingestion`'s."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import DocumentsUnavailable
from deployments.indexer import Indexer, IndexerUnhealthy
from deployments.outcomes import Refusal, value_of
from deployments.retrieval.ingestion import Ingestion
from tests.unit.house import house

pytestmark = pytest.mark.asyncio


class OverAHouse(Indexer):
    """One over an ingestion that is there, which whoever has made it closes."""

    def __init__(self, ingestion: Ingestion) -> None:
        self._ingestion = ingestion

    def __del__(self) -> None:
        pass


async def test_one_that_is_fenced_refuses_for_a_moment_and_has_itself_replaced(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        indexer = OverAHouse(made.ingestion)
        assert not isinstance(await indexer.call("create_store", None), Refusal)
        indexer.check_health()
        async with house(tmp_path):
            refused = await indexer.call("create_store", None)
            assert isinstance(refused, Refusal)
            with pytest.raises(DocumentsUnavailable, match="being replaced"):
                value_of(refused)
            with pytest.raises(IndexerUnhealthy):
                indexer.check_health()
