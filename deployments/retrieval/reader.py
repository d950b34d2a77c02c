"""Reading the document store: records, pages of them, chunks by words or by meaning.

Before each read a connection looks for a newer version of its table (`read_consistency_interval` 0: a listing of the
newest manifest, under a millisecond on a disk). So what the writer has committed, and the API has acknowledged, every
reader in every process finds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

from lancedb.query import ColumnOrdering, MatchQuery

from deployments.errors import NotFound
from deployments.retrieval.filters import decoded, quoted
from deployments.retrieval.ports import Vectors
from deployments.retrieval.records import (
    Attributes,
    Batch,
    Chunk,
    File,
    FileCounts,
    Page,
    PageRequest,
    VectorStore,
    VectorStoreFile,
)
from deployments.retrieval.tables import (
    BATCHES,
    DELETING,
    FILES,
    MEMBERS,
    STORES,
    Table,
    chunks_table,
    connect,
    is_missing,
    partitions,
)

R = TypeVar("R", File, VectorStore, VectorStoreFile, Batch)

_MAX_OPEN_TABLES: Final = 512
_FOUND_COLUMNS: Final = ["file_id", "filename", "position", "text", "char_start", "char_end", "attributes"]


class StoreGone(Exception):
    """A store's chunks are not there: it was deleted, perhaps just now."""


@dataclass(frozen=True, slots=True)
class Found:
    """A chunk that one leg of a search has found, with that leg's own score."""

    store_id: str
    file_id: str
    filename: str
    position: int
    text: str
    start: int
    end: int
    attributes: Attributes
    score: float


