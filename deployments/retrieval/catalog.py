"""Reading what there is, as its owner may see it: files, vector stores, what is in them."""

from __future__ import annotations

from typing import Final

from deployments.retrieval.blobs import Blobs
from deployments.retrieval.filters import quoted
from deployments.retrieval.reader import Reader, StoreGone, owned
from deployments.retrieval.records import (
    Batch,
    Chunk,
    File,
    FileCounts,
    FileStatus,
    Page,
    PageRequest,
    VectorStore,
    VectorStoreFile,
)
from deployments.retrieval.rules import no_batch, no_file, no_member, no_store
from deployments.retrieval.tables import FILES, MEMBERS, STORES

_CHUNKS_A_MESSAGE: Final = 16


class Catalog:
    """Every method raises `NotFound` for what is not there and for what is another's, and tells no difference."""

    def __init__(self, reader: Reader, blobs: Blobs) -> None:
        self._reader, self._blobs = reader, blobs

    async def file(self, owner: str | None, file_id: str) -> File:
        """Return a file."""
        file = await self._reader.file(owner, file_id)
        if file is None:
            raise no_file(file_id)
        return file

    async def files(self, owner: str | None, page: PageRequest, purpose: str | None = None) -> Page[File]:
        """Return a page of files."""
        where = owned(owner) if purpose is None else f"{owned(owner)} AND purpose = {quoted(purpose)}"
        return await self._reader.page(FILES, where, page)

    async def read_file(self, owner: str | None, file_id: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes of a file from `offset`, none past its end."""
        await self.file(owner, file_id)
        try:
            return await self._blobs.read(file_id, offset, length)
        except FileNotFoundError:
            raise no_file(file_id) from None

    async def store(self, owner: str | None, store_id: str) -> tuple[VectorStore, FileCounts]:
        """Return a vector store, and how its files stand."""
        store = await self._reader.store(owner, store_id)
        if store is None:
            raise no_store(store_id)
        return store, (await self._reader.counts("store_id", [store_id]))[store_id]

    async def stores(self, owner: str | None, page: PageRequest) -> Page[tuple[VectorStore, FileCounts]]:
        """Return a page of vector stores."""
        found = await self._reader.page(STORES, owned(owner), page)
        counts = await self._reader.counts("store_id", [store.id for store in found.data])
        return Page([(store, counts[store.id]) for store in found.data], found.has_more)

    async def members(
        self,
        owner: str | None,
        store_id: str,
        page: PageRequest,
        status: FileStatus | None = None,
        batch_id: str | None = None,
    ) -> Page[VectorStoreFile]:
        """Return a page of a store's files: all, or those of one status, or of one batch."""
        await self._visible(owner, store_id)
        only = []
        if status is not None:
            only.append(f"status = {quoted(status)}")
        if batch_id is not None:
            if await self._reader.batch(store_id, batch_id) is None:
                raise no_batch(batch_id)
            only.append(f"batch_id = {quoted(batch_id)}")
        return await self._reader.page(MEMBERS, f"store_id = {quoted(store_id)}", page, " AND ".join(only) or None)

    async def member(self, owner: str | None, store_id: str, file_id: str) -> VectorStoreFile:
        """Return a file of a store."""
        await self._visible(owner, store_id)
        member = await self._reader.member(store_id, file_id)
        if member is None:
            raise no_member(file_id)
        return member

    async def batch(self, owner: str | None, store_id: str, batch_id: str) -> tuple[Batch, FileCounts]:
        """Return a batch, and how its files stand."""
        await self._visible(owner, store_id)
        batch = await self._reader.batch(store_id, batch_id)
        if batch is None:
            raise no_batch(batch_id)
        return batch, (await self._reader.counts("batch_id", [batch_id]))[batch_id]

    async def chunks(self, owner: str | None, store_id: str, file_id: str, first: int) -> list[Chunk]:
        """Return some of what was read from a file, from chunk number `first` on; nothing past its end."""
        await self.member(owner, store_id, file_id)
        try:
            return await self._reader.chunks(store_id, file_id, first, _CHUNKS_A_MESSAGE)
        except StoreGone:
            return []  # none of its files has been indexed yet

    async def _visible(self, owner: str | None, store_id: str) -> None:
        if await self._reader.store(owner, store_id) is None:
            raise no_store(store_id)
