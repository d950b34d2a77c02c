"""Documents from the command line, against the real API over a real store."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from deployments.cli import main
from deployments.config import DocumentsConfig
from deployments.documents_cli import Bar, Failure, Server
from deployments.retrieval.api import documents_app
from deployments.retrieval.records import PageRequest
from tests.unit.house import House, house
from tests.unit.retrievers import HouseRetriever
from tests.unit.stub_server import http_server, served_by_uvicorn


@pytest_asyncio.fixture
async def made(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path / "store") as opened:
        yield opened


@pytest_asyncio.fixture
async def url(made: House, tmp_path: Path) -> AsyncIterator[str]:
    config = DocumentsConfig(uri=str(tmp_path / "store"))
    app: Any = documents_app(made.ingestion, HouseRetriever(made), config, max_body_bytes=100_000)
    async with served_by_uvicorn(app) as port:
        yield f"http://127.0.0.1:{port}"


async def groundswell(*arguments: str) -> int:
    return await asyncio.to_thread(main, list(arguments))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    (docs / "sub").mkdir(parents=True)
    (docs / ".git").mkdir()
    (docs / ".git" / "config").write_text("hidden")
    (docs / "one.md").write_text("# One\n\nA zebra has stripes.")
    (docs / "sub" / "two.txt").write_text("A horse has none.")
    (docs / "fake.pdf").write_text("not a PDF")
    (docs / "sub" / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return docs


@pytest.mark.asyncio
async def test_ingest_uploads_waits_sums_up_and_goes_on_where_it_was(
    url: str, folder: Path, made: House, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await groundswell("ingest", str(folder), "--store", "zoo", "--url", url) == 1
    said = capsys.readouterr()
    assert "2 files in zoo" in said.out
    assert "failed  docs/fake.pdf: The file is named .pdf but is not a PDF." in said.out
    assert "skipped 1 without text: docs/sub/photo.png" in said.out
    assert "uploading 3/3" in said.err
    (folder / "fake.pdf").unlink()
    (folder / "three.txt").write_text("A zebra again.")
    (folder / "one.md").write_text("# One\n\nA zebra has black stripes.")
    assert await groundswell("ingest", str(folder), "--store", "zoo", "--url", url) == 0
    assert "3 files in zoo" in (said := capsys.readouterr()).out
    assert "1 of them were there before" in said.out
    assert "uploading 2/2" in said.err
    assert await groundswell("ingest", str(folder), "--store", "zoo", "--url", url) == 0
    assert "3 of them were there before" in capsys.readouterr().out
    assert await groundswell("search", "zebra", "--store", "zoo", "--url", url) == 0
    found = capsys.readouterr().out
    assert "docs/one.md" in found
    assert "black stripes" in found
    assert "docs/three.txt" in found
    assert "has stripes" not in found
    assert await groundswell("ingest", str(folder / "sub" / "photo.png"), "--store", "zoo", "--url", url) == 1
    assert "failed  photo.png: The file is a PNG image" in capsys.readouterr().out


@pytest.mark.asyncio
async def test_two_files_that_would_go_by_one_name_are_refused_before_anything_is_sent(
    url: str, tmp_path: Path, made: House, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / place / "README.md" for place in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(f"A zebra of {file.parent.name}.")
    assert await groundswell("ingest", *map(str, files), "--store", "zoo", "--url", url) == 1
    said = capsys.readouterr().err
    assert f"{files[0]} and {files[1]} would both be 'README.md'" in said
    assert (await made.catalog.files(None, PageRequest())).data == []
    assert await groundswell("ingest", *[str(files[0])] * 2, "--store", "zoo", "--url", url) == 0
    assert "1 files in zoo" in capsys.readouterr().out


async def versions(made: House) -> list[tuple[str, str]]:
    """Return the status and the text of all that was ever attached and is still there, the oldest first."""
    (store, _), *_ = (await made.catalog.stores(None, PageRequest())).data
    return [(f.status, await made.text(store.id, f.file_id)) for f in await made.indexed(store.id)]


@pytest.mark.asyncio
async def test_a_new_version_that_cannot_be_read_leaves_the_former_one(
    url: str, tmp_path: Path, made: House, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one.md"
    for content, code, are_there in (
        (b"A zebra.", 0, [("completed", "A zebra.")]),
        (b"\x89PNG", 1, [("completed", "A zebra."), ("failed", "")]),
        (b"\x89PNG", 1, [("completed", "A zebra."), ("failed", "")]),
        (b"\x89PNG2", 1, [("completed", "A zebra."), ("failed", "")]),
        (b"Two zebras.", 0, [("completed", "Two zebras.")]),
    ):
        file.write_bytes(content)
        assert await groundswell("ingest", str(file), "--store", "zoo", "--url", url) == code
        assert await versions(made) == are_there
        assert ("(the former version stays)" in capsys.readouterr().out) == (code == 1)


@pytest.mark.asyncio
async def test_a_replacement_that_was_stopped_halfway_is_finished_by_the_next_run(
    url: str, tmp_path: Path, made: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one.md"
    file.write_text("A zebra.")
    assert await groundswell("ingest", str(file), "--store", "zoo", "--url", url) == 0
    file.write_text("Two zebras.")
    call = Server.call

    def stopped(server: Server, method: str, path: str, **options: Any) -> Any:
        if method == "DELETE":
            raise KeyboardInterrupt
        return call(server, method, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Server, "call", stopped)
        assert await groundswell("ingest", str(file), "--store", "zoo", "--url", url) == 130
    assert len(await versions(made)) == 2
    capsys.readouterr()
    assert await groundswell("ingest", str(file), "--store", "zoo", "--url", url) == 0
    assert "uploading" not in capsys.readouterr().err
    assert await versions(made) == [("completed", "Two zebras.")]


@pytest.mark.asyncio
async def test_mistakes_are_one_sentence(url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (("search", "x", "--store", "nope", "--url", url), "no vector store named 'nope'"),
        (("search", "x", "--store", "vs_nope", "--url", url), "No vector store with id 'vs_nope'"),
        (("ingest", str(folder / "nope"), "--store", "zoo", "--url", url), "is not there"),
        (("search", "x", "--store", "zoo", "--url", "http://127.0.0.1:9"), "No server answers"),
    ):
        assert await groundswell(*arguments) == 1
        error = capsys.readouterr().err
        assert sentence in error
        assert len(error.strip().splitlines()) == 1


def test_a_bar_is_drawn_on_a_terminal_and_lines_are_written_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, file = Terminal(), io.StringIO()
    for done in range(4):
        Bar(terminal).show("indexing", done, 3)
    bar = Bar(file, clock=lambda: 100.0)
    for done in range(4):
        bar.show("indexing", done, 3)
    assert "[##########....................] 1/3" in terminal.getvalue()
    assert file.getvalue().splitlines() == ["indexing 0/3", "indexing 3/3"]


class StubResponses(BaseHTTPRequestHandler):
    """A stub of the Responses API: streams a fixed answer with two citations of one file."""

    asked: Any = None

    def do_GET(self) -> None:
        listed = {"object": "list", "data": [{"id": "vs_1", "name": "zoo", "status": "completed"}], "has_more": False}
        body = {"data": [{"id": "tiny"}]} if self.path.startswith("/v1/models") else listed
        self._send(json.dumps(body).encode(), "application/json")

    def do_POST(self) -> None:
        type(self).asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        citation = {"type": "file_citation", "file_id": "file-1", "filename": "one.md", "index": 5}
        events = [
            {"type": "response.output_text.delta", "delta": "Stripes"},
            {"type": "response.output_text.annotation.added", "annotation": citation},
            {"type": "response.output_text.delta", "delta": ", mostly."},
            {"type": "response.output_text.annotation.added", "annotation": citation},
            {"type": "response.completed", "response": {}},
        ]
        self._send("".join(f"data: {json.dumps(e)}\n\n" for e in events).encode(), "text/event-stream")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def responses() -> Iterator[str]:
    with http_server(StubResponses) as url:
        yield url


def test_ask_streams_the_answer_and_lists_its_sources(responses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "What does a zebra have?", "--store", "zoo", "--url", responses]) == 0
    assert capsys.readouterr().out == "Stripes [1], mostly. [1]\n\nSources:\n  [1] one.md  (file-1)\n"
    assert StubResponses.asked == {
        "model": "tiny",
        "input": "What does a zebra have?",
        "tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}],
        "stream": True,
    }


def test_ask_says_so_where_no_model_could_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Server, "call", lambda self, method, path, **_: {"id": "vs_1", "data": []})
    assert main(["ask", "--store", "vs_1", "Who?"]) == 1
    assert "has no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "headers", "asked"), [(408, {}, 2), (429, {}, 2), (503, {}, 2), (408, {"x-should-retry": "false"}, 1)]
)
def test_an_upload_that_is_refused_for_now_is_sent_again(
    tmp_path: Path, status: int, headers: dict[str, str], asked: int
) -> None:
    bodies: list[bytes] = []

    class StubUploads(BaseHTTPRequestHandler):
        """A stub server that takes a file the second time."""

        def do_POST(self) -> None:
            bodies.append(b"")
            while size := int(self.rfile.readline(), 16):
                bodies[-1] += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            answer = json.dumps({"id": "file-1"} if len(bodies) == 2 else {"error": {"message": "not now"}}).encode()
            self.send_response(200 if len(bodies) == 2 else status)
            for name, value in {**headers, "retry-after": "0", "content-length": str(len(answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    (tmp_path / "one.md").write_text("zebra")
    with http_server(StubUploads) as url:
        server = Server(url, None)
        if asked == 1:
            with pytest.raises(Failure, match="not now"):
                server.upload(tmp_path / "one.md")
        else:
            assert server.upload(tmp_path / "one.md") == "file-1"
    assert [b"zebra" in body for body in bodies] == [True] * asked
