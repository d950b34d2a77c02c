"""Indexing: a file of a vector store is read, embedded and written, and whatever is under way can be stopped.

There is no queue beside the store: a file of a vector store whose status is `in_progress` *is* the work, so whatever
happens to this process, the next one goes on. Chunks are committed before the status that says so; what a broken run,
or a reading that was stopped, has left of a file that is still in progress is deleted before that file is read again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa

from deployments.config import DocumentsConfig
from deployments.errors import BadRequest
from deployments.retrieval.blobs import BlobMissing, Blobs
from deployments.retrieval.changes import Changes
from deployments.retrieval.embedding import Embedder, Text
from deployments.retrieval.filters import quoted
from deployments.retrieval.frames import Done
from deployments.retrieval.parsing import Unreadable
from deployments.retrieval.ports import Embed, Metrics, Vectors
from deployments.retrieval.reader import Reader, listed
from deployments.retrieval.records import Batch, Chunk, ErrorCode, VectorStore, VectorStoreFile
from deployments.retrieval.rules import check_dimension, check_usable
from deployments.retrieval.sandbox import Interrupted, Sandbox
from deployments.retrieval.stages import staged
from deployments.retrieval.tables import BATCHES, MEMBERS, STORES, chunk_rows
from deployments.retrieval.writer import Fenced, Writer

logger = logging.getLogger("ray.serve.groundswell.indexer")

_LOOK_AHEAD_FILES: Final = 256
_BUFFERED_PIECES: Final = 64
_CHUNKS_A_COMMIT: Final = 2048
_DELETED_TOGETHER: Final = 500
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
        return _key(self.member)


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


class Indexing:
    """See the module's docstring. Its `loops` do the work; whatever else happens to files and stores is told here.

    Args:
        config: Bounds, timeouts.
        writer: The one writer.
        reader: Over the same store.
        blobs: The files' bytes.
        sandbox: Reads and cuts files.
        changing: Held while rows are taken up and written here, and by whoever calls `put`, `remove`, `empty` or
            `cancel_batch`: what is stopped is then written no more.
        embed: Makes vectors; None without an embedding model.
    """

    def __init__(
        self,
        config: DocumentsConfig,
        writer: Writer,
        reader: Reader,
        blobs: Blobs,
        sandbox: Sandbox,
        metrics: Metrics,
        changing: Changes,
        *,
        embed: Embed | None,
    ) -> None:
        self._config = config
        self._writer, self._reader, self._blobs, self._sandbox = writer, reader, blobs, sandbox
        self._metrics = metrics
        self._staged = partial(staged, metrics, "indexer_stage_seconds")
        self._embedder = (
            Embedder(embed, batch_texts=config.embed_batch_texts, timeout_s=config.embed_timeout_s) if embed else None
        )
        self._changing = changing
        self._waiting: deque[_Job] = deque()
        self._put_off = 0  # files that are to be read again after a while
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._unclean: set[tuple[str, str]] = set()  # may have chunks of a former reading
        self._cancelling: set[str] = set()  # batches that may have files in progress no longer
        self._wake = asyncio.Event()
        self._refilling = asyncio.Lock()
        self._pieces: asyncio.Queue[_Piece] = asyncio.Queue(_BUFFERED_PIECES)
        self._buffered = 0

    async def recover(self) -> None:
        """Delete what a former run has left of files that are in progress, before the loops run."""
        begun = await self._reader.select(MEMBERS, "status = 'in_progress'")
        for store_id, count in Counter(member.store_id for member in begun).items():
            logger.info("Going on with %d files of vector store %s", count, store_id)
        await self._purge(begun)

    @property
    def loops(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """What is to run, each beside the others and again when it fails, for as long as files are to be indexed."""
        return [self._read_files] * self._config.parse_workers + [self._write_pieces]

    def wake(self) -> None:
        """Look for files in progress: there may be some that are not being indexed."""
        self._wake.set()

    # Told of changes

    async def put(self, members: Sequence[VectorStoreFile], former: Sequence[VectorStoreFile] = ()) -> None:
        """Write rows of files, then delete the chunks of those they replace: a crash between leaves work, not a gap.

        Args:
            members: The rows; a file that goes on being indexed ends as its row here, but for its status.
            former: Those they replace for good: what is being read of them is stopped.
        """
        for member in former:
            self._cancel(member)
        for member in members:
            if (job := self._jobs.get(_key(member))) is not None:
                job.member = member
        await self._writer.put(MEMBERS, members)
        self.wake()
        await self._purge(former)

    async def remove(self, member: VectorStoreFile) -> None:
        """Leave nothing of a file in a store: neither what is being indexed, nor its chunks, nor its row."""
        self._cancel(member)
        await self._purge([member])
        await self._writer.delete(MEMBERS, row(member))

    async def empty(self, store_id: str) -> None:
        """Leave nothing of any file in a store."""
        for job in [job for job in self._jobs.values() if job.member.store_id == store_id]:
            self._cancel(job.member)
        await self._writer.delete(MEMBERS, f"store_id = {quoted(store_id)}")
        await self._writer.drop_chunks(store_id)
        self._reader.forget_chunks(store_id)
        self._unclean = {key for key in self._unclean if key[0] != store_id}

    async def cancel_batch(self, batch: Batch) -> None:
        """Cancel those of a batch's files that are in progress; until that has succeeded, none of them is taken up."""
        self._cancelling.add(batch.id)
        where = f"batch_id = {quoted(batch.id)} AND status = 'in_progress'"
        if members := await self._reader.select(MEMBERS, where):
            for member in members:
                self._cancel(member)
            await self._purge(members)
            await self._writer.update(MEMBERS, where, {"status": "cancelled"})
        self._cancelling.discard(batch.id)

    async def half_cancelled(self) -> list[Batch]:
        """Return the batches whose cancellation broke off."""
        cancelled = await self._reader.select(BATCHES, "cancelled = true")
        if not cancelled:
            return []
        where = f"status = 'in_progress' AND batch_id IN ({listed([batch.id for batch in cancelled])})"
        begun = {member.batch_id for member in await self._reader.select(MEMBERS, where)} | self._cancelling
        return [batch for batch in cancelled if batch.id in begun]

    def _cancel(self, member: VectorStoreFile) -> None:
        """Stop indexing a file; what is there of it is purged before it is indexed again, if not sooner."""
        self._unclean.add(key := _key(member))
        if (job := self._jobs.pop(key, None)) is not None:
            job.cancelled = True
            self.wake()  # should what is to follow fail, the file is still in progress

    async def _purge(self, members: Sequence[VectorStoreFile]) -> None:
        """Leave no chunks of files in their stores."""
        by_store: dict[str, list[str]] = {}
        for member in members:
            by_store.setdefault(member.store_id, []).append(member.file_id)
        for store_id, file_ids in by_store.items():
            for first in range(0, len(file_ids), _DELETED_TOGETHER):
                some = file_ids[first : first + _DELETED_TOGETHER]
                if await self._reader.has_chunks(store_id):
                    await self._writer.delete_chunks(store_id, some)
                self._unclean -= {(store_id, file_id) for file_id in some}

    # The work

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
        self.wake()

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
                await self._purge([member])
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


def row(member: VectorStoreFile) -> str:
    """Return the predicate of a file's row in its store."""
    return f"store_id = {quoted(member.store_id)} AND file_id = {quoted(member.file_id)}"


def _key(member: VectorStoreFile) -> tuple[str, str]:
    return member.store_id, member.file_id
