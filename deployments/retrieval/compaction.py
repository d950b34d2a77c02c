"""Keeping the store's tables compact, beside all that is written to them."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from deployments.retrieval.ports import Metrics
from deployments.retrieval.reader import Reader
from deployments.retrieval.tables import STORES, TABLES, chunks_table, is_missing
from deployments.retrieval.writer import Fenced, Writer

logger = logging.getLogger("ray.serve.groundswell.indexer")

_LOOK_S: Final = 1.0


class Compaction:
    """See the module's docstring.

    Args:
        writer: Knows which tables are due, and compacts them.
        reader: Over the same store.
        compact_after_s: How long a table rests before it is compacted.
        keep_versions_s: How long its old versions can still be read.
    """

    def __init__(
        self, writer: Writer, reader: Reader, metrics: Metrics, *, compact_after_s: float, keep_versions_s: float
    ) -> None:
        self._writer, self._reader = writer, reader
        self._metrics = metrics
        self._compact_after_s, self._keep_versions_s = compact_after_s, keep_versions_s

    async def keep_compact(self) -> None:
        """Compact what is due, without end; at first what a former run has left to do."""
        for table in TABLES:
            self._writer.clean_after(table.name, self._keep_versions_s)
        for store in await self._reader.select(STORES, "state = 'open'"):
            try:
                await self._go_on(store.id)
            except Fenced:
                raise
            except Exception:
                logger.exception("The chunks of vector store %s cannot be looked at", store.id)
        while True:
            await asyncio.sleep(min(_LOOK_S, self._compact_after_s))
            for name in self._writer.behind(idle_s=self._compact_after_s):
                await self._compact(name)
            self._metrics.set("indexer_tables_behind", self._writer.tables_behind)

    async def _go_on(self, store_id: str) -> None:
        name = chunks_table(store_id)
        if await self._writer.unindexed(store_id):
            await self._compact(name)
        if await self._writer.has_old_versions(store_id):
            self._writer.clean_after(name, self._keep_versions_s)

    async def _compact(self, name: str) -> None:
        try:
            await self._writer.compact(name, keep_versions_s=self._keep_versions_s)
        except Fenced:
            raise
        except Exception as error:
            if is_missing(error):  # its store was deleted meanwhile
                return
            logger.exception("Table %s could not be compacted; it is tried again", name)
