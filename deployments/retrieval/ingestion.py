"""Taking documents in: files and vector stores are made, changed and deleted here, and what broke off is finished.

The bytes of files come by `uploads`, `indexing` makes them searchable, `compaction` keeps the tables in order; here is
what clients ask for. Deletions mark first, so that nobody sees the thing any more; one that breaks off is finished by
the housekeeping, or after a restart.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from deployments.config import DocumentsConfig
from deployments.errors import BadRequest
from deployments.retrieval.blobs import Blobs
from deployments.retrieval.changes import Changes
from deployments.retrieval.compaction import Compaction
from deployments.retrieval.filters import quoted
from deployments.retrieval.indexing import Indexing, row
from deployments.retrieval.ports import Embed, Metrics
from deployments.retrieval.reader import Reader, listed
from deployments.retrieval.records import (
    Attachment,
    Attributes,
    Batch,
    Chunking,
    File,
    VectorStore,
    VectorStoreFile,
    new_id,
)
from deployments.retrieval.rules import check_usable, no_batch, no_file, no_member, no_store, use_is_news
from deployments.retrieval.sandbox import Sandbox
from deployments.retrieval.tables import BATCHES, FILES, MEMBERS, STORES
from deployments.retrieval.uploads import Uploads
from deployments.retrieval.writer import Fenced, Writer

logger = logging.getLogger("ray.serve.groundswell.indexer")

P = ParamSpec("P")
T = TypeVar("T")

_HOUSE_KEEPING_S: Final = 10.0
_LAST_CHANGES_S: Final = 10.0


def _change(
    method: Callable[Concatenate[Ingestion, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Ingestion, P], Coroutine[Any, Any, T]]:
    """Have a method make a change to the store: alone, and to its end."""

    @wraps(method)
    async def change(self: Ingestion, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._changing.make(lambda: method(self, *args, **kwargs))

    return change


class Ingestion:
    """See the module's docstring. `start` it once; it works until it is closed or fenced.

    Args:
        config: Bounds, timeouts, defaults.
        writer: The one writer.
        reader: Over the same store.
        blobs: The files' bytes.
        sandbox: Reads and cuts files.
        embed: Makes vectors; None without an embedding model.
        max_chunk_tokens: What the embedding model reads at once; None without a limit.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        config: DocumentsConfig,
        writer: Writer,
        reader: Reader,
        blobs: Blobs,
        sandbox: Sandbox,
        metrics: Metrics,
        *,
        embed: Embed | None = None,
        max_chunk_tokens: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._writer, self._reader, self._blobs, self._sandbox = writer, reader, blobs, sandbox
        self._metrics = metrics
        self._max_chunk_tokens = max_chunk_tokens
        self._clock = clock
        self._changing = Changes(self._note_broken)  # what is checked under it still holds when it is written
        self._broken = False  # some change has failed, perhaps halfway
        self._uploads = Uploads(
            config.max_open_uploads, writer, reader, blobs, metrics, take_back=self._take_back, clock=clock
        )
        self._indexing = Indexing(config, writer, reader, blobs, sandbox, metrics, self._changing, embed=embed)
        self._compaction = Compaction(
            writer, reader, metrics, compact_after_s=config.compact_after_s, keep_versions_s=config.keep_versions_s
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.fenced = False

    async def start(self) -> None:
        """Finish what a former run has begun, and begin to work."""
        await self._uploads.forget_broken()
        await self._finish_broken()
        await self._indexing.recover()
        loops = [*self._indexing.loops, self._keep_house, self._compaction.keep_compact]
        self._tasks = [asyncio.get_running_loop().create_task(self._forever(loop)) for loop in loops]

    async def close(self) -> None:
        """Stop. What is unfinished stays in progress, for the next."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._sandbox.close()
        try:
            async with asyncio.timeout(_LAST_CHANGES_S), self._changing:
                pass  # what has begun, or had its turn before, has been made to its end
        except TimeoutError:
            logger.warning("A change is still under way as the Indexer ends; the next one finishes what it leaves")

    # Files

    async def begin_upload(self, owner: str | None) -> str:
        """Begin a file; return its id. As for the three that follow, see `Uploads`."""
        return await self._uploads.begin(owner)

    async def upload(self, file_id: str, offset: int, data: bytes) -> None:
        """Add bytes to a file that has been begun, in order."""
        await self._uploads.add(file_id, offset, data)

    async def finish_upload(
        self, file_id: str, filename: str, purpose: str, expires_after_s: int | None = None
    ) -> File:
        """Make a file of what was uploaded."""
        return await self._uploads.finish(file_id, filename, purpose, expires_after_s)

    async def abort_upload(self, file_id: str) -> None:
        """Leave nothing of an upload that will not be finished, or of which nobody hears that it was."""
        await self._uploads.abort(file_id)

    @_change
    async def _take_back(self, file_id: str) -> None:
        if await self._reader.select(FILES, f"id = {quoted(file_id)}"):
            await self._delete_file(file_id)

    @_change
    async def delete_file(self, owner: str | None, file_id: str) -> None:
        """Delete a file, and what vector stores have of it.

        Raises:
            NotFound: There is none, or it is another's.
        """
        if await self._reader.file(owner, file_id) is None:
            raise no_file(file_id)
        await self._delete_file(file_id)

    async def _delete_file(self, file_id: str) -> None:
        await self._writer.mark_deleting(FILES, f"id = {quoted(file_id)}")
        await self._finish_file(file_id)

    async def _finish_file(self, file_id: str) -> None:
        for member in await self._reader.select(MEMBERS, f"file_id = {quoted(file_id)}"):
            await self._indexing.remove(member)
        await self._blobs.delete(file_id)
        await self._writer.delete(FILES, f"id = {quoted(file_id)}")

    # Vector stores

    @_change
    async def create_store(
        self,
        owner: str | None,
        name: str = "",
        description: str | None = None,
        metadata: Mapping[str, str] | None = None,
        expires_after_days: int | None = None,
        attachments: Sequence[Attachment] = (),
    ) -> VectorStore:
        """Create a vector store, with files in it if any are given."""
        store = VectorStore(
            new_id("vs_"),
            owner,
            name,
            description,
            self._writer.now_us(),
            int(self._clock()),
            expires_after_days,
            metadata=metadata or {},
            embedding_model=self._config.embedding_model,
        )
        members, _ = await self._members(store, attachments, None)
        await self._writer.add(STORES, [store])
        await self._writer.add(MEMBERS, members)
        self._indexing.wake()
        return store

    @_change
    async def update_store(self, owner: str | None, store_id: str, changes: Mapping[str, Any]) -> VectorStore:
        """Change a store's `name`, `description`, `metadata` or `expires_after_days`; what is not there stays."""
        store = await self._store(owner, store_id, open_only=False)
        changed = replace(store, **changes, last_active_at=int(self._clock()))
        await self._writer.put(STORES, [changed])
        return changed

    @_change
    async def delete_store(self, owner: str | None, store_id: str) -> None:
        """Delete a store; its files stay."""
        await self._store(owner, store_id, open_only=False)
        await self._writer.mark_deleting(STORES, f"id = {quoted(store_id)}")
        await self._finish_store(store_id)

    async def _finish_store(self, store_id: str) -> None:
        await self._indexing.empty(store_id)
        await self._writer.delete(BATCHES, f"store_id = {quoted(store_id)}")
        await self._writer.delete(STORES, f"id = {quoted(store_id)}")

    @_change
    async def touch(self, store_ids: Sequence[str]) -> None:
        """Note that stores were used, which is what their expiry counts from."""
        await self._touch(f"id IN ({listed(store_ids)}) AND state = 'open'")

    async def _touch(self, where: str) -> None:
        await self._writer.update(STORES, where, {"last_active_at": int(self._clock())})

    async def _used(self, store: VectorStore) -> None:
        """Note that a store's files change, now and then."""
        if store.state == "open" and use_is_news(store, self._clock()):
            await self._touch(f"id = {quoted(store.id)}")

    # Files in vector stores

    @_change
    async def attach(self, owner: str | None, store_id: str, attachment: Attachment) -> VectorStoreFile:
        """Put a file into a store; it is indexed soon.

        Raises:
            NotFound: There is no such store or file.
            BadRequest: The store has expired, or was made for another embedding model.
        """
        store = await self._store(owner, store_id)
        members, former = await self._members(store, [attachment], None)
        await self._used(store)
        await self._indexing.put(members, former)
        return members[0]

    async def check_attachable(self, owner: str | None, store_id: str, attachments: Sequence[Attachment]) -> None:
        """Refuse what `attach_batch` would, before a batch comes in several calls; attributes do not matter."""
        store = await self._store(owner, store_id)
        await self._attachable(store, attachments)

    @_change
    async def attach_batch(
        self, owner: str | None, store_id: str, attachments: Sequence[Attachment], batch_id: str | None = None
    ) -> Batch:
        """Put files into a store, as one batch; `batch_id` adds them to one that is there."""
        store = await self._store(owner, store_id)
        if batch_id is None:
            batch = Batch(new_id("vsfb_"), store_id, owner, self._writer.now_us())
        else:
            batch = await self._batch(store_id, batch_id)
            if batch.cancelled:
                raise BadRequest(f"Batch {batch_id} was cancelled: it takes no more files.")
        members, former = await self._members(store, attachments, batch.id)
        await self._used(store)
        if batch_id is None:
            await self._writer.add(BATCHES, [batch])
        await self._indexing.put(members, former)
        return batch

    async def _attachable(self, store: VectorStore, attachments: Sequence[Attachment]) -> dict[str, File]:
        """Return the files to attach by id, all of them checked."""
        files = await self._reader.files(store.owner, list({attachment.file_id for attachment in attachments}))
        for attachment in attachments:
            if attachment.file_id not in files:
                raise no_file(attachment.file_id)
            self._check_chunking(attachment.chunking or self.default_chunking)
        return files

    async def _members(
        self, store: VectorStore, attachments: Sequence[Attachment], batch_id: str | None
    ) -> tuple[list[VectorStoreFile], list[VectorStoreFile]]:
        """Return the rows of files to attach, and those they replace.

        What is there already, and would be the same again, is kept.
        """
        files = await self._attachable(store, attachments)
        by_id = {attachment.file_id: attachment for attachment in attachments}
        where = f"store_id = {quoted(store.id)} AND file_id IN ({listed(list(by_id))})"
        present = {m.file_id: m for m in await self._reader.select(MEMBERS, where)} if by_id else {}
        for going in await self._reader.select(MEMBERS, where, deleting=True) if by_id else ():
            await self._indexing.remove(going)  # or its row would come back, beside chunks of before
        members, former = [], []
        for file_id, attachment in by_id.items():
            member = VectorStoreFile(
                store.id,
                file_id,
                store.owner,
                files[file_id].filename,
                self._writer.now_us(),
                "in_progress",
                attachment.chunking or self.default_chunking,
                attachment.attributes,
                batch_id=batch_id,
            )
            if (there := present.get(file_id)) is not None:
                same = (there.attributes, there.chunking) == (member.attributes, member.chunking)
                if same and there.status in ("in_progress", "completed"):
                    members.append(replace(there, batch_id=batch_id or there.batch_id))
                    continue
                former.append(there)
            members.append(member)
        return members, former

    @property
    def default_chunking(self) -> Chunking:
        """What is taken where the client leaves it to us: never more than the embedding model reads at once."""
        size, overlap = self._config.max_chunk_size_tokens, self._config.chunk_overlap_tokens
        if self._max_chunk_tokens is not None and size > self._max_chunk_tokens:
            return Chunking(self._max_chunk_tokens, overlap * self._max_chunk_tokens // size)
        return Chunking(size, overlap)

    def _check_chunking(self, chunking: Chunking) -> None:
        most = self._max_chunk_tokens
        if most is not None and chunking.max_tokens > most:
            raise BadRequest(
                f"The embedding model of this server reads {most} tokens at once: "
                f"`max_chunk_size_tokens` may be at most {most}.",
                param="chunking_strategy",
            )

    @_change
    async def set_attributes(
        self, owner: str | None, store_id: str, file_id: str, attributes: Attributes
    ) -> VectorStoreFile:
        """Give a file of a store new attributes."""
        store = await self._store(owner, store_id)
        member = await self._member(store_id, file_id)
        await self._used(store)
        changed = replace(member, attributes=attributes)
        if member.status == "completed":
            await self._writer.set_attributes(store_id, file_id, attributes)
        # What is being read is read again, with the new ones.
        await self._indexing.put([changed], [member] if member.status == "in_progress" else ())
        return changed

    @_change
    async def detach(self, owner: str | None, store_id: str, file_id: str) -> None:
        """Take a file out of a store."""
        store = await self._store(owner, store_id, open_only=False)
        member = await self._member(store_id, file_id)
        await self._used(store)
        await self._writer.mark_deleting(MEMBERS, row(member))
        await self._indexing.remove(member)

    @_change
    async def cancel_batch(self, owner: str | None, store_id: str, batch_id: str) -> Batch:
        """Stop indexing the files of a batch that are not done."""
        await self._store(owner, store_id, open_only=False)
        batch = await self._batch(store_id, batch_id)
        await self._writer.update(BATCHES, f"id = {quoted(batch_id)}", {"cancelled": True})
        await self._indexing.cancel_batch(batch)
        return replace(batch, cancelled=True)

    async def _store(self, owner: str | None, store_id: str, *, open_only: bool = True) -> VectorStore:
        store = await self._reader.store(owner, store_id)
        if store is None:
            raise no_store(store_id)
        if open_only:
            check_usable(store, self._config.embedding_model)
        return store

    async def _member(self, store_id: str, file_id: str) -> VectorStoreFile:
        member = await self._reader.member(store_id, file_id)
        if member is None:
            raise no_member(file_id)
        return member

    async def _batch(self, store_id: str, batch_id: str) -> Batch:
        batch = await self._reader.batch(store_id, batch_id)
        if batch is None:
            raise no_batch(batch_id)
        return batch

    # What broke off

    def _note_broken(self) -> None:
        self._broken = True
        self._metrics.inc("indexer_broken_changes")
        self._indexing.wake()  # it may have written rows of files before it failed

    async def _finish_broken(self) -> None:
        """Finish deletions and cancellations that broke off, each by itself: one that fails again holds up no other."""
        self._broken = False  # until one fails, here or elsewhere
        for what, finish in await self._changing.make(self._unfinished):
            try:
                await self._changing.make(finish)
            except Fenced:
                raise
            except Exception as error:
                logger.warning("%s is not finished yet: %s: %s", what, type(error).__name__, error)
        self._indexing.wake()

    async def _unfinished(self) -> list[tuple[str, Callable[[], Coroutine[Any, Any, None]]]]:
        """Return what broke off: what to call it, and what finishes it."""
        found: list[tuple[str, Callable[[], Coroutine[Any, Any, None]]]] = []
        for file in await self._reader.select(FILES, "true", deleting=True):
            found.append((f"The deletion of file {file.id}", partial(self._finish_file, file.id)))
        for store in await self._reader.select(STORES, "true", deleting=True):
            found.append((f"The deletion of vector store {store.id}", partial(self._finish_store, store.id)))
        for member in await self._reader.select(MEMBERS, "true", deleting=True):
            what = f"The removal of file {member.file_id} from {member.store_id}"
            found.append((what, partial(self._finish_removal, member)))
        for batch in await self._indexing.half_cancelled():
            found.append((f"The cancellation of batch {batch.id}", partial(self._indexing.cancel_batch, batch)))
        for store_id in await self._half_expired():
            found.append((f"The expiry of vector store {store_id}", partial(self._indexing.empty, store_id)))
        return found

    async def _finish_removal(self, member: VectorStoreFile) -> None:
        if await self._reader.select(MEMBERS, row(member), deleting=True):  # not attached again meanwhile
            await self._indexing.remove(member)

    async def _half_expired(self) -> list[str]:
        expired = [store.id for store in await self._reader.select(STORES, "state = 'expired'")]
        if not expired:
            return []
        members = await self._reader.select(MEMBERS, f"store_id IN ({listed(expired)})")
        left = {member.store_id for member in members}
        return [store_id for store_id in expired if store_id in left or await self._reader.has_chunks(store_id)]

    async def _forever(self, loop: Callable[[], Any]) -> None:
        while not self.fenced:
            try:
                await loop()
            except Fenced as error:
                logger.error("This Indexer must stop writing: %s", error)
                self.fenced = True
            except Exception:
                name = loop.__name__.strip("_")
                self._metrics.inc("indexer_loop_failures", loop=name)
                logger.exception("The Indexer's %s failed; it goes on", name)
                await asyncio.sleep(1)

    # The house

    async def _keep_house(self) -> None:
        while True:
            await self._uploads.end_stale()
            await self._expire()
            if self._broken:
                await self._finish_broken()
            await asyncio.sleep(_HOUSE_KEEPING_S)

    async def _expire(self) -> None:
        now = int(self._clock())
        for file in await self._reader.select(FILES, f"expires_at <= {now}"):
            await self._expire_file(file.id, now)
        for store in await self._reader.select(STORES, _due(now)):
            await self._expire_store(store.id, now)

    @_change
    async def _expire_file(self, file_id: str, now: int) -> None:
        if await self._reader.select(FILES, f"id = {quoted(file_id)} AND expires_at <= {now}"):
            logger.info("File %s has expired", file_id)
            await self._delete_file(file_id)

    @_change
    async def _expire_store(self, store_id: str, now: int) -> None:
        if await self._reader.select(STORES, f"id = {quoted(store_id)} AND {_due(now)}"):
            logger.info("Vector store %s has expired", store_id)
            await self._writer.update(STORES, f"id = {quoted(store_id)}", {"state": "expired"})
            await self._indexing.empty(store_id)


def _due(now: int) -> str:
    """Return which vector stores are to expire."""
    return f"state = 'open' AND expires_after_days IS NOT NULL AND last_active_at + expires_after_days * 86400 <= {now}"
