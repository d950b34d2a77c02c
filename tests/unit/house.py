"""An Indexer's and a Retriever's insides over one folder, as the tests of both use them."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deployments.config import DocumentsConfig
from deployments.metrics import NoMetrics
from deployments.retrieval.blobs import Blobs
from deployments.retrieval.catalog import Catalog
from deployments.retrieval.ingestion import Ingestion
from deployments.retrieval.ports import Vectors
from deployments.retrieval.reader import Reader
from deployments.retrieval.records import Attachment, PageRequest, VectorStoreFile
from deployments.retrieval.sandbox import Sandbox
from deployments.retrieval.search import Searcher
from deployments.retrieval.writer import Writer
from tests.unit.recording import Clock

LIMIT_S = 60
DIMENSION = 64


async def stub_embed(texts: Sequence[str]) -> Vectors:
    """A stub embedding model: words fall into 64 bins, and "car" means the same as "automobile"."""
    vectors = np.zeros((len(texts), DIMENSION), np.float32)
    for i, text in enumerate(texts):
        for word in re.findall(r"\w+", text.lower().replace("automobile", "car")):
            vectors[i, zlib.crc32(word.encode()) % DIMENSION] += 1
    return vectors + 1e-6


@dataclass
class House:
    ingestion: Ingestion
    catalog: Catalog
    searcher: Searcher
    reader: Reader
    writer: Writer
    sandbox: Sandbox
    clock: Clock

    async def upload(self, text: str | bytes, name: str = "a.txt", owner: str | None = None) -> str:
        file_id = await self.ingestion.begin_upload(owner)
        await self.ingestion.upload(file_id, 0, text.encode() if isinstance(text, str) else text)
        await self.ingestion.finish_upload(file_id, name, "assistants")
        return file_id

    async def text(self, store_id: str, file_id: str) -> str:
        """Return what was read from a file, but for white space between chunks."""
        text, end = "", 0
        for chunk in await self.reader.chunks(store_id, file_id):
            text += chunk.text[max(0, end - chunk.start) :]
            end = chunk.end
        return text

    async def store_of(self, *texts: str, owner: str | None = None, **attributes: Any) -> tuple[str, list[str]]:
        """Return a store in which files of these texts have been indexed, and their ids."""
        files = [await self.upload(text, owner=owner) for text in texts]
        store = await self.ingestion.create_store(owner, attachments=[Attachment(f, attributes) for f in files])
        await self.indexed(store.id, owner=owner)
        return store.id, files

    async def indexed(self, store_id: str, owner: str | None = None) -> list[VectorStoreFile]:
        """Wait until no file of the store is in progress; return them all."""
        async with asyncio.timeout(LIMIT_S):
            while (await self.catalog.store(owner, store_id))[1].in_progress:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        members: list[VectorStoreFile] = []
        page = PageRequest(limit=100, order="asc")
        while True:
            got = await self.catalog.members(owner, store_id, page)
            members += got.data
            if not got.has_more:
                return members
            page = PageRequest(limit=100, order="asc", after=got.data[-1].file_id)


@asynccontextmanager
async def house(uri: Path | str, *, embed: Any = None, start: bool = True, **options: Any) -> AsyncIterator[House]:
    """Run one over `uri`; `options` are those of `DocumentsConfig`, `score`, `touch`, `max_chunk_tokens`, `metrics`."""
    own = {key: options.pop(key, None) for key in ("score", "touch", "max_chunk_tokens", "metrics")}
    config = DocumentsConfig(uri=str(uri), embedding_model="stub" if embed else None, **options)
    metrics, clock = own["metrics"] or NoMetrics(), Clock(1_700_000_000.0)
    place = (str(uri), config.storage_options)
    writer = await Writer.claim(*place, cache_bytes=2**24, language="English", metrics=metrics)
    reader = await Reader.open(*place, cache_bytes=2**24)
    blobs = Blobs(*place)
    sandbox = Sandbox(
        workers=config.parse_workers,
        memory_bytes=config.parse_memory_bytes,
        timeout_s=config.parse_timeout_s,
        max_chars=config.max_text_chars,
        tokenizer=None,
        metrics=metrics,
    )
    ingestion = Ingestion(
        config,
        writer,
        reader,
        blobs,
        sandbox,
        metrics,
        embed=embed,
        max_chunk_tokens=own["max_chunk_tokens"],
        clock=clock,
    )
    readers = await Reader.open(*place, cache_bytes=2**24)
    searcher = Searcher(
        config, readers, metrics, embed=embed, score=own["score"], touch=own["touch"] or ingestion.touch, clock=clock
    )
    made = House(ingestion, Catalog(readers, blobs), searcher, reader, writer, sandbox, clock)
    if start:
        await ingestion.start()
    try:
        yield made
    finally:
        await ingestion.close()
