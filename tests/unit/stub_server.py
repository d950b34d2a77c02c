"""An HTTP server that does nothing but what a test's handler does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def served(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], path: str = "/v1/chat/completions"
) -> AsyncIterator[str]:
    """Have `handler` answer what is posted to `path` while the block runs; it is cancelled when its client hangs up.

    Yields:
        The URL, without the path.
    """
    app = web.Application()
    app.router.add_post(path, handler)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
