"""The `file_search` tool of a request: read, checked, taken out; what it found, in OpenAI's shapes. Pure.

It works on the JSON body, above vLLM's request models: they refuse the tool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec

from deployments.errors import BadRequest
from deployments.grounding.citations import Citation
from deployments.grounding.layout import INSTRUCTIONS, Passage
from deployments.retrieval.records import Hit, Ranking

Body = dict[str, Any]

TOOL: Final = "file_search"
MAX_VECTOR_STORES: Final = 16
_TOKENS_PER_MESSAGE: Final = 8
_TOKENS_PER_PROMPT: Final = 32
"""What chat templates add, generously: a prompt that is too long by one token is refused whole."""

SYSTEM_ROLES: Final = ("system", "developer")
COMPLETED: Final = "completed"
FAILED: Final = "failed"

_Weight = Annotated[float, msgspec.Meta(ge=0)]


class HybridSearch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    embedding_weight: _Weight = 1.0
    text_weight: _Weight = 1.0


class RankingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ranker: str | None = None
    score_threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    hybrid_search: HybridSearch | None = None


class FileSearch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tool as OpenAI defines it, and one field of ours.

    Attributes:
        allow_without_documents: Answer without documents, and say so, when they cannot be searched. None: as
            configured.
    """

    vector_store_ids: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_VECTOR_STORES)]
    type: Literal["file_search"] = "file_search"
    filters: dict[str, Any] | None = None
    max_num_results: Annotated[int, msgspec.Meta(ge=1, le=50)] | None = None
    ranking_options: RankingOptions | None = None
    allow_without_documents: bool | None = None

    def ranking(self) -> Ranking:
        """Return how results are put in order."""
        options = self.ranking_options or RankingOptions()
        hybrid = options.hybrid_search or HybridSearch()
        return Ranking(
            options.ranker or "auto", options.score_threshold or 0.0, hybrid.embedding_weight, hybrid.text_weight
        )


class Retriever(Protocol):
    """What grounding needs of the Retriever; see `retrieval.search.Searcher.search`. Late calls are cancelled."""

    async def search(
        self,
        owner: str | None,
        store_ids: Sequence[str],
        queries: Sequence[str],
        *,
        max_results: int,
        filters: Any,
        ranking: Ranking,
    ) -> Sequence[Hit]:
        """Return passages, best first.

        Raises:
            NotFound: A vector store does not exist.
            BadRequest: Filters or ranking make no sense.
            Exception: Any other: the Retriever is down.
        """


@dataclass(frozen=True)
class Answering:
    """All that rewriting an answer needs to know.

    Attributes:
        id: Of the `file_search_call` item.
        query: What was searched for.
        status: `completed`, or `failed` where the answer goes without documents.
        found: What the search gave, best first; the prompt may hold less.
        cited_as: The passages in the prompt, by the ids in its markers.
        tool: The tool as the client sent it, None where an assistant searched by itself.
        tool_index: Its place among the client's tools.
        tool_choice: As the client sent it.
        with_results: Whether a `file_search_call` item carries its results.
        instructions: As the client sent them.
        model: The name the client knows the model by, where that is not the model's own.
        sources_in_text: Whether the text ends in a list of its sources.
        note_in_text: Whether the text says that it goes without documents.
    """

    id: str = ""
    query: str = ""
    status: str = COMPLETED
    found: Sequence[Hit] = ()
    cited_as: Mapping[str, Passage] = field(default_factory=dict)
    tool: Any = None
    tool_index: int = 0
    tool_choice: Any = None
    with_results: bool = False
    instructions: str | None = None
    model: str | None = None
    sources_in_text: bool = False
    note_in_text: bool = False

    def annotations(self, citations: Iterable[Citation]) -> list[Body]:
        """Return citations as OpenAI's annotations, and which of the results each cites: a field of ours."""
        places = {(hit.file_id, hit.position): i for i, hit in reversed(list(enumerate(self.found)))}
        annotations = []
        for citation in citations:
            passage = self.cited_as[citation.id]
            annotation = {
                "type": "file_citation",
                "file_id": passage.file_id,
                "filename": passage.filename,
                "index": citation.index,
            }
            if (place := places.get((passage.file_id, passage.position))) is not None:
                annotation["result_index"] = place
            annotations.append(annotation)
        return annotations

    def postscript(self, annotations: Sequence[Body]) -> str:
        """Return what follows the text, for people whose clients show nothing but text."""
        if self.note_in_text:
            return "\n\n(The documents could not be searched: this answer does without them.)"
        names = list(dict.fromkeys(" ".join(annotation["filename"].split()) for annotation in annotations))
        if not self.sources_in_text or not names:
            return ""
        return "\n\nSources:\n" + "\n".join(f"- {name}" for name in names)

    def results(self) -> list[Body]:
        """Return what was found, as a `file_search_call` item has it."""
        return [
            {
                "file_id": hit.file_id,
                "filename": hit.filename,
                "score": hit.score,
                "text": hit.text,
                "attributes": dict(hit.attributes),
            }
            for hit in self.found
        ]


