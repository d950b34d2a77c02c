"""OpenAI's API of files and vector stores, driven by OpenAI's own client over a real store."""

from __future__ import annotations

import asyncio
import io
import json
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from deployments.config import DocumentsConfig
from deployments.retrieval import api
from deployments.retrieval.api import documents_app
from deployments.retrieval.tables import MEMBERS
from tests.unit.asgi_client import AsgiClient
from tests.unit.house import House, house
from tests.unit.recording import LIMIT_S, Leaps, Recorder
from tests.unit.retrievers import HouseRetriever

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def made(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path) as opened:
        yield opened


@pytest_asyncio.fixture
async def http(made: House, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    config = DocumentsConfig(uri=str(tmp_path), max_file_bytes=3_000_000)
    app = documents_app(
        made.ingestion,
        HouseRetriever(made),
        config,
        max_body_bytes=100_000,
        owner_of=lambda scope: dict(scope["headers"]).get(b"x-owner", b"").decode() or None,
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        yield client


@pytest_asyncio.fixture
async def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http, max_retries=0)


async def test_from_upload_to_search(client: openai.AsyncOpenAI, made: House) -> None:
    file = await client.files.create(file=("dir/notes.md", b"# Zebras\n\nA zebra has stripes."), purpose="assistants")
    assert (file.object, file.filename, file.bytes, file.status) == ("file", "notes.md", 30, "processed")
    store = await client.vector_stores.create(
        name="notes",
        file_ids=[file.id],
        metadata={"team": "zoo"},
        expires_after={"anchor": "last_active_at", "days": 7},
    )
    assert store.file_counts.in_progress == 1
    await made.indexed(store.id)
    store = await client.vector_stores.retrieve(store.id)
    assert (store.status, store.name, store.metadata, store.usage_bytes) == ("completed", "notes", {"team": "zoo"}, 30)
    assert store.expires_at == (store.last_active_at or 0) + 7 * 86400
    page = await client.vector_stores.search(store.id, query="stripes")
    assert page.object == "vector_store.search_results.page"
    (result,) = page.data
    assert (result.file_id, result.filename, result.attributes) == (file.id, "notes.md", {})
    assert result.content[0].text == "# Zebras\n\nA zebra has stripes."
    assert 0 < result.score < 1


async def test_files(client: openai.AsyncOpenAI) -> None:
    ids = [(await client.files.create(file=(f"{i}.txt", b"x" * i), purpose="user_data")).id for i in range(5)]
    other = (await client.files.create(file=("o.txt", b"x"), purpose="assistants")).id
    assert [f.id for f in (await client.files.list()).data] == [other, *reversed(ids)]
    assert [f.id async for f in client.files.list(purpose="user_data", limit=2, order="asc")] == ids
    assert (await client.files.retrieve(ids[3])).bytes == 3
    assert (await client.files.content(ids[4])).content == b"xxxx"
    assert (await client.files.content(ids[0])).content == b""
    gone = await client.files.delete(ids[0])
    assert (gone.id, gone.object, gone.deleted) == (ids[0], "file", True)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(ids[0])
    expiring = await client.files.create(
        file=("e.txt", b"x"), purpose="assistants", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert expiring.expires_at == 1_700_003_600


async def test_long_lists_come_in_one_page(
    client: openai.AsyncOpenAI, made: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_FILES_A_MESSAGE", 2)
    ids = [await made.upload("x") for _ in range(7)]
    page = await client.files.list(order="asc")
    assert ([f.id for f in page.data], page.has_more) == (ids, False)
    page = await client.files.list(order="asc", limit=5)
    assert ([f.id for f in page.data], page.has_more) == (ids[:5], True)
    page = await client.files.list(limit=3, after=ids[5], extra_query={"order": "desc"})
    assert ([f.id for f in page.data], page.has_more) == (ids[4:1:-1], True)


async def test_a_long_text_is_read_back_whole(client: openai.AsyncOpenAI, made: House) -> None:
    text = "\n\n".join(f"Paragraph {i} of a long text." for i in range(5000))
    store, (file,) = await made.store_of(text)
    content = await client.vector_stores.files.content(file, vector_store_id=store)
    assert "".join(part.text or "" for part in content.data).split() == text.split()


async def test_vector_stores(client: openai.AsyncOpenAI) -> None:
    ids = [(await client.vector_stores.create(name=f"s{i}")).id for i in range(4)]
    assert [s.id async for s in client.vector_stores.list(limit=3)] == ids[::-1]
    assert [s.id for s in (await client.vector_stores.list(before=ids[0], limit=2)).data] == [ids[2], ids[1]]
    changed = await client.vector_stores.update(ids[0], name="new", metadata={"a": "b"})
    assert (changed.name, changed.metadata) == ("new", {"a": "b"})
    changed = await client.vector_stores.update(ids[0], expires_after={"anchor": "last_active_at", "days": 1})
    assert (changed.name, changed.expires_after.days if changed.expires_after else None) == ("new", 1)
    gone = await client.vector_stores.delete(ids[0])
    assert (gone.object, gone.deleted) == ("vector_store.deleted", True)
    with pytest.raises(openai.NotFoundError):
        await client.vector_stores.retrieve(ids[0])


async def test_files_of_a_store(client: openai.AsyncOpenAI, made: House) -> None:
    store = await client.vector_stores.create()
    files = [await client.files.create(file=(f"{i}.txt", b"zebra %d" % i), purpose="assistants") for i in range(3)]
    broken = await client.files.create(file=("b.pdf", b"not one"), purpose="assistants")
    attached = await client.vector_stores.files.create(
        vector_store_id=store.id,
        file_id=files[0].id,
        attributes={"lang": "de", "year": 2024, "draft": True},
        chunking_strategy={"type": "static", "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 100}},
    )
    assert (attached.id, attached.status) == (files[0].id, "in_progress")
    for file in (*files[1:], broken):
        await client.vector_stores.files.create(vector_store_id=store.id, file_id=file.id)
    await made.indexed(store.id)
    listed = [f async for f in client.vector_stores.files.list(store.id, limit=1, order="asc")]
    assert [f.id for f in listed] == [f.id for f in (*files, broken)]
    failed = (await client.vector_stores.files.list(store.id, filter="failed")).data
    assert [(f.id, f.last_error.code if f.last_error else "") for f in failed] == [(broken.id, "invalid_file")]
    one = await client.vector_stores.files.retrieve(files[0].id, vector_store_id=store.id)
    assert one.attributes == {"lang": "de", "year": 2024.0, "draft": True}
    assert one.chunking_strategy is not None
    assert one.chunking_strategy.to_dict()["static"] == {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 100}
    changed = await client.vector_stores.files.update(files[1].id, vector_store_id=store.id, attributes={"lang": "en"})
    assert changed.attributes == {"lang": "en"}
    content = await client.vector_stores.files.content(files[1].id, vector_store_id=store.id)
    assert [part.text for part in content.data] == ["zebra 1"]
    found = await client.vector_stores.search(
        store.id, query=["zebra", "nothing"], filters={"type": "in", "key": "lang", "value": ["de", "en"]}
    )
    assert {r.file_id for r in found.data} == {files[0].id, files[1].id}
    gone = await client.vector_stores.files.delete(files[0].id, vector_store_id=store.id)
    assert (gone.object, gone.deleted) == ("vector_store.file.deleted", True)
    found = await client.vector_stores.search(store.id, query="zebra", max_num_results=50)
    assert {r.file_id for r in found.data} == {files[1].id, files[2].id}


async def test_a_list_by_status_goes_on_when_the_file_at_the_end_of_a_page_has_changed(
    client: openai.AsyncOpenAI, made: House
) -> None:
    store, files = await made.store_of(*["zebra"] * 4)
    page = await client.vector_stores.files.list(store, filter="completed", order="asc", limit=2)
    await made.writer.update(MEMBERS, f"file_id = '{files[1]}'", {"status": "failed"})
    await made.writer.update(MEMBERS, f"file_id = '{files[2]}'", {"status": "failed"})
    assert [file.id for file in (await page.get_next_page()).data] == files[3:]
    with pytest.raises(openai.NotFoundError):
        await client.vector_stores.files.list(store, after="file-99")


async def test_file_batches(client: openai.AsyncOpenAI, made: House) -> None:
    store = await client.vector_stores.create()
    files = [await client.files.create(file=(f"{i}.txt", b"zebra %d" % i), purpose="assistants") for i in range(3)]
    batch = await client.vector_stores.file_batches.create(
        store.id, file_ids=[f.id for f in files], attributes={"of": "batch"}
    )
    assert (batch.object, batch.file_counts.total) == ("vector_store.files_batch", 3)
    await made.indexed(store.id)
    batch = await client.vector_stores.file_batches.retrieve(batch.id, vector_store_id=store.id)
    assert (batch.status, batch.file_counts.completed) == ("completed", 3)
    listed = await client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id)
    assert {f.id for f in listed.data} == {f.id for f in files}
    assert listed.data[0].attributes == {"of": "batch"}
    own = await client.vector_stores.file_batches.create(
        store.id, files=[{"file_id": files[0].id, "attributes": {"own": 1}}, {"file_id": files[1].id}]
    )
    cancelled = await client.vector_stores.file_batches.cancel(own.id, vector_store_id=store.id)
    assert cancelled.status == "cancelled"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/v1/files/file-nope", None, 404, "file_id"),
        ("GET", "/v1/files/file-nope/content", None, 404, "file_id"),
        ("DELETE", "/v1/files/'; drop table files", None, 404, "file_id"),
        ("GET", "/v1/files?limit=0", None, 400, "limit"),
        ("GET", "/v1/files?limit=10001", None, 400, "limit"),
        ("GET", "/v1/files?order=up", None, 400, "order"),
        ("GET", "/v1/files?after=file-nope", None, 404, "after"),
        ("GET", "/v1/vector_stores?limit=101", None, 400, "limit"),
        ("GET", "/v1/vector_stores?limit=%C2%B2", None, 400, "limit"),
        ("GET", "/v1/vector_stores?after=a&before=b", None, 400, "before"),
        ("PUT", "/v1/files", None, 405, None),
        ("PATCH", "/v1/vector_stores/STORE", None, 405, None),
        ("GET", "/v1/files/a/b/c", None, 404, None),
        ("POST", "/v1/files", {"file": "x"}, 400, None),
        ("POST", "/v1/vector_stores", "{", 400, None),
        ("POST", "/v1/vector_stores", [], 400, None),
        ("POST", "/v1/vector_stores", {"name": 7}, 400, "name"),
        ("POST", "/v1/vector_stores", {"name": "x" * 513}, 400, "name"),
        ("POST", "/v1/vector_stores", {"file_ids": ["file-nope"]}, 404, "file_id"),
        ("POST", "/v1/vector_stores", {"file_ids": ["f"] * 2001}, 400, "file_ids"),
        ("POST", "/v1/vector_stores", {"metadata": {"k": 1}}, 400, "metadata[...]"),
        ("POST", "/v1/vector_stores", {"metadata": {str(i): "v" for i in range(17)}}, 400, "metadata"),
        ("POST", "/v1/vector_stores", {"expires_after": {"anchor": "now", "days": 1}}, 400, "expires_after"),
        ("POST", "/v1/vector_stores", {"name": "x" * 200_000}, 413, None),
        ("GET", "/v1/vector_stores/vs_nope", None, 404, "vector_store_id"),
        ("POST", "/v1/vector_stores/vs_nope/search", {"query": "x"}, 404, "vector_store_id"),
        ("POST", "/v1/vector_stores/STORE/search", {}, 400, "query"),
        ("POST", "/v1/vector_stores/STORE/search", {"query": 7}, 400, "query"),
        ("POST", "/v1/vector_stores/STORE/search", {"query": ""}, 400, "query"),
        ("POST", "/v1/vector_stores/STORE/search", {"query": "x", "max_num_results": 51}, 400, "max_num_results"),
        ("POST", "/v1/vector_stores/STORE/search", {"query": "x", "filters": {"type": "xor"}}, 400, "filters"),
        ("POST", "/v1/vector_stores/STORE/search", {"query": "x", "filters": 7}, 400, "filters"),
        (
            "POST",
            "/v1/vector_stores/STORE/search",
            {"query": "x", "ranking_options": {"ranker": "best"}},
            400,
            "ranking_options",
        ),
        ("POST", "/v1/vector_stores/STORE/files", {"file_id": "file-nope"}, 404, "file_id"),
        ("POST", "/v1/vector_stores/STORE/files", {"file_id": "FILE", "attributes": {"k": [1]}}, 400, "attributes"),
        (
            "POST",
            "/v1/vector_stores/STORE/files",
            {
                "file_id": "FILE",
                "chunking_strategy": {
                    "type": "static",
                    "static": {"max_chunk_size_tokens": 99, "chunk_overlap_tokens": 1},
                },
            },
            400,
            "chunking_strategy",
        ),
        (
            "POST",
            "/v1/vector_stores/STORE/files",
            {
                "file_id": "FILE",
                "chunking_strategy": {
                    "type": "static",
                    "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 51},
                },
            },
            400,
            "chunking_strategy",
        ),
        ("POST", "/v1/vector_stores/STORE/files", {"file_id": "FILE", "chunking_strategy": {"type": "x"}}, 400, None),
        ("GET", "/v1/vector_stores/STORE/files?filter=done", None, 400, "filter"),
        ("GET", "/v1/vector_stores/STORE/files/FILE", None, 404, "file_id"),
        ("POST", "/v1/vector_stores/STORE/file_batches", {}, 400, "file_ids"),
        ("POST", "/v1/vector_stores/STORE/file_batches", {"file_ids": []}, 400, "file_ids"),
        ("POST", "/v1/vector_stores/STORE/file_batches", {"file_ids": ["FILE"], "files": []}, 400, "file_ids"),
        ("GET", "/v1/vector_stores/STORE/file_batches/vsfb_nope", None, 404, "batch_id"),
        ("POST", "/v1/vector_stores/STORE/file_batches/vsfb_nope/cancel", None, 404, "batch_id"),
        ("GET", "/v1/vector_stores/STORE/file_batches/vsfb_nope/files", None, 404, "batch_id"),
    ],
)
async def test_wrong_requests_get_openais_error_shape(
    http: httpx.AsyncClient, made: House, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    store = await made.ingestion.create_store(None)
    file = await made.upload("x")
    content = body if isinstance(body, str) else json.dumps(body) if body is not None else ""
    content = content.replace("FILE", file)
    path = path.replace("STORE", store.id).replace("FILE", file)
    answer = await http.request(method, path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"data": {"purpose": "assistants"}, "files": {"other": b"x"}}, "file"),
        ({"data": {"purpose": "assistants", "file": "not a file"}, "files": {"x": b"x"}}, "file"),
        ({"files": {"file": b"x"}}, "purpose"),
        ({"data": {"purpose": "fun"}, "files": {"file": b"x"}}, "purpose"),
        (
            {"data": {"purpose": "assistants", "expires_after[seconds]": "9"}, "files": {"file": b"x"}},
            "expires_after",
        ),
        ({"content": b"--x\r\ngarbage", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "file"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, None),
        ({"data": {"purpose": "assistants"}, "files": [("file", b"x"), ("file", b"y")]}, None),
    ],
)
async def test_wrong_uploads_get_openais_error_shape(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    answer = await http.post("/v1/files", **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_a_file_beyond_the_bound_is_cut_off_with_or_without_a_length(http: httpx.AsyncClient) -> None:
    for size in (3_000_001, 20_000_000):
        answer = await http.post("/v1/files", data={"purpose": "assistants"}, files={"file": io.BytesIO(b"x" * size)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while sent < 10**9:
            sent += 100_000
            yield b"y" * 100_000

    answer = await http.post(
        "/v1/files", content=endless(), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == 413


async def test_a_batch_too_large_for_one_message_is_attached_whole_or_not_at_all(made: House, tmp_path: Path) -> None:
    app = documents_app(made.ingestion, HouseRetriever(made), DocumentsConfig(uri=str(tmp_path)), max_body_bytes=10**7)
    store = await made.ingestion.create_store(None)
    attributes = {f"key{i}": "v" * 500 for i in range(16)}
    files = [{"file_id": await made.upload("x"), "attributes": attributes} for _ in range(150)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
        path = f"/v1/vector_stores/{store.id}/file_batches"
        answer = await http.post(path, json={"files": [*files, {"file_id": "file-nope"}]})
        assert answer.status_code == 404
        assert (await made.catalog.store(None, store.id))[1].total == 0
        answer = await http.post(path, json={"files": files})
        assert answer.json()["file_counts"]["total"] == 150


async def raw_upload(app: Any, key: str, receive: Any) -> list[Any]:
    """Ask for an upload; return what is sent back."""
    headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"x-key", key.encode())]
    client = AsgiClient(path="/v1/files", headers=headers)
    await app(client.scope, receive, client.send)
    return client.sent


async def test_an_upload_that_stalls_is_given_up_and_one_keys_leave_room_for_anothers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def key_of(scope: Any) -> str | None:
        return dict(scope["headers"])[b"x-key"].decode() or None

    config = DocumentsConfig(uri="unused", max_open_uploads=4)
    nobody: Any = None
    app = documents_app(nobody, nobody, config, max_body_bytes=1000, key_of=key_of)  # of one owner
    leaps, recorder = Leaps(monkeypatch), Recorder()

    async def nothing() -> Any:
        recorder.note("waits")
        await asyncio.Event().wait()

    async def stalled(key: str) -> asyncio.Task[list[Any]]:
        n = len(recorder.noted)
        upload = asyncio.create_task(raw_upload(app, key, nothing))
        await recorder.until(lambda: len(recorder.noted) > n or upload.done())
        return upload

    async def status(upload: asyncio.Task[list[Any]]) -> int:
        return int((await asyncio.wait_for(upload, LIMIT_S))[0]["status"])

    mine = [await stalled("me") for _ in range(2)]
    assert await status(asyncio.create_task(raw_upload(app, "me", nothing))) == 429
    other = await stalled("you")
    await leaps.over(61)
    assert [await status(upload) for upload in (*mine, other)] == [408] * 3
    keyless = [await stalled("") for _ in range(4)]
    assert await status(asyncio.create_task(raw_upload(app, "you", nothing))) == 429
    await leaps.over(61)
    assert [await status(upload) for upload in keyless] == [408] * 4
    assert b"x-should-retry" not in dict(keyless[0].result()[0]["headers"]), "clients may try again by themselves"


@pytest.mark.parametrize(
    ("piece_bytes", "every_s", "least", "status"),
    [(1, 25, 1024, 408), (30 * 1024, 25, 1024, 400), (50 * 1024, 40, 1024, 400), (1, 25, 0, 400)],
)
async def test_an_upload_that_trickles_is_given_up_though_it_began_swiftly_and_one_that_is_slow_is_not(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int, every_s: float, least: int, status: int
) -> None:
    config = DocumentsConfig(uri="unused", max_open_uploads=1)
    nobody: Any = None
    app = documents_app(nobody, nobody, config, max_body_bytes=1000, min_body_bytes_per_s=least)
    leaps, recorder = Leaps(monkeypatch), Recorder()
    coming: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()

    async def receive() -> Any:
        recorder.note("waits")
        body, more = await coming.get()
        return {"type": "http.request", "body": body, "more_body": more}

    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    coming.put_nowait((head + b"y" * 10 * 2**20, True))
    upload = asyncio.create_task(raw_upload(app, "", receive))
    upload.add_done_callback(lambda upload: recorder.note("has ended"))
    for n in range(2, 12):
        await recorder.until(lambda n=n: len(recorder.noted) >= n)  # type: ignore[misc]
        if upload.done():
            break
        await leaps.over(every_s)
        coming.put_nowait((b"y" * piece_bytes, True))
    coming.put_nowait((b"\r\n--x--\r\n", False))
    start, body = await asyncio.wait_for(upload, LIMIT_S)
    error = json.loads(body["body"])["error"]
    assert start["status"] == status, "400 is for its having no `purpose`"
    if status == 408:
        assert (error["type"], error["code"]) == ("timeout_error", "body_stalled")
        assert error["message"] == "The body comes more slowly than 1024 bytes a second."


async def test_an_upload_takes_bounded_memory(made: House, tmp_path: Path, http: httpx.AsyncClient) -> None:
    app = documents_app(made.ingestion, HouseRetriever(made), DocumentsConfig(uri=str(tmp_path)), max_body_bytes=1000)
    size = 100 * 2**20
    transport = httpx.ASGITransport(app=app)

    async def form() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="big.txt"\r\n\r\n'
        for _ in range(size // 2**20):
            yield b"y" * 2**20
        yield b"\r\n--x--\r\n"

    async with httpx.AsyncClient(transport=transport, base_url="http://test") as big:
        tracemalloc.start()
        try:
            answer = await big.post(
                "/v1/files", content=form(), headers={"content-type": "multipart/form-data; boundary=x"}, timeout=120
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (answer.status_code, answer.json()["bytes"]) == (200, size)
    assert peak < 40 * 2**20


async def test_another_owners_things_are_not_there(http: httpx.AsyncClient) -> None:
    mine, yours = {"x-owner": "me"}, {"x-owner": "you"}
    upload = {"data": {"purpose": "assistants"}, "files": {"file": ("a.txt", b"zebra")}}
    file = (await http.post("/v1/files", headers=mine, **upload)).json()["id"]  # type: ignore[arg-type]
    store = (await http.post("/v1/vector_stores", headers=mine, json={"file_ids": [file]})).json()["id"]
    for headers, status in ((mine, 200), (yours, 404), ({}, 404)):
        for path in (f"/v1/files/{file}", f"/v1/files/{file}/content", f"/v1/vector_stores/{store}"):
            assert (await http.get(path, headers=headers)).status_code == status
        search = await http.post(f"/v1/vector_stores/{store}/search", headers=headers, json={"query": "zebra"})
        assert search.status_code == status
    assert (await http.get("/v1/files", headers=yours)).json()["data"] == []
    assert (await http.get("/v1/vector_stores", headers=yours)).json()["data"] == []


async def test_an_internal_error_is_opaque(http: httpx.AsyncClient, made: House) -> None:
    async def broken(*args: Any) -> Any:
        raise RuntimeError("secret path /etc/x")

    made.catalog.file = broken  # type: ignore[method-assign]
    answer = await http.get("/v1/files/file-1")
    assert answer.status_code == 500
    assert "secret" not in answer.text
