"""Around one model's app: answers from documents where a request asks for them, and is not there where it does not.

A request is searched for, laid out and handed on before any header is sent, so what goes wrong with documents is a real
HTTP status; then the app's answer is rewritten on its way out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from deployments import request_scope
from deployments.config import AssistantConfig, GroundingConfig
from deployments.dispatch import App, ClientGone, Message, Receive, Scope, Send, replay, while_connected
from deployments.errors import BadRequest, DocumentsUnavailable, NotFound, Overloaded, PublicError
from deployments.grounding import chat, responses
from deployments.grounding.file_search import (
    FAILED,
    SYSTEM_ROLES,
    TOOL,
    Answering,
    Body,
    FileSearch,
    Retriever,
    query_of,
    take_tool,
    text_of,
    tokens_besides_passages,
)
from deployments.grounding.layout import Layout, Passage, escape_tags, lay_out
from deployments.grounding.sse import EventSplitter
from deployments.retrieval.records import Hit

logger = logging.getLogger("ray.serve.groundswell.grounding")

_RETRY_AFTER_S: Final = 5.0
_MENTION: Final = TOOL.encode()
WITHOUT_DOCUMENTS: Final = (b"x-groundswell-documents", b"unavailable")
"""On answers that go without the documents they were asked from."""


class Stream(Protocol):
    def event(self, event: bytes) -> list[bytes]: ...


class Api(Protocol):
    """What differs between the two APIs: `chat` and `responses`."""

    def messages_of(self, body: Body) -> list[Body]: ...

    def put(self, body: Body, messages: Sequence[Mapping[str, Any]]) -> None: ...

    def output_tokens(self, body: Body) -> int | None: ...

    def sequences(self, body: Body) -> int: ...

    def is_prose(self, body: Body) -> bool: ...

    def rewrite(self, answer: Body, answering: Answering) -> Body: ...

    @property
    def Stream(self) -> Callable[[Answering], Stream]: ...


class Metrics(Protocol):
    def inc(self, name: str, value: float = 1, **tags: str) -> None: ...

    def observe(self, name: str, value: float, **tags: str) -> None: ...


_APIS: Final[Mapping[str, Api]] = {chat.PATH: chat, responses.PATH: responses}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What holds for a request before its model's app sees it.

    Attributes:
        model: Its name, for metrics and logs.
        let_in: Lets a request of so many sequences in before anything is done for it, or raises `PublicError`.
        count_tokens: Counts the tokens of a text; called in threads.
        max_model_len: How many tokens prompt and answer may have together.
        escape: Breaks up the model's special tokens in a document; see `layout.escaper`.
    """

    model: str
    let_in: Callable[[int], None]
    count_tokens: Callable[[str], int]
    max_model_len: int
    escape: Callable[[str], str] = escape_tags


