"""Taking documents in: files and vector stores are made, changed and deleted here, and files are indexed.

There is no queue beside the store: a file of a vector store whose status is `in_progress` *is* the work, so whatever
happens to this process, the next one goes on. Chunks are committed before the status that says so; what a broken run
has left of a file that is still in progress is deleted before that file is read again. Deletions mark first, so that
nobody sees the thing any more; one that breaks off is finished by the housekeeping, or after a restart.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa

from deployments.config import DocumentsConfig
from deployments.errors import BadRequest, DocumentsUnavailable, Overloaded
from deployments.retrieval.blobs import BlobMissing, Blobs, BlobWriter
from deployments.retrieval.changes import Changes
from deployments.retrieval.embedding import Embedder, Text
from deployments.retrieval.filters import quoted
from deployments.retrieval.frames import Done
from deployments.retrieval.parsing import Unreadable
from deployments.retrieval.ports import Embed, Metrics, Vectors
from deployments.retrieval.reader import Reader, listed
from deployments.retrieval.records import (
    Attachment,
    Attributes,
    Batch,
    Chunk,
    Chunking,
    ErrorCode,
    File,
    VectorStore,
    VectorStoreFile,
    new_id,
)
from deployments.retrieval.rules import (
    check_dimension,
    check_usable,
    no_batch,
    no_file,
    no_member,
    no_store,
    use_is_news,
)
from deployments.retrieval.sandbox import Interrupted, Sandbox
from deployments.retrieval.stages import staged
from deployments.retrieval.tables import BATCHES, FILES, MEMBERS, STORES, TABLES, chunk_rows, chunks_table, is_missing
from deployments.retrieval.writer import Fenced, Writer

logger = logging.getLogger("ray.serve.groundswell.indexer")

P = ParamSpec("P")
T = TypeVar("T")

_LOOK_AHEAD_FILES: Final = 256
_BUFFERED_PIECES: Final = 64
_CHUNKS_A_COMMIT: Final = 2048
_DELETED_TOGETHER: Final = 500
_HOUSE_KEEPING_S: Final = 10.0
_COMPACTION_LOOK_S: Final = 1.0
_LAST_CHANGES_S: Final = 10.0
_UPLOAD_IDLE_S: Final = 600.0
_RETRY_S: Final = (0.5, 30.0)
_READ_AGAIN_AFTER_S: Final = (1.0, 5.0, 20.0)
_MOST_PUT_OFF: Final = 8  # files that are to be read again, while workers read others


@dataclass(eq=False)
class _Job:
    """A file that is being indexed.

    Attributes:
        cancelled: Somebody has detached or deleted it.
        position: Chunks read so far.
        read: How long its child took, once it is read.
        broke_off: Readings that did.
    """

    member: VectorStoreFile
    cancelled: bool = False
    position: int = 0
    usage_bytes: int = 0
    read: Done | None = None
    broke_off: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> tuple[str, str]:
        return self.member.store_id, self.member.file_id


@dataclass(frozen=True, slots=True)
class _Piece:
    """Something of a job on its way into the store: chunks, or its end.

    Attributes:
        texts: Those of the chunks, if they are to have vectors.
    """

    job: _Job
    first: int = 0
    chunks: Sequence[Chunk] = ()
    texts: Sequence[Text] = ()
    end: bool = False
    error: Unreadable | None = None

    @property
    def vectors(self) -> Vectors | None:
        """One a row, or None before any is made, or without."""
        made = [text.vector for text in self.texts if text.vector is not None]
        assert len(made) in (0, len(self.texts)), "some chunks have vectors, and others none"
        return np.stack(made) if made else None

    @property
    def dimension(self) -> int:
        """Of its vectors, 0 without any."""
        vector = self.texts[0].vector if self.texts else None
        return 0 if vector is None else len(vector)


@dataclass
class _Upload:
    """A file on its way here.

    Attributes:
        recorded: Its record has been written, or may have been.
    """

    owner: str | None
    out: BlobWriter
    touched: float
    recorded: bool = False
    changing: Changes = field(default_factory=Changes)


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
        self._staged = partial(staged, metrics, "indexer_stage_seconds")
        self._embedder = (
            Embedder(embed, batch_texts=config.embed_batch_texts, timeout_s=config.embed_timeout_s) if embed else None
        )
        self._max_chunk_tokens = max_chunk_tokens
        self._clock = clock
        self._uploads: dict[str, _Upload] = {}
        self._changing = Changes(self._note_broken)  # what is checked under it still holds when it is written
        self._broken = False  # some change has failed, perhaps halfway
        self._waiting: deque[_Job] = deque()
        self._put_off = 0  # files that are to be read again after a while
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._unclean: set[tuple[str, str]] = set()  # may have chunks of a former reading
        self._cancelling: set[str] = set()  # batches that may have files in progress no longer
        self._wake = asyncio.Event()
        self._refilling = asyncio.Lock()
        self._pieces: asyncio.Queue[_Piece] = asyncio.Queue(_BUFFERED_PIECES)
        self._buffered = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.fenced = False

    async def start(self) -> None:
        """Finish what a former run has begun, and begin to work."""
        await self._recover()
        loops = [self._read_files] * self._config.parse_workers
        loops += [self._write_pieces, self._keep_house, self._keep_compact]
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
        """Begin a file; return its id.

        Raises:
            Overloaded: Too many uploads are open.
        """
        if len(self._uploads) >= self._config.max_open_uploads:
            raise Overloaded("Too many uploads at once.", retry_after_s=5)
        file_id = new_id("file-")
        self._uploads[file_id] = _Upload(owner, await self._blobs.create(file_id), time.monotonic())
        self._metrics.set("indexer_open_uploads", len(self._uploads))
        return file_id

    async def upload(self, file_id: str, offset: int, data: bytes) -> None:
        """Add bytes to a file that has been begun, in order.

        Raises:
            DocumentsUnavailable: The upload broke off; begin again.
        """
        upload = self._upload(file_id)
        await upload.changing.make(partial(self._add, upload, offset, data))

    async def _add(self, upload: _Upload, offset: int, data: bytes) -> None:
        upload.touched = time.monotonic()
        if offset != upload.out.size:
            raise DocumentsUnavailable("The upload broke off: try again.", retry_after_s=1)
        await upload.out.write(data)

    async def finish_upload(
        self, file_id: str, filename: str, purpose: str, expires_after_s: int | None = None
    ) -> File:
        """Make a file of what was uploaded."""
        upload = self._upload(file_id)
        return await upload.changing.make(partial(self._record, file_id, upload, filename, purpose, expires_after_s))

    async def _record(
        self, file_id: str, upload: _Upload, filename: str, purpose: str, expires_after_s: int | None
    ) -> File:
        await upload.out.close()
        expires_at = None if expires_after_s is None else int(self._clock()) + expires_after_s
        created = self._writer.now_us()
        file = File(file_id, upload.owner, filename, upload.out.size, created, purpose, expires_at)
        upload.recorded = True
        await self._writer.add(FILES, [file])
        self._forget_upload(file_id)
        return file

    async def abort_upload(self, file_id: str) -> None:
        """Leave nothing of an upload that will not be finished, or of which nobody hears that it was."""
        if (upload := self._uploads.get(file_id)) is not None:
            await upload.changing.make(partial(self._abort, file_id, upload))
        else:
            await self._changing.make(partial(self._take_back, file_id))

    async def _abort(self, file_id: str, upload: _Upload) -> None:
        self._forget_upload(file_id)
        await upload.out.close()
        if upload.recorded:
            await self._changing.make(partial(self._delete_file, file_id))
        else:
            await self._blobs.delete(file_id)

    async def _take_back(self, file_id: str) -> None:
        if await self._reader.select(FILES, f"id = {quoted(file_id)}"):
            await self._delete_file(file_id)

    def _upload(self, file_id: str) -> _Upload:
        if (upload := self._uploads.get(file_id)) is None:
            raise DocumentsUnavailable("The upload broke off: try again.", retry_after_s=1)
        return upload

    def _forget_upload(self, file_id: str) -> None:
        self._uploads.pop(file_id, None)
        self._metrics.set("indexer_open_uploads", len(self._uploads))

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
            await self._remove(member)
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
        self._wake.set()
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
        await self._empty_store(store_id)
        await self._writer.delete(BATCHES, f"store_id = {quoted(store_id)}")
        await self._writer.delete(STORES, f"id = {quoted(store_id)}")

    async def _empty_store(self, store_id: str) -> None:
        for job in [job for job in self._jobs.values() if job.member.store_id == store_id]:
            self._cancel(job.member)
        await self._writer.delete(MEMBERS, f"store_id = {quoted(store_id)}")
        await self._writer.drop_chunks(store_id)
        self._reader.forget_chunks(store_id)
        self._unclean = {key for key in self._unclean if key[0] != store_id}

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
        await self._put_members(members, former)
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
        await self._put_members(members, former)
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
            await self._remove(going)  # or its row would come back, beside chunks of before
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
                    kept = replace(there, batch_id=batch_id or there.batch_id)
                    if (job := self._jobs.get((store.id, file_id))) is not None:
                        job.member = kept
                    members.append(kept)
                    continue
                former.append(there)
            members.append(member)
        return members, former

    async def _put_members(self, members: list[VectorStoreFile], former: list[VectorStoreFile]) -> None:
        """Write rows of files, then delete the chunks of those they replace: a crash between leaves work, not a gap."""
        for member in former:
            self._cancel(member)
        await self._writer.put(MEMBERS, members)
        self._wake.set()
        for store_id in {member.store_id for member in former}:
            await self._purge(store_id, [member.file_id for member in former])

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
        if member.status == "completed":
            await self._writer.set_attributes(store_id, file_id, attributes)
        elif (store_id, file_id) in self._jobs:
            await self._stop(member)  # it is read again, with the new ones
        changed = replace(member, attributes=attributes)
        await self._writer.put(MEMBERS, [changed])
        self._wake.set()
        return changed

    @_change
    async def detach(self, owner: str | None, store_id: str, file_id: str) -> None:
        """Take a file out of a store."""
        store = await self._store(owner, store_id, open_only=False)
        member = await self._member(store_id, file_id)
        await self._used(store)
        await self._writer.mark_deleting(MEMBERS, _row(member))
        await self._remove(member)

    @_change
    async def cancel_batch(self, owner: str | None, store_id: str, batch_id: str) -> Batch:
        """Stop indexing the files of a batch that are not done."""
        await self._store(owner, store_id, open_only=False)
        batch = await self._batch(store_id, batch_id)
        await self._writer.update(BATCHES, f"id = {quoted(batch_id)}", {"cancelled": True})
        await self._finish_cancel(batch)
        return replace(batch, cancelled=True)

    async def _finish_cancel(self, batch: Batch) -> None:
        self._cancelling.add(batch.id)
        where = f"batch_id = {quoted(batch.id)} AND status = 'in_progress'"
        if members := await self._reader.select(MEMBERS, where):
            for member in members:
                self._cancel(member)
            await self._purge(batch.store_id, [member.file_id for member in members])
            await self._writer.update(MEMBERS, where, {"status": "cancelled"})
        self._cancelling.discard(batch.id)

    async def _remove(self, member: VectorStoreFile) -> None:
        await self._stop(member)
        await self._writer.delete(MEMBERS, _row(member))

    async def _stop(self, member: VectorStoreFile) -> None:
        """Leave nothing of a file in a store, now or from what is being indexed."""
        self._cancel(member)
        await self._purge(member.store_id, [member.file_id])

    def _cancel(self, member: VectorStoreFile) -> None:
        """Stop indexing a file; what is there of it is purged before it is indexed again, if not sooner."""
        key = (member.store_id, member.file_id)
        self._unclean.add(key)
        if (job := self._jobs.pop(key, None)) is not None:
            job.cancelled = True
            self._wake.set()  # should what is to follow fail, the file is still in progress

    async def _purge(self, store_id: str, file_ids: Sequence[str]) -> None:
        for first in range(0, len(file_ids), _DELETED_TOGETHER):
            some = file_ids[first : first + _DELETED_TOGETHER]
            if await self._reader.has_chunks(store_id):
                await self._writer.delete_chunks(store_id, some)
            self._unclean -= {(store_id, file_id) for file_id in some}

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

    # The work

    async def _recover(self) -> None:
        await self._forget_broken_uploads()
        await self._finish_broken()
        begun: dict[str, list[str]] = {}
        for member in await self._reader.select(MEMBERS, "status = 'in_progress'"):
            begun.setdefault(member.store_id, []).append(member.file_id)
        for store_id, file_ids in begun.items():
            logger.info("Going on with %d files of vector store %s", len(file_ids), store_id)
            await self._purge(store_id, file_ids)

    def _note_broken(self) -> None:
        self._broken = True
        self._metrics.inc("indexer_broken_changes")
        self._wake.set()  # it may have written rows of files before it failed

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
        self._wake.set()

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
        for batch in await self._half_cancelled():
            found.append((f"The cancellation of batch {batch.id}", partial(self._finish_cancel, batch)))
        for store_id in await self._half_expired():
            found.append((f"The expiry of vector store {store_id}", partial(self._empty_store, store_id)))
        return found

    async def _finish_removal(self, member: VectorStoreFile) -> None:
        if await self._reader.select(MEMBERS, _row(member), deleting=True):  # not attached again meanwhile
            await self._remove(member)

    async def _half_cancelled(self) -> list[Batch]:
        cancelled = await self._reader.select(BATCHES, "cancelled = true")
        if not cancelled:
            return []
        where = f"status = 'in_progress' AND batch_id IN ({listed([batch.id for batch in cancelled])})"
        begun = {member.batch_id for member in await self._reader.select(MEMBERS, where)} | self._cancelling
        return [batch for batch in cancelled if batch.id in begun]

    async def _half_expired(self) -> list[str]:
        expired = [store.id for store in await self._reader.select(STORES, "state = 'expired'")]
        if not expired:
            return []
        members = await self._reader.select(MEMBERS, f"store_id IN ({listed(expired)})")
        left = {member.store_id for member in members}
        return [store_id for store_id in expired if store_id in left or await self._reader.has_chunks(store_id)]

    async def _forget_broken_uploads(self) -> None:
        known = {file.id for file in await self._reader.select(FILES, "true")}
        strangers = await self._blobs.ids() - known
        if strangers and not known:  # rather than bytes too many, this may be tables too few
            logger.warning("The store has the bytes of %d files, and no record of any; they are kept", len(strangers))
            return
        for file_id in strangers:
            await self._blobs.delete(file_id)

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

    async def _read_files(self) -> None:
        while True:
            job = await self._next_job()
            try:
                await self._read(job)
            except Exception as error:
                if not job.cancelled and not await self._read_later(job, error):
                    await self._pieces.put(_Piece(job, end=True, error=_refusal(job, error)))

    async def _read_later(self, job: _Job, error: Exception) -> bool:
        """Have a file read again, a few times if need be: what breaks off may not be its fault.

        Others are read meanwhile, unless many wait so: then it is not one file's fault, and all would fail in a row.
        """
        passing = isinstance(error, OSError | Interrupted) and not isinstance(error, BlobMissing)
        if not passing or job.broke_off == len(_READ_AGAIN_AFTER_S):
            return False
        wait_s = _READ_AGAIN_AFTER_S[job.broke_off]
        job.broke_off += 1
        self._metrics.inc("indexer_read_retries")
        kind = type(error).__name__
        logger.warning("File %s is read again in %.1f s: %s: %s", job.member.file_id, wait_s, kind, error)
        self._put_off += 1
        if self._put_off > _MOST_PUT_OFF:
            await asyncio.sleep(wait_s)
            self._put_back(job)
        else:
            asyncio.get_running_loop().call_later(wait_s, self._put_back, job)
        return True

    def _put_back(self, job: _Job) -> None:
        self._put_off -= 1
        self._waiting.appendleft(job)
        self._wake.set()

    async def _next_job(self) -> _Job:
        async with self._refilling:
            while True:
                while self._waiting:
                    job = self._waiting.popleft()
                    if not job.cancelled:
                        return job
                self._wake.clear()
                async with self._changing:  # nobody detaches a file between this look and its job
                    limit = _LOOK_AHEAD_FILES + len(self._jobs)
                    where = "status = 'in_progress'"
                    if self._cancelling:
                        where += f" AND (batch_id IS NULL OR batch_id NOT IN ({listed(list(self._cancelling))}))"
                    for member in await self._reader.select(MEMBERS, where, order="asc", limit=limit):
                        if (job := _Job(member)).key not in self._jobs:
                            self._jobs[job.key] = job
                            self._waiting.append(job)
                self._metrics.set("indexer_waiting_files", len(self._jobs))
                if not self._waiting:
                    await self._wake.wait()

    async def _read(self, job: _Job) -> None:
        member, seen = job.member, 0
        async with self._blobs.local(member.file_id) as path:
            stream = self._sandbox.chunks(path, member.filename, member.chunking, done=partial(setattr, job, "read"))
            try:
                async for chunks in stream:
                    if job.cancelled:
                        return
                    chunks, seen = chunks[max(0, job.position - seen) :], seen + len(chunks)
                    if not chunks:  # a former reading came further
                        continue
                    self._buffered += len(chunks)
                    job.usage_bytes += sum(len(chunk.text.encode()) for chunk in chunks)
                    texts = [Text(chunk.text) for chunk in chunks] if self._embedder else ()
                    await self._pieces.put(_Piece(job, job.position, chunks, texts))
                    job.position += len(chunks)
            finally:
                await stream.aclose()
        await self._pieces.put(_Piece(job, end=True))

    async def _write_pieces(self) -> None:
        while True:
            pieces = [await self._pieces.get()]
            while not self._pieces.empty() and sum(len(p.chunks) for p in pieces) < _CHUNKS_A_COMMIT:
                pieces.append(self._pieces.get_nowait())
            await self._write_until_done(pieces)
            self._buffered -= sum(len(p.chunks) for p in pieces)
            del pieces  # or their vectors stay while nothing comes
            self._metrics.set("indexer_buffered_chunks", self._buffered)

    async def _write_until_done(self, pieces: list[_Piece], *, again: bool = False) -> None:
        """Write pieces, however often it takes: their files are read, and what fails here is not their fault.

        But for what would fail for ever: a text that the embedding model refuses, a store made for another model.
        """
        wait_s = _RETRY_S[0]
        refused: Unreadable | None = None
        while True:
            try:
                if refused is not None:
                    return await self._give_up(pieces[0].job, refused)
                return await self._write(pieces, again=again)
            except Fenced:
                raise
            except Unreadable as error:  # of some file among these: find out which
                jobs = list(dict.fromkeys(piece.job for piece in pieces))
                if len(jobs) == 1:
                    refused = error
                    continue
                for job in jobs:
                    await self._write_until_done([piece for piece in pieces if piece.job is job], again=again)
                return
            except Exception as error:
                self._metrics.inc("indexer_retries")
                logger.warning("Indexing waits %.1f s: %s: %s", wait_s, type(error).__name__, error)
                await asyncio.sleep(wait_s)
                wait_s, again = min(_RETRY_S[1], 2 * wait_s), True

    async def _give_up(self, job: _Job, error: Unreadable) -> None:
        async with self._changing:
            if not job.cancelled:
                await self._finish([_Piece(job, end=True, error=error)])
                job.cancelled = True  # what is still read of it is not written

    async def _write(self, pieces: list[_Piece], *, again: bool) -> None:
        """Embed and commit pieces, then the states of the files that end with them.

        Args:
            pieces: In the order they were read.
            again: A former try may have committed some of it.

        Raises:
            Unreadable: Some of it can never be written; nothing has been.
        """
        times: dict[str, float] = {}
        stores = await self._reader.stores_of_anybody({p.job.member.store_id for p in pieces})
        wanted = [p for p in pieces if not p.job.cancelled and p.job.member.store_id in stores]
        with _ours():
            for store_id in dict.fromkeys(p.job.member.store_id for p in wanted):
                check_usable(stores[store_id], self._config.embedding_model)
        # A store made without an embedding model has no room for vectors, whatever the config says now.
        meant = [p for p in wanted if p.texts and stores[p.job.member.store_id].embedding_model is not None]
        if self._embedder is not None and meant:
            async with self._staged("embed", times):
                await self._embedder.embed([text for piece in meant for text in piece.texts])
        with _ours():
            for piece in meant:
                check_dimension(stores[piece.job.member.store_id], piece.dimension)
        async with self._changing, self._staged("index", times):
            live = [p for p in wanted if not p.job.cancelled]
            for store_id in dict.fromkeys(p.job.member.store_id for p in live if p.chunks):
                of_store = [p for p in live if p.chunks and p.job.member.store_id == store_id]
                await self._write_chunks(stores[store_id], of_store, again=again)
            await self._finish([p for p in live if p.end])
        if n := sum(len(p.chunks) for p in live):
            spent = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in times.items())
            logger.info("%d chunks of %d files written: %s", n, len({p.job for p in live}), spent)

    async def _write_chunks(self, store: VectorStore, pieces: list[_Piece], *, again: bool) -> None:
        dimension = pieces[0].dimension
        if store.dimension != dimension:
            await self._writer.update(STORES, f"id = {quoted(store.id)}", {"dimension": dimension})
        await self._writer.create_chunks(store.id, dimension)
        for job in dict.fromkeys(piece.job for piece in pieces):
            if again or job.key in self._unclean:
                begun = min(piece.first for piece in pieces if piece.job is job)
                await self._writer.delete_chunks(store.id, [job.member.file_id], first=begun)
                self._unclean.discard(job.key)
        rows = [chunk_rows(p.job.member, p.chunks, p.first, p.vectors, dimension) for p in pieces]
        await self._writer.add_chunks(store.id, pa.concat_tables(rows))

    async def _finish(self, ends: list[_Piece]) -> None:
        members = []
        for piece in ends:
            member, error = piece.job.member, piece.error
            if error is not None:
                await self._purge(member.store_id, [member.file_id])
                members.append(_failed(member, error.code, error.message))
                logger.info("File %s of %s failed: %s", member.file_id, member.store_id, error.message)
            else:
                members.append(replace(member, status="completed", usage_bytes=piece.job.usage_bytes))
        await self._writer.put(MEMBERS, members)
        for piece, member in zip(ends, members, strict=True):
            if self._jobs.get(piece.job.key) is piece.job:
                del self._jobs[piece.job.key]
            seconds = time.monotonic() - piece.job.started
            self._metrics.inc("indexer_files", outcome=member.status)
            self._metrics.observe("indexer_file_seconds", seconds)
            if piece.error is None and piece.job.read is not None:
                logger.info(
                    "File %s of %s completed: %d chunks; parse %.2f s, chunk %.2f s, %.1f s in all",
                    member.file_id,
                    member.store_id,
                    piece.job.position,
                    piece.job.read.parse_s,
                    piece.job.read.chunk_s,
                    seconds,
                )
        self._metrics.set("indexer_waiting_files", len(self._jobs))

    # The house

    async def _keep_house(self) -> None:
        while True:
            await self._end_stale_uploads()
            await self._expire()
            if self._broken:
                await self._finish_broken()
            await asyncio.sleep(_HOUSE_KEEPING_S)

    async def _end_stale_uploads(self) -> None:
        for file_id, upload in list(self._uploads.items()):
            if time.monotonic() - upload.touched > _UPLOAD_IDLE_S:
                await upload.changing.make(partial(self._end_stale_upload, file_id, upload))

    async def _end_stale_upload(self, file_id: str, upload: _Upload) -> None:
        if self._uploads.get(file_id) is upload:  # or it has been finished meanwhile
            logger.info("Upload %s broke off", file_id)
            await self._abort(file_id, upload)

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
            await self._empty_store(store_id)

    async def _keep_compact(self) -> None:
        for table in TABLES:
            self._writer.clean_after(table.name, self._config.keep_versions_s)
        for store in await self._reader.select(STORES, "state = 'open'"):  # what a former run has left to do
            try:
                await self._go_on_compacting(store.id)
            except Fenced:
                raise
            except Exception:
                logger.exception("The chunks of vector store %s cannot be looked at", store.id)
        while True:
            await asyncio.sleep(min(_COMPACTION_LOOK_S, self._config.compact_after_s))
            for name in self._writer.behind(idle_s=self._config.compact_after_s):
                await self._compact(name)
            self._metrics.set("indexer_tables_behind", self._writer.tables_behind)

    async def _go_on_compacting(self, store_id: str) -> None:
        name = chunks_table(store_id)
        if await self._writer.unindexed(store_id):
            await self._compact(name)
        if await self._writer.has_old_versions(store_id):
            self._writer.clean_after(name, self._config.keep_versions_s)

    async def _compact(self, name: str) -> None:
        try:
            await self._writer.compact(name, keep_versions_s=self._config.keep_versions_s)
        except Fenced:
            raise
        except Exception as error:
            if is_missing(error):  # its store was deleted meanwhile
                return
            logger.exception("Table %s could not be compacted; it is tried again", name)


@contextmanager
def _ours() -> Iterator[None]:
    """Have a refusal fail files by no fault of their own."""
    try:
        yield
    except BadRequest as error:
        raise Unreadable("server_error", error.message) from None


def _refusal(job: _Job, error: Exception) -> Unreadable:
    """Return what to say of a file whose reading has failed for good."""
    if isinstance(error, Unreadable):
        return error
    if isinstance(error, Interrupted):
        return error.refusal
    logger.error("File %s could not be read", job.member.file_id, exc_info=error)
    return Unreadable("server_error", "The file could not be read, by no fault of its own.")


def _failed(member: VectorStoreFile, code: ErrorCode, message: str) -> VectorStoreFile:
    return replace(member, status="failed", error_code=code, error_message=message)


def _due(now: int) -> str:
    """Return which vector stores are to expire."""
    return f"state = 'open' AND expires_after_days IS NOT NULL AND last_active_at + expires_after_days * 86400 <= {now}"


def _row(member: VectorStoreFile) -> str:
    return f"store_id = {quoted(member.store_id)} AND file_id = {quoted(member.file_id)}"
