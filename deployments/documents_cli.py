"""`groundswell ingest`, `search` and `ask`: documents from the command line, against a running server."""

from __future__ import annotations

import argparse
import hashlib
import json
import mimetypes
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

import requests

DEFAULT_URL: Final = "http://127.0.0.1:8000"
KEY_VARIABLE: Final = "GROUNDSWELL_API_KEY"

_PIECE_BYTES: Final = 2**20
_TIMEOUT_S: Final = 120
_POLL_S: Final = 0.5
_BAR_CHARS: Final = 30
_LINE_EVERY_S: Final = 10.0
_RETRIES: Final = 5


class Failure(Exception):
    """Something that ends the command. Its text is one sentence for the person at the terminal."""


class Server:
    """A running server, as far as the commands need it.

    Args:
        url: Where it is, without `/v1`.
        key: An API key, where keys are asked for.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Return the JSON of an answer. What is refused for now is tried again a few times.

        Raises:
            Failure: The server is not there, or refuses.
        """
        for attempt in range(_RETRIES + 1):
            answer = self.open(method, path, **options)
            if not _for_now(answer) or attempt == _RETRIES:
                break
            time.sleep(float(answer.headers.get("retry-after", 1)))
        return self._checked(answer).json()

    def open(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {**self._headers, **options.pop("headers", {})}
        try:
            return requests.request(method, f"{self._url}/v1/{path}", headers=headers, timeout=_TIMEOUT_S, **options)
        except requests.RequestException as error:
            raise Failure(
                f"No server answers at {self._url}: {type(error).__name__}. Start one with `make serve`, or say "
                "with --url where it is."
            ) from None

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """Yield the events of a streaming answer."""
        answer = self._checked(self.open("POST", path, json=body, stream=True))
        for line in answer.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])

    def upload(self, path: Path) -> str:
        """Upload a file in pieces; return its id."""
        for attempt in range(_RETRIES + 1):
            boundary = secrets.token_hex(16)
            headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
            answer = self.open("POST", "files", data=_form(path, boundary), headers=headers)
            if not _for_now(answer) or attempt == _RETRIES:
                break
            time.sleep(float(answer.headers.get("retry-after", 1)))
        return str(self._checked(answer).json()["id"])

    def listed(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield all entries of a list."""
        after = None
        while True:
            params = {"limit": 100, **({"after": after} if after else {})}
            page = self.call("GET", path, params=params)
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]

    def store(self, name: str, *, create: bool = False) -> str:
        """Return the id of the vector store with this id or name, the newest if several have it."""
        if name.startswith("vs_"):
            return str(self.call("GET", f"vector_stores/{name}")["id"])
        for store in self.listed("vector_stores"):
            if store["name"] == name and store["status"] != "expired":
                return str(store["id"])
        if not create:
            raise Failure(
                f"There is no vector store named {name!r}: `groundswell ingest PATH --store {name}` makes one."
            )
        return str(self.call("POST", "vector_stores", json={"name": name})["id"])

    @staticmethod
    def _checked(answer: requests.Response) -> requests.Response:
        if answer.ok:
            return answer
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:200]
        raise Failure(f"The server refuses ({answer.status_code}): {message}")


def _for_now(answer: requests.Response) -> bool:
    """Return whether a server refuses what it may take a little later: it is busy, or the body came too slowly."""
    return answer.status_code in (408, 429, 503) and answer.headers.get("x-should-retry") != "false"


def _form(path: Path, boundary: str) -> Iterator[bytes]:
    name = path.name.replace("\\", "_").replace('"', "_").replace("\r", "_").replace("\n", "_")
    yield f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'.encode()
    yield f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
    yield f"\r\n--{boundary}--\r\n".encode()


@dataclass(frozen=True)
class Document:
    """A file on this machine: its path as it is known in the store, and what is in it."""

    path: Path
    name: str
    digest: str


def found(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the files under paths, and the names they go by; those that are hidden in folders are left out.

    Raises:
        Failure: A path is not there.
    """
    for path in paths:
        if path.is_file():
            yield path, path.name
        elif path.is_dir():
            root = path.resolve()
            for inner in sorted(root.rglob("*")):
                relative = inner.relative_to(root.parent)
                if inner.is_file() and not any(part.startswith(".") for part in relative.parts[1:]):
                    yield inner, relative.as_posix()
        else:
            raise Failure(f"{path} is not there.")


def has_no_text(name: str) -> bool:
    """Return whether a file is by its name a picture, a sound, a film or a font."""
    kind, _ = mimetypes.guess_type(name)
    return kind is not None and kind.startswith(("image/", "audio/", "video/", "font/"))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Bar:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._said = -_LINE_EVERY_S

    def show(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show how far it is."""
        if self._out.isatty():
            full = _BAR_CHARS * done // max(1, total)
            bar = "#" * full + "." * (_BAR_CHARS - full)
            self._out.write(f"\r{what:9} [{bar}] {done}/{total} {note}\x1b[K")
        elif self._clock() - self._said >= _LINE_EVERY_S or done == total:
            self._said = self._clock()
            self._out.write(f"{what} {done}/{total} {note}".rstrip() + "\n")
        self._out.flush()

    def end(self) -> None:
        """Leave the bar's line."""
        if self._out.isatty():
            self._out.write("\n")


def ingest(server: Server, options: argparse.Namespace) -> int:
    """Upload files, attach them to a store, wait until they are indexed. Begin again after a break where it was."""
    documents, skipped = _documents(options.paths)
    store = server.store(options.store, create=True)
    versions = _versions(server, store)
    todo = [d for d in documents if not any(_is_there(file, d) for file in versions.get(d.name, ()))]
    bar = Bar(sys.stderr)
    problems: dict[str, str] = {}
    work = [(d.name, partial(_send, server, store, d)) for d in todo]
    _in_parallel("uploading", work, options.parallel, bar, problems)
    _wait(server, store, bar)
    versions = _versions(server, store)
    completed, deletions = 0, []
    for document in documents:
        here = versions.get(document.name, [])
        state, former = _settled(here, document)
        completed += state is not None and state["status"] == "completed"
        if state is not None and state["status"] == "failed":
            stays = " (the former version stays)" if any(f["status"] == "completed" for f in here) else ""
            problems[document.name] = (state["last_error"] or {}).get("message", "") + stays
        deletions += [(document.name, partial(server.call, "DELETE", f"files/{file['id']}")) for file in former]
    _in_parallel("replacing", deletions, options.parallel, bar, problems)
    print(f"{completed} files in {options.store} ({store}), {len(documents) - len(todo)} of them were there before")
    if skipped:
        print(f"  skipped {len(skipped)} without text: {', '.join(skipped[:5])}{', …' if len(skipped) > 5 else ''}")
    for name, problem in sorted(problems.items()):
        print(f"  failed  {name}: {problem}")
    return 1 if problems else 0


def _documents(paths: list[Path]) -> tuple[list[Document], list[str]]:
    """Return what is to be in the store, and the names of what is skipped.

    Raises:
        Failure: Two files would go by one name, and each would replace the other.
    """
    documents: dict[str, Document] = {}
    skipped = []
    for path, name in found(paths):
        if has_no_text(name) and path not in paths:  # who names a picture is told why it cannot be read
            skipped.append(name)
            continue
        name = name[-512:]
        if (other := documents.get(name)) is None:
            documents[name] = Document(path, name, digest(path))
        elif not path.samefile(other.path):
            raise Failure(f"{other.path} and {path} would both be {name!r} in the store: name a folder above both.")
    return list(documents.values()), skipped


def _versions(server: Server, store: str) -> dict[str, list[dict[str, Any]]]:
    """Return the files of a store by path, of each the newest first."""
    versions: dict[str, list[dict[str, Any]]] = {}
    for file in server.listed(f"vector_stores/{store}/files"):
        versions.setdefault(str(file["attributes"].get("path")), []).append(file)
    return versions


def _is_there(file: Mapping[str, Any], document: Document) -> bool:
    return file["attributes"].get("sha256") == document.digest and file["status"] in ("completed", "in_progress")


def _settled(versions: list[dict[str, Any]], document: Document) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the version that is the document, and those that it replaces.

    One that cannot be read replaces those of its kind alone: the last that could be read stays.
    """
    mine = [file for file in versions if file["attributes"].get("sha256") == document.digest]
    readable = [file for file in versions if file["status"] == "completed"]
    current = next((file for file in mine if file in readable), mine[0] if mine else None)
    if current is None:
        return None, []
    kept = [current] if current in readable else [current, *readable[:1]]
    return current, [file for file in versions if file not in kept and file["status"] != "in_progress"]


def _send(server: Server, store: str, document: Document) -> None:
    file = server.upload(document.path)
    attributes = {"path": document.name, "sha256": document.digest}
    server.call("POST", f"vector_stores/{store}/files", json={"file_id": file, "attributes": attributes})


def _in_parallel(
    what: str, work: Sequence[tuple[str, Callable[[], object]]], at_once: int, bar: Bar, problems: dict[str, str]
) -> None:
    """Do work for documents, given by name, and note the problems of those for which it fails."""
    with ThreadPoolExecutor(at_once) as pool:
        doing = {pool.submit(do): name for name, do in work}
        try:
            for done, each in enumerate(as_completed(doing), start=1):
                if (error := each.exception()) is not None:
                    if not isinstance(error, Failure):
                        raise error
                    problems[doing[each]] = str(error)
                bar.show(what, done, len(work), f"{len(problems)} failed" if problems else "")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if work:
        bar.end()


def _wait(server: Server, store: str, bar: Bar) -> None:
    shown = False
    while True:
        counts = server.call("GET", f"vector_stores/{store}")["file_counts"]
        if not counts["in_progress"]:
            break
        shown = True
        bar.show("indexing", counts["total"] - counts["in_progress"], counts["total"])
        time.sleep(_POLL_S)
    if shown:
        bar.show("indexing", counts["total"], counts["total"])
        bar.end()


def search(server: Server, options: argparse.Namespace) -> int:
    """Print the passages that answer a query best."""
    body = {"query": options.query, "max_num_results": options.limit}
    results = server.call("POST", f"vector_stores/{server.store(options.store)}/search", json=body)["data"]
    for result in results:
        print(f"{result['score']:.3f}  {result['attributes'].get('path') or result['filename']}")
        text = " ".join(result["content"][0]["text"].split())
        print(f"       {text[:300]}{'…' if len(text) > 300 else ''}")
    if not results:
        print("Nothing was found.", file=sys.stderr)
    return 0 if results else 1


def _first_model(server: Server) -> str:
    models = server.call("GET", "models")["data"]
    if not models:
        raise Failure("The server has no model that could answer.")
    return str(models[0]["id"])


def ask(server: Server, options: argparse.Namespace) -> int:
    """Print an answer from the documents as it is made, and its sources."""
    tool = {"type": "file_search", "vector_store_ids": [server.store(options.store)]}
    model = options.model or _first_model(server)
    body = {"model": model, "input": options.question, "tools": [tool], "stream": True}
    sources: dict[str, str] = {}
    for event in server.stream("responses", body):
        kind = event.get("type")
        if kind == "response.output_text.delta":
            print(event["delta"], end="", flush=True)
        elif kind == "response.output_text.annotation.added":
            annotation = event["annotation"]
            sources.setdefault(annotation["file_id"], annotation["filename"])
            print(f" [{list(sources).index(annotation['file_id']) + 1}]", end="", flush=True)
        elif kind in ("error", "response.failed"):
            error = event.get("error") or event.get("response", {}).get("error") or event
            raise Failure(f"The answer broke off: {error.get('message', 'no reason was given')}")
    print()
    if sources:
        print("\nSources:")
        for number, (file_id, filename) in enumerate(sources.items(), 1):
            print(f"  [{number}] {filename}  ({file_id})")
    return 0


def add_commands(commands: Any) -> None:
    """Add the commands to the command line's subparsers."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", required=True, help="name or id of the vector store")
    common.add_argument("--url", default=DEFAULT_URL, help="of the server (%(default)s)")
    common.add_argument("--key", default=os.environ.get(KEY_VARIABLE), help=f"API key, else ${KEY_VARIABLE}")
    one = commands.add_parser("ingest", parents=[common], help="upload files and folders into a vector store")
    one.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    one.add_argument("--parallel", type=int, default=4, metavar="N", help="uploads at once (%(default)s)")
    one.set_defaults(run=run, use=ingest)
    two = commands.add_parser("search", parents=[common], help="search a vector store")
    two.add_argument("query")
    two.add_argument("--limit", type=int, default=5, metavar="N", help="results (%(default)s)")
    two.set_defaults(run=run, use=search)
    three = commands.add_parser("ask", parents=[common], help="ask a question of a vector store")
    three.add_argument("question")
    three.add_argument("--model", help="else the first that the server lists")
    three.set_defaults(run=run, use=ask)


def run(options: argparse.Namespace) -> int:
    """Run one of the commands; return the exit code."""
    try:
        return int(options.use(Server(options.url, options.key), options))
    except Failure as failure:
        print(f"groundswell: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngroundswell: stopped; the same command goes on from here", file=sys.stderr)
        return 130
