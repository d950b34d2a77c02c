"""How much of a request's body is taken, and how slowly it may come. Pure ASGI; one timer while a part is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from deployments.errors import BodyStalled, PayloadTooLarge, PublicError

MIN_BYTES_PER_S: Final = 1024
MAX_SILENCE_S: Final = 60.0

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


def bounded(
    scope: Scope,
    receive: Receive,
    most: int,
    *,
    min_bytes_per_s: int = MIN_BYTES_PER_S,
    too_large: PublicError | None = None,
) -> Receive:
    """Return a `receive` for a request's body that raises once that is too large, or does not keep up.

    A body may fall behind `min_bytes_per_s` by `MAX_SILENCE_S`, and never gets ahead of it: a swift beginning buys no
    slow end. Only the time that is spent waiting for the client counts. (Apache's mod_reqtimeout bounds bodies by a
    rate, too, but gives credit.)

    Args:
        scope: The request's, for the length that is announced.
        receive: ASGI's. Once the body has come, use this one again: the client may be silent as long as it likes.
        most: Bytes.
        min_bytes_per_s: 0 leaves the limit on silence alone.
        too_large: What is raised beyond `most`; else `PayloadTooLarge` with that number.

    Raises:
        BodyStalled: From what is returned.
        PayloadTooLarge: Likewise, before anything is received where too much is announced.
    """
    refusal = too_large or PayloadTooLarge(f"The body is larger than {most} bytes.")
    size, patience_s = 0, MAX_SILENCE_S
    clock = asyncio.get_running_loop().time
    announced = [int(value) for name, value in scope["headers"] if name == b"content-length" and value.isdigit()]

    async def receive_part() -> Message:
        nonlocal size, patience_s
        if any(length > most for length in announced):
            raise refusal
        since = clock()
        try:
            async with asyncio.timeout(max(0.0, patience_s)):
                message = await receive()
        except TimeoutError:
            if patience_s == MAX_SILENCE_S:
                raise BodyStalled(f"Nothing of the body came for {MAX_SILENCE_S:g} s.") from None
            raise BodyStalled(f"The body comes more slowly than {min_bytes_per_s} bytes a second.") from None
        came = len(message.get("body", b""))
        if min_bytes_per_s:
            patience_s = min(MAX_SILENCE_S, patience_s + came / min_bytes_per_s - (clock() - since))
        size += came
        if size > most:
            raise refusal
        return message

    return receive_part
