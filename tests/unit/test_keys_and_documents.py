"""Files and vector stores belong to a key: another's are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments import request_scope
from deployments.access.gate import Gate
from deployments.access.keys import KeyEntry, Keys, hash_of
from deployments.config import DocumentsConfig
from deployments.dispatch import App, Dispatcher
from deployments.metrics import NoMetrics
from deployments.retrieval import api
from tests.unit.house import House, house

pytestmark = pytest.mark.asyncio
ANN, ANNS_NEW, BOB, HEIR = "gs-ann-0123456789", "gs-ann-9876543210", "gs-bob-0123456789", "gs-heir-0123456789"


class Reading:
    """Catalog and searcher as one, as the Retriever puts them together."""

    def __init__(self, made: House) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made.searcher if name == "search" else self._made.catalog, name)


def client(made: House) -> httpx.AsyncClient:
    """Return a client of a Router's app, put together as a Router does."""

    async def resolve(name: str) -> App | None:
        return None

    reading: Any = Reading(made)
    documents: Any = api.documents_app(
        made.ingestion,
        reading,
        DocumentsConfig(uri="unused"),
        max_body_bytes=10**6,
        owner_of=lambda scope: request_scope.owner(),
    )
    dispatcher = Dispatcher(
        resolve, ["m"], [], {}, max_body_bytes=10**6, mounted=dict.fromkeys(api.PREFIXES, documents)
    )
    entries = [
        KeyEntry(name="ann", sha256=hash_of(ANN)),
        KeyEntry(name="ann", sha256=hash_of(ANNS_NEW)),
        KeyEntry(name="bob", sha256=hash_of(BOB)),
        KeyEntry(name="heir", sha256=hash_of(HEIR), owns_unowned=True),
    ]
    gate = Gate(dispatcher, Keys(entries), [], max_header_count=100, max_header_bytes=2**15, metrics=NoMetrics())
    return httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://test")


def by(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_another_key_gets_404_and_the_same_callers_new_key_does_not(tmp_path: Path) -> None:
    async with house(tmp_path) as made, client(made) as http:
        form, files = {"purpose": "assistants"}, {"file": ("a.txt", b"The tide turns.")}
        uploaded = await http.post("/v1/files", headers=by(ANN), data=form, files=files)
        file_id = uploaded.json()["id"]
        created = await http.post("/v1/vector_stores", headers=by(ANN), json={"file_ids": [file_id]})
        store_id = created.json()["id"]
        await made.indexed(store_id, owner="ann")
        paths = (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/vector_stores/{store_id}")
        for path in paths:
            statuses = [(await http.get(path, headers=by(key))).status_code for key in (ANN, ANNS_NEW, BOB, HEIR)]
            assert statuses == [200, 200, 404, 404], path
        search = f"/v1/vector_stores/{store_id}/search"
        found = [await http.post(search, headers=by(key), json={"query": "tide"}) for key in (ANN, BOB)]
        assert [answer.status_code for answer in found] == [200, 404]
        assert found[0].json()["data"]
        for path in (f"/v1/files/{file_id}", f"/v1/vector_stores/{store_id}"):
            assert (await http.delete(path, headers=by(BOB))).status_code == 404
        assert (await http.get("/v1/files", headers=by(BOB))).json()["data"] == []
        assert len((await http.get("/v1/files", headers=by(ANNS_NEW))).json()["data"]) == 1
        mine = await http.post("/v1/vector_stores", headers=by(BOB), json={})
        theirs = {"file_id": file_id}
        attached = await http.post(f"/v1/vector_stores/{mine.json()['id']}/files", headers=by(BOB), json=theirs)
        assert attached.status_code == 404


async def test_what_was_stored_without_keys_is_seen_by_the_key_that_keeps_it(tmp_path: Path) -> None:
    async with house(tmp_path) as made, client(made) as http:
        file_id = await made.upload("Old words.")
        statuses = [(await http.get(f"/v1/files/{file_id}", headers=by(key))).status_code for key in (ANN, HEIR)]
        assert statuses == [404, 200]
