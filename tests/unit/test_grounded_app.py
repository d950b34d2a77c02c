"""Around a model's app: what is searched, what goes wrong with documents, and what is left alone. No vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments import request_scope
from deployments.access.keys import KeyRing
from deployments.config import AssistantConfig, GroundingConfig
from deployments.dispatch import App, Dispatcher, Receive, Scope, Send
from deployments.errors import BadRequest, EngineUnavailable, NotFound, Overloaded
from deployments.grounding.asgi import GroundedApp, Limits
from deployments.grounding.layout import INSTRUCTIONS, Passage, passage_id
from tests.unit.asgi_client import AsgiClient
from tests.unit.recording import LIMIT_S, Recorder
from tests.unit.retrievers import StubRetriever, hit

pytestmark = pytest.mark.asyncio

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
TOOL = {"type": "file_search", "vector_store_ids": ["vs_1"]}
PASSAGE = Passage("file-1", "tides.md", 0, "The tide turns twice a day.", 0.9)
ID = passage_id(PASSAGE)


class StubApp:
    """A stub model app: answers a chat with one marked sentence, and remembers what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[Scope] = []
        self.status = 200
        self.answer: dict[str, Any] = {
            "model": "tiny",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": f"Twice a day [{ID}]."}}],
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.bodies.append((await receive())["body"])
        headers = [(b"content-type", b"application/json"), (b"content-length", b"7"), (b"x-mine", b"1")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(self.answer).encode()})

    @property
    def asked(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.bodies[-1])
        return body


class House:
    """A grounded app behind the dispatcher, as a client meets it."""

    def __init__(
        self,
        *,
        assistant: AssistantConfig | None = None,
        owner_of: Callable[[str], str | None] = str,
        retriever: bool = True,
        max_model_len: int = 4000,
        **config: Any,
    ) -> None:
        self.app, self.metrics = StubApp(), Recorder()
        self.retriever = StubRetriever(hit(PASSAGE, year=2024.0))
        self.admitted: list[int] = []
        self.let_in: Callable[[int], None] = self.admitted.append
        limits = Limits("tiny", lambda n: self.let_in(n), lambda text: len(text) // 4, max_model_len)
        grounded = GroundedApp(
            self.app,
            limits,
            self.retriever if retriever else None,
            GroundingConfig(**config),
            metrics=self.metrics,
            assistant=assistant,
            owner_of=owner_of,
        )

        async def resolve(name: str) -> App | None:
            return grounded

        paths = [CHAT, RESPONSES, "/v1/embeddings"]
        self.dispatcher = Dispatcher(resolve, ["tiny"], paths, {}, max_body_bytes=10**6)
        self.hang_up = asyncio.Event()

    async def ask(self, body: Any, path: str = CHAT) -> tuple[int, Any, dict[str, str]]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = AsgiClient(raw, path=path, headers=[(b"content-length", str(len(raw)).encode())])
        client.gone = self.hang_up
        async with asyncio.timeout(LIMIT_S):
            status, answer, headers = await client.ask(self.dispatcher)
        return status, json.loads(answer) if status else None, headers | {"length": str(len(answer))}

    def outcomes(self) -> list[str]:
        return [tags[2] for tags in self.metrics.counts if tags[0] == "grounding_searches"]


def question(*tools: Any, content: str = "When does the tide turn?", **rest: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "tools": [*(tools or [TOOL])], **rest}


async def test_a_question_is_searched_for_laid_out_and_its_answer_annotated() -> None:
    house = House()
    status, answer, headers = await house.ask(question(TOOL | {"max_num_results": 3, "filters": {"type": "eq"}}))
    assert house.retriever.asked == [
        {"stores": ["vs_1"], "query": "When does the tide turn?", "max": 3, "filters": {"type": "eq"}}
    ]
    system, user = house.app.asked["messages"]
    assert system["content"] == INSTRUCTIONS
    assert f'<passage id="{ID}" source="tides.md">\n{PASSAGE.text}' in user["content"]
    assert user["content"].endswith("When does the tide turn?")
    assert "tools" not in house.app.asked
    message = answer["choices"][0]["message"]
    assert (status, message["content"]) == (200, "Twice a day.")
    assert message["annotations"] == [
        {"type": "file_citation", "file_id": "file-1", "filename": "tides.md", "index": 11, "result_index": 0}
    ]
    fields = message["provider_specific_fields"]
    assert fields["search_results"][0]["search_query"] == "When does the tide turn?"
    assert fields["search_results"][0]["data"] == [
        {
            "file_id": "file-1",
            "filename": "tides.md",
            "score": 0.9,
            "attributes": {"year": 2024.0},
            "content": [{"type": "text", "text": PASSAGE.text}],
        }
    ]
    assert fields["file_search_status"] == "completed"
    assert (headers["content-length"], headers["x-mine"]) == (headers["length"], "1")
    sent_on = dict(house.app.scopes[-1]["headers"])
    assert sent_on[b"content-length"] == str(len(house.app.bodies[-1])).encode()


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "messages": []}',
        b'{"model":"tiny",  "messages": [{"role": "user", "content": "what is file_search?"}]}',
        b'{"model":"tiny",  "messages": [], "tools": [{"type": "function", "function": {"name": "file_search"}}]}',
    ],
)
async def test_a_request_without_the_tool_passes_byte_by_byte(body: bytes) -> None:
    house = House()
    _, answer, _ = await house.ask(body)
    assert house.app.bodies == [body]
    assert answer == house.app.answer
    assert (house.retriever.asked, house.admitted) == ([], [])


