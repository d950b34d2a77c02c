"""The ASGI app in front: chooses the model's app by the body's `model`, and answers what belongs to no model.

Pure ASGI: knows no Ray and no vLLM. Each body is read once, bounded, and peeked into without being built.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec

from deployments.errors import (
    OPAQUE,
    BadRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    NotSupportedByFleet,
    PublicError,
)
from deployments.redaction import redacted
from deployments.request_body import MIN_BYTES_PER_S, bounded
from deployments.request_scope import request_scope
from deployments.time_limits import ClientStalled, Deadline, deadline, reading, until

logger = logging.getLogger("ray.serve.groundswell.router")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Answer = Callable[[], Awaitable[tuple[int, str, bytes]]]
"""Makes an answer of the Router's own: status, content type, body."""
Lookup = Callable[[str], Awaitable[tuple[int, str, bytes]]]
"""Makes such an answer about the thing that is named by the rest of the path."""


class _Peek(msgspec.Struct):
    """The few fields of any request that decide where it goes."""

    model: Any = None
    use_beam_search: Any = None
    background: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    queries: msgspec.Raw = msgspec.Raw()
    texts: msgspec.Raw = msgspec.Raw()
    inputs: msgspec.Raw = msgspec.Raw()
    items: msgspec.Raw = msgspec.Raw()
    text_1: msgspec.Raw = msgspec.Raw()
    text_2: msgspec.Raw = msgspec.Raw()
    data_1: msgspec.Raw = msgspec.Raw()
    data_2: msgspec.Raw = msgspec.Raw()


_LISTS: Final = tuple(field for field in _Peek.__struct_fields__ if _Peek.__annotations__[field] == "msgspec.Raw")
"""Fields in which a small body can ask for much: each item is rendered, and may become a request of its own."""
_TOKEN_IDS: Final = re.compile(rb"\[\s*-?\d")

_REFUSED_FIELDS: Final[Mapping[str, str]] = {
    "use_beam_search": "Beam search",
    "background": "Background mode",
    "previous_response_id": "Continuing a stored response",
    "conversation": "A stored conversation",
}
_REFUSED_PATHS: Final = (("/v1/responses/", "Stored responses"), ("/v1/realtime", "The realtime API"))


class ClientGone(Exception):
    """The client hung up before it had an answer."""


