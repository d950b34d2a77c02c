"""How long a request may take, and how long its client may leave its answer unread. Pure ASGI; two timers a request.

The deadline is kept twice. `RequestScope.deadline` is for whoever knows how to end a request in its API's own words:
the seam fails the generation there. What has not ended a moment later is cancelled here, wherever it is. Both come
before Serve's own reading of the same header, which would answer with a line of text or cut the stream.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from deployments.errors import BadRequest, RequestTimeout

HEADER: Final = b"x-request-timeout-seconds"
_MARGIN: Final = 0.1
_LONGEST_MARGIN_S: Final = 0.5
_LOOKS: Final = 4

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class ClientStalled(Exception):
    """The client has not read its answer for too long."""


@dataclass(frozen=True)
class Deadline:
    """When a request must be over, by the event loop's clock.

    Attributes:
        seconds: What was asked for.
        graceful: When whoever can end it well should.
        final: When it is cancelled.
    """

    seconds: float
    graceful: float
    final: float

    @property
    def error(self) -> RequestTimeout:
        return RequestTimeout(f"The request was not finished within {self.seconds:g} s.")


def deadline(headers: Iterable[tuple[bytes, bytes]], longest_s: float | None, now: float) -> Deadline | None:
    """Return a request's deadline: the client's own (0 or less: none), but never beyond `longest_s`.

    Raises:
        BadRequest: The header is not a number.
    """
    seconds = longest_s
    for name, value in headers:
        if name == HEADER:
            try:
                asked = float(value)
            except ValueError:
                asked = math.nan
            if math.isnan(asked):
                raise BadRequest(f"{HEADER.decode()} must be a number of seconds.")
            if asked > 0:
                seconds = min(asked, longest_s or math.inf)
    if seconds is None or math.isinf(seconds):
        return None
    margin = min(_MARGIN * seconds, _LONGEST_MARGIN_S)
    return Deadline(seconds, now + seconds - margin, now + seconds - margin / 2)


@asynccontextmanager
async def until(limit: Deadline | None) -> AsyncIterator[None]:
    """Run the block until the deadline, if there is one.

    Raises:
        RequestTimeout: It has come.
    """
    try:
        async with asyncio.timeout_at(None if limit is None else limit.final) as timeout:
            yield
    except TimeoutError:
        if limit is None or not timeout.expired():
            raise
        raise limit.error from None


@asynccontextmanager
async def reading(send: Send, *, max_unread_s: float) -> AsyncIterator[Send]:
    """Run the block until something it sends has not been taken for `max_unread_s`.

    Args:
        send: ASGI's; the block is to use the one it is given instead, for its last words too.
        max_unread_s: How long one message may wait for the client's buffers to take it.

    Raises:
        ClientStalled: The client does not read.
    """
    loop = asyncio.get_running_loop()
    since: float | None = None
    timer: asyncio.TimerHandle

    async def noted(message: Message) -> None:
        nonlocal since
        since = loop.time()
        try:
            await send(message)
        finally:
            since = None

    def look() -> None:
        nonlocal timer
        if since is not None and loop.time() - since >= max_unread_s:
            timeout.reschedule(loop.time())
        else:
            timer = loop.call_later(max_unread_s / _LOOKS, look)

    timer = loop.call_later(max_unread_s / _LOOKS, look)
    try:
        async with asyncio.timeout(None) as timeout:
            yield noted
    except TimeoutError:
        if not timeout.expired():
            raise
        raise ClientStalled from None
    finally:
        timer.cancel()
