"""`file_search` in the Responses API, in OpenAI's shapes. Pure.

The search is an output item of its own ahead of vLLM's, so of a stream every `output_index` moves by one, and the whole
gets one `sequence_number` from 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from deployments.errors import BadRequest
from deployments.grounding.citations import Citation, CitationReader, read
from deployments.grounding.file_search import COMPLETED, SYSTEM_ROLES, Answering, Body, normal_parts, whole_number
from deployments.grounding.sse import data_of, event_of

PATH: Final = "/v1/responses"
RESULTS: Final = "file_search_call.results"
_CALL: Final = "file_search_call"


def drop_past_calls(body: Body) -> bool:
    """Take past `file_search_call` items out of the input, which vLLM would refuse; return whether there were any.

    Clients that keep the conversation themselves send an answer's whole `output` back.
    """
    items = body.get("input")
    if not isinstance(items, list):
        return False
    body["input"] = [item for item in items if not (isinstance(item, dict) and item.get("type") == _CALL)]
    return len(body["input"]) < len(items)


def messages_of(body: Body) -> list[Body]:
    """Return instructions and input as a conversation that `lay_out` can read; `put` undoes it.

    Raises:
        BadRequest: The input is no list of items.
    """
    given, instructions = body.get("input"), body.get("instructions")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise BadRequest("`input` must be a string or a list of items.", param="input")
    messages: list[Body] = []
    if isinstance(instructions, str) and instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if item.get("role") in (*SYSTEM_ROLES, "user"):
            messages.append({"role": item["role"], "content": normal_parts(item.get("content")), "item": item})
        else:  # an answer, or an item that is no message; its text is here to be counted
            messages.append({"role": "", "content": json.dumps(item), "item": item})
    return messages


def put(body: Body, messages: Sequence[Mapping[str, Any]]) -> None:
    """Put a conversation back into its request: what is in front and no item of the input becomes its instructions."""
    body.pop("instructions", None)
    if messages[0]["role"] == "system" and "item" not in messages[0]:
        body["instructions"], messages = messages[0]["content"], messages[1:]
    body["input"] = [_item(message) for message in messages]


def _item(message: Mapping[str, Any]) -> Body:
    given: Body = message.get("item", {})
    if message["role"] == "" or (given and message["content"] == normal_parts(given.get("content"))):
        return given
    content = message["content"]
    if isinstance(content, list):
        content = [{**part, "type": "input_text"} if part.get("type") == "text" else part for part in content]
    return {**given, "role": message["role"], "content": content}


def output_tokens(body: Body) -> int | None:
    """Return how long the answer may become, where the request says so."""
    return whole_number(body.get("max_output_tokens"))


def sequences(body: Body) -> int:
    """Return how many answers are asked for."""
    return 1


def is_prose(body: Body) -> bool:
    """Whether the answer is text for people: a list of sources would break any other format."""
    text = body.get("text")
    wanted = text.get("format") if isinstance(text, dict) else None
    return (not isinstance(wanted, dict) or wanted.get("type") == "text") and not body.get("structured_outputs")


def rewrite(answer: Body, answering: Answering) -> Body:
    """Return a whole response without markers, with annotations and the search as its first item."""
    _restore(answer, answering)
    answer["output"] = [_call(answering), *(_clean_item(item, answering) for item in answer.get("output") or ())]
    return answer


def _restore(response: Body, answering: Answering) -> None:
    """Have a response repeat the request as the client sent it."""
    if answering.model is not None:
        response["model"] = answering.model
    response["instructions"] = answering.instructions
    if answering.tool is not None:
        tools = list(response.get("tools") or ())
        tools.insert(answering.tool_index, answering.tool)
        response["tools"] = tools
        response["tool_choice"] = answering.tool_choice or "auto"


def _call(answering: Answering) -> Body:
    return {
        "id": answering.id,
        "type": _CALL,
        "status": answering.status,
        "queries": [answering.query],
        "results": answering.results() if answering.with_results else None,
    }


def _clean_item(item: Body, answering: Answering) -> Body:
    for part in item.get("content") or ():
        _clean_part(part, answering)
    for key in ("arguments", "input"):
        if isinstance(item.get(key), str):
            item[key] = read(item[key], answering.cited_as)[0]
    return item


def _clean_part(part: Body, answering: Answering) -> None:
    if not isinstance(part.get("text"), str) or not part["text"]:
        return
    part["text"], citations = read(part["text"], answering.cited_as)
    if part.get("type") == "output_text":
        part["annotations"] = answering.annotations(citations)
        part["text"] += answering.postscript(part["annotations"])


_DONE: Final[Mapping[str, tuple[str, str]]] = {
    "response.output_text.done": ("response.output_text.delta", "text"),
    "response.reasoning_text.done": ("response.reasoning_text.delta", "text"),
    "response.reasoning_summary_text.done": ("response.reasoning_summary_text.delta", "text"),
    "response.function_call_arguments.done": ("response.function_call_arguments.delta", "arguments"),
    "response.custom_tool_call_input.done": ("response.custom_tool_call_input.delta", "input"),
}
"""By the event that ends a text: the event that brings its pieces, and the key of the whole."""
_DELTAS: Final = frozenset(delta for delta, _ in _DONE.values())
_TEXT: Final = "response.output_text.delta"


class Stream:
    """Rewrites the events of one streamed response."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._next = 0
        self._searched = False
        self._readers: dict[tuple[str, int, int], CitationReader] = {}
        self._annotated: Counter[tuple[str, int, int]] = Counter()

    def event(self, event: bytes) -> list[bytes]:
        """Return what one event of vLLM's becomes."""
        data = data_of(event)
        if data is None or not isinstance(data.get("type"), str):
            return [event]
        return [self._numbered(each) for each in self._rewrite(data)]

    def _numbered(self, data: Body) -> bytes:
        data["sequence_number"] = self._next
        self._next += 1
        return event_of(data, named=True)

    def _rewrite(self, data: Body) -> list[Body]:
        kind = data["type"]
        before = [] if self._searched or kind in ("response.created", "response.in_progress") else self._search()
        if "output_index" in data:
            data["output_index"] += 1
        if kind in _DELTAS:
            return [*before, *self._delta(data)]
        if kind in _DONE:
            return [*before, *self._done(data, *_DONE[kind])]
        if kind == "response.content_part.done":
            _clean_part(data["part"], self._answering)
        elif kind == "response.output_item.done":
            _clean_item(data["item"], self._answering)
        elif kind in ("response.created", "response.in_progress"):
            _restore(data["response"], self._answering)
            if kind == "response.in_progress":
                return [data, *self._search()]
        elif isinstance(data.get("response"), dict):
            rewrite(data["response"], self._answering)
        return [*before, data]

    def _search(self) -> list[Body]:
        """Return the search's own events, all at once: it was over before the stream began."""
        self._searched = True
        answering = self._answering
        call = _call(answering)
        begun = {**call, "status": "in_progress", "results": None}
        place = {"output_index": 0, "item_id": answering.id}
        events: list[Body] = [
            {"type": "response.output_item.added", "output_index": 0, "item": begun},
            {"type": "response.file_search_call.in_progress", **place},
            {"type": "response.file_search_call.searching", **place},
        ]
        if answering.status == COMPLETED:  # of one that failed, OpenAI has no event; its item says so
            events.append({"type": "response.file_search_call.completed", **place})
        return [*events, {"type": "response.output_item.done", "output_index": 0, "item": call}]

    def _delta(self, data: Body) -> list[Body]:
        place = _place(data["type"], data)
        reader = self._readers.setdefault(place, CitationReader(self._answering.cited_as))
        data["delta"], citations = reader.feed(data["delta"])
        said = [data] if data["delta"] or data.get("logprobs") else []
        return [*said, *self._annotate(data, citations)]

    def _annotate(self, data: Body, citations: list[Citation]) -> list[Body]:
        if data["type"] != _TEXT or not citations:
            return []
        place = _place(_TEXT, data)
        events: list[Body] = []
        for annotation in self._answering.annotations(citations):
            where = {key: data[key] for key in ("item_id", "output_index", "content_index")}
            added = {"annotation_index": self._annotated[place], "annotation": annotation}
            events.append({"type": "response.output_text.annotation.added", **where, **added})
            self._annotated[place] += 1
        return events

    def _done(self, data: Body, delta: str, key: str) -> list[Body]:
        """A text is over: say what was held back, then what the whole is."""
        place = _place(delta, data)
        reader = self._readers.pop(place, None)
        rest = reader.end() if reader is not None else ""
        spoke = bool(data[key])
        data[key], citations = read(data[key], self._answering.cited_as)
        if delta == _TEXT and spoke:
            postscript = self._answering.postscript(self._answering.annotations(citations))
            rest += postscript
            data[key] += postscript
        if not rest:
            return [data]
        more: Body = {"type": delta, "delta": rest}
        more |= {name: data[name] for name in ("item_id", "output_index", "content_index") if name in data}
        if delta == _TEXT:
            more["logprobs"] = []
        return [more, data]


def _place(kind: str, data: Body) -> tuple[str, int, int]:
    return kind, data["output_index"], data.get("content_index", 0)