def take_tool(body: Body) -> tuple[FileSearch, Answering] | None:
    """Take `file_search` out of a request's `tools` and `tool_choice`.

    Returns:
        The tool and what it leaves for the answer; None where the request has none, or has it switched off.

    Raises:
        BadRequest: The tool is malformed, or there are two of them.
    """
    tools = body.get("tools")
    if not isinstance(tools, list):
        return None
    places = [i for i, tool in enumerate(tools) if isinstance(tool, dict) and tool.get("type") == TOOL]
    if not places:
        return None
    if len(places) > 1:
        raise BadRequest("There is more than one `file_search` tool; give one all `vector_store_ids`.", param="tools")
    index, choice = places[0], body.get("tool_choice")
    tool = _checked(tools[index], f"tools[{index}]")
    rest = [other for i, other in enumerate(tools) if i != index]
    _set_or_drop(body, "tools", rest)
    _set_or_drop(body, "tool_choice", _choice_among(rest, choice))
    if choice == "none":
        return None
    return tool, Answering(tool=tools[index], tool_index=index, tool_choice=choice)


def _checked(tool: Body, where: str) -> FileSearch:
    try:
        return msgspec.convert(tool, FileSearch)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise BadRequest(f"`file_search`: {reason}.", param=where + place.rstrip("`")) from None


def _choice_among(rest: Sequence[Any], choice: Any) -> Any:
    """Return what the model may still choose: the search is done for it, and counts where a tool is required."""
    if not rest:
        return None
    if isinstance(choice, dict):
        if choice.get("type") == TOOL:
            return None
        allowed = choice.get("tools")
        if choice.get("type") == "allowed_tools" and isinstance(allowed, list):
            left = [tool for tool in allowed if not (isinstance(tool, dict) and tool.get("type") == TOOL)]
            return {**choice, "tools": left} if left else "none"
    return "auto" if choice == "required" else choice


def _set_or_drop(body: Body, key: str, value: Any) -> None:
    if value is None or value == []:
        body.pop(key, None)
    else:
        body[key] = value


def text_of(content: Any) -> str:
    """Return the text of a message's content, its parts joined by newlines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part["text"] for part in normal_parts(content) if part.get("type") == "text")


def normal_parts(content: Any) -> Any:
    """Return content with its text parts as `lay_out` reads them: `{"type": "text", "text": …}`.

    Raises:
        BadRequest: Content of no known shape.
    """
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise BadRequest("A message's `content` must be a string or a list of parts.")
    parts: list[Any] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif not isinstance(part, dict):
            raise BadRequest("A part of a message's `content` must be an object.")
        elif part.get("type") in ("text", "input_text", "output_text"):
            if not isinstance(part.get("text"), str):
                raise BadRequest("A text part's `text` must be a string.")
            parts.append({"type": "text", "text": part["text"]})
        else:
            parts.append(part)
    return parts


def query_of(messages: Sequence[Mapping[str, Any]], max_chars: int) -> str:
    """Return what to search for: the text of the user's last message.

    Of a long one its two ends, where questions stand when people paste a document around them.

    Raises:
        BadRequest: There is no such text.
    """
    for message in reversed(messages):
        if message.get("role") == "user":
            query = text_of(message.get("content")).strip()
            if not query:
                break
            if len(query) <= max_chars:
                return query
            half = max_chars // 2
            return f"{query[:half]}\n{query[-half:]}"
    raise BadRequest("`file_search` needs a message of the user with text to search for.")


def tokens_besides_passages(
    messages: Iterable[Mapping[str, Any]], tools: Any, count_tokens: Callable[[str], int]
) -> int:
    """Return an upper bound of the prompt's tokens before passages are laid in."""
    tokens = count_tokens(INSTRUCTIONS) + _TOKENS_PER_PROMPT
    for message in messages:
        tokens += _TOKENS_PER_MESSAGE + count_tokens(text_of(message.get("content")))
        if message.get("tool_calls"):
            tokens += count_tokens(json.dumps(message["tool_calls"]))
    return tokens + (count_tokens(json.dumps(tools, indent=4)) if tools else 0)


def whole_number(value: Any) -> int | None:
    """Return a positive whole number, or None for anything else: vLLM will say what it thinks of that."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
