"""Writing the document store: one writer, fenced.

Who writes is settled by a lease: one row that holds an epoch, raised by compare-and-set. A new writer never waits for
an old one, it fences it:

1. A writer opens a table, looks at the lease, and puts a *barrier* (Lance's `restore` of the version it just opened)
   into the table's history. Commits by others that began before a barrier fail, by Lance's own conflict rules.
2. Each later write looks at the lease first. Its table handle never looks for newer versions by itself, so a writer
   that paused between this look and its commit commits against a version from before its successor's barrier.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar

import pyarrow as pa
from lancedb.index import FTS, IvfFlat

from deployments.retrieval.filters import encoded, quoted
from deployments.retrieval.ports import Metrics
from deployments.retrieval.reader import listed
from deployments.retrieval.records import Attributes, Batch, File, VectorStore, VectorStoreFile
from deployments.retrieval.tables import (
    DELETING,
    TABLES,
    VECTORS_TO_INDEX,
    Table,
    chunks_schema,
    chunks_table,
    connect,
    is_missing,
    partitions,
)

logger = logging.getLogger("ray.serve.groundswell.indexer")

R = TypeVar("R", File, VectorStore, VectorStoreFile, Batch)
T = TypeVar("T")

_LEASE: Final = "lease"
_LEASE_SCHEMA: Final = pa.schema([("epoch", pa.int64()), ("holder", pa.string()), ("since", pa.int64())])
_INCOMPATIBLE: Final = "incompatible"
_TEXT_INDEX: Final = "text_idx"
_VECTOR_INDEX: Final = "vector_idx"
_OUTGROWN: Final = 4
_MANY_COMMITS: Final = 64
_SOME_ROWS: Final = 1000
_MANY_ROWS: Final = 5000
_MAX_OPEN_TABLES: Final = 512


class Fenced(Exception):
    """Another writer has taken over: this one must write nothing more."""


@dataclass
class _Open:
    """A table of the writer's, and what compaction needs to know of it.

    Attributes:
        total: Rows of chunks, about.
        vectors: Whether it has any.
        trained: Its rows when the index over its vectors was made, 0 if there is none.
        commits, rows: Since the last compaction.
        preempted: Compactions that did not succeed since then.
    """

    handle: Any
    total: int = 0
    vectors: bool = False
    trained: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    commits: int = 0
    rows: int = 0
    preempted: int = 0
    changed: float = 0.0

    @property
    def much(self) -> bool:
        """Whether it is time: unindexed rows cost each search, and folding them in costs as the whole table."""
        return self.commits >= _MANY_COMMITS or self.rows >= min(_MANY_ROWS, max(_SOME_ROWS, self.total // 20))

    def folded(self, commits: int, rows: int) -> None:
        """Note what a compaction has folded in."""
        self.commits -= commits
        self.rows -= rows
        self.preempted = 0


class Writer:
    """See the module's docstring. Made with `await Writer.claim(…)`, which fences any other.

    Args:
        language: Of the texts, for stemming and stop words in the full-text index.
    """

    def __init__(self, connection: Any, lease: Any, epoch: int, language: str, metrics: Metrics) -> None:
        self._db = connection
        self._lease = lease
        self.epoch = epoch
        self._language = language
        self._metrics = metrics
        self._tables: dict[str, _Open] = {}
        self._clean_at: dict[str, float] = {}  # when old versions of a table may go, be it open or not
        self._opening = asyncio.Lock()
        self._last_us = 0

    @classmethod
    async def claim(
        cls, uri: str, storage_options: Mapping[str, str], *, cache_bytes: int, language: str, metrics: Metrics
    ) -> Writer:
        """Become the writer of the store under `uri`, creating what is not there."""
        connection = await connect(uri, storage_options, cache_bytes=cache_bytes)
        leases = await connect(uri, storage_options, cache_bytes=2**22, read_consistency_interval=timedelta(0))
        try:
            lease = await leases.open_table(_LEASE)
        except Exception as error:
            if not is_missing(error):
                raise
            first = pa.Table.from_pylist([{"epoch": 0, "holder": "", "since": 0}], schema=_LEASE_SCHEMA)
            lease = await leases.create_table(_LEASE, first, exist_ok=True)
        writer = cls(connection, lease, await _next_epoch(lease), language, metrics)
        for table in TABLES:
            await writer._opened(table.name, lambda table=table: table.schema)  # type: ignore[misc]
        logger.info("This process writes the document store now (epoch %d)", writer.epoch)
        return writer

    async def check(self) -> None:
        """Look at the lease.

        Raises:
            Fenced: It is another's.
        """
        epoch = await _epoch(self._lease)
        if epoch != self.epoch:
            raise Fenced(f"writer {self.epoch} was followed by writer {epoch}")

    def now_us(self) -> int:
        """Return the time in microseconds, never the same twice."""
        self._last_us = max(self._last_us + 1, time.time_ns() // 1000)
        return self._last_us

    async def add(self, table: Table[R], records: Sequence[R]) -> None:
        """Write new records."""
        if records:
            await self._write(table.name, lambda handle: handle.add(table.rows(records)))

    async def put(self, table: Table[R], records: Sequence[R]) -> None:
        """Write records, each in place of the one with the same key."""
        if not records:
            return
        rows = table.rows(records)
        await self._write(
            table.name,
            lambda handle: (
                handle.merge_insert(list(table.key))
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .execute(rows)
            ),
        )

    async def update(self, table: Table[Any], where: str, values: Mapping[str, Any]) -> None:
        """Set columns of the rows that match."""
        await self._write(table.name, lambda handle: handle.update(dict(values), where=where))

    async def mark_deleting(self, table: Table[Any], where: str) -> None:
        """Hide rows for good: their deletion follows, and is finished after a restart if need be."""
        await self.update(table, where, {DELETING: True})

    async def delete(self, table: Table[Any], where: str) -> None:
        """Delete the rows that match."""
        await self._write(table.name, lambda handle: handle.delete(where))

    async def create_chunks(self, store_id: str, dimension: int) -> None:
        """Create a store's table of chunks, unless it is there."""
        await self._opened(chunks_table(store_id), lambda: chunks_schema(dimension))

    async def add_chunks(self, store_id: str, rows: pa.Table) -> None:
        """Write chunks; they are found from now on."""
        await self._write(chunks_table(store_id), lambda handle: handle.add(rows), rows.num_rows)
        self._metrics.inc("indexer_chunks", rows.num_rows)

    async def delete_chunks(self, store_id: str, file_ids: Sequence[str], *, first: int = 0) -> None:
        """Delete the chunks of files from number `first` on."""
        where = f"file_id IN ({listed(file_ids)}) AND position >= {first}"
        await self._write(chunks_table(store_id), lambda handle: handle.delete(where))

    async def set_attributes(self, store_id: str, file_id: str, attributes: Attributes) -> None:
        """Give all chunks of a file new attributes."""
        where = f"file_id = {quoted(file_id)}"
        value = quoted(encoded(attributes))
        await self._write(
            chunks_table(store_id), lambda handle: handle.update(where=where, updates_sql={"attributes": value})
        )

    async def drop_chunks(self, store_id: str) -> None:
        """Delete a store's table of chunks, unless it is gone already."""
        name = chunks_table(store_id)
        opened = self._tables.pop(name, None)
        async with opened.lock if opened else asyncio.Lock():
            await self.check()
            try:
                await self._db.drop_table(name)
            except Exception as error:
                if not is_missing(error):
                    raise
            self._clean_at.pop(name, None)

    async def _write(self, name: str, commit: Callable[[Any], Awaitable[T]], rows: int = 0) -> T:
        async with self._locked(name) as opened:
            started = time.monotonic()
            await self.check()
            try:
                result = await commit(opened.handle)
            except Exception as error:
                if _INCOMPATIBLE not in str(error).lower():
                    raise
                # A fenced writer's last barrier, or this one is fenced: the lease tells.
                await self.check()
                logger.warning("Table %s was touched by a fenced writer; writing again", name)
                opened.handle = await self._db.open_table(name)
                result = await commit(opened.handle)
            opened.commits += 1
            opened.rows += rows
            opened.total += rows
            opened.changed = time.monotonic()
            kind = "chunks" if name.startswith("chunks_") else name
            self._metrics.observe("indexer_commit_seconds", time.monotonic() - started, table=kind)
            return result

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[_Open]:
        """Give the table, alone: a handle's commits come one after another."""
        while True:
            opened = await self._opened(name)
            async with opened.lock:
                if self._tables.get(name) is opened:
                    yield opened
                    return

    async def _opened(self, name: str, schema: Callable[[], pa.Schema] | None = None) -> _Open:
        if (opened := self._tables.get(name)) is not None:
            return opened
        async with self._opening:
            if (opened := self._tables.get(name)) is not None:
                return opened
            try:
                handle = await self._db.open_table(name)
            except Exception as error:
                if schema is None or not is_missing(error):
                    raise
                await self.check()
                handle = await self._db.create_table(name, schema=schema())
                if name.startswith("chunks_"):
                    config = FTS(with_position=False, language=self._language)
                    await handle.create_index("text", config=config, name=_TEXT_INDEX)
            else:
                await self._put_barrier(handle)
            opened = self._tables[name] = _Open(handle)
            if name.startswith("chunks_"):
                opened.total = await handle.count_rows()
                opened.vectors = "vector" in (await handle.schema()).names
                opened.trained = opened.total if await handle.index_stats(_VECTOR_INDEX) is not None else 0
            self._close_some()
            return opened

    def _close_some(self) -> None:
        """Keep few tables open: one that has been compacted and is not in use can be opened again."""
        for name, opened in list(self._tables.items()):
            if len(self._tables) <= _MAX_OPEN_TABLES:
                return
            if name.startswith("chunks_") and not opened.commits and not opened.lock.locked():
                del self._tables[name]

    async def _put_barrier(self, handle: Any) -> None:
        before = await handle.version()
        await self.check()
        await handle.checkout(before)
        await handle.restore()
        if (after := await handle.version()) == before + 1:
            return
        try:
            await self.check()
        except Fenced:
            # Our successor wrote between the look and the barrier: give back what the barrier has hidden.
            await handle.checkout(after - 1)
            await handle.restore()
            raise

    def behind(self, *, idle_s: float) -> list[str]:
        """Return the tables due for compaction: much was written, or something, and then nothing for a while.

        And those due for it once more, because the versions that the last one has replaced may go by now.
        """
        now = time.monotonic()
        due = [
            name
            for name, opened in self._tables.items()
            if opened.much or (opened.commits and now - opened.changed >= idle_s)
        ]
        return due + [name for name, at in self._clean_at.items() if at <= now and name not in due]

    def clean_after(self, name: str, seconds: float) -> None:
        """Have `behind` name a table once, when its old versions may go."""
        self._clean_at[name] = time.monotonic() + seconds

    @property
    def tables_behind(self) -> int:
        """How many tables have commits that no compaction has folded in."""
        return sum(1 for opened in self._tables.values() if opened.commits)

    async def has_old_versions(self, store_id: str) -> bool:
        """Return whether a store's chunks have other versions than the newest: what was deleted may be in them."""
        try:
            handle = await self._db.open_table(chunks_table(store_id))
        except Exception as error:
            if is_missing(error):
                return False
            raise
        return len(await handle.list_versions()) > 1

    async def unindexed(self, store_id: str) -> int:
        """Return how many chunks of a store are in no index yet: they are found, but each search reads them all."""
        try:
            handle = await self._db.open_table(chunks_table(store_id))
        except Exception as error:
            if is_missing(error):
                return 0
            raise
        stats = await handle.index_stats(_TEXT_INDEX)
        return int(stats.num_unindexed_rows) if stats is not None else 0

    async def compact(self, name: str, *, keep_versions_s: float) -> None:
        """Fold small fragments and unindexed rows of a table in, and forget its versions of `keep_versions_s` ago.

        No reader's query may take as long. Chunks go on being added meanwhile; a deletion preempts the compaction,
        which is tried again, and the third time lets nothing come between.
        """
        try:
            opened = await self._opened(name)
        except Exception as error:
            if is_missing(error):
                self._clean_at.pop(name, None)
            else:
                self.clean_after(name, keep_versions_s)
                self._metrics.inc("indexer_maintenance", outcome="failed")
            raise
        started, written = time.monotonic(), opened.commits
        try:
            if name.startswith("chunks_") and opened.preempted < 2:
                await self._compact_beside(name, opened, keep_versions_s)
            else:
                async with self._locked(name) as opened:
                    await self.check()
                    await opened.handle.optimize(cleanup_older_than=timedelta(seconds=keep_versions_s))
                    await _index_vectors(opened, opened.handle)
                    opened.folded(opened.commits, opened.rows)
        except BaseException as error:
            opened.preempted += 1
            opened.changed = time.monotonic()
            if name in self._clean_at:
                self.clean_after(name, keep_versions_s)
            preempted = "preempted" in str(error).lower()
            self._metrics.inc("indexer_maintenance", outcome="preempted" if preempted else "failed")
            if preempted:
                return
            raise
        self._clean_at.pop(name, None)
        if written:  # what it has replaced is too young to go yet
            self.clean_after(name, keep_versions_s)
        self._metrics.inc("indexer_maintenance", outcome="done")
        self._metrics.observe("indexer_maintenance_seconds", time.monotonic() - started)

    async def _compact_beside(self, name: str, opened: _Open, keep_versions_s: float) -> None:
        commits, rows = opened.commits, opened.rows
        handle = await self._db.open_table(name)
        await self.check()
        await handle.optimize(cleanup_older_than=timedelta(seconds=keep_versions_s))
        await _index_vectors(opened, handle)
        async with opened.lock:
            await opened.handle.checkout_latest()
            opened.folded(commits, rows)


async def _index_vectors(opened: _Open, handle: Any) -> None:
    """Make the index over a large table's vectors, and again when the table has outgrown it.

    New vectors are compared one by one until a compaction puts them into the partitions there are.
    """
    total = opened.total
    if opened.vectors and total >= VECTORS_TO_INDEX and total >= _OUTGROWN * opened.trained:
        config = IvfFlat(distance_type="cosine", num_partitions=partitions(total))
        await handle.create_index("vector", config=config, name=_VECTOR_INDEX, replace=True)
        opened.trained = total


async def _epoch(lease: Any) -> int:
    rows = await lease.query().select(["epoch"]).to_list()
    return int(max(row["epoch"] for row in rows))


async def _next_epoch(lease: Any) -> int:
    holder = secrets.token_hex(8)
    while True:
        seen = await _epoch(lease)
        values = {"epoch": seen + 1, "holder": holder, "since": int(time.time())}
        result = await lease.update(values, where=f"epoch = {seen}")
        if result.rows_updated:
            return seen + 1
