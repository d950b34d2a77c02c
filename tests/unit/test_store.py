"""The document store: records and pages, what readers see, who may write."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from deployments.errors import NotFound
from deployments.metrics import NoMetrics
from deployments.retrieval.blobs import Blobs
from deployments.retrieval.filters import predicate
from deployments.retrieval.reader import Reader, StoreGone
from deployments.retrieval.records import (
    Batch,
    Chunk,
    Chunking,
    File,
    FileCounts,
    PageRequest,
    VectorStore,
    VectorStoreFile,
)
from deployments.retrieval.tables import BATCHES, FILES, MEMBERS, STORES, chunk_rows
from deployments.retrieval.writer import Fenced, Writer
from tests.unit.recording import Leaps

pytestmark = pytest.mark.asyncio
CACHE = 2**24


async def claim(uri: Path) -> Writer:
    return await Writer.claim(str(uri), {}, cache_bytes=CACHE, language="English", metrics=NoMetrics())


@pytest_asyncio.fixture
async def writer(tmp_path: Path) -> Writer:
    return await claim(tmp_path)


@pytest_asyncio.fixture
async def reader(tmp_path: Path, writer: Writer) -> Reader:
    return await Reader.open(str(tmp_path), {}, cache_bytes=CACHE)


def file(number: int, owner: str | None = None) -> File:
    return File(f"file-{number}", owner, f"{number}.txt", 10, 1000 + number, "assistants")


def member(file_id: str, text: str = "", status: Any = "completed", **changed: Any) -> VectorStoreFile:
    return VectorStoreFile("vs_1", file_id, None, f"{file_id}.txt", 1, status, Chunking(), **changed)


async def fill(writer: Writer, texts: dict[str, str], dimension: int = 0, **attributes: Any) -> None:
    await writer.create_chunks("vs_1", dimension)
    for i, (file_id, text) in enumerate(texts.items()):
        vectors = np.eye(dimension, dtype=np.float32)[i : i + 1] if dimension else None
        file = member(file_id, attributes=attributes)
        await writer.add_chunks("vs_1", chunk_rows(file, [Chunk(text, 0, len(text), 3)], 0, vectors, dimension))


async def test_records_come_back_as_they_were(writer: Writer, reader: Reader) -> None:
    store = VectorStore("vs_1", "me", "n'ame", None, 1, 2, 7, metadata={"k": "ü'"}, embedding_model="m", dimension=3)
    row = member("file-1", status="failed", attributes={"a": 1.5, "b": True, "c": "x"}, error_code="invalid_file")
    await writer.add(STORES, [store])
    await writer.add(MEMBERS, [row])
    await writer.add(BATCHES, [Batch("vsfb_1", "vs_1", None, 5)])
    assert await reader.store("me", "vs_1") == store
    assert await reader.member("vs_1", "file-1") == row
    assert await reader.batch("vs_1", "vsfb_1") == Batch("vsfb_1", "vs_1", None, 5)


async def test_what_belongs_to_another_is_not_there(writer: Writer, reader: Reader) -> None:
    await writer.add(FILES, [file(1, "me"), file(2, None), file(3, "it's")])
    assert await reader.file("you", "file-1") is None
    assert await reader.file(None, "file-1") is None
    assert await reader.file("me", "file-2") is None
    assert set(await reader.files("it's", ["file-1", "file-2", "file-3"])) == {"file-3"}
    assert await reader.file("me' OR '1'='1", "file-1") is None


async def test_putting_replaces_by_key_and_never_doubles(writer: Writer, reader: Reader) -> None:
    for status in ("in_progress", "completed", "failed"):
        await writer.put(MEMBERS, [member("file-1", status=status), member("file-2", status=status)])
    assert [m.status for m in await reader.select(MEMBERS, "true")] == ["failed", "failed"]


async def test_pages_go_both_ways_and_say_whether_there_is_more(writer: Writer, reader: Reader) -> None:
    await writer.add(FILES, [file(i) for i in range(10)])

    async def page(**request: Any) -> tuple[list[int], bool]:
        got = await reader.page(FILES, "owner IS NULL", PageRequest(**request))
        return [int(f.id[5:]) for f in got.data], got.has_more

    assert await page(limit=3) == ([9, 8, 7], True)
    assert await page(limit=3, after="file-7") == ([6, 5, 4], True)
    assert await page(limit=3, after="file-2") == ([1, 0], False)
    assert await page(limit=3, before="file-4") == ([7, 6, 5], True)
    assert await page(limit=5, before="file-7") == ([9, 8], False)
    assert await page(limit=4, order="asc") == ([0, 1, 2, 3], True)
    assert await page(limit=4, order="asc", after="file-7") == ([8, 9], False)
    assert await page(limit=2, order="asc", before="file-5") == ([3, 4], True)
    with pytest.raises(NotFound, match="after"):
        await page(after="file-99")


async def test_counts_are_by_store_and_by_batch(writer: Writer, reader: Reader) -> None:
    await writer.add(
        MEMBERS,
        [
            member("file-1", usage_bytes=5, batch_id="vsfb_1"),
            member("file-2", usage_bytes=7),
            member("file-3", status="failed", batch_id="vsfb_1"),
            member("file-4", status="in_progress"),
        ],
    )
    await writer.mark_deleting(MEMBERS, "file_id = 'file-4'")
    assert await reader.counts("store_id", ["vs_1", "vs_2"]) == {
        "vs_1": FileCounts(completed=2, failed=1, usage_bytes=12),
        "vs_2": FileCounts(),
    }
    assert (await reader.counts("batch_id", ["vsfb_1"]))["vsfb_1"].total == 2


async def test_words_find_chunks_with_and_without_compaction_in_between(writer: Writer, reader: Reader) -> None:
    await fill(writer, {"file-1": "The quick brown foxes", "file-2": "A lazy dog"})
    assert [f.file_id for f in await reader.by_words("vs_1", "fox", None, 5)] == ["file-1"]
    await writer.compact("chunks_vs_1", keep_versions_s=600)
    await fill(writer, {"file-3": "Another dog, and a fox"})
    assert {f.file_id for f in await reader.by_words("vs_1", "fox dog", None, 5)} == {"file-1", "file-2", "file-3"}


@pytest.mark.parametrize("query", ["", " ", "'; DROP TABLE", '"unclosed', "a AND (b OR", "*", "\u0000", "x" * 5000])
async def test_any_query_is_only_words(writer: Writer, reader: Reader, query: str) -> None:
    await fill(writer, {"file-1": "Some text"})
    assert await reader.by_words("vs_1", query, None, 5) == []


async def test_meaning_finds_the_nearest(writer: Writer, reader: Reader) -> None:
    await fill(writer, {"file-1": "one", "file-2": "two", "file-3": "three"}, dimension=4)
    near = await reader.by_vector("vs_1", np.array([0.1, 1, 0.2, 0], np.float32), None, 2)
    assert [f.file_id for f in near] == ["file-2", "file-3"]
    assert 0 < near[0].score < near[1].score < 2


async def test_many_vectors_are_indexed_and_new_ones_found_all_the_same(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.retrieval.writer.VECTORS_TO_INDEX", 500)
    await writer.create_chunks("vs_1", 16)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 16)).astype(np.float32)
    many = [Chunk(f"text {i}", 0, 6, 2) for i in range(600)]
    await writer.add_chunks("vs_1", chunk_rows(member("file-1"), many, 0, vectors, 16))
    await writer.compact("chunks_vs_1", keep_versions_s=600)
    assert [i.name for i in await (await reader._chunks("vs_1")).list_indices()] == ["text_idx", "vector_idx"]
    near = await reader.by_vector("vs_1", vectors[7], None, 3)
    assert near[0].position == 7
    new = rng.standard_normal((1, 16)).astype(np.float32)
    await writer.add_chunks("vs_1", chunk_rows(member("file-2"), many[:1], 0, new, 16))
    assert (await reader.by_vector("vs_1", new[0], None, 3))[0].file_id == "file-2"
    await writer.compact("chunks_vs_1", keep_versions_s=600)
    assert (await reader.by_vector("vs_1", new[0], None, 3))[0].file_id == "file-2"


async def test_filters_are_pushed_down_and_follow_changed_attributes(writer: Writer, reader: Reader) -> None:
    await fill(writer, {"file-1": "fox one"}, lang="de", year=2020.0)
    await fill(writer, {"file-2": "fox two"}, lang="en")
    german = predicate({"type": "eq", "key": "lang", "value": "de"})
    assert [f.file_id for f in await reader.by_words("vs_1", "fox", german, 5)] == ["file-1"]
    await writer.set_attributes("vs_1", "file-2", {"lang": "de", "it's": "odd"})
    found = await reader.by_words("vs_1", "fox", german, 5)
    assert {f.file_id: f.attributes for f in found}["file-2"] == {"lang": "de", "it's": "odd"}


async def test_deleted_chunks_are_not_found(writer: Writer, reader: Reader) -> None:
    await fill(writer, {"file-1": "fox one", "file-2": "fox two"})
    await writer.compact("chunks_vs_1", keep_versions_s=600)
    await writer.delete_chunks("vs_1", ["file-1"])
    assert [f.file_id for f in await reader.by_words("vs_1", "fox", None, 5)] == ["file-2"]


async def test_a_store_that_goes_while_it_is_searched_is_gone_not_broken(writer: Writer, reader: Reader) -> None:
    await fill(writer, {"file-1": "fox one"}, dimension=4)
    await reader.by_words("vs_1", "fox", None, 5)
    await writer.drop_chunks("vs_1")
    for search in (
        reader.by_words("vs_1", "fox", None, 5),
        reader.by_vector("vs_1", np.ones(4, np.float32), None, 5),
        reader.chunks("vs_1", "file-1"),
        reader.chunks("vs_never", "file-1"),
    ):
        with pytest.raises(StoreGone):
            await search
    await writer.drop_chunks("vs_1")


READER = """
import asyncio, json, sys
from deployments.retrieval.reader import Reader

