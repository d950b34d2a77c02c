"""`file_search` in Chat Completions, where OpenAI has none: LiteLLM's convention, and OpenAI's annotations beside it.

What was found is in `provider_specific_fields.search_results`, what was cited in `annotations`; in a stream, both come
with the delta that carries the choice's `finish_reason`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from deployments.errors import BadRequest
from deployments.grounding.citations import CitationReader, read
from deployments.grounding.file_search import SYSTEM_ROLES, Answering, Body, normal_parts, whole_number
from deployments.grounding.sse import data_of, event_of

PATH: Final = "/v1/chat/completions"


def messages_of(body: Body) -> list[Body]:
    """Return the conversation, with text parts as `lay_out` reads them.

    Raises:
        BadRequest: It is none.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise BadRequest("`messages` must be a list of messages, each with a `role`.", param="messages")
    return [
        {**message, "content": normal_parts(message.get("content"))} if _is_read(message) else message
        for message in messages
    ]


def _is_read(message: Body) -> bool:
    return message["role"] in (*SYSTEM_ROLES, "user")


def put(body: Body, messages: Sequence[Mapping[str, Any]]) -> None:
    """Put a conversation back into its request."""
    body["messages"] = list(messages)


def output_tokens(body: Body) -> int | None:
    """Return how long the answer may become, where the request says so."""
    return whole_number(body.get("max_completion_tokens")) or whole_number(body.get("max_tokens"))


def sequences(body: Body) -> int:
    """Return how many answers are asked for."""
    return whole_number(body.get("n")) or 1


def is_prose(body: Body) -> bool:
    """Whether the answer is text for people: a list of sources would break any other format."""
    wanted = body.get("response_format")
    return (not isinstance(wanted, dict) or wanted.get("type") == "text") and not body.get("structured_outputs")


def rewrite(answer: Body, answering: Answering) -> Body:
    """Return a whole answer without markers, with annotations and what was found."""
    _name(answer, answering)
    for choice in answer.get("choices", ()):
        message = choice["message"]
        annotations: list[Body] = []
        if message.get("content"):
            text, citations = read(message["content"], answering.cited_as)
            annotations = answering.annotations(citations)
            message["content"] = text + answering.postscript(annotations)
        if message.get("reasoning"):
            message["reasoning"] = read(message["reasoning"], answering.cited_as)[0]
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = read(call["function"]["arguments"], answering.cited_as)[0]
        message.update(_fields(answering, annotations))
    return answer


class Stream:
    """Rewrites the events of one streamed answer."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._choices: dict[int, _Choice] = {}

    def event(self, event: bytes) -> list[bytes]:
        """Return what one event of vLLM's becomes."""
        data = data_of(event)
        if data is None or "choices" not in data:
            return [event]
        _name(data, self._answering)
        said_nothing = bool(data["choices"]) and "usage" not in data
        for choice in data["choices"]:
            state = self._choices.setdefault(choice["index"], _Choice(self._answering))
            had_content = bool(choice["delta"].get("content"))
            state.rewrite(choice)
            said_nothing = said_nothing and had_content and _is_empty(choice)
        return [] if said_nothing else [event_of(data)]


class _Choice:
    """One choice of a streamed answer, its texts read side by side."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._content = CitationReader(answering.cited_as)
        self._reasoning = CitationReader(answering.cited_as)
        self._arguments: dict[int, CitationReader] = {}
        self._annotations: list[Body] = []
        self._spoke = False

    def rewrite(self, choice: Body) -> None:
        delta, answering = choice["delta"], self._answering
        finished = choice.get("finish_reason") is not None
        if delta.get("content"):
            self._spoke = True
            delta["content"], citations = self._content.feed(delta["content"])
            self._annotations += answering.annotations(citations)
        if delta.get("reasoning"):
            delta["reasoning"], _ = self._reasoning.feed(delta["reasoning"])
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if function.get("arguments"):
                reader = self._arguments.setdefault(call["index"], CitationReader(answering.cited_as))
                function["arguments"], _ = reader.feed(function["arguments"])
        if finished:
            self._finish(delta)

    def _finish(self, delta: Body) -> None:
        if thought := self._reasoning.end():
            delta["reasoning"] = (delta.get("reasoning") or "") + thought
        rest = self._content.end()
        if self._spoke:
            rest += self._answering.postscript(self._annotations)
        if rest:
            delta["content"] = (delta.get("content") or "") + rest
        for index, reader in self._arguments.items():
            if held := reader.end():
                delta["tool_calls"] = [
                    *(delta.get("tool_calls") or ()),
                    {"index": index, "function": {"arguments": held}},
                ]
        delta.update(_fields(self._answering, self._annotations))


def _fields(answering: Answering, annotations: list[Body]) -> Body:
    found = [
        {
            "file_id": result["file_id"],
            "filename": result["filename"],
            "score": result["score"],
            "attributes": result["attributes"],
            "content": [{"type": "text", "text": result["text"]}],
        }
        for result in answering.results()
    ]
    fields = {
        "search_results": [{"search_query": answering.query, "data": found}],
        "file_search_status": answering.status,
    }
    return {"annotations": annotations, "provider_specific_fields": fields}


def _name(answer: Body, answering: Answering) -> None:
    if answering.model is not None and "model" in answer:
        answer["model"] = answering.model


def _is_empty(choice: Body) -> bool:
    """Whether nothing is left of a choice whose text is held back."""
    delta = choice["delta"]
    carried = choice.get("finish_reason") or choice.get("logprobs") or choice.get("token_ids")
    return not carried and not any(value for key, value in delta.items())
