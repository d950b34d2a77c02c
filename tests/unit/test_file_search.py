"""The `file_search` tool of a request: what it may say, and what is left of the request without it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from deployments.errors import BadRequest
from deployments.grounding import chat, responses
from deployments.grounding.file_search import Answering, query_of, take_tool, tokens_besides_passages
from deployments.grounding.layout import Passage, lay_out
from deployments.grounding.sse import EventSplitter, data_of, event_of

TOOL = {"type": "file_search", "vector_store_ids": ["vs_1"]}
OTHER = {"type": "function", "function": {"name": "f"}}


def taken(**body: Any) -> tuple[Any, dict[str, Any]]:
    return take_tool(body), body


def test_the_tool_is_read_and_taken_out() -> None:
    full = TOOL | {
        "filters": {"type": "eq", "key": "k", "value": 1},
        "max_num_results": 3,
        "ranking_options": {"score_threshold": 0.5, "hybrid_search": {"embedding_weight": 1, "text_weight": 0.5}},
        "allow_without_documents": True,
    }
    found, body = taken(tools=[OTHER, full], tool_choice="auto")
    search, answering = found
    assert (search.vector_store_ids, search.max_num_results, search.filters) == (("vs_1",), 3, full["filters"])
    assert search.ranking_options.hybrid_search.text_weight == 0.5
    assert search.allow_without_documents is True
    assert (answering.tool, answering.tool_index, answering.tool_choice) == (full, 1, "auto")
    assert body == {"tools": [OTHER], "tool_choice": "auto"}


@pytest.mark.parametrize("absent", [{"filters": None}, {"max_num_results": None}, {"ranking_options": None}])
def test_null_means_left_out(absent: dict[str, None]) -> None:
    assert taken(tools=[TOOL | absent])[0]


@pytest.mark.parametrize(
    ("tools", "choice", "left"),
    [
        ([TOOL], "auto", {}),
        ([TOOL], "required", {}),
        ([TOOL], {"type": "file_search"}, {}),
        ([TOOL, OTHER], {"type": "file_search"}, {"tools": [OTHER]}),
        ([TOOL, OTHER], "required", {"tools": [OTHER], "tool_choice": "auto"}),
        ([TOOL, OTHER], OTHER, {"tools": [OTHER], "tool_choice": OTHER}),
        (
            [TOOL, OTHER],
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "file_search"}, OTHER]},
            {"tools": [OTHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [OTHER]}},
        ),
        (
            [TOOL, OTHER],
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "file_search"}]},
            {"tools": [OTHER], "tool_choice": "none"},
        ),
    ],
)
def test_what_the_model_may_still_choose(tools: list[Any], choice: Any, left: dict[str, Any]) -> None:
    found, body = taken(tools=tools, tool_choice=choice)
    assert found
    assert body == left


def test_a_tool_that_may_not_be_used_is_taken_out_and_not_searched() -> None:
    assert taken(tools=[TOOL, OTHER], tool_choice="none") == (None, {"tools": [OTHER], "tool_choice": "none"})


@pytest.mark.parametrize("tools", [None, [], [OTHER], "file_search", [None, 7]])
def test_a_request_without_the_tool_stays_as_it_is(tools: Any) -> None:
    assert taken(tools=tools) == (None, {"tools": tools})


@pytest.mark.parametrize(
    ("tools", "param", "words"),
    [
        ([{"type": "file_search"}], "tools[0]", "vector_store_ids"),
        ([TOOL | {"vector_store_ids": []}], "tools[0].vector_store_ids", ">= 1"),
        ([TOOL | {"vector_store_ids": ["vs"] * 50}], "tools[0].vector_store_ids", "<= 16"),
        ([TOOL | {"vector_store_ids": "vs_1"}], "tools[0].vector_store_ids", "array"),
        ([OTHER, TOOL | {"max_num_results": 51}], "tools[1].max_num_results", "<= 50"),
        ([TOOL | {"max_num_results": 0}], "tools[0].max_num_results", ">= 1"),
        ([TOOL | {"filters": "x"}], "tools[0].filters", "object"),
        ([TOOL | {"ranking_options": {"score_threshold": 2}}], "tools[0].ranking_options.score_threshold", "<= 1"),
        ([TOOL | {"rerank": 1}], "tools[0]", "rerank"),
        ([TOOL, TOOL], "tools", "more than one"),
    ],
)
def test_a_malformed_tool_is_refused_by_place(tools: list[Any], param: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        take_tool({"tools": tools})
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("messages", "query"),
    [
        ([{"role": "user", "content": " why? "}], "why?"),
        ([{"role": "user", "content": "one"}, {"role": "assistant"}, {"role": "user", "content": "two"}], "two"),
        ([{"role": "user", "content": "asked"}, {"role": "tool", "content": "called"}], "asked"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, "b"]}], "a\nb"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "a"),
        ([{"role": "user", "content": "begin" + "x" * 100 + "end"}], "begin\nxxend"),
    ],
)
def test_the_users_last_words_are_searched_for(messages: list[Any], query: str) -> None:
    assert query_of(messages, 10 if len(str(messages)) > 120 else 100) == query


@pytest.mark.parametrize("content", ["", "  ", None, [], [{"type": "image_url"}]])
def test_without_words_there_is_nothing_to_search_for(content: Any) -> None:
    with pytest.raises(BadRequest, match="text to search"):
        query_of([{"role": "user", "content": content}], 100)


def test_the_bound_of_a_prompt_counts_all_that_is_in_it() -> None:
    def words(text: str) -> int:
        return len(text.split())

    bare = tokens_besides_passages([], None, words)
    message = {"role": "assistant", "content": "four words of text", "tool_calls": [{"id": "c1"}]}
    assert tokens_besides_passages([message], None, words) >= bare + 4 + 2
    assert tokens_besides_passages([], [OTHER], words) > bare


PASSAGE = Passage("file-1", "a.md", 0, "Water boils.", 1.0)


def laid(api: Any, body: dict[str, Any]) -> dict[str, Any]:
    layout = lay_out(api.messages_of(body), [PASSAGE], 1000, len)
    api.put(body, layout.messages)
    return body


def test_a_response_is_laid_out_as_the_same_chat_would_be() -> None:
    instructions, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    chatted = laid(chat, {"messages": [instructions, question]})["messages"]
    for given in ("Why?", [question], [{"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}]):
        body = laid(responses, {"input": given, "instructions": "Be brief."})
        assert body["instructions"] == chatted[0]["content"]
        assert [(item["role"], item["content"]) for item in body["input"]] == [("user", chatted[1]["content"])]


def test_items_that_are_not_the_question_keep_their_form() -> None:
    image = {"type": "input_image", "image_url": "data:"}
    history = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "first"}]},
        {"type": "message", "role": "assistant", "id": "m", "content": [{"type": "output_text", "text": "yes"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "7"},
    ]
    question = {"role": "user", "content": [image, {"type": "input_text", "text": "Why?"}]}
    items = laid(responses, {"input": [*history, question]})["input"]
    assert items[:-1] == history
    assert [part["type"] for part in items[-1]["content"]] == ["input_text", "input_image", "input_text"]
    assert "Water boils." in items[-1]["content"][0]["text"]


def test_past_searches_are_dropped_from_the_input() -> None:
    past, question = {"type": "file_search_call", "id": "fs_1"}, {"role": "user", "content": "Why?"}
    body = {"input": [past, question]}
    assert responses.drop_past_calls(body)
    assert body["input"] == [question]
    assert not responses.drop_past_calls(body)


@pytest.mark.parametrize(
    ("api", "body", "param"),
    [
        (chat, {}, "messages"),
        (chat, {"messages": [{"content": "x"}]}, "messages"),
        (chat, {"messages": [{"role": "user", "content": 7}]}, None),
        (chat, {"messages": [{"role": "user", "content": [7]}]}, None),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None),
        (responses, {}, "input"),
        (responses, {"input": ["x"]}, "input"),
    ],
)
def test_a_conversation_of_no_known_shape_is_refused(api: Any, body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(BadRequest) as refused:
        api.messages_of(body)
    assert refused.value.param == param


@pytest.mark.parametrize(("names", "text"), [([], ""), (["a", "b\nc", "a"], "\n\nSources:\n- a\n- b c")])
def test_sources_are_listed_once_each_in_the_order_of_their_citations(names: list[str], text: str) -> None:
    assert Answering(sources_in_text=True).postscript([{"filename": name} for name in names]) == text


def test_events_are_cut_apart_wherever_the_bytes_are_cut() -> None:
    stream = event_of({"type": "a", "text": "é"}, named=True) + b": alive\n\n" + b"data: [DONE]\n\n"
    splitter = EventSplitter()
    events = [event for i in range(len(stream)) for event in splitter.feed(stream[i : i + 1])]
    assert b"".join(events) == stream
    assert [data_of(event) for event in events] == [{"type": "a", "text": "é"}, None, None]
    assert splitter.end() == b""


def test_a_stream_that_breaks_before_any_text_still_tells_of_the_search() -> None:
    stream = responses.Stream(Answering(id="fs_1", query="q"))
    created = {"type": "response.created", "response": {"tools": []}, "sequence_number": 0}
    error = {"type": "error", "message": "no", "sequence_number": 1}
    events = [data_of(event) for each in (created, error) for event in stream.event(event_of(each, named=True))]
    assert [event["sequence_number"] for event in events if event] == list(range(7))
    assert events[-1] == error | {"sequence_number": 6}


@pytest.mark.parametrize("event", [b": alive\n\n", b"data: [DONE]\n\n", b'data: {"error": {"message": "no"}}\n\n'])
def test_what_is_no_chunk_passes_a_streamed_chat_untouched(event: bytes) -> None:
    assert chat.Stream(Answering()).event(event) == [event]


IDS = {"k3f9": Passage("file-1", "a.md", 0, "x"), "b2c1": Passage("file-2", "b.md", 0, "y")}
PIECES = ("[k3f9]", " [b2c1]", "[z9z9]", "[k3f9, b2c1]", "[k3", "f9]", "[", "]", " ", "word", "é🌊")


def chat_events(pieces: list[str]) -> list[bytes]:
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces), {}]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices[-1]["finish_reason"] = "stop"
    return [event_of({"model": "tiny", "choices": [choice]}) for choice in choices]


def response_events(pieces: list[str]) -> list[bytes]:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "".join(pieces), "annotations": []}
    output = [{"type": "message", "id": "msg_1", "content": [part]}]
    return [
        event_of({"sequence_number": 0, **event}, named=True)
        for event in (
            {"type": "response.in_progress", "response": {"output": []}},
            *({"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []} for piece in pieces),
            {"type": "response.output_text.done", **place, "text": part["text"]},
            {"type": "response.content_part.done", **place, "part": part},
            {"type": "response.completed", "response": {"output": output}},
        )
    ]


@pytest.mark.parametrize("sources", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_stream_says_what_the_whole_says_however_it_is_cut(seed: int, sources: bool) -> None:
    rng = random.Random(seed)
    answering = Answering(id="fs_1", cited_as=IDS, sources_in_text=sources)
    for _ in range(50):
        pieces = rng.choices(PIECES, k=rng.randrange(1, 10))
        whole: Any = {"choices": [{"message": {"content": "".join(pieces)}}]}
        message = chat.rewrite(whole, answering)["choices"][0]["message"]

        stream: Any = chat.Stream(answering)
        chunks = [data_of(event) or {} for given in chat_events(pieces) for event in stream.event(given)]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
        assert deltas[-1]["annotations"] == message["annotations"]

        stream = responses.Stream(answering)
        events = [data_of(event) or {} for given in response_events(pieces) for event in stream.event(given)]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        added = [e["annotation"] for e in events if e["type"] == "response.output_text.annotation.added"]
        *_, done, part, completed = events
        final = completed["response"]["output"][1]["content"][0]
        assert said == done["text"] == part["part"]["text"] == final["text"] == message["content"]
        assert added == part["part"]["annotations"] == final["annotations"] == message["annotations"]


@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"role": "user", "content": "Why?"}], "instructions": "Be brief."},
        {"input": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    ],
)
def test_a_conversation_is_put_back_as_it_was(body: dict[str, Any]) -> None:
    again = dict(body)
    responses.put(again, responses.messages_of(body))
    assert again == body