async def main():
    reader = await Reader.open(sys.argv[1], {}, cache_bytes=2**24)
    for line in sys.stdin:
        name, word = line.split()
        record = await reader.file(None, name)
        found = await reader.by_words("vs_1", word, None, 5)
        print(json.dumps([record is not None, [chunk.file_id for chunk in found]]), flush=True)

asyncio.run(main())
"""


async def test_what_is_committed_is_found_at_once_in_every_process(writer: Writer, tmp_path: Path) -> None:
    readers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", READER, str(tmp_path), stdin=-1, stdout=-1, env={**os.environ}
        )
        for _ in range(2)
    ]
    await writer.create_chunks("vs_1", 0)
    for number in range(30):
        name = f"file-{number}"
        await writer.add(FILES, [file(number)])
        text = f"This is {name}, token{number}"
        await writer.add_chunks("vs_1", chunk_rows(member(name), [Chunk(text, 0, len(text), 3)], 0, None, 0))
        if number % 10 == 9:
            await writer.compact("chunks_vs_1", keep_versions_s=600)
        for process in readers:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{name} token{number}\n".encode())
            assert json.loads(await process.stdout.readline() or "null") == [True, [name]]
    for process in readers:
        process.stdin.close()  # type: ignore[union-attr]
        assert await process.wait() == 0


async def test_a_new_writer_fences_the_old_one(tmp_path: Path, writer: Writer, reader: Reader) -> None:
    await writer.add(FILES, [file(1)])
    await fill(writer, {"file-1": "fox one"})
    successor = await claim(tmp_path)
    for write in (
        writer.add(FILES, [file(2)]),
        writer.put(FILES, [file(2)]),
        writer.delete(FILES, "true"),
        writer.delete_chunks("vs_1", ["file-1"]),
        writer.create_chunks("vs_2", 0),
        writer.drop_chunks("vs_1"),
        writer.compact("files", keep_versions_s=600),
    ):
        with pytest.raises(Fenced):
            await write
    await successor.add(FILES, [file(3)])
    await successor.delete_chunks("vs_1", ["none"])
    assert set(await reader.files(None, ["file-1", "file-2", "file-3"])) == {"file-1", "file-3"}
    assert len(await reader.by_words("vs_1", "fox", None, 5)) == 1


async def test_a_write_that_passed_the_check_before_it_was_fenced_fails(
    tmp_path: Path, writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(writer, {"file-1": "fox one"})
    real, successors = writer.check, []

    async def check_then_pause() -> None:
        await real()
        if not successors:
            successors.append(await claim(tmp_path))
            await successors[0].add(FILES, [file(1)])
            await fill(successors[0], {"file-2": "fox two"})

    monkeypatch.setattr(writer, "check", check_then_pause)
    with pytest.raises(Fenced):
        await fill(writer, {"file-3": "fox three"})
    with pytest.raises(Fenced):
        await writer.add(FILES, [file(2)])
    assert {f.file_id for f in await reader.by_words("vs_1", "fox", None, 5)} == {"file-1", "file-2"}
    assert set(await reader.files(None, ["file-1", "file-2"])) == {"file-1"}


async def test_a_fenced_writer_that_opens_a_table_too_late_undoes_its_barrier(
    tmp_path: Path, writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(writer, {"file-1": "fox one"})
    writer._tables.pop("chunks_vs_1")
    real, successors = writer.check, []

    async def check_then_pause() -> None:
        await real()
        if not successors:
            successors.append(await claim(tmp_path))
            await fill(successors[0], {"file-2": "fox two"})

    monkeypatch.setattr(writer, "check", check_then_pause)
    with pytest.raises(Fenced):
        await fill(writer, {"file-3": "fox three"})
    await fill(successors[0], {"file-4": "fox four"})
    assert {f.file_id for f in await reader.by_words("vs_1", "fox", None, 5)} == {"file-1", "file-2", "file-4"}


async def test_of_many_that_claim_at_once_one_is_left(tmp_path: Path, writer: Writer) -> None:
    claimed = await asyncio.gather(*(claim(tmp_path) for _ in range(5)), return_exceptions=True)
    writers = [w for w in claimed if isinstance(w, Writer)]
    assert all(isinstance(w, Writer | Fenced) for w in claimed)
    assert len({w.epoch for w in writers}) == len(writers)
    checks = await asyncio.gather(*(w.check() for w in writers), return_exceptions=True)
    assert [w.epoch for w, fenced in zip(writers, checks, strict=True) if fenced is None] == [6]


async def test_compaction_is_due_after_much_or_after_a_rest(writer: Writer) -> None:
    def due(idle_s: float) -> list[str]:
        return writer.behind(idle_s=idle_s)

    assert due(0) == []
    await writer.add(FILES, [file(1)])
    assert (due(60), due(0)) == ([], ["files"])
    for number in range(63):
        await writer.add(FILES, [file(number)])
    assert due(60) == ["files"]
    await writer.compact("files", keep_versions_s=600)
    assert (due(0), writer.tables_behind) == ([], 0)


async def test_what_a_compaction_replaces_is_cleaned_away_once_it_may_go(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaps = Leaps(monkeypatch)
    await fill(writer, {"a": "zebra", "b": "lion"})
    await writer.delete_chunks("vs_1", ["a"])
    await writer.compact("chunks_vs_1", keep_versions_s=600)
    assert writer.behind(idle_s=0) == []
    assert await writer.has_old_versions("vs_1")
    await leaps.over(601)
    assert writer.behind(idle_s=0) == ["chunks_vs_1"]
    await writer.compact("chunks_vs_1", keep_versions_s=0.001)
    assert not await writer.has_old_versions("vs_1")
    await leaps.over(601)
    assert writer.behind(idle_s=0) == [], "once is enough"
    assert [row.file_id for row in await reader.by_words("vs_1", "zebra lion", None, 10)] == ["b"]


async def test_cleaning_that_fails_is_tried_again_and_of_a_table_that_is_gone_forgotten(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaps = Leaps(monkeypatch)
    await fill(writer, {"a": "zebra"})
    await writer.compact("chunks_vs_1", keep_versions_s=600)
    await leaps.over(601)

    async def full(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_compact_beside", full)
        with pytest.raises(OSError, match="disk full"):
            await writer.compact("chunks_vs_1", keep_versions_s=600)
    assert writer.behind(idle_s=0) == []
    await leaps.over(601)
    assert writer.behind(idle_s=0) == ["chunks_vs_1"]
    writer._tables.clear()  # as after a restart
    with monkeypatch.context() as patched:
        patched.setattr(writer._db, "open_table", full)
        with pytest.raises(OSError, match="disk full"):
            await writer.compact("chunks_vs_1", keep_versions_s=600)
    assert writer.behind(idle_s=0) == []
    await leaps.over(601)
    assert writer.behind(idle_s=0) == ["chunks_vs_1"]
    await writer.drop_chunks("vs_1")
    assert writer.behind(idle_s=0) == []


async def test_chunks_are_folded_into_the_index_while_others_are_added(writer: Writer, reader: Reader) -> None:
    await fill(writer, {"file-1": "fox one"})
    many = [Chunk(f"zebra number{i}", 0, 10, 2) for i in range(1000)]
    await writer.add_chunks("vs_1", chunk_rows(member("file-2"), many, 0, None, 0))
    assert writer.behind(idle_s=60) == ["chunks_vs_1"]
    assert await writer.unindexed("vs_1") == 1001
    compacting = asyncio.create_task(writer.compact("chunks_vs_1", keep_versions_s=600))
    for i in range(20):
        await fill(writer, {f"file-{10 + i}": f"fox {i}"})
    await compacting
    assert writer.tables_behind == 1
    assert await writer.unindexed("vs_1") <= 20
    await writer.compact("chunks_vs_1", keep_versions_s=600)
    assert (await writer.unindexed("vs_1"), writer.tables_behind) == (0, 0)
    assert len(await reader.by_words("vs_1", "fox", None, 50)) == 21


async def test_a_deletion_beats_a_compaction_which_succeeds_in_the_end(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(8):
        await fill(writer, {f"file-{i}": f"fox {i}"})
    real, deleted = writer.check, 0

    async def check_then_delete() -> None:
        nonlocal deleted
        await real()
        monkeypatch.setattr(writer, "check", real)
        await writer.delete_chunks("vs_1", [f"file-{deleted}"])
        deleted += 1

    for _ in range(3):
        if deleted < 2:
            monkeypatch.setattr(writer, "check", check_then_delete)
        await writer.compact("chunks_vs_1", keep_versions_s=600)
    assert await writer.unindexed("vs_1") == 0
    assert {f.file_id for f in await reader.by_words("vs_1", "fox", None, 50)} == {f"file-{i}" for i in range(2, 8)}


@pytest_asyncio.fixture
async def blobs(tmp_path: Path) -> AsyncIterator[Blobs]:
    yield Blobs(str(tmp_path), {})


async def test_bytes_are_kept_and_read_in_pieces(blobs: Blobs) -> None:
    out = await blobs.create("file-1")
    for part in (b"hello ", b"world"):
        await out.write(part)
    await out.close()
    assert out.size == 11
    assert [await blobs.read("file-1", offset, 6) for offset in (0, 6, 12)] == [b"hello ", b"world", b""]
    async with blobs.local("file-1") as path:
        assert path.read_bytes() == b"hello world"
    assert await blobs.ids() == {"file-1"}
    await blobs.delete("file-1")
    await blobs.delete("file-1")
    assert await blobs.ids() == set()
    with pytest.raises(FileNotFoundError):
        await blobs.read("file-1", 0, 1)
