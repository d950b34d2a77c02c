"""Documents in: what is acknowledged stays, what is broken says so, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from deployments.errors import BadRequest, DocumentsUnavailable, EngineUnavailable, NotFound, Overloaded
from deployments.metrics import METRICS, NoMetrics
from deployments.retrieval import compaction, indexing, ingestion
from deployments.retrieval.parsing import Unreadable
from deployments.retrieval.records import Attachment, Chunking, PageRequest, Ranking
from deployments.retrieval.sandbox import Interrupted
from deployments.retrieval.tables import FILES, MEMBERS, STORES, chunks_table
from tests.unit.documents import docx, pdf, zip_bomb
from tests.unit.house import DIMENSION, LIMIT_S, House, house, stub_embed
from tests.unit.recording import Recorder

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def words(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as made:
        yield made


async def found(made: House, store_id: str, query: str, owner: str | None = None) -> set[str]:
    return {hit.file_id for hit in await made.searcher.search(owner, [store_id], [query], max_results=50)}


async def test_a_file_is_found_once_it_is_indexed(words: House) -> None:
    store, (fox, _) = await words.store_of("A quick fox.", "A lazy dog.")
    assert await found(words, store, "foxes") == {fox}
    counts = (await words.catalog.store(None, store))[1]
    assert (counts.completed, counts.total, counts.usage_bytes) == (2, 2, len("A quick fox.A lazy dog."))


async def test_every_kind_of_document_is_read(words: House) -> None:
    files = [
        await words.upload("# Head\n\nzebra in markdown", "a.md"),
        await words.upload("<html><p>zebra in html</p></html>", "a.html"),
        await words.upload(pdf(["zebra in pdf"]), "a.pdf"),
        await words.upload(docx([("", "zebra in docx")]), "a.docx"),
    ]
    store = await words.ingestion.create_store(None, attachments=[Attachment(f) for f in files])
    assert {m.status for m in await words.indexed(store.id)} == {"completed"}
    assert await found(words, store.id, "zebra") == set(files)


async def test_a_broken_file_fails_with_a_reason_and_its_batch_goes_on(words: House) -> None:
    broken = {
        await words.upload(b"", "empty.txt"): ("invalid_file", "empty"),
        await words.upload("text", "a.pdf"): ("invalid_file", "not a PDF"),
        await words.upload(os.urandom(3000), "noise.bin"): ("unsupported_file", "binary"),
        await words.upload(zip_bomb(300 * 2**20), "bomb.docx"): ("invalid_file", "unpacks"),
    }
    good = await words.upload("a good zebra")
    store = await words.ingestion.create_store(None)
    batch = await words.ingestion.attach_batch(None, store.id, [Attachment(f) for f in (*broken, good)])
    members = {m.file_id: m for m in await words.indexed(store.id)}
    for file_id, (code, word) in broken.items():
        assert (members[file_id].status, members[file_id].error_code) == ("failed", code)
        assert word in (members[file_id].error_message or "")
    assert members[good].status == "completed"
    counts = (await words.catalog.batch(None, store.id, batch.id))[1]
    assert (counts.failed, counts.completed, counts.in_progress) == (4, 1, 0)


async def test_a_passing_fault_while_a_file_is_read_delays_it_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_READ_AGAIN_AFTER_S", (0.001, 0.001, 0.001))
    recorder = Recorder()
    async with house(tmp_path, metrics=recorder, parse_workers=1) as made:
        sandbox = made.sandbox
        start, chunks, faults = sandbox._start, sandbox.chunks, ["no process", "dead halfway"]

        async def no_process() -> Any:
            if faults and faults[0] == "no process":
                faults.pop(0)
                raise BlockingIOError("Resource temporarily unavailable")
            return await start()

        async def dead_halfway(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            async for some in chunks(*args, **kwargs):
                yield some
                if faults:
                    faults.pop(0)
                    raise Interrupted(Unreadable("invalid_file", "its reader is dead"))

        monkeypatch.setattr(sandbox, "_start", no_process)
        monkeypatch.setattr(sandbox, "chunks", dead_halfway)
        text = "\n\n".join(f"zebra {i} " + "word " * 90 for i in range(300))
        file = await made.upload(text)
        store = await made.ingestion.create_store(None, attachments=[Attachment(file, {}, Chunking(100, 0))])
        (member,) = await made.indexed(store.id)
        assert (member.status, member.usage_bytes) == ("completed", len(text) - 2 * 299 - 300)
        assert "".join((await made.text(store.id, file)).split()) == "".join(text.split())
        positions = Counter(row.position for row in await made.reader.by_words(store.id, "word", None, 1000))
        assert positions == Counter(range(300))
    assert recorder.counts["indexer_read_retries",] == 2


async def test_a_file_whose_reader_always_dies_fails_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_READ_AGAIN_AFTER_S", (0.001, 0.001, 0.001))

    async def dead(path: Any, filename: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if filename == "deadly":
            raise Interrupted(Unreadable("invalid_file", "its reader is dead"))
        async for some in chunks(path, filename, *args, **kwargs):
            yield some

    async with house(tmp_path) as made:
        chunks = made.sandbox.chunks
        monkeypatch.setattr(made.sandbox, "chunks", dead)
        files = [await made.upload("zebra", name) for name in ("deadly", "good")]
        store = await made.ingestion.create_store(None, attachments=[Attachment(file) for file in files])
        members = {m.file_id: m for m in await made.indexed(store.id)}
        assert members[files[0]].error_message == "its reader is dead"
        assert members[files[1]].status == "completed"


async def test_a_file_that_is_to_be_read_again_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_READ_AGAIN_AFTER_S", (3600.0,))

    async def broken(path: Any, filename: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if filename == "broken":
            raise OSError("no process")
        async for some in chunks(path, filename, *args, **kwargs):
            yield some

    recorder = Recorder()
    async with house(tmp_path, metrics=recorder, parse_workers=1) as made:
        chunks = made.sandbox.chunks
        monkeypatch.setattr(made.sandbox, "chunks", broken)
        first, second = [await made.upload("zebra", name) for name in ("broken", "good")]
        await made.ingestion.create_store(None, attachments=[Attachment(first)])
        await recorder.until(lambda: recorder.counts["indexer_read_retries",] == 1)
        store = await made.ingestion.create_store(None, attachments=[Attachment(second)])
        assert [m.status for m in await made.indexed(store.id)] == ["completed"]


async def test_a_file_without_its_bytes_fails_at_once(tmp_path: Path) -> None:
    recorder = Recorder()
    async with house(tmp_path, metrics=recorder) as made:
        file = await made.upload("zebra")
        (tmp_path / "files" / file).unlink()
        store = await made.ingestion.create_store(None, attachments=[Attachment(file)])
        (member,) = await made.indexed(store.id)
        assert (member.status, member.error_code) == ("failed", "server_error")
    assert recorder.counts["indexer_read_retries",] == 0


async def test_openais_static_strategy_is_honoured(words: House) -> None:
    file = await words.upload("\n\n".join(f"Paragraph {i} with some words in it." for i in range(500)))
    store = await words.ingestion.create_store(None, attachments=[Attachment(file, {}, Chunking(100, 20))])
    (member,) = await words.indexed(store.id)
    assert member.chunking == Chunking(100, 20)
    chunks = await words.reader.chunks(store.id, file)
    assert len(chunks) > 20
    assert max(chunk.tokens for chunk in chunks) <= 100
    assert "".join((await words.text(store.id, file)).split()) == "".join(
        f"Paragraph{i}withsomewordsinit." for i in range(500)
    )


async def test_chunks_are_never_longer_than_the_embedding_model_reads(tmp_path: Path) -> None:
    async with house(tmp_path, embed=stub_embed, max_chunk_tokens=200) as made:
        file = await made.upload("words " * 1000)
        store = await made.ingestion.create_store(None, attachments=[Attachment(file)])
        (member,) = await made.indexed(store.id)
        assert member.chunking == Chunking(200, 100)
        with pytest.raises(BadRequest, match="at most 200"):
            await made.ingestion.attach(None, store.id, Attachment(file, {}, Chunking(201, 0)))


async def test_attaching_again_changes_nothing_or_indexes_anew_but_never_doubles(words: House) -> None:
    store, (file,) = await words.store_of("one zebra")
    before = await words.catalog.member(None, store, file)
    assert await words.ingestion.attach(None, store, Attachment(file)) == before
    again = await words.ingestion.attach(None, store, Attachment(file, {"k": "v"}))
    assert again.status == "in_progress"
    await words.indexed(store)
    (hit,) = await words.searcher.search(None, [store], ["zebra"])
    assert hit.attributes == {"k": "v"}


async def test_attaching_again_in_vain_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(tmp_path, embed=stub_embed, max_chunk_tokens=200) as made:
        store, (file,) = await made.store_of("one zebra")
        other = await made.upload("two zebras")
        changed = Attachment(file, {"k": "v"})
        with pytest.raises(BadRequest, match="at most 200"):
            await made.ingestion.attach_batch(None, store, [changed, Attachment(other, {}, Chunking(201, 0))])
        assert await found(made, store, "zebra") == {file}

        with monkeypatch.context() as patched:
            patched.setattr(made.writer, "put", full)
            with pytest.raises(OSError, match="disk full"):
                await made.ingestion.attach(None, store, changed)
        assert await found(made, store, "zebra") == {file}
        assert (await made.catalog.member(None, store, file)).status == "completed"

        with monkeypatch.context() as patched:
            patched.setattr(made.ingestion._indexing, "_purge", full)
            with pytest.raises(OSError, match="disk full"):
                await made.ingestion.attach(None, store, changed)
        await made.indexed(store)
        (hit,) = await made.searcher.search(None, [store], ["zebra"])
        assert hit.attributes == {"k": "v"}


async def test_attributes_can_be_changed(words: House) -> None:
    store, (file,) = await words.store_of("one zebra", year=1999.0)
    await words.ingestion.set_attributes(None, store, file, {"year": 2024.0})
    newer = {"type": "gt", "key": "year", "value": 2000}
    assert len(await words.searcher.search(None, [store], ["zebra"], filters=newer)) == 1
    assert (await words.catalog.member(None, store, file)).attributes == {"year": 2024.0}


async def test_a_deleted_file_is_gone_from_everywhere(words: House) -> None:
    store, (one, two) = await words.store_of("first zebra", "second zebra")
    other = await words.ingestion.create_store(None, attachments=[Attachment(one)])
    await words.indexed(other.id)
    await words.ingestion.delete_file(None, one)
    assert await found(words, store, "zebra") == {two}
    assert await found(words, other.id, "zebra") == set()
    for gone in (words.catalog.file(None, one), words.catalog.member(None, store, one)):
        with pytest.raises(NotFound):
            await gone
    with pytest.raises(NotFound):
        await words.catalog.read_file(None, one, 0, 10)


async def test_a_detached_file_stays_a_file(words: House) -> None:
    store, (file,) = await words.store_of("one zebra")
    await words.ingestion.detach(None, store, file)
    assert await found(words, store, "zebra") == set()
    assert await words.catalog.read_file(None, file, 4, 100) == b"zebra"


async def test_a_deleted_store_is_gone_and_its_files_stay(words: House) -> None:
    store, (file,) = await words.store_of("one zebra")
    await words.ingestion.delete_store(None, store)
    for gone in (words.catalog.store(None, store), found(words, store, "zebra")):
        with pytest.raises(NotFound):
            await gone
    assert (await words.catalog.file(None, file)).id == file


async def test_deleting_while_it_is_indexed_leaves_nothing(words: House) -> None:
    texts = ["\n\n".join(f"zebra {i} in file {n}" for i in range(3000)) for n in range(6)]
    files = [await words.upload(text) for text in texts]
    store = await words.ingestion.create_store(None, attachments=[Attachment(f, {}, Chunking(100, 0)) for f in files])
    gone = await words.ingestion.create_store(None, attachments=[Attachment(f) for f in files])
    await words.ingestion.detach(None, store.id, files[0])
    await words.ingestion.delete_file(None, files[1])
    await words.ingestion.delete_store(None, gone.id)
    members = await words.indexed(store.id)
    assert {m.file_id for m in members} == set(files[2:])
    rows = await words.reader.by_words(store.id, "zebra", None, 100_000)
    assert {row.file_id for row in rows} == set(files[2:])
    assert Counter((r.file_id, r.position) for r in rows).most_common(1)[0][1] == 1


async def test_a_cancelled_batch_stops_where_it_is(tmp_path: Path) -> None:
    hold = asyncio.Event()

    async def slow_stub_embed(texts: Any) -> Any:
        await hold.wait()
        return await stub_embed(texts)

    async with house(tmp_path, embed=slow_stub_embed) as made:
        files = [await made.upload(f"zebra {i}") for i in range(5)]
        store = await made.ingestion.create_store(None)
        batch = await made.ingestion.attach_batch(None, store.id, [Attachment(f) for f in files])
        assert (await made.ingestion.cancel_batch(None, store.id, batch.id)).cancelled
        hold.set()
        counts = (await made.catalog.batch(None, store.id, batch.id))[1]
        assert (counts.cancelled, counts.total) == (5, 5)
        again = await made.ingestion.attach(None, store.id, Attachment(files[0]))
        assert again.status == "in_progress"
        await made.indexed(store.id)
        assert await found(made, store.id, "zebra") == {files[0]}


async def test_a_cancelled_batch_takes_no_more_files(words: House) -> None:
    one, two = [await words.upload("zebra") for _ in range(2)]
    store = await words.ingestion.create_store(None)
    batch = await words.ingestion.attach_batch(None, store.id, [Attachment(one)])
    await words.ingestion.cancel_batch(None, store.id, batch.id)
    with pytest.raises(BadRequest, match="cancelled"):
        await words.ingestion.attach_batch(None, store.id, [Attachment(two)], batch.id)
    assert (await words.catalog.batch(None, store.id, batch.id))[1].total == 1


async def test_an_embedding_model_that_is_away_delays_and_loses_nothing(tmp_path: Path) -> None:
    calls = 0

    async def flaky_stub_embed(texts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise EngineUnavailable("no engine")
        return await stub_embed(texts)

    async with house(tmp_path, embed=flaky_stub_embed) as made:
        store, (file,) = await made.store_of("one zebra")
        assert await found(made, store, "zebra") == {file}


async def test_a_text_the_embedding_model_refuses_fails_that_file_alone(tmp_path: Path) -> None:
    async def picky_stub_embed(texts: Any) -> Any:
        if any("poison" in text for text in texts):
            raise BadRequest("no poison, please")
        return await stub_embed(texts)

    async with house(tmp_path, embed=picky_stub_embed) as made:
        files = [await made.upload(text) for text in ("one zebra", "poison zebra", "two zebras")]
        store = await made.ingestion.create_store(None, attachments=[Attachment(f) for f in files])
        members = {m.file_id: m for m in await made.indexed(store.id)}
        assert members[files[1]].error_message == "no poison, please"
        assert await found(made, store.id, "zebra") == {files[0], files[2]}


async def test_a_text_at_which_the_embedding_model_hangs_fails_that_file_alone_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_RETRY_S", (0.001, 0.01))

    async def hanging_stub_embed(texts: Any) -> Any:
        if any("poison" in text for text in texts) or len(texts) > 40:
            await asyncio.Event().wait()
        return await stub_embed(texts)

    async with house(tmp_path, embed=hanging_stub_embed, embed_timeout_s=0.01) as made:
        long = "\n\n".join(f"zebra {i} " + "word " * 90 for i in range(200))
        files = [await made.upload(text) for text in (long, "poison zebra", "two zebras")]
        attachments = [Attachment(f, {}, Chunking(100, 0)) for f in files]
        store = await made.ingestion.create_store(None, attachments=attachments)
        members = {m.file_id: m for m in await made.indexed(store.id)}
        assert (members[files[1]].status, members[files[1]].error_code) == ("failed", "server_error")
        assert await found(made, store.id, "zebra") == {files[0], files[2]}
        assert len(await made.reader.chunks(store.id, files[0])) == 200


async def test_a_commit_that_fails_halfway_is_repeated_without_doubling(
    words: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = words.writer.put, []

    async def put(table: Any, records: Any) -> None:
        if table is MEMBERS and any(r.status == "completed" for r in records) and len(failed) < 2:
            failed.append(1)
            raise OSError("disk full")
        await real(table, records)

    monkeypatch.setattr(words.writer, "put", put)
    store, (file,) = await words.store_of("\n\n".join(f"zebra {i}" for i in range(5000)))
    assert failed == [1, 1]
    rows = await words.reader.by_words(store, "zebra", None, 100_000)
    positions = Counter(row.position for row in rows)
    assert set(positions.values()) == {1}
    assert len(positions) == len(await words.reader.chunks(store, file))


async def test_what_belongs_to_another_is_not_there(words: House) -> None:
    store, (file,) = await words.store_of("my zebra", owner="me")
    mine = await words.upload("another zebra", owner="you")
    for attempt in (
        words.ingestion.attach("you", store, Attachment(mine)),
        words.ingestion.attach("me", store, Attachment(mine)),
        words.ingestion.delete_file("you", file),
        words.ingestion.delete_file(None, file),
        words.ingestion.delete_store("you", store),
        words.ingestion.update_store(None, store, {"name": "x"}),
        words.ingestion.detach("you", store, file),
        words.catalog.file("you", file),
        words.catalog.store("you", store),
        words.catalog.members("you", store, PageRequest()),
        words.catalog.chunks("you", store, file, 0),
        words.searcher.search("you", [store], ["zebra"]),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await words.catalog.files("you", PageRequest())).data[0].id == mine
    assert (await words.catalog.stores("you", PageRequest())).data == []


async def test_a_store_can_be_changed(words: House) -> None:
    store = await words.ingestion.create_store(None, "old", metadata={"a": "b"}, expires_after_days=3)
    assert store.expires_at == int(words.clock.now) + 3 * 86400
    changed = await words.ingestion.update_store(None, store.id, {"name": "new", "expires_after_days": None})
    assert (changed.name, changed.expires_at, changed.metadata) == ("new", None, {"a": "b"})
    assert (await words.catalog.store(None, store.id))[0] == changed


async def test_an_unused_store_expires_and_a_used_one_does_not(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        (used, _), (unused, _) = [await made.store_of("a zebra") for _ in range(2)]
        for store in (used, unused):
            await made.ingestion.update_store(None, store, {"expires_after_days": 1})
        made.clock.now += 80_000
        await found(made, used, "zebra")
        await asyncio.gather(*made.searcher._touching)
        made.clock.now += 20_000
        await made.ingestion._expire()
        assert len(await found(made, used, "zebra")) == 1
        assert (await made.catalog.store(None, unused))[0].state == "expired"
        with pytest.raises(BadRequest, match="expired"):
            await found(made, unused, "zebra")


@pytest.mark.parametrize("change", ["attach", "batch", "attributes", "detach"])
async def test_a_store_whose_files_change_does_not_expire(words: House, change: str) -> None:
    store, (file,) = await words.store_of("a zebra")
    await words.ingestion.update_store(None, store, {"expires_after_days": 1})
    other = await words.upload("another zebra")
    words.clock.now += 86_000
    if change == "attach":
        await words.ingestion.attach(None, store, Attachment(other))
    elif change == "batch":
        await words.ingestion.attach_batch(None, store, [Attachment(other)])
    elif change == "attributes":
        await words.ingestion.set_attributes(None, store, file, {"k": "v"})
    else:
        await words.ingestion.detach(None, store, file)
    words.clock.now += 500
    await words.ingestion._expire()
    assert (await words.catalog.store(None, store))[0].state == "open"


async def test_a_store_that_is_used_at_the_last_moment_does_not_expire(
    words: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = await words.store_of("a zebra")
    await words.ingestion.update_store(None, store, {"expires_after_days": 1})
    words.clock.now += 90_000
    select, used = words.reader.select, []

    async def select_and_use(table: Any, where: str, **options: Any) -> Any:
        found = await select(table, where, **options)
        if found and table is STORES and "expires_after_days" in where and not used:
            used.append(1)
            await words.ingestion.touch([store])
        return found

    monkeypatch.setattr(words.reader, "select", select_and_use)
    await words.ingestion._expire()
    assert used
    assert (await words.catalog.store(None, store))[0].state == "open"
    assert await found(words, store, "zebra")


async def test_a_store_whose_expiry_breaks_off_is_emptied_later(
    words: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = await words.store_of("a zebra")
    await words.ingestion.update_store(None, store, {"expires_after_days": 1})
    words.clock.now += 90_000
    with monkeypatch.context() as patched:
        patched.setattr(words.writer, "drop_chunks", full)
        with pytest.raises(OSError, match="disk full"):
            await words.ingestion._expire()
    await words.ingestion._finish_broken()
    assert (await words.catalog.store(None, store))[1].total == 0
    assert not (tmp_path / "tables" / f"chunks_{store}.lance").exists()


async def test_files_expire(words: House) -> None:
    file_id = await words.ingestion.begin_upload(None)
    await words.ingestion.finish_upload(file_id, "a.txt", "assistants", expires_after_s=3600)
    words.clock.now += 3601
    await words.ingestion._expire()
    with pytest.raises(NotFound):
        await words.catalog.file(None, file_id)


async def test_uploads_are_bounded_and_must_come_in_order(tmp_path: Path) -> None:
    async with house(tmp_path, max_open_uploads=2) as made:
        first = await made.ingestion.begin_upload(None)
        second = await made.ingestion.begin_upload(None)
        with pytest.raises(Overloaded):
            await made.ingestion.begin_upload(None)
        with pytest.raises(DocumentsUnavailable):
            await made.ingestion.upload(first, 5, b"later")
        await made.ingestion.abort_upload(second)
        with pytest.raises(DocumentsUnavailable):
            await made.ingestion.finish_upload(second, "a", "assistants")
        await made.ingestion.begin_upload(None)
        assert (await made.catalog.files(None, PageRequest())).data == []


async def test_a_store_of_another_embedding_model_is_refused_clearly(tmp_path: Path) -> None:
    async with house(tmp_path, embed=stub_embed) as made:
        store, (file,) = await made.store_of("one zebra")
    async with house(tmp_path) as made:
        for refused in (found(made, store, "zebra"), made.ingestion.attach(None, store, Attachment(file))):
            with pytest.raises(BadRequest, match="embedding model 'stub'"):
                await refused


async def test_a_store_made_for_words_alone_stays_so_and_grows_after_an_embedding_model_has_come(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as made:
        store, (one,) = await made.store_of("one zebra")
    async with house(tmp_path, embed=stub_embed) as made:
        two = await made.upload("two zebras")
        newer = await made.ingestion.create_store(None, attachments=[Attachment(one)])
        await made.ingestion.attach(None, store, Attachment(two))
        assert [m.status for m in await made.indexed(store)] == ["completed", "completed"]
        await made.indexed(newer.id)
        assert (await made.reader.store(None, newer.id)).dimension == DIMENSION  # type: ignore[union-attr]
        assert (await made.reader.store(None, store)).dimension == 0  # type: ignore[union-attr]
        for ranking in (Ranking(), Ranking(text_weight=0)):
            hits = await made.searcher.search(None, [store], ["zebra"], ranking=ranking)
            assert {hit.file_id for hit in hits} == {one, two}
        hits = await made.searcher.search(None, [store, newer.id], ["zebra"])
        assert {(hit.store_id, hit.file_id) for hit in hits} == {(store, one), (store, two), (newer.id, one)}


async def test_vectors_of_another_dimension_fail_their_file_clearly_and_hold_up_no_other(tmp_path: Path) -> None:
    async with house(tmp_path, embed=stub_embed) as made:
        store, _ = await made.store_of("one zebra")

    async def narrow_stub_embed(texts: Any) -> Any:
        return (await stub_embed(texts))[:, :32]

    async with house(tmp_path, embed=narrow_stub_embed) as made:
        file = await made.upload("two zebras")
        await made.ingestion.attach(None, store, Attachment(file))
        newer = await made.ingestion.create_store(None, attachments=[Attachment(file)])
        assert [m.status for m in await made.indexed(newer.id)] == ["completed"]
        failed = {m.file_id: m for m in await made.indexed(store)}[file]
        assert (failed.status, failed.error_code) == ("failed", "server_error")
        assert "64 dimensions" in (failed.error_message or "")
        assert len(await made.reader.chunks(store, file)) == 0


async def test_what_was_in_progress_for_another_embedding_model_fails_and_is_not_mixed_in(tmp_path: Path) -> None:
    async with house(tmp_path, embed=stub_embed, start=False) as made:
        file = await made.upload("one zebra")
        store = await made.ingestion.create_store(None, attachments=[Attachment(file)])
    async with house(tmp_path) as made:
        (member,) = await made.indexed(store.id)
        assert (member.status, member.error_code) == ("failed", "server_error")
        assert "embedding model 'stub'" in (member.error_message or "")
        other = await made.ingestion.create_store(None, attachments=[Attachment(file)])
        assert [m.status for m in await made.indexed(other.id)] == ["completed"]


async def test_unfinished_deletions_are_finished_at_the_next_start(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        store, (one, two, three) = await made.store_of("zebra one", "zebra two", "zebra three")
        gone, _ = await made.store_of("zebra")
        await made.ingestion.begin_upload(None)
        await made.writer.mark_deleting(FILES, f"id = '{one}'")
        await made.writer.mark_deleting(MEMBERS, f"file_id = '{two}'")
        await made.writer.mark_deleting(STORES, f"id = '{gone}'")
    async with house(tmp_path) as made:
        assert await found(made, store, "zebra") == {three}
        assert len(list((tmp_path / "files").iterdir())) == 3
        assert not (tmp_path / "tables" / f"chunks_{gone}.lance").exists()


class Held:
    """A call that stops before it begins, or once it is done, until a test lets it go on."""

    def __init__(self, call: Any, *, done: bool = False) -> None:
        self._call, self._done = call, done
        self.reached, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._done:
            result = await self._call(*args, **kwargs)
        self.reached.set()
        await self.go.wait()
        return result if self._done else await self._call(*args, **kwargs)


async def leave(call: Any, at: Held) -> None:
    """Make a call, and cancel it where it is held."""
    calling = asyncio.ensure_future(call)
    await asyncio.wait_for(at.reached.wait(), LIMIT_S)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


async def full(*args: Any, **kwargs: Any) -> None:
    raise OSError("disk full")


async def test_a_deletion_that_breaks_off_is_finished_by_the_housekeeping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion, "_HOUSE_KEEPING_S", 0.01)
    recorder = Recorder()
    async with house(tmp_path, metrics=recorder) as made:
        store, (one, two) = await made.store_of("first zebra", "second zebra")
        with monkeypatch.context() as patched:
            patched.setattr(made.writer, "delete_chunks", full)
            with pytest.raises(OSError, match="disk full"):
                await made.ingestion.delete_file(None, one)
        async with asyncio.timeout(LIMIT_S):
            while await found(made, store, "zebra") != {two} or (tmp_path / "files" / one).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    assert recorder.counts["indexer_broken_changes",] >= 1


async def test_a_caller_that_leaves_does_not_cut_a_deletion_in_half(
    words: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (one, two) = await words.store_of("first zebra", "second zebra")
    held = Held(words.writer.delete_chunks)
    monkeypatch.setattr(words.writer, "delete_chunks", held)
    await leave(words.ingestion.delete_file(None, one), held)
    held.go.set()
    await words.ingestion.close()  # which waits for it
    assert await found(words, store, "zebra") == {two}
    assert await words.reader.select(FILES, "true", deleting=True) == []


async def test_a_deletion_that_fails_again_and_again_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(tmp_path, start=False) as made:
        files = [await made.upload(f"zebra {i}") for i in range(3)]
        await made.writer.mark_deleting(FILES, "true")
        delete = made.ingestion._blobs.delete

        async def delete_most(file_id: str) -> None:
            await (full() if file_id == files[0] else delete(file_id))

        with monkeypatch.context() as patched:
            patched.setattr(made.ingestion._blobs, "delete", delete_most)
            await made.ingestion._finish_broken()
        assert [file.id for file in await made.reader.select(FILES, "true", deleting=True)] == [files[0]]
        assert made.ingestion._broken
        assert f"The deletion of file {files[0]} is not finished yet: OSError: disk full" in caplog.text
        await made.ingestion._finish_broken()
        assert await made.reader.select(FILES, "true", deleting=True) == []
        assert not made.ingestion._broken


async def test_a_file_that_is_attached_again_before_its_removal_is_finished_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, start=False) as made:
        one, two = [await made.upload("zebra") for _ in range(2)]
        store = await made.ingestion.create_store(None, attachments=[Attachment(one)])
        await made.writer.mark_deleting(FILES, f"id = '{two}'")
        await made.writer.mark_deleting(MEMBERS, f"file_id = '{one}'")
        attaching: list[asyncio.Task[Any]] = []

        async def attach_next(file_id: str) -> None:
            attaching.append(asyncio.create_task(made.ingestion.attach(None, store.id, Attachment(one))))
            await asyncio.sleep(0)

        monkeypatch.setattr(made.ingestion, "_finish_file", attach_next)
        await made.ingestion._finish_broken()
        await asyncio.gather(*attaching)
        assert (await made.catalog.member(None, store.id, one)).status == "in_progress"


async def test_what_is_finished_is_not_finished_again(words: House, monkeypatch: pytest.MonkeyPatch) -> None:
    store, (file,) = await words.store_of("a zebra")
    other = await words.ingestion.create_store(None)
    batch = await words.ingestion.attach_batch(None, other.id, [Attachment(file)])
    await words.ingestion.cancel_batch(None, other.id, batch.id)
    await words.ingestion.update_store(None, store, {"expires_after_days": 1})
    words.clock.now += 90_000
    await words.ingestion._expire()
    assert await words.ingestion._unfinished() == []


async def test_an_expired_store_whose_files_were_never_indexed_is_emptied_too(tmp_path: Path) -> None:
    async with house(tmp_path, start=False) as made:
        file = await made.upload("zebra")
        store = await made.ingestion.create_store(None, attachments=[Attachment(file)])
        await made.writer.update(STORES, f"id = '{store.id}'", {"state": "expired"})
        await made.ingestion._finish_broken()
        assert (await made.catalog.store(None, store.id))[1].total == 0


@pytest.mark.parametrize("create", [False, True])
async def test_a_file_whose_row_is_written_though_that_fails_is_indexed(
    words: House, monkeypatch: pytest.MonkeyPatch, create: bool
) -> None:
    file = await words.upload("zebra")
    store = (await words.ingestion.create_store(None)).id
    write = words.writer.add if create else words.writer.put

    async def write_and_fail(table: Any, records: Any) -> None:
        await write(table, records)
        if table is MEMBERS and records[0].status == "in_progress":
            await full()

    indexed = words.ingestion._indexing
    while indexed._wake.is_set() or not indexed._refilling.locked():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    with monkeypatch.context() as patched:
        patched.setattr(words.writer, "add" if create else "put", write_and_fail)
        with pytest.raises(OSError, match="disk full"):
            if create:
                await words.ingestion.create_store(None, attachments=[Attachment(file)])
            else:
                await words.ingestion.attach(None, store, Attachment(file))
    if create:
        (store,) = {m.store_id for m in await words.reader.select(MEMBERS, "true")}
    assert [m.status for m in await words.indexed(store)] == ["completed"]


async def test_a_change_that_cannot_begin_holds_up_no_other(words: House) -> None:
    with pytest.raises(TypeError):
        await words.ingestion.create_store(None, colour="green")  # type: ignore[call-arg]
    assert await asyncio.wait_for(words.ingestion.create_store(None), LIMIT_S)


async def test_a_caller_that_leaves_before_its_turn_changes_nothing(words: House) -> None:
    async with words.ingestion._changing:
        creating = asyncio.ensure_future(words.ingestion.create_store(None))
        await asyncio.sleep(0)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
    assert (await words.catalog.stores(None, PageRequest())).data == []


async def test_a_failure_is_logged_if_its_caller_has_left(
    words: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, (file,) = await words.store_of("one zebra")
    held = Held(full)
    monkeypatch.setattr(words.writer, "delete_chunks", held)
    await leave(words.ingestion.detach(None, store, file), held)
    held.go.set()
    await words.ingestion.close()
    assert "after its caller had left" in caplog.text


async def test_a_file_whose_detachment_broke_off_is_not_there_twice_when_it_is_attached_again(
    words: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (file,) = await words.store_of("one zebra")
    with monkeypatch.context() as patched:
        patched.setattr(words.writer, "delete_chunks", full)
        with pytest.raises(OSError, match="disk full"):
            await words.ingestion.detach(None, store, file)
    await words.ingestion.attach(None, store, Attachment(file))
    await words.indexed(store)
    assert len(await words.reader.chunks(store, file)) == 1


@asynccontextmanager
async def half_indexed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, paragraphs: int
) -> AsyncIterator[tuple[House, Attachment, Held, asyncio.Event]]:
    """Have a long file whose indexing waits before its last paragraph until an event is set.

    Yields:
        The house, the file, what is reached once some of its chunks are there, and the event.
    """
    later = asyncio.Event()

    async def holding_stub_embed(texts: Any) -> Any:
        if any(f"zebra {paragraphs - 1}" in text for text in texts):
            await later.wait()
        return await stub_embed(texts)

    monkeypatch.setattr(indexing, "_CHUNKS_A_COMMIT", 64)
    async with house(folder, embed=holding_stub_embed) as made:
        written = Held(made.writer.add_chunks, done=True)
        written.go.set()
        monkeypatch.setattr(made.writer, "add_chunks", written)
        file = await made.upload("\n\n".join(f"zebra {i} " + "word " * 90 for i in range(paragraphs)))
        yield made, Attachment(file, {}, Chunking(100, 0)), written, later


@pytest.mark.parametrize("at", ["delete_chunks", "update_members"])
async def test_a_cancelled_batch_stays_so_when_that_fails_at_first_and_none_of_it_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    async with half_indexed(tmp_path, monkeypatch, 3000) as (made, long, written, later):
        file = long.file_id
        store = await made.ingestion.create_store(None)
        batch = await made.ingestion.attach_batch(None, store.id, [long])
        await asyncio.wait_for(written.reached.wait(), LIMIT_S)
        update = made.writer.update

        async def not_members(table: Any, *args: Any) -> None:
            await (full() if table is MEMBERS else update(table, *args))

        with monkeypatch.context() as patched:
            patched.setattr(made.writer, *(("update", not_members) if at == "update_members" else (at, full)))
            with pytest.raises(OSError, match="disk full"):
                await made.ingestion.cancel_batch(None, store.id, batch.id)
        later.set()
        other = await made.upload("another zebra")
        await made.ingestion.attach(None, store.id, Attachment(other))
        async with asyncio.timeout(LIMIT_S):
            while (await made.catalog.member(None, store.id, other)).status == "in_progress":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await made.ingestion._finish_broken()
        counts = (await made.catalog.batch(None, store.id, batch.id))[1]
        assert (counts.cancelled, counts.total) == (1, 1)
        assert await made.reader.chunks(store.id, file) == []
        again = await made.ingestion.attach(None, store.id, long)
        assert again.status == "in_progress"
        await made.indexed(store.id)
        rows = await made.reader.by_words(store.id, "word", None, 100_000)
        assert len(rows) > 2000
        assert Counter(row.position for row in rows).most_common(1)[0][1] == 1


async def test_new_attributes_that_fail_at_first_leave_the_file_to_be_indexed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with half_indexed(tmp_path, monkeypatch, 1000) as (made, long, written, later):
        file = long.file_id
        store = await made.ingestion.create_store(None, attachments=[long])
        await asyncio.wait_for(written.reached.wait(), LIMIT_S)
        with monkeypatch.context() as patched:
            patched.setattr(made.writer, "delete_chunks", full)
            with pytest.raises(OSError, match="disk full"):
                await made.ingestion.set_attributes(None, store.id, file, {"k": "v"})
        later.set()
        assert [m.status for m in await made.indexed(store.id)] == ["completed"]
        rows = await made.reader.by_words(store.id, "word", None, 100_000)
        assert len(rows) > 500
        assert Counter(row.position for row in rows).most_common(1)[0][1] == 1


async def test_a_file_that_cannot_be_failed_at_first_fails_later_and_its_neighbours_are_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def picky_stub_embed(texts: Any) -> Any:
        if any("poison" in text for text in texts):
            raise BadRequest("no poison, please")
        return await stub_embed(texts)

    async with house(tmp_path, embed=picky_stub_embed) as made:
        put, failed = made.writer.put, []

        async def put_at_the_second_time(table: Any, records: Any) -> None:
            if table is MEMBERS and any(r.status == "failed" for r in records) and not failed:
                failed.append(1)
                await full()
            await put(table, records)

        monkeypatch.setattr(made.writer, "put", put_at_the_second_time)
        files = [await made.upload(text) for text in ("poison zebra", "one zebra")]
        store = await made.ingestion.create_store(None, attachments=[Attachment(f) for f in files])
        members = {m.file_id: m.status for m in await made.indexed(store.id)}
        assert members == {files[0]: "failed", files[1]: "completed"}
        assert failed == [1]


@pytest.mark.parametrize("done", [False, True])
async def test_an_upload_cut_off_while_it_finishes_leaves_neither_record_nor_bytes(
    words: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    file_id = await words.ingestion.begin_upload(None)
    await words.ingestion.upload(file_id, 0, b"zebra")
    held = Held(words.writer.add, done=done)
    monkeypatch.setattr(words.writer, "add", held)
    await leave(words.ingestion.finish_upload(file_id, "a.txt", "assistants"), held)
    aborting = asyncio.create_task(words.ingestion.abort_upload(file_id))
    held.go.set()
    await aborting
    assert await words.reader.select(FILES, "true") == []
    assert list((tmp_path / "files").iterdir()) == []


async def test_an_upload_of_whose_end_nobody_heard_leaves_neither_record_nor_bytes(
    words: House, tmp_path: Path
) -> None:
    file_id = await words.upload("zebra")
    await words.ingestion.abort_upload(file_id)
    assert await words.reader.select(FILES, "true") == []
    assert list((tmp_path / "files").iterdir()) == []


async def test_closing_does_not_wait_for_ever(words: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "_LAST_CHANGES_S", 0.01)
    async with words.ingestion._changing:
        await words.ingestion.close()


def mentions(folder: Path, word: bytes) -> bool:
    """Return whether a file of a table has a word; one that goes meanwhile has none."""

    def has(path: Path) -> bool:
        try:
            return path.is_file() and word in path.read_bytes().lower()
        except FileNotFoundError:
            return False

    return any(has(path) for path in folder.rglob("*"))


async def test_deleted_text_leaves_the_disk_though_nothing_else_happens(tmp_path: Path) -> None:
    async with house(tmp_path, compact_after_s=0.05, keep_versions_s=1) as made:
        store, (one, _) = await made.store_of("confidential zebra", "another zebra")
        table = tmp_path / "tables" / f"chunks_{store}.lance"
        assert mentions(table, b"confidential")
        async with asyncio.timeout(LIMIT_S):
            # A compaction that the deletion came before would leave a file, and what one has put into the index is
            # rewritten by the next alone.
            while made.writer.tables_behind or made.writer._clean_at:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await made.ingestion.delete_file(None, one)
            while mentions(table, b"confidential"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_deleted_text_leaves_the_disk_after_a_restart(tmp_path: Path) -> None:
    async with house(tmp_path, compact_after_s=1000) as made:
        store, (one, _) = await made.store_of("confidential zebra", "another zebra")
        await made.ingestion.delete_file(None, one)
        await made.writer.compact(chunks_table(store), keep_versions_s=1000)
    table = tmp_path / "tables" / f"chunks_{store}.lance"
    assert mentions(table, b"confidential")
    async with house(tmp_path, compact_after_s=0.05, keep_versions_s=1), asyncio.timeout(LIMIT_S):
        while mentions(table, b"confidential"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_compaction_that_fails_is_counted_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: Counter[str] = Counter()

    class Compactions(NoMetrics):
        def inc(self, name: str, value: float = 1, **tags: str) -> None:
            if name == "indexer_maintenance":
                outcomes[tags["outcome"]] += 1

    async with house(tmp_path, metrics=Compactions(), compact_after_s=0.1) as made:
        real = made.writer._compact_beside

        async def full(*args: Any) -> None:
            if not outcomes["failed"]:
                raise OSError("disk full")
            await real(*args)

        monkeypatch.setattr(made.writer, "_compact_beside", full)
        store, _ = await made.store_of("one zebra")
        async with asyncio.timeout(LIMIT_S):
            while await made.writer.unindexed(store) or made.writer.tables_behind:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    assert outcomes["failed"] == 1
    assert outcomes["done"] > 0
    assert f"chunks_{store} could not be compacted" in caplog.text


async def test_a_table_that_cannot_be_read_at_the_start_keeps_no_other_from_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(tmp_path, compact_after_s=1000) as made:
        stores = [(await made.store_of("zebra"))[0] for _ in range(2)]
    async with house(tmp_path, compact_after_s=0.05, start=False) as made:
        unindexed = made.writer.unindexed

        async def unindexed_of_one(store_id: str) -> int:
            await (full() if store_id == stores[0] else asyncio.sleep(0))
            return await unindexed(store_id)

        monkeypatch.setattr(made.writer, "unindexed", unindexed_of_one)
        await made.ingestion.start()
        async with asyncio.timeout(LIMIT_S):
            while await unindexed(stores[1]):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    assert f"{stores[0]} cannot be looked at" in caplog.text


async def test_a_table_that_cannot_be_read_at_the_start_is_tried_ever_more_seldom_until_it_can_be_or_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compaction, "_LOOK_AGAIN_AFTER_S", (0.001, 0.004))
    async with house(tmp_path, compact_after_s=1000) as made:
        back, gone = [(await made.store_of("zebra"))[0] for _ in range(2)]
    async with house(tmp_path, compact_after_s=0.01, start=False) as made:
        unindexed, behind, looks, recorder = made.writer.unindexed, made.writer.behind, Counter[str](), Recorder()

        async def unindexed_in_the_end(store_id: str) -> int:
            looks[store_id] += 1
            if looks[store_id] < 5 if store_id == back else await made.reader.has_chunks(gone):
                await full()
            recorder.note(store_id)
            return await unindexed(store_id)

        def behind_noted(**options: Any) -> list[str]:
            recorder.note("round")
            return behind(**options)

        monkeypatch.setattr(made.writer, "unindexed", unindexed_in_the_end)
        monkeypatch.setattr(made.writer, "behind", behind_noted)
        await made.ingestion.start()
        async with asyncio.timeout(LIMIT_S):
            while await unindexed(back):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await made.ingestion.delete_store(None, gone)
        await recorder.until(lambda: gone in recorder.noted)
        ended, rounds = looks.copy(), recorder.noted.count("round")
        await recorder.until(lambda: recorder.noted.count("round") == rounds + 5)
        assert looks == ended
    said = [r.getMessage() for r in caplog.records if f"{back} cannot be looked at" in r.getMessage()]
    assert [line.split(" again in ")[1] for line in said] == [
        f"{seconds} s: OSError: disk full" for seconds in (0.001, 0.002, 0.004, 0.004)
    ]


class Stages(NoMetrics):
    """Counts nothing but the stages that are timed."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def observe(self, name: str, value: float, **tags: str) -> None:
        if "stage" in tags:
            assert name in METRICS and value >= 0
            self.seen.add((name.removesuffix("_stage_seconds"), tags["stage"]))


