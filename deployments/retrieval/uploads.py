"""Files on their way here, piece by piece: bytes that nobody sees until the record of their file is written."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from deployments.errors import DocumentsUnavailable, Overloaded
from deployments.retrieval.blobs import Blobs, BlobWriter
from deployments.retrieval.changes import Changes
from deployments.retrieval.ports import Metrics
from deployments.retrieval.reader import Reader
from deployments.retrieval.records import File, new_id
from deployments.retrieval.tables import FILES
from deployments.retrieval.writer import Writer

logger = logging.getLogger("ray.serve.groundswell.indexer")

_IDLE_S: Final = 600.0


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


class Uploads:
    """Those that are open. An upload's own calls are made one after another, each to its end.

    Args:
        max_open: More at once are refused.
        writer: Writes the record of a file that has come.
        reader: Over the same store.
        blobs: Where the bytes go.
        take_back: Deletes a file, if there is a record of it.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        max_open: int,
        writer: Writer,
        reader: Reader,
        blobs: Blobs,
        metrics: Metrics,
        *,
        take_back: Callable[[str], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._max_open = max_open
        self._writer, self._reader, self._blobs = writer, reader, blobs
        self._metrics = metrics
        self._take_back = take_back
        self._clock = clock
        self._open: dict[str, _Upload] = {}

    async def begin(self, owner: str | None) -> str:
        """Begin a file; return its id.

        Raises:
            Overloaded: Too many uploads are open.
        """
        if len(self._open) >= self._max_open:
            raise Overloaded("Too many uploads at once.", retry_after_s=5)
        file_id = new_id("file-")
        self._open[file_id] = _Upload(owner, await self._blobs.create(file_id), time.monotonic())
        self._metrics.set("indexer_open_uploads", len(self._open))
        return file_id

    async def add(self, file_id: str, offset: int, data: bytes) -> None:
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

    async def finish(self, file_id: str, filename: str, purpose: str, expires_after_s: int | None) -> File:
        """Make a file of what was uploaded.

        Raises:
            DocumentsUnavailable: The upload broke off; begin again.
        """
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
        self._forget(file_id)
        return file

    async def abort(self, file_id: str) -> None:
        """Leave nothing of an upload that will not be finished, or of which nobody hears that it was."""
        if (upload := self._open.get(file_id)) is not None:
            await upload.changing.make(partial(self._abort, file_id, upload))
        else:
            await self._take_back(file_id)

    async def _abort(self, file_id: str, upload: _Upload) -> None:
        self._forget(file_id)
        await upload.out.close()
        if upload.recorded:
            await self._take_back(file_id)
        await self._blobs.delete(file_id)  # the record may not have been written

    async def end_stale(self) -> None:
        """End those of which nothing has come for long: their Router is lost."""
        for file_id, upload in list(self._open.items()):
            if time.monotonic() - upload.touched > _IDLE_S:
                await upload.changing.make(partial(self._end_stale, file_id, upload))

    async def _end_stale(self, file_id: str, upload: _Upload) -> None:
        if self._open.get(file_id) is upload:  # or it has been finished meanwhile
            logger.info("Upload %s broke off", file_id)
            await self._abort(file_id, upload)

    async def forget_broken(self) -> None:
        """Delete what a former run has left of uploads that it did not see the end of."""
        known = {file.id for file in await self._reader.select(FILES, "true")}
        strangers = await self._blobs.ids() - known
        if strangers and not known:  # rather than bytes too many, this may be tables too few
            logger.warning("The store has the bytes of %d files, and no record of any; they are kept", len(strangers))
            return
        for file_id in strangers:
            await self._blobs.delete(file_id)

    def _upload(self, file_id: str) -> _Upload:
        if (upload := self._open.get(file_id)) is None:
            raise DocumentsUnavailable("The upload broke off: try again.", retry_after_s=1)
        return upload

    def _forget(self, file_id: str) -> None:
        self._open.pop(file_id, None)
        self._metrics.set("indexer_open_uploads", len(self._open))
