"""How the store's records lie in LanceDB, and how its tables are opened.

<uri>/tables/   files, vector_stores, vector_store_files, batches, lease; chunks_<store> for each store
<uri>/files/    the bytes of uploaded files
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import lancedb
import msgspec
import pyarrow as pa

from deployments.retrieval.filters import decoded, encoded
from deployments.retrieval.records import Attributes, Batch, Chunk, File, VectorStore, VectorStoreFile

R = TypeVar("R", File, VectorStore, VectorStoreFile, Batch)

_JSON_FIELDS: Final = ("attributes", "metadata")
DELETING: Final = "deleting"
"""Column of what is being deleted: nobody sees it any more, and its deletion will be finished."""
VECTORS_TO_INDEX: Final = 30_000
"""From here on vectors are indexed; fewer are compared one by one, which is exact."""


@dataclass(frozen=True)
class Table(Generic[R]):
    """A table of one kind of record.

    Attributes:
        key: Columns that together name a row; the last one is the id by which lists are paged.
    """

    name: str
    record: type[R]
    schema: pa.Schema
    key: tuple[str, ...]

    def rows(self, records: Sequence[R]) -> pa.Table:
        """Return records as rows."""
        return pa.Table.from_pylist([_row(record) for record in records], schema=self.schema)

    def records(self, rows: Sequence[Mapping[str, Any]]) -> list[R]:
        """Return rows as records."""
        return [_record(self.record, row) for row in rows]

    @property
    def columns(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self.record)]


def _row(record: Any) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    for name in _JSON_FIELDS:
        if name in row:
            row[name] = encoded(row[name])
    if "chunking" in row:
        row["chunking"] = dataclasses.asdict(row["chunking"])
    return {**row, DELETING: False}


def _record(kind: type[R], row: Mapping[str, Any]) -> R:
    changed = {name: decoded(row[name]) for name in _JSON_FIELDS if name in row}
    return msgspec.convert({**row, **changed}, kind)


def _schema(required: Mapping[str, pa.DataType], optional: Mapping[str, pa.DataType]) -> pa.Schema:
    fields = [pa.field(name, kind, nullable=False) for name, kind in required.items()]
    return pa.schema([*fields, *(pa.field(name, kind) for name, kind in optional.items())])


_S, _I64, _I32, _BOOL = pa.string(), pa.int64(), pa.int32(), pa.bool_()
_CHUNKING: Final = pa.struct([("max_tokens", _I32), ("overlap_tokens", _I32)])

FILES: Final = Table(
    "files",
    File,
    _schema(
        {"id": _S, "filename": _S, "bytes": _I64, "created_us": _I64, "purpose": _S, DELETING: _BOOL},
        {"owner": _S, "expires_at": _I64},
    ),
    ("id",),
)
STORES: Final = Table(
    "vector_stores",
    VectorStore,
    _schema(
        {"id": _S, "name": _S, "created_us": _I64, "last_active_at": _I64, "state": _S, DELETING: _BOOL},
        {
            "owner": _S,
            "description": _S,
            "expires_after_days": _I32,
            "metadata": _S,
            "embedding_model": _S,
            "dimension": _I32,
        },
    ),
    ("id",),
)
MEMBERS: Final = Table(
    "vector_store_files",
    VectorStoreFile,
    _schema(
        {"store_id": _S, "file_id": _S, "filename": _S, "created_us": _I64, "status": _S, DELETING: _BOOL},
        {
            "owner": _S,
            "chunking": _CHUNKING,
            "attributes": _S,
            "error_code": _S,
            "error_message": _S,
            "usage_bytes": _I64,
            "batch_id": _S,
        },
    ),
    ("store_id", "file_id"),
)
BATCHES: Final = Table(
    "batches",
    Batch,
    _schema(
        {"id": _S, "store_id": _S, "created_us": _I64, "cancelled": _BOOL, DELETING: _BOOL},
        {"owner": _S},
    ),
    ("id",),
)
TABLES: Final[tuple[Table[Any], ...]] = (FILES, STORES, MEMBERS, BATCHES)


def partitions(vectors: int) -> int:
    """Return into how many partitions an index over so many vectors divides them."""
    return max(1, round(math.sqrt(vectors)))


def chunks_table(store_id: str) -> str:
    """Return the name of a store's table of chunks."""
    return f"chunks_{store_id}"


def chunks_schema(dimension: int) -> pa.Schema:
    """Return the schema of a table of chunks; `dimension` 0 leaves vectors out."""
    fields = [
        pa.field("file_id", _S, nullable=False),
        pa.field("filename", _S, nullable=False),
        pa.field("position", _I32, nullable=False),
        pa.field("text", _S, nullable=False),
        pa.field("char_start", _I64, nullable=False),
        pa.field("char_end", _I64, nullable=False),
        pa.field("tokens", _I32, nullable=False),
        pa.field("attributes", pa.json_()),
    ]
    if dimension:
        fields.append(pa.field("vector", pa.list_(pa.float32(), dimension)))
    return pa.schema(fields)


def chunk_rows(
    file: VectorStoreFile, chunks: Sequence[Chunk], first: int, vectors: Any | None, dimension: int
) -> pa.Table:
    """Return a file's chunks as rows.

    Args:
        file: The file, as it is in the vector store.
        chunks: Some of its chunks, in order.
        first: The number of the first of them.
        vectors: One row of `dimension` floats for each chunk; None without vectors.
        dimension: 0 without vectors.
    """
    n = len(chunks)
    columns: list[pa.Array] = [
        pa.array([file.file_id] * n, _S),
        pa.array([file.filename] * n, _S),
        pa.array(range(first, first + n), _I32),
        pa.array([c.text for c in chunks], _S),
        pa.array([c.start for c in chunks], _I64),
        pa.array([c.end for c in chunks], _I64),
        pa.array([c.tokens for c in chunks], _I32),
        json_array([file.attributes] * n),
    ]
    if dimension:
        assert vectors is not None
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), dimension))
    return pa.Table.from_arrays(columns, schema=chunks_schema(dimension))


def json_array(attributes: Sequence[Attributes]) -> pa.Array:
    """Return attributes as a column of JSON."""
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array([encoded(a) for a in attributes], _S))


def located(uri: str) -> str:
    """Return the URI, of a folder the absolute path: LanceDB takes a bare name for a database of its cloud."""
    return uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())


async def connect(
    uri: str,
    storage_options: Mapping[str, str],
    *,
    cache_bytes: int,
    read_consistency_interval: timedelta | None = None,
) -> Any:
    """Return an async LanceDB connection to the tables under `uri`, its caches bounded."""
    place = f"{located(uri)}/tables"
    if "://" not in place:
        await asyncio.to_thread(Path(place).mkdir, parents=True, exist_ok=True)
    return await lancedb.connect_async(
        place,
        storage_options=dict(storage_options),
        session=lancedb.Session(cache_bytes * 3 // 4, cache_bytes // 4),
        read_consistency_interval=read_consistency_interval,
    )


def is_missing(error: Exception) -> bool:
    """Whether LanceDB says that a table is not there, or not any more."""
    return isinstance(error, ValueError | RuntimeError | OSError) and "not found" in str(error).lower()