async def test_each_stage_is_timed_in_metrics_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def stub_score(query: str, texts: Any) -> list[float]:
        return [0.5] * len(texts)

    stages = Stages()
    caplog.set_level("INFO", "ray.serve.groundswell")
    async with house(tmp_path, embed=stub_embed, score=stub_score, metrics=stages) as made:
        store, (file,) = await made.store_of("one zebra")
        await found(made, store, "zebra")
    indexing, searching = {"parse", "chunk", "embed", "index"}, {"retrieve", "embed", "rank", "rerank"}
    assert stages.seen == {("indexer", s) for s in indexing} | {("retriever", s) for s in searching}
    lines = [record.getMessage() for record in caplog.records]
    of_file, of_chunks, of_search = (
        next(line for line in lines if words in line) for words in (f"{file} of", "chunks of 1 files", "passages found")
    )
    assert "parse" in of_file and "chunk" in of_file
    assert "embed" in of_chunks and "index" in of_chunks
    assert all(stage in of_search for stage in searching)
    assert not any("zebra" in line for line in lines), "what is in documents and questions is nobody's to log"


INDEXER = """
import asyncio, os, signal, sys, threading
from pathlib import Path
from deployments.retrieval.tables import MEMBERS
from tests.unit.house import house

async def main():
    async with house(Path(sys.argv[1]), start=False) as made:
        put = made.writer.put

        async def put_and_be_killed_soon(table, records):
            await put(table, records)
            if table is MEMBERS and any(record.status == "completed" for record in records):
                threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()

        made.writer.put = put_and_be_killed_soon
        await made.ingestion.start()
        await asyncio.sleep(3600)

asyncio.run(main())
"""
"""An Indexer that is killed, from within, some seconds after it has first completed files."""