class Dispatcher:
    """See the module's docstring.

    Args:
        resolve: Returns the app of a model by name, or None; or something to wait for where it must be built first.
        names: All names clients may use, for messages.
        model_paths: Paths that belong to a model.
        own: The Router's own GET paths.
        lookups: Likewise, by the beginning of their paths.
        min_body_bytes_per_s: What the body of a model's request keeps up.
        max_items: Messages, prompts, texts or tools in one request.
        mounted: Apps of their own, by the prefix of their paths; they read their bodies themselves.
        request_timeout_s: Deadline of each request; a client may ask for less.
        max_unread_s: How long a client may leave what is sent to it unread.
        count: Called with path and status of each finished request.
    """

    def __init__(
        self,
        resolve: Callable[[str], App | Awaitable[App | None] | None],
        names: Iterable[str],
        model_paths: Iterable[str],
        own: Mapping[str, Answer],
        *,
        lookups: Mapping[str, Lookup] | None = None,
        max_body_bytes: int,
        min_body_bytes_per_s: int = MIN_BYTES_PER_S,
        max_items: int = 2048,
        mounted: Mapping[str, App] | None = None,
        request_timeout_s: float | None = None,
        max_unread_s: float = 60,
        count: Callable[[str, int], None] = lambda path, status: None,
    ) -> None:
        self._resolve = resolve
        self._names = list(names)
        self._model_paths = frozenset(model_paths)
        self._own, self._lookups = own, lookups or {}
        self._mounted = mounted or {}
        self._max_body_bytes, self._max_items = max_body_bytes, max_items
        self._min_body_bytes_per_s = min_body_bytes_per_s
        self._request_timeout_s, self._max_unread_s = request_timeout_s, max_unread_s
        self._count = count
        self._decoder = msgspec.json.Decoder(_Peek)
        self._items = msgspec.json.Decoder(list[msgspec.Raw])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":
            await receive()
            return await send({"type": "websocket.close", "code": 1008, "reason": "WebSockets are not served here"})
        await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        request_id = _request_id(scope)
        status = 0
        streams = hung_up = False

        async def heard() -> Message:
            nonlocal hung_up
            message = await receive()
            hung_up = hung_up or (message["type"] == "http.disconnect" and not status)
            return message

        async def watched(message: Message) -> None:
            nonlocal status, streams
            if hung_up:
                return  # vLLM's app answers those too that are gone
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = any(
                    name == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message.get("headers", ())
                )
            else:
                streams = streams and message.get("more_body", False)
            await send(message)

        path = scope["path"]
        try:
            async with reading(watched, max_unread_s=self._max_unread_s) as bounded:
                try:
                    limit = deadline(scope["headers"], self._request_timeout_s, asyncio.get_running_loop().time())
                    async with until(limit):
                        await self._route(scope, heard, bounded, limit)
                except ClientGone:
                    raise
                except Exception as error:
                    public = error if isinstance(error, PublicError) else PublicError(OPAQUE)
                    if public is not error:
                        logger.exception("Request %s failed", request_id)
                    if not status:
                        said = json.dumps(public.body(path)).encode()
                        await _respond(bounded, public.status, said, headers=public.headers())
                    elif streams:
                        await bounded({"type": "http.response.body", "body": last_words(path, public)})
                    elif public is not error:
                        raise
        except ClientGone:
            status = 499
        except ClientStalled:
            status = 499
            logger.warning("Request %s: its client has not read for %g s", request_id, self._max_unread_s)
        finally:
            known = path if path in self._model_paths or path in self._own else self._prefix(path) or "other"
            status = 499 if hung_up else status
            self._count(known, status)
            took_ms = 1000 * (time.perf_counter() - started)
            logger.info("%s %r %s %.0f ms", scope["method"], redacted(path), status or "aborted", took_ms)

    async def _route(self, scope: Scope, receive: Receive, send: Send, limit: Deadline | None) -> None:
        path, method = scope["path"], scope["method"]
        graceful = None if limit is None else (limit.graceful, limit.error)
        if (own := self._own_answer(path)) is not None:
            if method not in ("GET", "HEAD"):
                raise MethodNotAllowed(f"{path} takes GET.")
            code, content_type, body = await own()
            return await _respond(send, code, b"" if method == "HEAD" else body, content_type=content_type)
        if (prefix := self._prefix(path)) is not None:
            with request_scope(deadline=graceful):
                return await self._mounted[prefix](scope, receive, send)
        for prefix, feature in _REFUSED_PATHS:
            if path.startswith(prefix):
                raise NotSupportedByFleet(f"{feature} would live in one engine, and a fleet has many.")
        if path not in self._model_paths:
            raise NotFound(f"There is no {path} here.")
        if method == "OPTIONS":
            app = await self._app(self._names[0], receive)
            assert app is not None
            return await app(scope, receive, send)
        if method != "POST":
            raise MethodNotAllowed(f"{path} takes POST.")
        body = await self._read(scope, receive)
        app = await self._choose(body, receive)
        with request_scope(deadline=graceful):
            await app(scope, replay(body, receive), send)

    def _own_answer(self, path: str) -> Answer | None:
        for prefix, lookup in self._lookups.items():
            if path.startswith(prefix) and len(path) > len(prefix):
                return partial(lookup, path[len(prefix) :])
        return self._own.get(path)

    def _prefix(self, path: str) -> str | None:
        return next((p for p in self._mounted if path == p or path.startswith(p + "/")), None)

    async def _app(self, name: str, receive: Receive) -> App | None:
        found = self._resolve(name)
        return await while_connected(found, receive) if isinstance(found, Awaitable) else found

    async def _choose(self, body: bytes, receive: Receive) -> App:
        peek = self._peek(body)
        for field, feature in _REFUSED_FIELDS.items():
            if getattr(peek, field):
                raise NotSupportedByFleet(f"{feature} is not supported over a fleet of engines.", param=field)
        self._check_items(peek)
        name = peek.model
        if name is None and len(self._names) == 1:
            name = self._names[0]
        if not isinstance(name, str) or not name:
            raise BadRequest(f"`model` must be one of: {', '.join(self._names)}.", param="model")
        app = await self._app(name, receive)
        if app is None:
            raise ModelNotFound(f"The model `{name[:200]}` does not exist.", param="model")
        return app

    def _check_items(self, peek: _Peek) -> None:
        for field in _LISTS:
            raw = memoryview(getattr(peek, field))
            if len(raw) <= 2 * self._max_items or bytes(raw[:1]) != b"[" or _TOKEN_IDS.match(raw):
                continue  # too short for so many, or one prompt of token ids, which has the model's own limit
            count = len(self._items.decode(raw))
            if count > self._max_items:
                raise BadRequest(f"`{field}` has {count} items, and may have {self._max_items}.", param=field)

    def _peek(self, body: bytes) -> _Peek:
        try:
            if not body.isascii():
                body.decode()  # what is skipped below must be text too
            return self._decoder.decode(body)
        except msgspec.ValidationError:
            raise BadRequest("The body must be a JSON object.") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = "it is empty" if not body.strip() else str(error)
            raise BadRequest(f"The body is not valid JSON: {reason}.") from None

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        part = bounded(scope, receive, self._max_body_bytes, min_bytes_per_s=self._min_body_bytes_per_s)
        chunks: list[bytes] = []
        while True:
            message = await part()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(chunks)