async def test_a_tool_that_is_switched_off_costs_no_search() -> None:
    house = House()
    await house.ask(question(tool_choice="none"))
    assert house.retriever.asked == []
    assert set(house.app.asked) == {"model", "messages"}


async def test_past_searches_reach_no_model_even_where_nothing_is_searched_now() -> None:
    house = House()
    items = [{"type": "file_search_call", "id": "fs_1"}, {"role": "user", "content": "And then?"}]
    await house.ask({"model": "tiny", "input": items}, RESPONSES)
    assert house.app.asked["input"] == items[1:]


async def test_errors_of_the_app_pass_untouched() -> None:
    house = House()
    house.app.status, house.app.answer = 400, {"error": {"message": f"no [{ID}]"}}
    status, answer, headers = await house.ask(question())
    assert (status, answer, headers["content-length"]) == (400, house.app.answer, "7")


async def test_nothing_is_searched_for_a_request_that_is_not_let_in() -> None:
    house = House()

    def refuse(n: int) -> None:
        raise Overloaded("It is full.", retry_after_s=7)

    house.let_in = refuse
    status, answer, headers = await house.ask(question())
    assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "overloaded", "7")
    assert house.retriever.asked == []


async def test_all_sequences_of_a_request_are_let_in_together() -> None:
    house = House()
    await house.ask(question(n=3))
    assert house.admitted == [3]


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (NotFound("Vector store with id 'vs_1' not found."), 404, "refused"),
        (BadRequest("`filters.type` must be …", param="filters"), 400, "refused"),
        (EngineUnavailable("The embedding model is away."), 503, "failed"),
        (Overloaded("The Retriever has too much to do.", retry_after_s=2), 503, "failed"),
        (ConnectionError("secret"), 503, "failed"),
    ],
)
async def test_what_goes_wrong_with_a_search_is_an_http_status(error: Exception, status: int, outcome: str) -> None:
    house = House()
    house.retriever.error = error
    got, answer, headers = await house.ask(question())
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in json.dumps(answer)
    assert ("retry-after" in headers) == (status == 503)
    assert (house.app.bodies, house.outcomes()) == ([], [outcome])


async def test_a_late_search_is_cancelled_and_answered_503() -> None:
    house = House(search_timeout_s=0.01)
    house.retriever.hangs = True
    status, answer, headers = await house.ask(question())
    assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "documents_unavailable", "5")
    assert house.retriever.cancelled


async def test_a_client_that_hangs_up_cancels_the_search() -> None:
    house = House()
    house.retriever.hangs = True
    asking = asyncio.create_task(house.ask(question()))
    await house.retriever.began.wait()
    house.hang_up.set()
    assert (await asking)[0] == 0
    assert house.retriever.cancelled
    assert (house.app.bodies, house.outcomes()) == ([], ["cancelled"])


@pytest.mark.parametrize(
    ("configured", "requested", "status"),
    [(False, None, 503), (True, None, 200), (False, True, 200), (True, False, 503)],
)
async def test_an_answer_does_without_documents_only_where_that_is_allowed_and_says_so(
    configured: bool, requested: bool | None, status: int
) -> None:
    house = House(allow_without_documents=configured)
    house.retriever.error = ConnectionError()
    got, answer, headers = await house.ask(question(TOOL | {"allow_without_documents": requested}))
    assert got == status
    assert ("x-groundswell-documents" in headers) == (status == 200)
    if status == 200:
        fields = answer["choices"][0]["message"]["provider_specific_fields"]
        assert (fields["file_search_status"], fields["search_results"][0]["data"]) == ("failed", [])
        assert house.app.asked["messages"] == question()["messages"]


async def test_a_server_without_documents_says_so() -> None:
    status, answer, _ = await House(retriever=False).ask(question())
    assert (status, answer["error"]["param"]) == (400, "tools")


async def test_a_search_that_finds_nothing_is_no_failure() -> None:
    house = House()
    house.retriever.found = []
    status, answer, _ = await house.ask(question())
    assert status == 200
    assert "There are no passages." in house.app.asked["messages"][-1]["content"]
    assert answer["choices"][0]["message"]["content"] == f"Twice a day [{ID}]."