class Reader:
    """See the module's docstring. Made with `await Reader.open(…)`; any number may read at once."""

    def __init__(self, connection: Any) -> None:
        self._db = connection
        self._tables: OrderedDict[str, Any] = OrderedDict()

    @classmethod
    async def open(cls, uri: str, storage_options: Mapping[str, str], *, cache_bytes: int) -> Reader:
        """Connect to the store under `uri`, which need not have been written to yet."""
        return cls(await connect(uri, storage_options, cache_bytes=cache_bytes, read_consistency_interval=timedelta(0)))

    async def _table(self, name: str) -> Any | None:
        if (table := self._tables.get(name)) is not None:
            self._tables.move_to_end(name)
            return table
        try:
            table = await self._db.open_table(name)
        except Exception as error:
            if is_missing(error):
                return None
            raise
        self._tables[name] = table
        if len(self._tables) > _MAX_OPEN_TABLES:
            self._tables.popitem(last=False)
        return table

    @property
    def open_tables(self) -> int:
        """How many tables are kept open."""
        return len(self._tables)

    async def select(
        self,
        table: Table[R],
        where: str,
        *,
        limit: int | None = None,
        order: str | None = None,
        deleting: bool = False,
    ) -> list[R]:
        """Return records.

        Args:
            table: The kind of record.
            where: A predicate whose literals have been quoted.
            limit: None for all.
            order: "asc" or "desc" by creation.
            deleting: Those that are being deleted, rather than those that are not.
        """
        opened = await self._table(table.name)
        if opened is None:
            return []
        query = opened.query().where(f"({where}) AND {DELETING} = {str(deleting).lower()}").select(table.columns)
        if order is not None:
            query = query.order_by([ColumnOrdering(column_name="created_us", ascending=order == "asc")])
        return table.records(await query.limit(limit if limit is not None else 2**31 - 1).to_list())

    async def page(self, table: Table[R], where: str, request: PageRequest, only: str | None = None) -> Page[R]:
        """Return one page of a list, in order of creation.

        Args:
            table: The kind of record.
            where: Which list: `after` and `before` name anything in it.
            request: Which page.
            only: What of the list is shown. States change between two pages: what a cursor names need not meet it.

        Raises:
            NotFound: `after` or `before` names nothing in the list.
        """
        ascending = request.order == "asc"
        if (cursor := request.after or request.before) is not None:
            at = await self.select(table, f"({where}) AND {table.key[-1]} = {quoted(cursor)}", limit=1)
            if not at:
                param = "after" if request.after else "before"
                raise NotFound(f"`{param}` names nothing in this list: {cursor[:100]!r}.", param=param)
            forward = ascending == bool(request.after)
            where = f"({where}) AND created_us {'>' if forward else '<'} {at[0].created_us}"
        if only is not None:
            where = f"({where}) AND ({only})"
        backward = request.before is not None and request.after is None
        order = "asc" if ascending != backward else "desc"
        found = await self.select(table, where, limit=request.limit + 1, order=order)
        data = found[: request.limit]
        return Page(data[::-1] if backward else data, len(found) > request.limit)

    async def file(self, owner: str | None, file_id: str) -> File | None:
        """Return a file of this owner's, or None."""
        return await self._one(FILES, f"id = {quoted(file_id)} AND {owned(owner)}")

    async def files(self, owner: str | None, file_ids: Sequence[str]) -> dict[str, File]:
        """Return those of the files that are this owner's."""
        found = await self.select(FILES, f"id IN ({listed(file_ids)}) AND {owned(owner)}") if file_ids else []
        return {file.id: file for file in found}

    async def store(self, owner: str | None, store_id: str) -> VectorStore | None:
        """Return a vector store of this owner's, or None."""
        return await self._one(STORES, f"id = {quoted(store_id)} AND {owned(owner)}")

    async def stores(self, owner: str | None, store_ids: Sequence[str]) -> dict[str, VectorStore]:
        """Return those of the vector stores that are this owner's."""
        found = await self.select(STORES, f"id IN ({listed(store_ids)}) AND {owned(owner)}") if store_ids else []
        return {store.id: store for store in found}

    async def stores_of_anybody(self, store_ids: Collection[str]) -> dict[str, VectorStore]:
        """Return those of the vector stores that are there, whoever owns them: for the Indexer's own work."""
        found = await self.select(STORES, f"id IN ({listed(list(store_ids))})") if store_ids else []
        return {store.id: store for store in found}

    async def has_chunks(self, store_id: str) -> bool:
        """Whether a store has a table of chunks: its first file makes it."""
        return await self._table(chunks_table(store_id)) is not None

    def forget_chunks(self, store_id: str) -> None:
        """Note that a store's table of chunks has been deleted."""
        self._tables.pop(chunks_table(store_id), None)

    async def member(self, store_id: str, file_id: str) -> VectorStoreFile | None:
        """Return a file of a vector store, or None."""
        return await self._one(MEMBERS, f"store_id = {quoted(store_id)} AND file_id = {quoted(file_id)}")

    async def batch(self, store_id: str, batch_id: str) -> Batch | None:
        """Return a batch of a vector store, or None."""
        return await self._one(BATCHES, f"store_id = {quoted(store_id)} AND id = {quoted(batch_id)}")

    async def _one(self, table: Table[R], where: str) -> R | None:
        found = await self.select(table, where, limit=1)
        return found[0] if found else None

    async def counts(self, column: str, ids: Sequence[str]) -> dict[str, FileCounts]:
        """Return how the files of stores (`store_id`) or batches (`batch_id`) stand."""
        opened = await self._table(MEMBERS.name)
        result = dict.fromkeys(ids, FileCounts())
        if opened is None or not ids:
            return result
        rows = await (
            opened.query()
            .where(f"{column} IN ({listed(ids)}) AND {DELETING} = false")
            .select([column, "status", "usage_bytes"])
            .to_arrow()
        )
        sums: dict[str, dict[str, int]] = {}
        grouped = rows.group_by([column, "status"]).aggregate([("status", "count"), ("usage_bytes", "sum")])
        for row in grouped.to_pylist():
            into = sums.setdefault(row[column], {"usage_bytes": 0})
            into[row["status"]] = row["status_count"]
            into["usage_bytes"] += row["usage_bytes_sum"] or 0
        return result | {key: FileCounts(**values) for key, values in sums.items()}

    async def chunks(self, store_id: str, file_id: str, first: int = 0, limit: int = 2**31 - 1) -> list[Chunk]:
        """Return a file's chunks in order, from number `first` on, at most `limit`.

        Raises:
            StoreGone: The store is not there.
        """
        table = await self._chunks(store_id)
        columns = ["position", "text", "char_start", "char_end", "tokens"]
        where = f"file_id = {quoted(file_id)} AND position >= {first} AND position < {first + limit}"
        rows = await self._rows(store_id, table.query().where(where).select(columns))
        rows.sort(key=lambda row: row["position"])
        return [Chunk(row["text"], row["char_start"], row["char_end"], row["tokens"]) for row in rows]

    async def by_words(self, store_id: str, query: str, where: str | None, limit: int) -> list[Found]:
        """Return the best chunks by BM25, best first.

        Raises:
            StoreGone: The store is not there.
        """
        table = await self._chunks(store_id)
        search = table.query().nearest_to_text(MatchQuery(query, "text"))
        if where:
            search = search.where(where)
        rows = await self._rows(store_id, search.select([*_FOUND_COLUMNS, "_score"]).limit(limit))
        return [_found(store_id, row, row["_score"]) for row in rows]

    async def by_vector(self, store_id: str, vector: Vectors, where: str | None, limit: int) -> list[Found]:
        """Return the chunks nearest in meaning, nearest first, scored by cosine distance (0 to 2, less is nearer).

        Raises:
            StoreGone: The store is not there.
        """
        table = await self._chunks(store_id)
        search = table.query().nearest_to(vector).distance_type("cosine").column("vector")
        search = search.nprobes(await self._probes(store_id, table))
        if where:
            search = search.where(where)
        rows = await self._rows(store_id, search.select([*_FOUND_COLUMNS, "_distance"]).limit(limit))
        return [_found(store_id, row, row["_distance"]) for row in rows]

    async def _probes(self, store_id: str, table: Any) -> int:
        """Return how many partitions to look into: a quarter finds 94% of the 50 nearest of 100,000."""
        try:
            return max(1, -(-partitions(await table.count_rows()) // 4))
        except Exception as error:
            self._check_gone(store_id, error)
            raise

    async def _chunks(self, store_id: str) -> Any:
        table = await self._table(chunks_table(store_id))
        if table is None:
            raise StoreGone(store_id)
        return table

    async def _rows(self, store_id: str, query: Any) -> list[dict[str, Any]]:
        try:
            rows: list[dict[str, Any]] = await query.to_list()
        except Exception as error:
            self._check_gone(store_id, error)
            raise
        return rows

    def _check_gone(self, store_id: str, error: Exception) -> None:
        """Raise `StoreGone` if that is what a failed read of a store's chunks means."""
        if is_missing(error):
            self.forget_chunks(store_id)
            raise StoreGone(store_id) from error


def owned(owner: str | None) -> str:
    """Return the predicate of what belongs to this owner."""
    return "owner IS NULL" if owner is None else f"owner = {quoted(owner)}"


def listed(values: Sequence[str]) -> str:
    """Return literals for `IN (…)`."""
    return ", ".join(quoted(value) for value in values)


def _found(store_id: str, row: Mapping[str, Any], score: float) -> Found:
    return Found(
        store_id,
        row["file_id"],
        row["filename"],
        row["position"],
        row["text"],
        row["char_start"],
        row["char_end"],
        decoded(row["attributes"]),
        score,
    )