def below_prefix(app: App) -> App:
    """Return `app` as it is served below a prefix: it sees paths without, and no `root_path`.

    Serve's `route_prefix` and `http_options.root_path` come in ASGI's `root_path`, and in `path` as well. The prefix
    alone is sent on to the one with a slash, from where the page's relative links go.
    """

    async def below(scope: Scope, receive: Receive, send: Send) -> None:
        root, path = scope.get("root_path", ""), scope.get("path", "")
        if root and path == root and scope["type"] == "http":
            query = f"?{asked.decode('latin-1')}" if (asked := scope.get("query_string")) else ""
            return await _respond(send, 307, b"", headers={"location": f"{quote(path.rpartition('/')[2])}/{query}"})
        if root and path.startswith(root + "/"):
            scope = {**scope, "root_path": "", "path": path[len(root) :]}
        await app(scope, receive, send)

    return below


def _request_id(scope: Scope) -> str:
    """Return the client's `x-request-id`, or the one Serve gave the request and its answer."""
    return next((str(value.decode("latin-1")) for name, value in scope["headers"] if name == b"x-request-id"), "-")


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body again, then whatever comes after it: the client hanging up."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def while_connected(work: Awaitable[T], receive: Receive) -> T:
    """Return what `work` returns, or cancel it when the client hangs up.

    Raises:
        ClientGone: It did.
    """

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, listening = asyncio.ensure_future(work), asyncio.create_task(hung_up())
    both: set[asyncio.Future[Any]] = {working, listening}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in both:
            task.cancel()
        await asyncio.wait(both)
        for task in both:
            if not task.cancelled():
                task.exception()  # looked at, or asyncio would log it as nobody's


def last_words(path: str, error: PublicError) -> bytes:
    """Return the event that ends a stream of the API at `path` with an error, as its clients know it."""
    if path == "/v1/messages":
        body = error.body(path)
    elif path == "/v1/responses":
        body = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    else:
        return b"data: " + json.dumps(error.body()).encode() + b"\n\ndata: [DONE]\n\n"
    return b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"


async def _respond(
    send: Send,
    status: int,
    body: bytes,
    *,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> None:
    raw = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    raw += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})