async def test_passages_take_the_room_that_prompt_and_answer_leave() -> None:
    house = House()
    texts = [f"{i}" + " word" * 400 for i in range(9)]
    house.retriever.found = [hit(Passage("f", "f.md", i, text, 1 - i / 10)) for i, text in enumerate(texts)]
    await house.ask(question(max_tokens=2000))
    prompt = house.app.asked["messages"][-1]["content"]
    assert [text in prompt for text in texts] == [True] * 3 + [False] * 6


async def test_no_room_for_any_passage_is_an_error_rather_than_an_empty_answer() -> None:
    house = House(max_model_len=200)
    status, answer, _ = await house.ask(question(max_tokens=100))
    assert (status, house.app.bodies) == (400, [])
    assert "No passage fits" in answer["error"]["message"]


async def test_a_body_that_only_looks_like_json_is_refused() -> None:
    assert (await House().ask(b'{"model": "tiny", "file_search": "\xff"}'))[0] == 400


ASSISTANT = AssistantConfig(
    name="handbook",
    model="tiny",
    vector_store_ids=("vs_hand",),
    instructions="You know the handbook.",
    max_num_results=4,
    sources_in_text=True,
)


async def test_an_assistant_searches_its_stores_under_its_own_name() -> None:
    house = House(assistant=ASSISTANT)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "When?"}]
    _, answer, _ = await house.ask({"model": "handbook", "messages": messages})
    assert house.retriever.asked == [{"stores": ["vs_hand"], "query": "When?", "max": 4, "filters": None}]
    assert house.app.asked["model"] == "tiny"
    assert house.app.asked["messages"][0]["content"] == f"{INSTRUCTIONS}\n\nYou know the handbook.\n\nBe brief."
    assert answer["model"] == "handbook"
    message = answer["choices"][0]["message"]
    assert message["content"] == "Twice a day.\n\nSources:\n- tides.md"
    assert [a["index"] for a in message["annotations"]] == [11]


async def test_an_assistant_searches_what_the_request_brings_too() -> None:
    house = House(assistant=ASSISTANT)
    await house.ask(question(TOOL | {"max_num_results": 2}))
    assert (house.retriever.asked[0]["stores"], house.retriever.asked[0]["max"]) == (["vs_hand", "vs_1"], 2)


async def test_stores_are_searched_as_the_key_that_asks_and_an_assistants_as_the_key_it_names() -> None:
    house = House(assistant=ASSISTANT.model_copy(update={"owner": "librarian"}))
    house.retriever.found = [hit(PASSAGE)]
    with request_scope.request_scope(request_scope.Caller("ann", "ann")):
        status, _, _ = await house.ask(question(TOOL))
        assert (status, house.retriever.owners) == (200, ["librarian", "ann"])
        assert [asked["stores"] for asked in house.retriever.asked] == [["vs_hand"], ["vs_1"]]
        plain = House()
        await plain.ask(question(TOOL))
        assert plain.retriever.owners == ["ann"]


async def test_an_assistants_stores_may_be_those_from_before_there_were_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"name": "heir", "sha256": "0" * 64, "owns_unowned": True}]))
    house = House(assistant=ASSISTANT.model_copy(update={"owner": "heir"}), owner_of=KeyRing(file).owner_of)
    with request_scope.request_scope(request_scope.Caller("ann", "ann")):
        await house.ask(question(TOOL))
    asked = [(owner, call["stores"]) for owner, call in zip(house.retriever.owners, house.retriever.asked, strict=True)]
    assert asked == [(None, ["vs_hand"]), ("ann", ["vs_1"])]


async def test_an_answer_that_is_json_gets_no_list_of_sources() -> None:
    house = House(assistant=ASSISTANT)
    _, answer, _ = await house.ask(question(response_format={"type": "json_object"}))
    assert answer["choices"][0]["message"]["content"] == "Twice a day."


async def test_an_assistant_without_its_documents_says_so_in_the_text() -> None:
    house = House(assistant=ASSISTANT.model_copy(update={"allow_without_documents": True}))
    house.retriever.error = ConnectionError()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "When?"}]
    _, answer, _ = await house.ask({"model": "handbook", "messages": messages})
    assert house.app.asked["messages"] == [
        {"role": "system", "content": "You know the handbook.\n\nBe brief."},
        messages[1],
    ]
    assert answer["choices"][0]["message"]["content"].endswith(
        "(The documents could not be searched: this answer does without them.)"
    )


async def test_an_assistant_answers_questions_and_nothing_else() -> None:
    status, answer, _ = await House(assistant=ASSISTANT).ask({"model": "handbook", "input": "x"}, "/v1/embeddings")
    assert (status, answer["error"]["param"]) == (404, "model")