class GroundedApp:
    """See the module's docstring.

    Args:
        app: The model's own app.
        retriever: Where documents are searched; None where there are none.
        assistant: Stores that are searched for each question, under a name of their own.
        owner_of: Says whose files and vector stores a key of this name sees; None is nobody's.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        retriever: Retriever | None,
        config: GroundingConfig,
        *,
        metrics: Metrics,
        assistant: AssistantConfig | None = None,
        owner_of: Callable[[str], str | None] = lambda name: name,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app, self._limits, self._retriever, self._config = app, limits, retriever, config
        self._assistant, self._owner_of, self._metrics, self._clock = assistant, owner_of, metrics, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        api = _APIS.get(scope["path"]) if scope["method"] == "POST" else None
        if api is None:
            if self._assistant is not None and scope["method"] == "POST":
                raise NotFound(f"The model `{self._assistant.name}` answers at {' and '.join(_APIS)}.", param="model")
            return await self._app(scope, receive, send)
        raw = (await receive())["body"]
        if self._assistant is None and _MENTION not in raw:
            return await self._app(scope, replay(raw, receive), send)
        try:
            body: Body = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):  # in what the dispatcher had no need to look at
            raise BadRequest("The body is not valid JSON.") from None
        tools = body.get("tools")
        dropped = api is responses and responses.drop_past_calls(body)
        wanted = self._wanted(body)
        if wanted is None:
            if dropped or body.get("tools") is not tools:
                raw = msgspec.json.encode(body)
            return await self._app(_with_length(scope, len(raw)), replay(raw, receive), send)
        answering = await self._ground(api, body, *wanted, receive)
        raw = msgspec.json.encode(body)
        await self._app(_with_length(scope, len(raw)), replay(raw, receive), _Rewriter(send, api, answering))

    def _wanted(self, body: Body) -> tuple[FileSearch, Answering] | None:
        """Take what is to be searched out of a request; None where nothing is."""
        taken, assistant = take_tool(body), self._assistant
        if assistant is None:
            return taken
        body["model"] = assistant.model
        search, answering = taken or (FileSearch(()), Answering())
        search = msgspec.structs.replace(
            search,
            vector_store_ids=tuple(dict.fromkeys(assistant.vector_store_ids + search.vector_store_ids)),
            max_num_results=search.max_num_results or assistant.max_num_results,
        )
        return search, dataclasses.replace(answering, model=assistant.name)

    async def _ground(
        self, api: Api, body: Body, search: FileSearch, answering: Answering, receive: Receive
    ) -> Answering:
        """Search, lay what was found into the request, and return what rewriting its answer needs."""
        assistant = self._assistant
        instructions = body.get("instructions")
        messages = api.messages_of(body)
        query = query_of(messages, self._config.max_query_chars)
        if assistant is not None and assistant.instructions:
            messages = [{"role": "system", "content": assistant.instructions}, *messages]
        self._limits.let_in(api.sequences(body))
        started = self._clock()
        found = await self._search(search, query, receive)
        searching_s = self._clock() - started
        prose = assistant is not None and api.is_prose(body)
        answering = dataclasses.replace(
            answering,
            id=f"fs_{secrets.token_hex(24)}",
            query=query,
            instructions=instructions if isinstance(instructions, str) else None,
            with_results=isinstance(body.get("include"), list) and responses.RESULTS in body["include"],
            sources_in_text=prose and assistant is not None and assistant.sources_in_text,
        )
        if found is None:
            api.put(body, one_system_message(messages))
            return dataclasses.replace(answering, status=FAILED, note_in_text=prose)
        started = self._clock()
        layout = await asyncio.to_thread(self._lay_out, api, body, messages, found)
        laying_out_s = self._clock() - started
        self._metrics.observe("grounding_layout_seconds", laying_out_s, model=self._limits.model)
        api.put(body, layout.messages)
        logger.info(
            "%s: %d passages found in %.0f ms, %d laid into the prompt in %.0f ms",
            self._limits.model,
            len(found),
            1000 * searching_s,
            len(layout.ids),
            1000 * laying_out_s,
        )
        return dataclasses.replace(answering, found=found, cited_as=layout.ids)

    def _lay_out(self, api: Api, body: Body, messages: list[Body], found: Sequence[Hit]) -> Layout:
        limits, config = self._limits, self._config
        context = limits.max_model_len
        answer = api.output_tokens(body) or min(config.output_reserve_tokens, context // 4)
        room = context - answer - tokens_besides_passages(messages, body.get("tools"), limits.count_tokens)
        passages = [Passage(hit.file_id, hit.filename, hit.position, hit.text, hit.score) for hit in found]
        budget = min(room, config.max_passage_tokens)
        layout = lay_out(messages, passages, budget, limits.count_tokens, limits.escape)
        if passages and not layout.ids:
            raise BadRequest(
                f"No passage fits: of the model's {context} tokens, {answer} are kept for the answer and "
                f"{max(room, 0)} are left for passages. Ask for a shorter answer, or shorten the conversation."
            )
        return layout

    async def _search(self, search: FileSearch, query: str, receive: Receive) -> Sequence[Hit] | None:
        """Return what was found; None where the answer may do without.

        Raises:
            ClientGone: The client hung up.
            DocumentsUnavailable: The Retriever is down or late.
            PublicError: It refuses the request.
        """
        if self._retriever is None:
            raise BadRequest("`file_search` needs documents, and this server is not set up for any.", param="tools")
        outcome, started = "failed", self._clock()
        asked = self._find(self._retriever, search, query)
        try:
            async with asyncio.timeout(self._config.search_timeout_s):
                found = await while_connected(asked, receive)
            outcome = "completed"
            return found
        except ClientGone:
            outcome = "cancelled"
            raise
        except PublicError as error:
            if error.status < 500 and not isinstance(error, Overloaded):
                outcome = "refused"
                raise
            logger.warning("%s: a search failed: %s", self._limits.model, error.message)
            reason: Exception = error
        except TimeoutError as error:
            logger.warning("%s: a search took longer than %g s", self._limits.model, self._config.search_timeout_s)
            reason = error
        except Exception as error:
            logger.exception("%s: a search failed", self._limits.model)
            reason = error
        finally:
            self._metrics.inc("grounding_searches", model=self._limits.model, outcome=outcome)
            self._metrics.observe("grounding_search_seconds", self._clock() - started, model=self._limits.model)
        if self._may_do_without(search):
            return None
        raise DocumentsUnavailable(
            "The documents cannot be searched now. Retry later, or set `allow_without_documents` in the `file_search` "
            "tool to be answered without them.",
            retry_after_s=getattr(reason, "retry_after_s", None) or _RETRY_AFTER_S,
        ) from reason

    async def _find(self, retriever: Retriever, search: FileSearch, query: str) -> Sequence[Hit]:
        """Search each store as its owner: an assistant's may be another's than those of the key that asks."""
        assistant, lent = self._assistant, tuple[str, ...]()
        lender = owner = request_scope.owner()
        if assistant is not None and assistant.owner is not None:
            lender, lent = self._owner_of(assistant.owner), assistant.vector_store_ids
        by_owner: dict[str | None, list[str]] = {}
        for store in search.vector_store_ids:
            by_owner.setdefault(lender if store in lent else owner, []).append(store)
        most = search.max_num_results or self._config.max_num_results
        options: dict[str, Any] = {"max_results": most, "filters": search.filters, "ranking": search.ranking()}
        searches = (retriever.search(owner, stores, [query], **options) for owner, stores in by_owner.items())
        found = await asyncio.gather(*searches)
        if len(found) == 1:
            return found[0]
        return sorted((hit for hits in found for hit in hits), key=lambda hit: -hit.score)[:most]

    def _may_do_without(self, search: FileSearch) -> bool:
        if search.allow_without_documents is not None:
            return search.allow_without_documents
        return (self._assistant or self._config).allow_without_documents


def one_system_message(messages: list[Body]) -> list[Body]:
    """Join the system messages in front, as `lay_out` would: chat templates take one."""
    count = next((i for i, message in enumerate(messages) if message["role"] not in SYSTEM_ROLES), len(messages))
    if count < 2:
        return messages
    text = "\n\n".join(text_of(message["content"]) for message in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]


def _with_length(scope: Scope, length: int) -> Scope:
    """Return the scope of a request whose body has another length now."""
    headers = [header for header in scope["headers"] if header[0] != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


class _Rewriter:
    """The `send` of a grounded request: rewrites a stream event by event and a plain answer whole.

    Errors pass untouched.
    """

    def __init__(self, send: Send, api: Api, answering: Answering) -> None:
        self._send, self._api, self._answering = send, api, answering
        self._start: Message | None = None
        self._chunks: list[bytes] = []
        self._stream: Stream | None = None
        self._events = EventSplitter()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._stream is not None:
            await self._pass_events(self._stream, message)
        elif self._start is not None:
            await self._collect(self._start, message)
        else:
            await self._send(message)

    async def _begin(self, start: Message) -> None:
        content_type = dict(start["headers"]).get(b"content-type", b"")
        if start["status"] != 200:
            return await self._send(start)
        if self._answering.status == FAILED:
            start = {**start, "headers": [*start["headers"], WITHOUT_DOCUMENTS]}
        if content_type.startswith(b"text/event-stream"):
            self._stream = self._api.Stream(self._answering)
            return await self._send(start)
        self._start = start  # until the answer's new length is known

    async def _pass_events(self, stream: Stream, message: Message) -> None:
        more = message.get("more_body", False)
        data = b"".join(b"".join(stream.event(e)) for e in self._events.feed(message.get("body", b"")))
        if not more:
            data += self._events.end()
        if data or not more:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _collect(self, start: Message, message: Message) -> None:
        self._chunks.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = b"".join(self._chunks)
        answer = msgspec.json.decode(body)
        if isinstance(answer, dict):  # or it is the null that vLLM says to clients that are gone
            body = msgspec.json.encode(self._api.rewrite(answer, self._answering))
        await self._send(_with_length(start, len(body)))
        await self._send({"type": "http.response.body", "body": body})
