"""Answers from documents through the real app and OpenAI's client: two Routers, a real store, a real engine.

The tiny model cites nobody by itself. Where a citation matters, structured output makes it write one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import yaml

from benchmarks.replicas import replicas
from deployments.grounding.layout import Passage, lay_out
from models import tiny_random
from tests.collector import Collector, over_grpc
from tests.e2e.serving import ROOT, Served, serving, wait_for
from tests.unit.house import house

MODEL = "tiny"
RESTARTS_WITHIN_S = 240
TIDES = "The tide turns twice a day, and it follows the moon."
QUESTION: Any = [{"role": "user", "content": "When does the tide turn?"}]
FILES = {
    "tides.md": (TIDES, {"sea": True, "year": 2024}),
    "storms.md": ("A storm raises the sea, and the tide with it.", {"sea": True, "year": 2019}),
    "bread.md": ("A baker makes dough from flour and water.", {"sea": False, "year": 2024}),
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with over_grpc() as made:
        yield made


async def made_before(documents: Path) -> str:
    """Return the id of a store that is there before the app is: an assistant's is named in the configuration."""
    async with house(documents) as earlier:
        store_id, _ = await earlier.store_of(TIDES)
        return store_id


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("grounded")
    model = {
        "name": MODEL,
        "engine_args": {
            "model": str(tiny_random.write(ROOT / "models" / "tiny-random", lora=True)),
            "dtype": "float32",
            "max_model_len": 2048,
            "enforce_eager": True,
        },
        "deployment": {"num_replicas": 1},
    }
    args = {
        "models": [model],
        "assistants": [
            {"name": "handbook", "model": MODEL, "vector_store_ids": [asyncio.run(made_before(folder / "store"))]},
            {"name": "lost", "model": MODEL, "vector_store_ids": ["vs_gone"]},
        ],
        "router": {"deployment": {"num_replicas": 2}},
        "documents": {"uri": str(folder / "store"), "retriever": {"num_replicas": 2}},
        "grounding": {"search_timeout_s": 10},
        "tracing": {"otlp_endpoint": collector.endpoint, "sample_ratio": 0},  # but for clients that want a trace
    }
    application = {"name": "groundswell", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    with serving(config, tmp_path_factory.mktemp("state")) as served:
        yield served


@pytest.fixture(scope="module")
def base(app: Served) -> str:
    return f"http://127.0.0.1:{app.port}"


@pytest.fixture(scope="module")
def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def store(client: openai.OpenAI) -> str:
    made = client.vector_stores.create(name="sea")
    for name, (text, attributes) in FILES.items():
        file = client.files.create(file=(name, text.encode()), purpose="assistants")
        attached = client.vector_stores.files.create_and_poll(file.id, vector_store_id=made.id, attributes=attributes)
        assert attached.status == "completed"
    return made.id


def tool(store: str, **options: Any) -> Any:
    return {"type": "file_search", "vector_store_ids": [store], **options}


def respond(client: openai.OpenAI, store: str, **options: Any) -> Any:
    request = {"model": MODEL, "input": QUESTION, "tools": [tool(store)], "max_output_tokens": 8, "temperature": 0}
    return client.responses.create(**(request | {"include": ["file_search_call.results"]} | options))


def chat(client: openai.OpenAI, store: str, **options: Any) -> Any:
    request = {"model": MODEL, "messages": QUESTION, "tools": [tool(store)], "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**(request | options))


ASK = pytest.mark.parametrize("ask", [respond, chat])
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def cites(client: openai.OpenAI, store: str) -> dict[str, Any]:
    """Options that make the model say one sentence and cite the passage about tides, of the two that are found."""
    results = respond(client, store).output[0].results
    passages = [Passage(found.file_id, found.filename, 0, found.text) for found in results]
    ids = lay_out([{"role": "user", "content": "?"}], passages, 1 << 30, len).ids
    (marker,) = (id_ for id_, passage in ids.items() if passage.filename == "tides.md")
    return {"extra_body": {"structured_outputs": {"choice": [f"It turns twice a day [{marker}]."]}}}


def test_one_trace_of_a_client_has_the_router_the_search_and_the_engine_and_others_have_none(
    client: openai.OpenAI, store: str, collector: Collector
) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    respond(client, store)
    respond(client, store, extra_headers={"traceparent": f"00-{trace}-{parent}-01"})
    expected = {"Router POST", "call search", "Retriever.search", "llm_request"}
    wait_for(lambda: expected <= collector.trace(trace).keys(), "all spans have come")
    spans = collector.trace(trace)
    router = spans["Router POST"]
    assert router.parent == parent
    assert spans["call search"].parent == spans["llm_request"].parent == router.id
    assert spans["Retriever.search"].parent == spans["call search"].id
    assert len({spans[name].service for name in ("Router POST", "Retriever.search", "llm_request")}) == 3
    assert "gen_ai.latency.time_to_first_token" in spans["llm_request"].attributes
    others = {name for other in collector.traces() - {trace} for name in collector.trace(other)}
    assert not others & expected  # there may be vLLM's own, of how it starts


def citation(annotation: Any) -> tuple[str, int]:
    plain = annotation if isinstance(annotation, dict) else annotation.model_dump()
    assert plain["type"] == "file_citation" and plain["file_id"].startswith("file-")
    return plain["filename"], plain["index"]


def test_a_response_begins_with_what_was_found(client: openai.OpenAI, store: str) -> None:
    call, message = respond(client, store).output
    assert (call.type, call.status, call.queries) == ("file_search_call", "completed", [QUESTION[0]["content"]])
    assert [result.filename for result in call.results] == ["tides.md", "storms.md"]
    assert call.results[0].text == TIDES
    assert call.results[0].attributes == {"sea": True, "year": 2024}
    assert message.type == "message"


def test_filters_and_limits_reach_the_search(client: openai.OpenAI, store: str) -> None:
    old = {"type": "lt", "key": "year", "value": 2020}
    (found,) = respond(client, store, tools=[tool(store, filters=old)]).output[0].results
    assert found.filename == "storms.md"
    (first,) = respond(client, store, tools=[tool(store, max_num_results=1)]).output[0].results
    assert first.filename == "tides.md"


def test_a_question_that_nothing_answers_is_answered_all_the_same(client: openai.OpenAI, store: str) -> None:
    call, _ = respond(client, store, input="xylophone").output
    assert (call.status, call.results) == ("completed", [])


def test_a_response_cites_streaming_or_not(client: openai.OpenAI, store: str, cites: dict[str, Any]) -> None:
    options = cites | {"max_output_tokens": 64}
    plain = respond(client, store, **options)
    assert plain.output_text == "It turns twice a day."
    assert [citation(each) for each in plain.output[1].content[0].annotations] == [("tides.md", 20)]
    events = list(respond(client, store, stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[2:7]] == [
        "response.output_item.added",
        "response.file_search_call.in_progress",
        "response.file_search_call.searching",
        "response.file_search_call.completed",
        "response.output_item.done",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    added = [event for event in events if event.type == "response.output_text.annotation.added"]
    assert (text, [citation(event.annotation) for event in added]) == (plain.output_text, [("tides.md", 20)])
    final = events[-1].response
    assert final.output_text == plain.output_text
    assert final.output[0].results == plain.output[0].results
    assert [citation(each) for each in final.output[1].content[0].annotations] == [("tides.md", 20)]


def test_a_chat_cites_streaming_or_not(client: openai.OpenAI, store: str, cites: dict[str, Any]) -> None:
    options = cites | {"max_tokens": 64}
    message = chat(client, store, **options).choices[0].message
    assert message.content == "It turns twice a day."
    assert [citation(each) for each in message.annotations] == [("tides.md", 20)]
    (search,) = message.provider_specific_fields["search_results"]
    assert [result["filename"] for result in search["data"]] == ["tides.md", "storms.md"]
    choices = [c for chunk in chat(client, store, stream=True, **options) for c in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == message.content
    last = choices[-1].delta
    assert [citation(each) for each in last.annotations] == [("tides.md", 20)]
    assert last.provider_specific_fields["search_results"] == [search]


def test_a_response_goes_on_from_its_own_output(client: openai.OpenAI, store: str) -> None:
    first = respond(client, store)
    history = [*QUESTION, *(item.model_dump(exclude_none=True) for item in first.output)]
    second = respond(client, store, input=[*history, {"role": "user", "content": "And what does a storm do?"}])
    assert second.output[0].results[0].filename == "storms.md"


def test_the_same_passages_are_in_the_prefix_cache(client: openai.OpenAI, store: str) -> None:
    answers = [chat(client, store, messages=[{"role": "user", "content": f"tide {i}?"}]) for i in range(3)]
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert cached[-1] > 100


@ASK
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_store_is_a_404(client: openai.OpenAI, ask: Ask, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError, match="vs_gone"):
        ask(client, "vs_gone", stream=stream)


@ASK
def test_a_deleted_store_is_a_404_at_once(client: openai.OpenAI, ask: Ask) -> None:
    made = client.vector_stores.create(name="short-lived")
    ask(client, made.id)
    client.vector_stores.delete(made.id)
    for _ in range(4):  # whichever Router and Retriever it is
        with pytest.raises(openai.NotFoundError):
            ask(client, made.id)


@ASK
@pytest.mark.parametrize(
    "wrong",
    [
        {"filters": {"type": "like", "key": "year", "value": 1}},
        {"max_num_results": 51},
        {"vector_store_ids": []},
        {"vector_store_ids": ["vs_1"] * 50},
        {"ranking_options": {"ranker": "nobody"}},
    ],
)
def test_a_wrong_tool_is_a_400(client: openai.OpenAI, store: str, ask: Ask, wrong: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, store, tools=[tool(store) | wrong])


def test_an_assistant_is_listed_and_answers_from_its_own_store(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL, "handbook", "lost"]
    answer: Any = client.chat.completions.create(model="handbook", messages=QUESTION, max_tokens=8)
    assert (answer.model, answer.usage.completion_tokens > 0) == ("handbook", True)
    (search,) = answer.choices[0].message.provider_specific_fields["search_results"]
    assert [found["filename"] for found in search["data"]] == ["a.txt"]
    with pytest.raises(openai.NotFoundError, match="vs_gone"):
        client.chat.completions.create(model="lost", messages=QUESTION)


def test_many_clients_at_once_each_get_their_own_answer(base: str, store: str) -> None:
    failures: list[str] = []

    def ask(number: int) -> None:
        question = [{"role": "user", "content": "moon" if number % 2 else "dough"}]
        body = {"model": MODEL, "messages": question, "tools": [tool(store, max_num_results=1)], "max_tokens": 4}
        answer = requests.post(f"{base}/v1/chat/completions", json=body, timeout=120).json()
        found = answer["choices"][0]["message"]["provider_specific_fields"]["search_results"][0]["data"]
        if [each["filename"] for each in found] != ["tides.md" if number % 2 else "bread.md"]:
            failures.append(f"{number}: {found}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_without_any_retriever_a_request_fails_clearly_or_does_without_as_it_wants(
    app: Served, client: openai.OpenAI, store: str
) -> None:
    def kill_all() -> None:
        for retriever in replicas(app.run_id, "Retriever"):
            with contextlib.suppress(psutil.NoSuchProcess):
                retriever.kill()

    without = {"tools": [tool(store, allow_without_documents=True)], "max_output_tokens": 4}
    kill_all()
    with ThreadPoolExecutor(2) as pool:
        refusal, doing_without = (
            pool.submit(respond, client, store, stream=True),
            pool.submit(respond, client, store, **without),
        )
        while not (refusal.done() and doing_without.done()):  # new ones are on their way, and shall not be in time
            kill_all()
            time.sleep(0.2)
    refused = refusal.exception()
    assert isinstance(refused, openai.InternalServerError)
    assert (refused.status_code, refused.code) == (503, "documents_unavailable")
    assert int(refused.response.headers["retry-after"]) > 0
    call, message = doing_without.result().output
    assert (call.status, message.type) == ("failed", "message")
    begin = time.monotonic()
    while respond(client, store, **without).output[0].status == "failed":
        assert time.monotonic() - begin < RESTARTS_WITHIN_S, f"no Retriever within {RESTARTS_WITHIN_S} s"
    assert respond(client, store).output[0].results[0].filename == "tides.md"
