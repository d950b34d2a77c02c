"""The first thing a request meets in a Router: who asks, and whether it may.

Pure ASGI around the whole app: no path goes past it. What tells a key is taken out of the request here, so that nothing
behind can log it or send it on. Knows no Ray and no vLLM.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol

from deployments.access.keys import KeyHolder
from deployments.access.limits import Meter
from deployments.dispatch import App, Message, Receive, Scope, Send
from deployments.errors import HeadersTooLarge, PublicError, Unauthorized
from deployments.request_scope import Caller, request_scope

OPEN_PATHS: Final = frozenset({"/health", "/ping"})
"""For balancers and probes, which have no key: alive or not, and no more than that."""

_CREDENTIALS: Final = frozenset({b"authorization", b"x-api-key"})
_BYTES_PER_TOKEN: Final = 4


class Ring(Protocol):
    """`deployments.access.keys.KeyRing`, as far as it is asked here."""

    def find(self, key: bytes) -> KeyHolder | None: ...


class Metrics(Protocol):
    def inc(self, name: str, value: float = 1, **tags: str) -> None: ...


class Gate:
    """See the module's docstring.

    Args:
        app: What it guards.
        keys: The keys that are good; None where none is needed.
        model_paths: Where a POST costs tokens.
        open_pages: Files that hold no data and need no key to be read: the page at `/`, which asks for one itself.
    """

    def __init__(
        self,
        app: App,
        keys: Ring | None,
        model_paths: Collection[str],
        *,
        max_header_count: int,
        max_header_bytes: int,
        metrics: Metrics,
        open_pages: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._keys, self._model_paths = app, keys, frozenset(model_paths)
        self._max_header_count, self._max_header_bytes = max_header_count, max_header_bytes
        self._metrics, self._clock = metrics, clock
        self._open_pages = frozenset(open_pages)
        self._meters: dict[str, Meter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a lifespan, or a WebSocket, which the app closes
            return await self._app(scope, receive, send)
        try:
            self._check_headers(scope)
            holder = self._holder(scope)
            if holder is None and self._keys is not None and not self._is_open(scope):
                raise Unauthorized(_what_is_wrong(scope))
        except PublicError as error:
            self._metrics.inc("router_refused_requests", reason=error.code or "")
            return await _answer(send, scope, error)
        kept = [(name, value) for name, value in scope["headers"] if name.lower() not in _CREDENTIALS]
        scope = {**scope, "headers": kept}
        if holder is None:
            return await self._app(scope, receive, send)
        await self._as(holder, scope, receive, send)

    async def _as(self, holder: KeyHolder, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one of the holder's requests through, within its limits."""
        meter = self._meters.get(holder.name)
        if meter is None:
            meter = self._meters[holder.name] = Meter(holder, clock=self._clock)
        else:
            meter.update(holder)
        caller = Caller(holder.name, holder.owner, may_set_priority=holder.may_set_priority)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_raw(meter.headers())]}
                self._metrics.inc("router_key_requests", key=holder.name, status=str(message["status"]))
            await send(message)

        estimate = self._estimate(scope)
        try:
            meter.enter(estimate)
        except PublicError as error:
            return await _answer(with_headers, scope, error)
        try:
            with request_scope(caller):
                await self._app(scope, receive, with_headers)
        finally:
            meter.leave(estimate, caller.tokens)
            self._metrics.inc("router_key_tokens", caller.tokens, key=holder.name)

    def _check_headers(self, scope: Scope) -> None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._max_header_count or size > self._max_header_bytes:
            raise HeadersTooLarge(
                f"The request has more than {self._max_header_count} headers, or more than {self._max_header_bytes} "
                "bytes of them."
            )

    def _holder(self, scope: Scope) -> KeyHolder | None:
        key = _presented(scope)
        return None if key is None or self._keys is None else self._keys.find(key)

    def _is_open(self, scope: Scope) -> bool:
        """Whether it is answered without a key. Paths are compared whole, never by their beginning."""
        path = scope["path"]
        return path in OPEN_PATHS or (scope["method"] in ("GET", "HEAD") and path in self._open_pages)

    def _estimate(self, scope: Scope) -> int | None:
        """Return about how many tokens a request's prompt has, before its body is read; None where nothing runs."""
        if scope["method"] != "POST" or scope["path"] not in self._model_paths:
            return None
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        return int(length) // _BYTES_PER_TOKEN if length.isdigit() and len(length) < 16 else 0


def _presented(scope: Scope) -> bytes | None:
    """Return the key a request shows: `Authorization: Bearer`, or `x-api-key` as Anthropic's clients send it."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.lower(), value)
    kind, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
    if kind.lower() == b"bearer" and key.strip():
        return bytes(key.strip())
    return headers.get(b"x-api-key", b"").strip() or None


def _what_is_wrong(scope: Scope) -> str:
    if _presented(scope) is None:
        return "This server needs an API key: send it as `Authorization: Bearer …`, or as `x-api-key`."
    return "The API key is not one of this server's."


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _answer(send: Send, scope: Scope, error: PublicError) -> None:
    body: bytes = json.dumps(error.body(scope["path"])).encode()
    fixed: dict[str, Any] = {"content-type": "application/json", "content-length": str(len(body))}
    await send({"type": "http.response.start", "status": error.status, "headers": _raw(fixed | error.headers())})
    await send({"type": "http.response.body", "body": body})
