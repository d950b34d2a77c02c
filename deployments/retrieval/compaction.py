"""Keeping the store's tables compact, beside all that is written to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Final

from deployments.retrieval.ports import Metrics
from deployments.retrieval.reader import Reader
from deployments.retrieval.tables import STORES, TABLES, chunks_table, is_missing
from deployments.retrieval.writer import Fenced, Writer

logger = logging.getLogger("ray.serve.groundswell.indexer")

_LOOK_S: Final = 1.0
_LOOK_AGAIN_AFTER_S: Final = (10.0, 600.0)


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
        """Compact what is due, without end; and what a former run has left to do, as soon as that can be seen."""
        for table in TABLES:
            self._writer.clean_after(table.name, self._keep_versions_s)
        unseen = [store.id for store in await self._reader.select(STORES, "state = 'open'")]
        pause_s, look_at = _LOOK_AGAIN_AFTER_S[0], time.monotonic()
        while True:
            if unseen and look_at <= time.monotonic():
                unseen = await self._look(unseen, pause_s)
                look_at = time.monotonic() + pause_s
                pause_s = min(2 * pause_s, _LOOK_AGAIN_AFTER_S[1])
            await asyncio.sleep(min(_LOOK_S, self._compact_after_s))
            for name in self._writer.behind(idle_s=self._compact_after_s):
                await self._compact(name)
            self._metrics.set("indexer_tables_behind", self._writer.tables_behind)

    async def _look(self, store_ids: Iterable[str], pause_s: float) -> list[str]:
        """Go on with the chunks of stores; return the stores whose chunks cannot be looked at. One that is gone can."""
        unseen = []
        for store_id in store_ids:
            try:
                await self._go_on(store_id)
            except Fenced:
                raise
            except Exception as error:
                said = "The chunks of vector store %s cannot be looked at; they are again in %g s: %s: %s"
                logger.warning(said, store_id, pause_s, type(error).__name__, error)
                unseen.append(store_id)
        return unseen

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