async def test_after_kill_9_halfway_work_goes_on_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    n = 120
    async with house(tmp_path, start=False) as made:
        files = [await made.upload("\n\n".join(f"zebra {i} of {f}" for i in range(300))) for f in range(n)]
        store = await made.ingestion.create_store(None)
        attachments = [Attachment(f, {}, Chunking(100, 0)) for f in files]
        batch = await made.ingestion.attach_batch(None, store.id, attachments)
        done = 0
        for seconds in ("0.02", "0.005"):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", INDEXER, str(tmp_path), seconds, cwd=Path(__file__).parents[2]
            )
            assert await asyncio.wait_for(process.wait(), 120) == -signal.SIGKILL
            counts = (await made.catalog.store(None, store.id))[1]
            assert counts.completed > done
            assert counts.in_progress > 0
            done = counts.completed
    async with house(tmp_path) as made:
        members = await made.indexed(store.id)
        assert Counter(m.status for m in members) == {"completed": n}
        assert {m.file_id for m in members} == set(files)
        table = await made.reader._chunks(store.id)
        rows = await table.query().select(["file_id", "position"]).to_list()
        counted = Counter((row["file_id"], row["position"]) for row in rows)
        assert set(counted.values()) == {1}
        per_file = Counter(file_id for file_id, _ in counted)
        assert set(per_file) == set(files)
        for file_id in files[::10]:
            assert (await made.text(store.id, file_id)).count("zebra") == 300
        assert (await made.catalog.batch(None, store.id, batch.id))[1].completed == n
